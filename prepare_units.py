"""Speech to units: the speech tokeniser (encoder + k-means + dedup), fitting its codebook, tokenising a corpus.

In:  audio: a folder (any libsndfile format, any rate, any number of channels), a tar or tar.gz archive, a parquet file,
     a list of paths; or units in SlamKit's .jsonl, taken for the published mHuBERT's unless --tokenizer says otherwise.
Out: a folder of unit files (slam/units.py) with a report; or a codebook (.safetensors), the whole definition of a tokeniser.

    python prepare_units.py config/units_embedded.py --input my_speech --out out/my_units
    python prepare_units.py verify out/my_units                    # is it whole? hours, tokens, entropy
    python prepare_units.py fit config/fit_embedded.py --input my_speech --codebook my_codebook.safetensors
    python dev/check_tokenizer.py --tokenizer my_codebook.safetensors --input my_speech   # how steady its units are
    python prepare_units.py convert --source mhubert_base_25hz_cp_mls_cv_sp_fisher_L11_km500.bin   # a published k-means
    python prepare_units.py bpe --units out/my_units --out out/my_bpe                     # pieces of several units

One process, or several that share a folder: `--shard=3/8` is the third of eight, torchrun's processes share by
themselves. Killed, the same command goes on, and writes what it would have written. Two cores tokenise more than 100
times faster than real time with the embedded encoder; an hour of units takes 0.15 MB.
"""
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from queue import Full, Queue

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config import load_config
from slam.audio import SAMPLE_RATE, Item, check_extent, read_blocks, read_input, split_at_silences
from slam.kmeans import ConvertConfig, FitConfig, convert, fit, refuse_existing
from slam.slamkit import read_features, slamkit_tokenizer
from slam.tokenizer import DTYPES, Bpe, SpeechTokenizer, codebook_fingerprints, read_codebook, windows, write_codebook
from slam.units import Shard, UnitReader, UnitWriter, require_same, to_bytes, vocab_size


@dataclass
class Config:
    """Tokenise a corpus."""
    input: str = ""  # folder (searched recursively), audio file, .tar, .tar.gz, .parquet, list of paths, SlamKit .jsonl
    out: str = "out/units"  # folder of unit files to write; an interrupted run resumes in it
    tokenizer: str = ""  # codebook file, or `embedded` (in assets/); empty: `embedded` for audio, and the published
    # mHuBERT-25hz's for SlamKit's .jsonl, which does not name its own
    durations: bool = False  # keep frames per unit beside the units (training a vocoder needs them)
    text: bool = False  # keep what is said, of whole recordings: LibriSpeech's .trans.txt, .txt, a parquet's `text`
    audio_column: str = "audio"  # of a parquet file
    max_utterance_seconds: float = 0.0  # cut longer recordings at silences into utterances so long; 0: leave them whole
    max_bad_share: float = 0.01  # of recordings that can't be used, before the run stops with an error
    dtype: str = "auto"  # of the encoder: float32, float16, bfloat16; auto is float16 on a GPU, float32 on a CPU
    batch_seconds: float = 0.0  # audio encoded together; 0: 240 on a GPU, 30 on a CPU
    workers: int = 0  # threads that read, decode and resample ahead of the encoder; 0: one per core, at most 16
    shard: str = ""  # this process's part of the work, 1/8 to 8/8; all parts write into the same `out`
    shard_tokens: int = 1_000_000  # tokens per unit file; a killed run loses at most one
    overwrite: bool = False  # start anew instead of resuming

    def problems(self) -> list[str]:
        """Cross-field checks of the loader."""
        found = []
        try:
            part_of(self.shard)
        except ValueError:
            found.append(f"shard: {self.shard!r} is not a part such as 1/8 to 8/8")
        if self.dtype not in ("auto", *DTYPES):
            found.append(f"dtype: {self.dtype!r}; expected auto, {', '.join(DTYPES)}")
        if self.max_utterance_seconds != 0 and self.max_utterance_seconds < 1:
            found.append("max_utterance_seconds: at least 1, or 0")
        if self.max_utterance_seconds and self.text:
            found.append("text: of whole recordings only, not with max_utterance_seconds")
        if self.batch_seconds < 0 or self.workers < 0 or self.shard_tokens <= 0:
            found.append("shard_tokens is positive, batch_seconds and workers are not negative")
        return found


@dataclass
class BpeConfig:
    """Train a sentencepiece model over units, each a character, and encode unit files with it."""
    units: tuple[str, ...] = ()  # folders of unit files: the first is trained on, all are encoded
    out: str = "out/bpe"  # folder to write: tokenizer.safetensors, and the unit files under their folders' names
    tokenizer: str = "embedded"  # codebook file of these units
    n_pieces: int = 2000  # size of the vocabulary, single units included
    train_tokens: float = 10e6  # units to train on, at most
    overwrite: bool = False  # replace what is there


# ---------------------------------------------------------------- a corpus
@dataclass
class Utterance:
    """What will be one entry of a unit file."""
    id: str
    item: Item
    n_samples: int = 0
    frames: list[np.ndarray] = field(default_factory=list)


@dataclass
class Piece:
    """A window of an utterance; of its frames `first` to `last` are kept, and with None it is the last one."""
    utterance: Utterance
    wave: np.ndarray
    first: int
    last: int | None


@dataclass
class Skipped:
    """What is not in the unit files, and why; `fatal`: with an unknown number of others."""
    id: str
    reason: str
    fatal: bool = False


END = object()  # of a recording


def pieces_of(item: Item, encoder, max_utterance_seconds: float) -> Iterator[Piece | Skipped]:
    """Decode, resample, cut. ValueError if the recording can't be used, be it at its end."""
    if item.problem:
        raise ValueError(item.problem)
    for start, blocks in split_at_silences(read_blocks(item.source, item.id), max_utterance_seconds):
        id = f"{item.id}@{start / SAMPLE_RATE:.2f}" if max_utterance_seconds else item.id
        utterance, peak = Utterance(id, item), 0.0

        def measured():
            nonlocal peak
            for block in blocks:
                utterance.n_samples += len(block)
                peak = max(peak, float(np.abs(block).max(initial=0)))
                yield block

        for wave, first, last in windows(measured(), encoder):
            if last is None:
                try:
                    check_extent(utterance.n_samples, peak, id)
                    if encoder.n_frames(len(wave)) < 1:
                        raise ValueError(f"{len(wave)} samples are less than a frame of the encoder")
                except ValueError as e:
                    yield Skipped(id, str(e).removeprefix(f"{id}: "))
                    break
            yield Piece(utterance, wave, first, last)


class ReadAhead:
    """In a `with` block, iterating gives (item, its pieces) in order; threads make pieces ahead of their turn.

    Every item's pieces wait in a short queue, so that a recording of hours is decoded as fast as it is used. What an
    item's making raises is raised where its pieces are used. `waited`: seconds for which the consumer had nothing.
    """

    def __init__(self, items: Iterable, make: Callable[[object], Iterator], workers: int, depth: int = 4):
        self.items, self.make, self.workers, self.depth = items, make, workers, depth
        self.waited, self.stop = 0.0, threading.Event()
        self.pool = ThreadPoolExecutor(workers + 1)  # one reads items, the others make pieces of them

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        self.pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[object, Iterator]]:
        line: Queue = Queue(2 * self.workers)
        self.pool.submit(self._fill, line, self._start())
        for item, queue in self._drain(line):
            yield item, self._drain(queue)

    def _start(self) -> Iterator[tuple[object, Queue]]:
        for item in self.items:
            queue: Queue = Queue(self.depth)
            self.pool.submit(self._fill, queue, self.make(item))
            yield item, queue

    def _fill(self, queue: Queue, values: Iterator) -> None:
        try:
            for value in values:
                self._put(queue, value)
            self._put(queue, END)
        except BaseException as e:  # whatever it is, it is raised where the values are used
            self._put(queue, e)

    def _put(self, queue: Queue, value) -> None:
        while not self.stop.is_set():
            try:
                return queue.put(value, timeout=0.2)
            except Full:
                pass
        raise InterruptedError

    def _drain(self, queue: Queue) -> Iterator:
        while True:
            started = time.perf_counter()
            value = queue.get()
            self.waited += time.perf_counter() - started
            if value is END:
                return
            if isinstance(value, BaseException):
                raise value
            yield value


def events(ahead: ReadAhead) -> Iterator[Piece | Skipped | object]:
    """Pieces and skips of all recordings in order, END after each."""
    for item, pieces in ahead:
        try:
            yield from pieces
        except ValueError as e:
            yield Skipped(item.id, str(e).removeprefix(f"{item.id}: "), item.fatal)
        yield END


def groups(events: Iterable, seconds: float) -> Iterator[list]:
    """Events in groups of so much audio, within which batches are formed.

    A group that can hold a recording to its end does; so what a group holds hangs only on the recording that it begins
    with, and a run resumed at a group's beginning forms the same batches, whose units are the same to the bit.
    """
    group, held, crossing = [], 0.0, False
    for event in events:
        group.append(event)
        held += len(event.wave) / SAMPLE_RATE if isinstance(event, Piece) else 0
        if event is END and (crossing or held >= seconds) or held >= 2 * seconds:
            yield group
            group, held, crossing = [], 0.0, event is not END
    if group:
        yield group


def part_of(shard: str) -> tuple[int, int]:
    """part_of("3/8") -> (2, 8); under torchrun its processes share that part. ValueError if it is none."""
    i, n = map(int, shard.split("/")) if shard else (1, 1)
    if not 1 <= i <= n:
        raise ValueError(shard)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return (i - 1) * world + rank, n * world


@dataclass
class Tally:
    """What became of the recordings so far."""
    report_file: Path
    max_bad_share: float
    utterances: int = 0
    seconds: float = 0.0
    already_there: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    def skip(self, skipped: Skipped) -> None:
        self.skipped.append(skipped)
        tqdm.write(f"skipped {skipped.id!r}: {skipped.reason}", file=sys.stderr)

    def report(self, complete: bool) -> None:
        """Write the report file."""
        content = {"complete": complete, "utterances": self.utterances, "hours": self.seconds / 3600,
                   "already_there": self.already_there, "skipped": [vars(s) for s in self.skipped]}
        temporary = self.report_file.with_suffix(".part")
        temporary.write_bytes(to_bytes(json.dumps(content, indent=1, ensure_ascii=False)))
        os.replace(temporary, self.report_file)

    def refuse_bad(self, of_at_least: int) -> None:
        """SystemExit if too large a share of at least so many was bad."""
        n = self.utterances + self.already_there + len(self.skipped)
        if n < of_at_least or len(self.skipped) <= self.max_bad_share * n:
            return
        self.report(complete=False)
        kinds = Counter(re.sub(r"\d+(\.\d+)?", "N", s.reason) for s in self.skipped).most_common(3)
        raise SystemExit(f"{len(self.skipped)} of {n} can't be used, more than --max_bad_share={self.max_bad_share} ("
                         + "; ".join(f"{count} x {reason}" for reason, count in kinds)
                         + f"); listed in {self.report_file}. Whole unit files are kept")

    def close(self, started: float, more: str = "") -> None:
        """The report and the last line."""
        self.refuse_bad(1)
        lost = [s for s in self.skipped if s.fatal]
        if lost and self.max_bad_share < 1:  # however few they are, nobody knows what else was there
            self.report(complete=False)
            raise SystemExit(f"{lost[0].id}: {lost[0].reason}. What was good is kept; --max_bad_share=1 accepts that")
        self.report(complete=True)
        took = time.perf_counter() - started
        print(f"{self.report_file.parent}: {self.utterances} utterances, {self.seconds / 3600:.2f} h added in "
              f"{took / 60:.1f} min ({self.seconds / took:.0f}x real time{more}); {self.already_there} were there "
              f"already; {len(self.skipped)} skipped" + f" (listed in {self.report_file})" * bool(self.skipped))


def prepare_output_dir(cfg: Config, prefix: str = "") -> Path:
    """The folder to write in. SystemExit if it holds what other settings made."""
    out = Path(cfg.out)
    made_by = out / "config.json"
    if cfg.overwrite and prefix and out.exists():
        raise SystemExit(f"{out}: several processes share it, none of which may empty it: remove it, then start them")
    if cfg.overwrite:  # unit files, and nothing that only ends like them
        for old in (*out.glob("[0-9]" * 5 + ".safetensors"), *out.glob("part*of*-" + "[0-9]" * 5 + ".safetensors")):
            old.unlink()
    elif made_by.exists():
        free = {"out", "max_bad_share", "workers", "shard", "overwrite"}
        old, new = json.loads(made_by.read_text()), asdict(cfg)
        other = [f"{k} {old.get(k)!r}, now {v!r}" for k, v in new.items() if k not in free and old.get(k) != v]
        if other:
            raise SystemExit(f"{out} was made with other settings: {'; '.join(other)}. Choose another --out, or "
                             f"--overwrite")
    elif any(out.glob("*.safetensors")):
        raise SystemExit(f"{out} holds files of another stage; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{prefix}report.json").unlink(missing_ok=True)  # it would say that all is there
    (out / f"{prefix}config.part").write_text(json.dumps(asdict(cfg), indent=2))
    os.replace(out / f"{prefix}config.part", made_by)
    return out


class Fetched:
    """A copy of a tensor on its way to the host; what the GPU does after it was asked for is not waited for."""

    def __init__(self, x: Tensor):
        self.event, self.x = None, x
        if x.is_cuda:
            self.x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def numpy(self) -> np.ndarray:
        if self.event:
            self.event.synchronize()
        return self.x.numpy()


def label_group(group: list, tokenizer: SpeechTokenizer, batch_seconds: float) -> tuple[list, list[int], Fetched]:
    """The group, the frames of each of its pieces, and all their units in one row."""
    labels = tokenizer.label([e.wave for e in group if isinstance(e, Piece)], batch_seconds)
    return group, [len(x) for x in labels], Fetched(torch.cat(labels) if labels else torch.zeros(0))


def finish_group(labelled: tuple[list, list[int], Fetched], tokenizer: SpeechTokenizer, writer: UnitWriter,
                 tally: Tally) -> None:
    """Hand what a group completes to the writer, in order."""
    group, lengths, fetched = labelled
    parts = iter(np.split(fetched.numpy(), np.cumsum(lengths)[:-1]))
    for event in group:
        if isinstance(event, Skipped):
            tally.skip(event)
            writer.skipped.append(vars(event))
        elif isinstance(event, Piece):
            utterance = event.utterance
            utterance.frames.append(next(parts)[event.first:event.last])
            if event.last is None:
                text = {"text": utterance.item.text} if utterance.item.text else {}
                writer.add(utterance.id, *tokenizer.finish(np.concatenate(utterance.frames)), **text)
                tally.utterances += 1
                tally.seconds += utterance.n_samples / SAMPLE_RATE


def skipped_before(shards: list[Shard]) -> dict[str, tuple[Skipped, float]]:
    """What the unit files of an earlier run of this part left out: {id: (skip, when the file was written)}.

    A bad recording may be bad only at its end, when it has had its share in the batches; so that a resumed run forms
    the same ones, it is not tried again unless it has changed since.
    """
    return {s["id"]: (Skipped(**s), shard.stat[1] / 1e9) for shard in shards for s in shard.header["skipped"]}


def main(cfg: Config) -> None:
    if cfg.input.endswith(".jsonl"):
        return import_units(cfg)
    cfg = replace(cfg, tokenizer=cfg.tokenizer or "embedded")
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)  # under torchrun each process has its own
    extract(cfg, SpeechTokenizer.load(cfg.tokenizer, device, cfg.dtype))


def extract(cfg: Config, tokenizer: SpeechTokenizer) -> None:
    """Audio to unit files; decoding, encoding and writing at the same time."""
    index, n_parts = part_of(cfg.shard)
    prefix = f"part{index + 1:03d}of{n_parts:03d}-" if n_parts > 1 else ""
    total, items = read_input(cfg.input, cfg.text, cfg.audio_column, (index, n_parts))
    out = prepare_output_dir(cfg, prefix)
    tally = Tally(out / f"{prefix}report.json", cfg.max_bad_share)
    bar = tqdm(total=total, disable=None, desc="units", unit="file", smoothing=0)

    def missing() -> Iterator[Item]:
        """The recordings that are not there yet."""
        for item in items:
            skip, when = bad.get(item.id, (None, 0))
            if item.id in done:
                tally.already_there += 1
            elif skip and not changed_after(item.path, when):
                pass
            else:
                done.add(item.id)  # a list may name it again
                bad.pop(item.id, None)
                yield item
                continue
            bar.update()

    workers = cfg.workers or min(16, os.cpu_count() or 1)
    batch_seconds = cfg.batch_seconds or tokenizer.batch_seconds
    started = time.perf_counter()
    with (UnitWriter(out, tokenizer.fingerprint, cfg.input, cfg.durations, None, prefix) as writer,
          ReadAhead(missing(), lambda item: pieces_of(item, tokenizer.encoder, cfg.max_utterance_seconds),
                    workers) as ahead):
        done = {id.rpartition("@")[0] if cfg.max_utterance_seconds else id for id in writer.done}
        bad = skipped_before(writer.shards)
        before = label_group([], tokenizer, batch_seconds)
        for group in chain(groups(events(ahead), 8 * batch_seconds), [[]]):
            now = label_group(group, tokenizer, batch_seconds)
            finish_group(before, tokenizer, writer, tally)  # while a GPU is at work on `now`
            tally.refuse_bad(1000)
            if before[0] and before[0][-1] is END and writer.n_tokens >= cfg.shard_tokens:
                writer.flush()
            bar.update(sum(event is END for event in before[0]))
            bar.set_postfix_str(f"{tally.seconds / 3600:.2f} h, "
                                f"{tally.seconds / (time.perf_counter() - started):.0f}x real time")
            before = now
    bar.close()
    tally.skipped += [skip for id, (skip, _) in bad.items() if cfg.max_utterance_seconds or id not in done]
    if not (tally.utterances or tally.already_there or tally.skipped) and n_parts == 1:
        raise SystemExit(f"--input={cfg.input}: there are no recordings in it")
    waited = ahead.waited / (time.perf_counter() - started)
    tally.close(started, f", the encoder waited for audio {100 * waited:.1f}% of the time")


def changed_after(path: str, when: float) -> bool:
    """Whether a file was written, or anything about it changed, since then."""
    return os.path.exists(path) and os.stat(path).st_ctime > when


def import_units(cfg: Config) -> None:
    """SlamKit's features.jsonl or tokens.jsonl as unit files."""
    if not Path(cfg.input).is_file():
        raise SystemExit(f"--input={cfg.input}: no such file")
    if part_of(cfg.shard)[1] > 1:
        raise SystemExit(f"{cfg.input}: units are imported by one process")
    fingerprint, base, bpe = slamkit_tokenizer(cfg.input, cfg.tokenizer)
    out = prepare_output_dir(cfg)
    tally, started = Tally(out / "report.json", cfg.max_bad_share), time.perf_counter()
    with (open(cfg.input, encoding="utf-8", errors="replace") as lines,
          UnitWriter(out, fingerprint, cfg.input, cfg.durations, cfg.shard_tokens) as writer):
        done = writer.done.copy()
        for number, line in enumerate(tqdm(lines, disable=None, desc="units", unit="line"), start=1):
            try:
                id, units, durations = read_features(line, base.n_units)
                if cfg.durations and durations is None:
                    raise ValueError("no durations; import it without --durations")
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
                tally.skip(Skipped(f"line {number}", f"not units of {base.encoder} ({type(e).__name__}: {e})"))
                tally.refuse_bad(1000)
                continue
            if id in done:
                tally.already_there += 1
                continue
            done.add(id)
            tally.seconds += 0 if durations is None else durations.sum() / base.unit_rate_hz
            tally.utterances += 1
            writer.add(id, *(bpe.encode(units, durations) if bpe else (units, durations)))
    tally.close(started)


# ---------------------------------------------------------------- what is there
def verify(folders: list[str]) -> None:
    """Read whole corpora; print what is in them. SystemExit listing everything that is wrong."""
    if not folders or "--help" in folders:
        raise SystemExit("usage: python prepare_units.py verify DIR [DIR ...]   # folders of unit files")
    problems, ids, hours, n_tokens = [], Counter(), 0.0, 0
    counts, fingerprint = 0, None
    for folder in map(Path, folders):
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            problems.append(f"{folder}: no unit files")
        problems += unfinished(folder, [p.stem for p in paths])
        for path in tqdm(paths, disable=None, desc=str(folder), unit="shard"):
            try:
                shard = Shard(path)
                fingerprint = fingerprint or shard.fingerprint
                require_same(fingerprint, folders[0], shard.fingerprint, path)
                problems += [f"{path}: {p}" for p in shard.problems()]
                ids.update(r["id"] for r in shard.records())
            except (SystemExit, ValueError, KeyError) as e:
                problems.append(str(e) if isinstance(e, SystemExit) else f"{path}: its records are damaged ({e})")
                continue
            size = vocab_size(fingerprint.n_units)
            counts = counts + np.bincount(shard.tokens, minlength=size)[:size]
            hours, n_tokens = hours + shard.hours, n_tokens + len(shard.tokens)
    twice = [id for id, n in ids.items() if n > 1]
    if twice:
        problems.append(f"{len(twice)} utterances are there more than once, the first {twice[0]!r}")
    if n_tokens:
        share = counts[2:] / max(1, counts[2:].sum())
        entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
        speed = f"{counts[2:].sum() / hours / 3600:.2f} units per second" if hours else "durations are not known"
        print(f"{fingerprint}\n{len(ids):,} utterances, {hours:,.2f} h, {n_tokens:,} tokens, {speed}\n"
              f"{(share > 0).sum()} of {len(share)} units in use, entropy {entropy:.3f} of {np.log2(len(share)):.3f} "
              f"bits")
    if problems:
        raise SystemExit("\n".join(problems))
    print("whole")


def unfinished(folder: Path, stems: list[str]) -> list[str]:
    """What the names in a corpus' folder tell of a run that is not over."""
    named = [re.fullmatch(r"(part\d+of(\d+)-)?(\d{5})", stem) for stem in stems]
    problems = [f"{folder / stem}.safetensors: not a unit file by its name" for stem, m in zip(stems, named) if not m]
    numbers = {}
    for match in filter(None, named):
        numbers.setdefault(match[1] or "", set()).add(int(match[3]))
    for prefix, found in sorted(numbers.items()):
        gaps = set(range(max(found))) - found
        if gaps:
            problems.append(f"{folder}: {prefix}{min(gaps):05d}.safetensors is missing")

    def complete(prefix: str) -> bool:
        report = folder / f"{prefix}report.json"
        return report.exists() and json.loads(report.read_bytes())["complete"]

    if not (folder / "config.json").exists():  # of another stage
        return problems
    # Begun in so many parts and finished in others it is whole too, as each looks for what no other has done.
    counts = {int(m[2] or 1) for m in filter(None, named)} or {1}
    pending = {n: [p for p in ([""] if n == 1 else [f"part{i + 1:03d}of{n:03d}-" for i in range(n)]) if not complete(p)]
               for n in counts}
    if all(pending.values()):
        part = min(pending.values(), key=len)[0].rstrip("-")
        problems.append(f"{folder}: {part or 'the run'} is not finished; start it again, and it goes on")
    return problems


# ---------------------------------------------------------------- BPE
def bpe(cfg: BpeConfig) -> None:
    """Fit pieces on the first folder, encode all; a tokeniser that gives pieces is written beside them."""
    out = Path(cfg.out)
    if not cfg.units or len({Path(u).name for u in cfg.units}) < len(cfg.units):
        raise SystemExit("--units: name folders of unit files, all of different names")
    for to in (out / Path(folder).name for folder in cfg.units):
        if to.resolve() in [Path(folder).resolve() for folder in cfg.units]:
            raise SystemExit(f"--out={out}: {to} is among the units to read; choose another")
        for old in (out / "tokenizer.safetensors", *to.glob("*.safetensors")):
            refuse_existing(old, cfg.overwrite)
    tensors, meta = read_codebook(cfg.tokenizer)
    _, base = codebook_fingerprints(tensors, meta)
    readers = [UnitReader(folder) for folder in cfg.units]
    for folder, reader in zip(cfg.units, readers):
        require_same(reader.fingerprint, folder, base, f"the units of {cfg.tokenizer}")
    order = np.random.default_rng(0).permutation(len(readers[0]))
    enough = int(np.searchsorted(np.cumsum(readers[0].lengths[order]), cfg.train_tokens)) + 1
    model = Bpe.train((readers[0].units(i) for i in order[:enough]), base.n_units, cfg.n_pieces)
    tensors["bpe"] = torch.frombuffer(bytearray(model.model), dtype=torch.uint8)
    fingerprint, _ = codebook_fingerprints(tensors, meta)
    for folder, reader in zip(cfg.units, readers):
        to = out / Path(folder).name
        for old in to.glob("*.safetensors"):
            old.unlink()
        with UnitWriter(to, fingerprint, folder, reader.shards[0].durations is not None, None) as writer:
            starts = set(reader.starts[1:].tolist())
            for i, record in enumerate(tqdm(reader.records(), total=len(reader), disable=None, desc=str(to))):
                pieces, durations = model.encode(reader.units(i), reader.durations(i))
                writer.add(record.pop("id"), pieces, durations, **record)
                if i + 1 in starts:  # shard by shard, as durations may be known of a shard only in sum
                    hours = reader.shards[writer.number].hours
                    writer.n_frames = round(hours * 3600 * base.unit_rate_hz)
                    writer.flush()
        units, tokens = (r.n_tokens - 2 * len(r) for r in (reader, UnitReader(to)))  # without BOS and EOS
        print(json.dumps({"folder": str(to), "pieces": model.n_pieces, "units": units, "tokens": tokens,
                          "units_per_token": round(units / tokens, 3)}))
    write_codebook(out / "tokenizer.safetensors", tensors, meta | {"n_pieces": model.n_pieces})


if __name__ == "__main__":
    commands = {"fit": (FitConfig, fit), "convert": (ConvertConfig, convert), "bpe": (BpeConfig, bpe)}
    if sys.argv[1:2] == ["verify"]:
        verify(sys.argv[2:])
    else:
        Settings, run = commands.get("".join(sys.argv[1:2]), (Config, main))
        run(load_config(Settings, sys.argv[1 + (run is not main):], __doc__))
