"""Speech to units: tokenise a corpus with encoder + k-means + dedup; make the tokeniser's codebook; add BPE.

In:  audio: a folder, a tar archive, a parquet file, a list of paths; or units in SlamKit's .jsonl.
Out: a folder of unit files (slam/units.py) with a report; or a codebook (.safetensors), which defines a tokeniser.

    python prepare_units.py config/units_embedded.py --input my_speech --out out/my_units
    python prepare_units.py verify out/my_units                    # is it whole? hours, tokens, entropy
    python prepare_units.py fit config/fit_embedded.py --input my_speech --codebook my_codebook.safetensors
    python dev/check_tokenizer.py --tokenizer my_codebook.safetensors --input my_speech   # how steady its units are
    python prepare_units.py convert --source mhubert_base_25hz_cp_mls_cv_sp_fisher_L11_km500.bin   # a published k-means
    python prepare_units.py bpe --units out/my_units --out out/my_bpe                     # pieces of several units

Several processes may share a folder: `--shard=3/8` is the third of eight, and torchrun's divide the work by themselves.
If a run is killed, the same command continues it: no utterance is lost or written twice. Two cores tokenise more than
100 times faster than real time with the embedded encoder.
"""
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from config import load_config
from slam.audio import SAMPLE_RATE, Item, read_input
from slam.device import pick_device, world_size
from slam.read_ahead import Piece, Utterance, read_ahead, read_recording
from slam.slamkit import slamkit_tokenizer, slamkit_units
from slam.tokenizer import Bpe, SpeechTokenizer, codebook_fingerprints, read_codebook, write_codebook
from slam.units import OFFSET, UnitReader, UnitWriter, require_same, vocab_size, write_atomic


@dataclass
class Config:
    """Tokenise a corpus."""
    input: str = ""  # folder (searched recursively), audio file, .tar, .tar.gz, .parquet, list of paths, SlamKit .jsonl
    out: str = "out/units"  # folder of unit files to write; an interrupted run resumes in it
    tokenizer: str = ""  # codebook file, or `embedded` (in assets/); empty: `embedded` for audio, and the published
    # mHuBERT-25hz's for SlamKit's .jsonl, which does not name its own
    durations: bool = False  # keep frames per unit beside the units (training a vocoder needs them)
    audio_column: str = "audio"  # of a parquet file
    max_utterance_seconds: float = 0.0  # cut longer recordings at silences into utterances of at most this; 0: don't
    max_bad_share: float = 0.01  # share of recordings that may be unusable; more are an error at the end
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # encoder; auto: float16 on a GPU, else float32
    batch_seconds: float = 0.0  # audio encoded together; 0: 240 on a GPU, 30 on a CPU
    workers: int = 0  # threads that read, decode and resample ahead of the encoder; 0: one per core, at most 16
    shard: str = ""  # this process's part of the work, 1/8 to 8/8; all parts write into the same `out`
    shard_tokens: int = 1_000_000  # tokens per unit file; a killed run loses the work of at most one file
    overwrite: bool = False  # start anew instead of resuming

    def problems(self) -> list[str]:
        found = []
        try:
            part_of(self.shard)
        except ValueError:
            found.append(f"shard: {self.shard!r} is not a part such as 1/8 to 8/8")
        if self.max_utterance_seconds != 0 and not 1 <= self.max_utterance_seconds < 1e6:
            found.append("max_utterance_seconds: 0, or at least 1 and finite")
        if not 0 <= self.batch_seconds < 1e6 or self.workers < 0 or self.shard_tokens <= 0:
            found.append("shard_tokens is positive, batch_seconds and workers are not negative (nor infinite)")
        return found


@dataclass
class BpeConfig:
    """Train a sentencepiece model over units (each is a character) and encode unit files with it."""
    units: tuple[str, ...] = ()  # folders of unit files: the first is trained on, all are encoded
    out: str = "out/bpe"  # folder to write: tokenizer.safetensors, and the unit files under their folders' names
    tokenizer: str = "embedded"  # codebook file of these units
    n_pieces: int = 2000  # size of the vocabulary, single units included
    train_tokens: float = 10e6  # units to train on, at most
    overwrite: bool = False  # replace existing files


# ---------------------------------------------------------------- a corpus
def part_of(shard: str) -> tuple[int, int]:
    """part_of("3/8") -> (2, 8); torchrun's processes divide that part among them. ValueError if it is malformed."""
    i, n = map(int, shard.split("/")) if shard else (1, 1)
    if not 1 <= i <= n:
        raise ValueError(shard)
    return (i - 1) * world_size() + int(os.environ.get("RANK", 0)), n * world_size()


def part_prefix(index: int, n_parts: int) -> str:
    """Prefix of the names of a part's files: part_prefix(2, 8) -> "part003of008-"; empty if there is one part."""
    return f"part{index + 1:03d}of{n_parts:03d}-" if n_parts > 1 else ""


class Tally:
    """Counts of a run, its report file, and the error if too many recordings are bad."""

    def __init__(self, report_file: Path, max_bad_share: float):
        self.report_file, self.max_bad_share, self.started = report_file, max_bad_share, time.perf_counter()
        self.utterances, self.seconds, self.already_there = 0, 0.0, 0
        self.skipped: list[dict] = []

    def skip(self, id: str, reason: str, fatal: bool = False, part: bool = False) -> None:
        """Record why a recording can't be used. part: only a part of it can't, so it does not count as bad."""
        self.skipped.append({"id": id, "reason": reason, "fatal": fatal, "part": part})
        tqdm.write(f"skipped {id!r}: {reason}", file=sys.stderr)

    def close(self, *reports: Path) -> None:
        """Write the report and print the last line. SystemExit if too much was bad, or an archive broke off.

        reports: files to wait for before exiting with an error, since torchrun then ends its other processes.
        """
        n_bad = sum(not s["part"] for s in self.skipped)
        n = self.utterances + self.already_there + n_bad
        lost = [s for s in self.skipped if s["fatal"] and self.max_bad_share < 1]  # archives that broke off
        problem = ""
        if lost:
            problem = f"{lost[0]['id']}: {lost[0]['reason']}. What was good is kept; --max_bad_share=1 accepts that"
        if n_bad > self.max_bad_share * n:
            kinds = Counter(re.sub(r"(?<![-\w])\d+(\.\d+)?", "N", s["reason"]) for s in self.skipped if not s["part"])
            problem = (f"{n_bad} of {n} can't be used, more than --max_bad_share={self.max_bad_share} ("
                       + "; ".join(f"{count} x {reason}" for reason, count in kinds.most_common(3))
                       + f"); listed in {self.report_file}. What was good is kept")
        content = {"complete": not problem, "utterances": self.utterances, "hours": self.seconds / 3600,
                   "already_there": self.already_there, "skipped": self.skipped}
        write_atomic(self.report_file, json.dumps(content, indent=1, ensure_ascii=False))
        if problem:
            while not all(path.exists() for path in reports):
                time.sleep(1)
            raise SystemExit(problem)
        elapsed = time.perf_counter() - self.started
        print(f"{self.report_file.parent}: {self.utterances} utterances, {self.seconds / 3600:.2f} h added in "
              f"{elapsed / 60:.1f} min ({self.seconds / elapsed:.0f}x real time); {self.already_there} were there "
              f"already; {len(self.skipped)} skipped" + f" (listed in {self.report_file})" * bool(self.skipped))


def prepare_output_dir(cfg: Config, prefix: str = "") -> Path:
    """Create the folder to write in, or resume in it. SystemExit if it holds what other settings or stages made."""
    out = Path(cfg.out)
    made_by = out / "config.json"
    if cfg.overwrite and prefix:
        raise SystemExit(f"{out}: several processes share it, so none may empty it; remove it, then omit --overwrite")
    if cfg.overwrite:  # unit files, by their exact names
        for old in (*out.glob("[0-9]" * 5 + ".safetensors"), *out.glob("part*of*-" + "[0-9]" * 5 + ".safetensors")):
            old.unlink()
    elif made_by.exists():
        free = {"out", "max_bad_share", "workers", "shard", "overwrite"}  # settings that may differ
        old, new = json.loads(made_by.read_text()), asdict(cfg)
        other = [f"{k} {old.get(k)!r}, now {v!r}" for k, v in new.items() if k not in free and old.get(k) != v]
        if other:
            raise SystemExit(f"{out} was made with other settings: {'; '.join(other)}. Choose another --out, or "
                             f"--overwrite")
    elif out.is_file() or any(out.glob("*.safetensors")):
        raise SystemExit(f"{out} was made by something else; choose another --out")
    own = f"{prefix}report.json"
    for old in out.glob("*report.json"):  # all but those of this run's other processes
        if old.name == own or old.name.partition("of")[2] != own.partition("of")[2]:
            old.unlink(missing_ok=True)
    write_atomic(made_by, json.dumps(asdict(cfg), indent=2))
    return out


def groups(events: Iterable, seconds: float) -> Iterator[list]:
    """Lists of consecutive events; each ends once its pieces hold `seconds` of audio, the last may hold less."""
    group, held = [], 0.0
    for event in events:
        group.append(event)
        held += len(event.wave) / SAMPLE_RATE if isinstance(event, Piece) else 0
        if held >= seconds:
            yield group
            group, held = [], 0.0
    yield group


def encode(events: Iterable, tokenizer: SpeechTokenizer, batch_seconds: float) -> Iterator[list[Utterance]]:
    """Encode the pieces among the events; yield the others, lists of a recording's utterances, with frames filled in.

    In a group of eight batches, pieces of like length share a batch. A group is launched before the units of the
    previous one are fetched, so a GPU works on it while the CPU writes that one and gathers the next.
    """
    previous, fetched, copied = [], iter(()), None
    for group in chain(groups(events, 8 * batch_seconds), [[]]):
        labels = tokenizer.label([event.wave for event in group if isinstance(event, Piece)], batch_seconds)
        on_gpu = labels and labels[0].is_cuda
        labels = [x.to("cpu", non_blocking=True) for x in labels]
        launched = group, iter(labels), torch.cuda.current_stream().record_event() if on_gpu else None
        if copied:
            copied.synchronize()
        for event in previous:
            if isinstance(event, Piece):
                event.utterance.frames.append(next(fetched).numpy()[event.first:event.last])
            else:
                yield event
        previous, fetched, copied = launched


def main(cfg: Config) -> None:
    if cfg.input.endswith(".jsonl"):
        return import_units(cfg)
    cfg = replace(cfg, tokenizer=cfg.tokenizer or "embedded")
    device = pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # under torchrun each process has its own
    extract(cfg, SpeechTokenizer.load(cfg.tokenizer, str(device), cfg.dtype))


def extract(cfg: Config, tokenizer: SpeechTokenizer) -> None:
    """Audio to unit files; threads read and decode recordings ahead of the encoder."""
    # ---- settings
    index, n_parts = part_of(cfg.shard)
    prefix = part_prefix(index, n_parts)
    workers = cfg.workers or min(16, os.cpu_count() or 1)
    batch_seconds = cfg.batch_seconds or tokenizer.batch_seconds

    # ---- data
    total, items = read_input(cfg.input, cfg.audio_column, (index, n_parts))
    out = prepare_output_dir(cfg, prefix)
    writer = UnitWriter(out, tokenizer.fingerprint, cfg.input, cfg.durations, None, prefix)
    done = Counter(id.rpartition("@")[0] if cfg.max_utterance_seconds else id for id in writer.done)  # by recording
    tally = Tally(out / f"{prefix}report.json", cfg.max_bad_share)
    bar = tqdm(total=total, disable=None, desc="units", unit="file", smoothing=0)

    def missing() -> Iterator[Item]:
        """The recordings that are not yet in `out`."""
        for item in items:
            if item.id in done:
                tally.already_there += done[item.id]
                bar.update()
            else:
                done[item.id] = 1  # a list of paths may name it twice
                yield item

    # ---- loop
    with ThreadPoolExecutor(workers + 1) as pool, writer:
        recordings = (read_recording(item, tokenizer.encoder, cfg.max_utterance_seconds) for item in missing())
        for utterances in encode(read_ahead(pool, recordings, 2 * workers), tokenizer, batch_seconds):
            usable = any(not utterance.problem for utterance in utterances)
            for utterance in utterances:  # of one recording; they go into the same unit file
                if utterance.problem:
                    tally.skip(utterance.id, utterance.problem, utterance.fatal, part=usable)
                    continue
                frames = np.concatenate(utterance.frames)
                try:
                    units = tokenizer.finish(frames)
                except ValueError as e:
                    tally.skip(utterance.id, str(e))
                    continue
                writer.add(utterance.id, *units)
                tally.utterances += 1
                tally.seconds += len(frames) / tokenizer.fingerprint.unit_rate_hz
            if writer.n_tokens >= cfg.shard_tokens:
                writer.flush()
            bar.set_postfix_str(f"{tally.seconds / 3600:.2f} h", refresh=False)
            bar.update()
    bar.close()
    if not (tally.utterances or tally.already_there or tally.skipped) and n_parts == 1:
        raise SystemExit(f"--input={cfg.input}: there are no recordings in it")
    first = index // world_size() * world_size()  # of torchrun's parts
    tally.close(*(out / f"{part_prefix(first + i, n_parts)}report.json" for i in range(world_size())))


def import_units(cfg: Config) -> None:
    """SlamKit's features.jsonl or tokens.jsonl to unit files."""
    if not Path(cfg.input).is_file():
        raise SystemExit(f"--input={cfg.input}: no such file")
    if part_of(cfg.shard)[1] > 1:
        raise SystemExit(f"{cfg.input}: units are imported by one process")
    fingerprint = slamkit_tokenizer(cfg.input, cfg.tokenizer)
    out = prepare_output_dir(cfg)
    tally = Tally(out / "report.json", cfg.max_bad_share)
    with (open(cfg.input, encoding="utf-8", errors="replace") as lines,
          UnitWriter(out, fingerprint, cfg.input, cfg.durations, cfg.shard_tokens) as writer):
        for number, line in enumerate(tqdm(lines, disable=None, desc="units", unit="line"), start=1):
            try:
                record = json.loads(line)
                id, (units, durations) = str(record["file_name"]), slamkit_units(record, fingerprint.n_units)
                if cfg.durations and durations is None:
                    raise ValueError("no durations; import it without --durations")
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
                tally.skip(f"line {number}", f"not units of {fingerprint.encoder} ({type(e).__name__}: {e})")
                continue
            if id in writer.done:
                tally.already_there += 1
                continue
            tally.utterances += 1
            tally.seconds += 0 if durations is None else durations.sum() / fingerprint.unit_rate_hz
            writer.add(id, units, durations)
    tally.close()


# ---------------------------------------------------------------- verify
def verify(folders: list[str]) -> None:
    """Read whole corpora and print their size and statistics. SystemExit listing what is wrong."""
    if not folders or "--help" in folders:
        raise SystemExit("usage: python prepare_units.py verify DIR [DIR ...]   # folders of unit files")
    reader = UnitReader(*folders)
    problems, ids, counts = [problem for folder in folders for problem in unfinished(Path(folder))], Counter(), 0
    n_units = reader.fingerprint.n_units
    for shard in tqdm(reader.shards, disable=None, desc="verify", unit="shard"):
        try:
            problems += [f"{shard.path}: {problem}" for problem in shard.problems()]
            ids.update(record["id"] for record in shard.records())
        except (ValueError, KeyError) as e:
            problems.append(f"{shard.path}: its records are damaged ({e})")
        counts = counts + np.bincount(shard.tokens[:], minlength=vocab_size(n_units))[OFFSET:vocab_size(n_units)]
    twice = [id for id, n in ids.items() if n > 1]
    if twice:
        problems.append(f"{len(twice)} utterances are there more than once, the first {twice[0]!r}")
    share = counts[counts > 0] / max(1, counts.sum())
    speed = f"{counts.sum() / reader.hours / 3600:.2f} units per second" if reader.hours else "durations are not known"
    print(f"{reader.fingerprint}\n{len(reader):,} utterances, {reader.hours:,.2f} h, {reader.n_tokens:,} tokens, "
          f"{speed}\n{len(share)} of {n_units} units in use, entropy {-(share * np.log2(share)).sum():.3f} of "
          f"{np.log2(n_units):.3f} bits")
    if problems:
        raise SystemExit("\n".join(problems))
    print("whole")


def unfinished(folder: Path) -> Iterator[str]:
    """What is missing in a corpus' folder, by the names of its files and by its reports."""
    names = [re.fullmatch(r"(part\d+of(\d+)-)?(\d{5})", path.stem) for path in folder.glob("*.safetensors")]
    shards = [match for match in names if match]  # groups: prefix, number of parts, number of the shard
    before = {f"{match[1] or ''}{int(match[3]) - 1:05d}" for match in shards if int(match[3]) > 0}
    yield from (f"{folder}: {stem}.safetensors is missing" for stem in sorted(before - {match[0] for match in shards}))
    if (folder / "config.json").exists():  # else another stage made it
        finished = [path.name.removesuffix("report.json") for path in folder.glob("*report.json")
                    if json.loads(path.read_text("utf-8", "surrogateescape"))["complete"]]
        # A corpus that another number of processes has finished is complete too: each skips what any has written.
        numbers = [match[2] for match in shards] + [prefix.partition("of")[2][:-1] for prefix in finished] or [1]
        pending = min(([prefix for i in range(n) if (prefix := part_prefix(i, n)) not in finished]
                       for n in {int(n or 1) for n in numbers}), key=len)
        if pending:
            yield f"{folder}: {pending[0].rstrip('-') or 'the run'} is not finished; start it again, and it goes on"


# ---------------------------------------------------------------- BPE
def bpe(cfg: BpeConfig) -> None:
    """Train pieces on the first folder, encode all folders, write the tokeniser that gives pieces."""
    out = Path(cfg.out)
    targets = [out / Path(folder).name for folder in cfg.units]
    if not targets or len(set(targets)) < len(targets):
        raise SystemExit("--units: name folders of unit files, all of different names")
    if twice := {t.resolve() for t in targets} & {Path(folder).resolve() for folder in cfg.units}:
        raise SystemExit(f"--out={out}: {twice.pop()} is among the units to read; choose another")
    if out.exists() and not cfg.overwrite:
        raise SystemExit(f"{out} exists; --overwrite replaces its files")
    tensors, meta = read_codebook(cfg.tokenizer)
    _, base = codebook_fingerprints(tensors, meta)
    readers = [UnitReader(folder) for folder in cfg.units]
    for folder, reader in zip(cfg.units, readers):
        require_same(reader.fingerprint, folder, base, f"the units of {cfg.tokenizer}")
        if reader.fingerprint.text_lm:
            raise SystemExit(f"{folder}: has words, which pieces would lose; name the units that it was made of")

    order = np.random.default_rng(0).permutation(len(readers[0]))
    enough = int(np.searchsorted(np.cumsum(readers[0].lengths[order]), cfg.train_tokens)) + 1
    model = Bpe.train((readers[0].units(i) for i in order[:enough]), base.n_units, cfg.n_pieces)
    tensors["bpe"] = torch.frombuffer(bytearray(model.model), dtype=torch.uint8)
    fingerprint, _ = codebook_fingerprints(tensors, meta)

    for folder, target, reader in zip(cfg.units, targets, readers):
        for old in target.glob("*.safetensors"):
            old.unlink()
        writer = UnitWriter(target, fingerprint, folder, reader.shards[0].durations is not None, None)
        for path in tqdm([shard.path for shard in reader.shards], disable=None, desc=str(target), unit="shard"):
            shard = UnitReader(path)
            for i, record in enumerate(shard.records()):
                pieces, durations = model.encode(shard.units(i), shard.durations(i))
                writer.add(record.pop("id"), pieces, durations, **record)
            writer.flush(shard.hours)
        n_units, n_tokens = (r.n_tokens - 2 * len(r) for r in (reader, UnitReader(target)))  # without BOS and EOS
        print(json.dumps({"folder": str(target), "pieces": model.n_pieces, "units": n_units, "tokens": n_tokens,
                          "units_per_token": round(n_units / n_tokens, 3)}))
    write_codebook(out / "tokenizer.safetensors", tensors, meta | {"n_pieces": model.n_pieces})


if __name__ == "__main__":
    command, arguments = "".join(sys.argv[1:2]), sys.argv[2:]
    if command == "verify":
        verify(arguments)
    elif command == "bpe":
        bpe(load_config(BpeConfig, arguments, __doc__))
    elif command in ("fit", "convert"):
        from slam import kmeans
        Settings = {"fit": kmeans.FitConfig, "convert": kmeans.ConvertConfig}[command]
        getattr(kmeans, command)(load_config(Settings, arguments, __doc__))
    else:
        main(load_config(Config, None, __doc__))
