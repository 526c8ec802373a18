"""The contract between the stages: vocabulary, tokeniser fingerprint, unit files, pair files.

Vocabulary: PAD 0, BOS = EOS 1, unit u is token u + 2. An utterance is the tokens `1 units 1`.

A unit file is a safetensors file; its tokens are memory-mapped and its header is JSON:
    tokens    uint16 (n_tokens,)        the utterances, each as `1 units 1`, one after the other
    offsets   int64  (n_utterances + 1,) where each begins, and the end of the last
    durations uint16 (n_tokens,)        frames per unit, 0 at BOS and EOS; only if asked for
    text      uint32 (n_text,)          text tokens of the utterances, and
    words     uint32 (n_words, 2)       of each word the first text token and the first unit, counted in its utterance,
    ends      int64  (n_utterances, 2)  and where an utterance's text and words end; only from slam/alignment.py
    records   uint8                     JSON lines, one per utterance: {"id": ..., "text": ...}
    header    format, version, fingerprint, source, n_utterances, n_tokens, hours (0 if durations are not known)
A corpus is a folder of numbered unit files, its shards. Processes that share a folder number their own, under a prefix.
"""
import contextlib
import fnmatch
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

PAD, BOS, EOS, OFFSET = 0, 1, 1, 2
IGNORE = -100  # target that the loss ignores
VERSION = 2  # of unit files and pair files


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write a file under another name, then rename it into place, so that `path` is never an incomplete file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # pids repeat on other machines
    try:
        part.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def empty_folder(folder: Path) -> None:
    """Empty a folder, if there is one: files last, since they tell whose it is. The folder stays: it may be a link."""
    for path in sorted(folder.iterdir(), key=Path.is_file) if folder.exists() else ():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sha256_of(*values) -> str:
    """sha256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def vocab_size(n_units: int) -> int:
    """vocab_size(500) -> 502."""
    return n_units + OFFSET


def to_tokens(units: Iterable[int]) -> list[int]:
    """to_tokens([3, 49]) -> [1, 5, 51, 1]"""
    return [BOS, *(int(u) + OFFSET for u in units), EOS]


def to_units(tokens: Iterable[int]) -> list[int]:
    """to_units([1, 5, 51, 1]) -> [3, 49]; special tokens are dropped."""
    return [int(t) - OFFSET for t in tokens if t >= OFFSET]


def dedup(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One unit per frame (T,) -> (units, durations): every run of equal units becomes one; durations sum to T.

    dedup([7, 7, 7, 2, 2, 7]) -> [7, 2, 7], [3, 2, 1]
    """
    frames = np.asarray(frames)
    starts = np.flatnonzero(np.diff(frames, prepend=-1))
    return frames[starts], np.diff(starts, append=len(frames))


# ---------------------------------------------------------------- fingerprints
@dataclass(frozen=True)
class Fingerprint:
    """The identity of a speech tokeniser; units with different fingerprints mean different sounds."""
    encoder: str  # hub id or embedded:NAME
    layer: int  # hidden state, 0 = the input of the first transformer layer
    unit_rate_hz: float  # frames per second
    n_units: int
    dedup: bool  # no two neighbours are equal; two pieces of a BPE can be
    codebook_sha256: str  # empty: not recorded
    text_lm: str = ""  # the text LM whose tokens stand beside the units, if any,
    text_vocab: int = 0  # the number of these tokens,
    text_sha256: str = ""  # and the sha256 of its tokenizer

    def to_dict(self) -> dict:
        return {k: v for k, v in asdict(self).items() if self.text_lm or not k.startswith("text_")}

    @property
    def vocab_size(self) -> int:
        """Tokens of a model: PAD, EOS, units; with text also two markers and the text's (slam/interleave.py)."""
        return vocab_size(self.n_units) + (2 + self.text_vocab if self.text_lm else 0)

    def speech(self) -> "Fingerprint":
        """The fingerprint of the units alone, without the text."""
        return replace(self, text_lm="", text_vocab=0, text_sha256="")

    def __str__(self) -> str:
        book = self.codebook_sha256[:12] or "not recorded"
        text = f", text of {self.text_lm} (tokenizer {self.text_sha256[:12]})" if self.text_lm else ""
        return (f"{self.encoder} layer {self.layer}, {self.unit_rate_hz:g} Hz, {self.n_units} units, "
                f"{'dedup' if self.dedup else 'no dedup'}, codebook {book}{text}")


def published_fingerprint(vocab: int) -> Fingerprint:
    """The fingerprint assumed for SlamKit's checkpoints and unit files of `vocab` tokens; its codebook is unknown."""
    return Fingerprint("slprl/mhubert-base-25hz", 11, 25.0, vocab - OFFSET, True, "")


def same_units(a: Fingerprint, b: Fingerprint) -> bool:
    """Whether two fingerprints are equal; a codebook or text that is not recorded equals any."""
    if "" in (a.text_sha256, b.text_sha256):
        a, b = a.speech(), b.speech()
    return a == b or "" in (a.codebook_sha256, b.codebook_sha256) and \
        replace(a, codebook_sha256="") == replace(b, codebook_sha256="")


def require_same(a: Fingerprint, a_name, b: Fingerprint, b_name) -> None:
    """SystemExit, naming both files and fingerprints, unless `same_units`; a note on stderr if one has no codebook."""
    if bool(a.codebook_sha256) != bool(b.codebook_sha256):
        unknown, other = (a_name, b_name) if b.codebook_sha256 else (b_name, a_name)
        print(f"{unknown} does not say which codebook made its units; assumed to be that of {other}", file=sys.stderr)
    if not same_units(a, b):
        raise SystemExit(f"units of different tokenisers:\n  {a_name}: {a}\n  {b_name}: {b}\n"
                         f"  make one of them again with the other's tokeniser (prepare_units.py; slam.alignment for "
                         f"text)")


def newest_first(folder: str | Path, pattern: str) -> list[Path]:
    """Files below a folder whose names match `pattern`, the newest first; files that vanish meanwhile are left out."""
    found = []
    for here, _, names in os.walk(folder):
        for path in (Path(here, name) for name in fnmatch.filter(names, pattern)):
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def find_speaking(fingerprint: Fingerprint, embedded: Path, folder: str,
                  read: Callable[[Path], Fingerprint]) -> str | None:
    """Name of a codebook or vocoder with this fingerprint: `embedded`, or the newest such file below a folder, or None.

    embedded: the embedded one's file. read: gives a file's fingerprint; SystemExit for other files.
    """
    for path in [embedded, *newest_first(folder, "*.safetensors")]:
        with contextlib.suppress(SystemExit):
            if read(path) == fingerprint.speech():
                return "embedded" if path == embedded else str(path)
    return None


# ---------------------------------------------------------------- unit files
class UnitWriter(contextlib.AbstractContextManager):
    """Write a corpus as numbered shards: `with UnitWriter(folder, fingerprint) as w: w.add(id, units, durations)`.

    A shard is written when it holds `shard_tokens` tokens (None: only by `flush`), and at the end of the `with` block.
    To resume, open the folder again and add what is not in `done`. SystemExit if its units are another tokeniser's.
    """

    def __init__(self, folder: str | Path, fingerprint: Fingerprint, source: str = "", durations: bool = False,
                 shard_tokens: int | None = 50_000_000, prefix: str = ""):
        self.folder, self.fingerprint, self.source, self.prefix = Path(folder), fingerprint, source, prefix
        self.with_durations, self.shard_tokens = durations, shard_tokens
        self.folder.mkdir(parents=True, exist_ok=True)
        self.done: set[str] = set()
        if any(self.folder.glob("*.safetensors")):
            there = UnitReader(self.folder)
            require_same(there.fingerprint, folder, fingerprint, "the tokeniser to write with")
            if any(bool(shard.fingerprint.text_lm) != bool(fingerprint.text_lm) for shard in there.shards):
                raise SystemExit(f"{folder}: unit files with words and without don't go into one folder; choose "
                                 f"another one")
            self.done = set(there.ids())
        numbers = [int(p.stem[-5:]) for p in self.folder.glob(f"{prefix}{'[0-9]' * 5}.safetensors")]
        self.number = max(numbers, default=-1) + 1  # of the next shard
        self.held: list[tuple] = []  # its utterances: tokens, durations, record, text, words
        self.n_tokens = self.n_frames = 0

    def add(self, id: str, units: np.ndarray, durations: np.ndarray | None, text_tokens: np.ndarray = (),
            words: np.ndarray = (), **record) -> None:
        """Add an utterance: units and durations (frames), (T,) ints; `record`: more to keep of it, e.g. text="...".

        text_tokens (n,), words (m, 2): as in the file; all utterances of a folder have them, or none.
        """
        units = np.asarray(units)
        durations = np.zeros_like(units) if durations is None else np.asarray(durations)
        assert units.shape == durations.shape and len(units), f"{id}: {units.shape} units, {durations.shape} durations"
        assert units.min() >= 0 and units.max() < self.fingerprint.n_units, f"{id}: unit out of range"
        self.held.append((np.array(to_tokens(units), dtype="<u2"),
                          np.array([0, *np.minimum(durations, 65_535), 0], dtype="<u2"),  # at most 43 min of one unit
                          json.dumps({"id": id} | record, ensure_ascii=False),
                          np.array(text_tokens, dtype="<u4"), np.array(words, dtype="<u4").reshape(-1, 2)))
        self.n_tokens += len(units) + 2
        self.n_frames += int(durations.sum())
        self.done.add(id)
        if self.shard_tokens and self.n_tokens >= self.shard_tokens:
            self.flush()

    def flush(self, hours: float | None = None) -> None:
        """Write the utterances added since the last shard as a new one. hours: of speech; None: from the durations."""
        if not self.held:
            return
        tokens, durations, records, texts, words = zip(*self.held)
        tensors = {"tokens": np.concatenate(tokens),
                   "offsets": np.cumsum([0, *map(len, tokens)], dtype="<i8"),
                   "records": np.frombuffer("\n".join(records).encode("utf-8", "surrogateescape"), dtype=np.uint8)}
        if self.with_durations:
            tensors["durations"] = np.concatenate(durations)
        if self.fingerprint.text_lm:
            ends = np.cumsum([(len(text), len(word)) for text, word in zip(texts, words)], 0, dtype="<i8")
            tensors |= {"text": np.concatenate(texts), "words": np.concatenate(words), "ends": ends}
        if hours is None:
            hours = self.n_frames / self.fingerprint.unit_rate_hz / 3600
        header = {"format": "slam-units", "version": VERSION, "fingerprint": self.fingerprint.to_dict(),
                  "source": self.source, "n_utterances": len(tokens), "n_tokens": self.n_tokens, "hours": hours}
        write_atomic(self.folder / f"{self.prefix}{self.number:05d}.safetensors",
                     save(tensors, {"slam": json.dumps(header)}))
        self.number += 1
        self.held, self.n_tokens, self.n_frames = [], 0, 0

    def __exit__(self, error, *_) -> None:
        if error is None:
            self.flush()


class Shard:
    """One unit file, memory-mapped. SystemExit, naming the file, if it is not whole or not a unit file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.modified = path.stat().st_mtime_ns
            self.file = safe_open(path, "numpy")
            header = self.header = json.loads((self.file.metadata() or {}).get("slam", "{}"))
            if header.get("format") != "slam-units" or header.get("version") != VERSION:
                raise ValueError(f"format {header.get('format')!r} version {header.get('version')}, expected "
                                 f"'slam-units' version {VERSION}")
            self.fingerprint = Fingerprint(**header["fingerprint"])
            self.hours = float(header["hours"])
            self.offsets = self.file.get_tensor("offsets")
            self.tokens = self.file.get_slice("tokens")  # an utterance is read when it is sliced
            self.durations = self.file.get_slice("durations") if "durations" in self.file.keys() else None
            self.ends = self.file.get_tensor("ends") if self.fingerprint.text_lm else None
            if not self.offsets[-1] == header["n_tokens"] == self.tokens.get_shape()[0]:
                raise ValueError("header, offsets and tokens disagree")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
            raise SystemExit(f"{path}: not a whole unit file ({e}); if a stage wrote it, remove it "
                             f"and run the stage again") from None

    def problems(self) -> Iterator[str]:
        """Errors in the content of a file that could be opened; reads all of it."""
        tokens, offsets, n, n_records = self.tokens[:], self.offsets, len(self.offsets) - 1, len(self.records())
        if self.header["n_utterances"] != n or n_records != n:
            yield f"{n} utterances, but {self.header['n_utterances']} by its header and {n_records} records"
        if offsets[0] != 0 or (np.diff(offsets) < 3).any():
            yield "its offsets do not rise by an utterance each"
            return
        ends = np.concatenate([offsets[:-1], offsets[1:] - 1])  # the places of BOS and EOS
        if (tokens[ends] != BOS).any() or (tokens < OFFSET).sum() != len(ends):
            yield "its utterances are not `1 units 1`"
        if tokens.max() >= vocab_size(self.fingerprint.n_units):
            yield f"token {tokens.max()}, but a vocabulary of {vocab_size(self.fingerprint.n_units)}"
        if self.durations is not None:
            frames = self.durations[:]
            hours = frames.sum(dtype=np.int64) / self.fingerprint.unit_rate_hz / 3600
            if frames[ends].any() or (frames == 0).sum() != len(ends) or abs(hours - self.hours) > 1e-6:
                yield f"its durations are not one or more frames per unit, {self.hours:.4f} h in all"

    def records(self) -> list[dict]:
        text = self.file.get_tensor("records").tobytes().decode("utf-8", "surrogateescape")
        return [json.loads(line) for line in text.split("\n")]


class UnitReader:
    """Read unit files: one, a folder of them, or several of these; utterances are numbered through all of them.

    `tokens(i)` -> uint16 `1 units 1`; `units(i)` -> int64 (T,); `durations(i)` -> int64 (T,) in frames, or None.
    SystemExit if a path is missing, a shard is not whole, or fingerprints differ.
    """

    def __init__(self, *paths: str | Path):
        files, n_files = [], []
        for path in map(Path, paths):
            found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
            if not found or not found[0].is_file():
                raise SystemExit(f"{path}: no unit files here; prepare_units.py and synth_stories.py write them")
            files += found
            n_files.append(len(files))
        self.shards = [Shard(f) for f in files]
        kinds = {shard.fingerprint: shard for shard in reversed(self.shards)}.values()  # the first shard of each kind
        named = next((s for s in self.shards if s.fingerprint.codebook_sha256), self.shards[0])
        self.fingerprint = named.fingerprint
        for shard in kinds:
            require_same(self.fingerprint, named.path, shard.fingerprint, shard.path)
        self.starts = np.cumsum([0] + [len(s.offsets) - 1 for s in self.shards])
        self.sizes = np.diff(self.starts[[0, *n_files]]).tolist()  # utterances of each of `paths`
        self.lengths = np.concatenate([np.diff(s.offsets) for s in self.shards])  # in tokens, BOS and EOS included
        self.n_tokens = int(self.lengths.sum())
        self.hours = sum(s.hours for s in self.shards) * all(s.hours for s in self.shards)  # 0: not known of all

    def __len__(self) -> int:
        return int(self.starts[-1])

    def digest(self) -> str:
        """sha256 of the shards' headers: it changes with their number, counts, hours and order. Reads no tokens."""
        return sha256_of(self.sizes, [s.header for s in self.shards])

    def check(self) -> None:
        """SystemExit, naming it, if a file has vanished or changed: reading its mapping could kill the process."""
        for shard in self.shards:
            if not shard.path.exists() or shard.path.stat().st_mtime_ns != shard.modified:
                raise SystemExit(f"{shard.path}: {'changed' if shard.path.exists() else 'gone'} while in use")

    def _find(self, i: int) -> tuple[Shard, int, slice]:
        """The shard of utterance i, its number in there, and the place of its tokens."""
        s = int(np.searchsorted(self.starts, i, side="right")) - 1
        shard, j = self.shards[s], i - self.starts[s]
        return shard, j, slice(shard.offsets[j], shard.offsets[j + 1])

    def tokens(self, i: int) -> np.ndarray:
        shard, _, span = self._find(i)
        return shard.tokens[span]

    def units(self, i: int) -> np.ndarray:
        return self.tokens(i)[1:-1].astype(np.int64) - OFFSET

    def durations(self, i: int) -> np.ndarray | None:
        shard, _, span = self._find(i)
        return None if shard.durations is None else shard.durations[span][1:-1].astype(np.int64)

    def words(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Text tokens (n,) int64 and words (m, 2) int64 of an utterance; of unit files of slam/alignment.py."""
        shard, j, _ = self._find(i)
        (text, word), (text_end, word_end) = shard.ends[j - 1] if j else (0, 0), shard.ends[j]
        return (shard.file.get_slice("text")[text:text_end].astype(np.int64),
                shard.file.get_slice("words")[word:word_end].astype(np.int64))

    def records(self) -> Iterator[dict]:
        for shard in self.shards:
            yield from shard.records()

    def ids(self) -> list[str]:
        return [r["id"] for r in self.records()]


# ---------------------------------------------------------------- pair files
def write_pairs(path: str | Path, fingerprint: Fingerprint, pairs: Iterable[dict]) -> None:
    """Write preference pairs as JSON lines after a line with the fingerprint.

    A pair: {"id", "prompt", "chosen", "rejected"} (lists of units) and, if known, "prompt_text" etc. "chosen_ended" and
    "rejected_ended" (default true): false if the completion was cut off, so that no EOS follows it.
    """
    header = {"format": "slam-pairs", "version": VERSION, "fingerprint": fingerprint.to_dict()}
    lines = [json.dumps(line, ensure_ascii=False) for line in (header, *pairs)]
    write_atomic(path, "\n".join(lines) + "\n")


def read_pairs(path: str | Path) -> tuple[Fingerprint, list[dict]]:
    """Read a pair file. SystemExit, naming file and pair, if it is missing or malformed."""
    pairs, where = [], "first line"
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as f:
            fingerprint = Fingerprint(**json.loads(f.readline())["fingerprint"])
            for i, text in enumerate(filter(str.strip, f), 1):
                where = f"pair {i}"
                pair = json.loads(text)
                for key in ("prompt", "chosen", "rejected"):
                    if not pair[key] or not all(0 <= u < fingerprint.n_units for u in pair[key]):
                        raise ValueError(f"{key} must be a non-empty list of units below {fingerprint.n_units}")
                for key in ("chosen_ended", "rejected_ended"):
                    if not isinstance(pair.get(key, True), bool):
                        raise ValueError(f"{key} must be true or false, not {pair[key]!r}")
                pairs.append(pair)
    except OSError as e:
        raise SystemExit(f"{path}: no such pair file ({e.strerror}); synth_stories.py writes one") from None
    except (ValueError, KeyError, TypeError) as e:
        raise SystemExit(f"{path}: {where}: not that of preference pairs ({type(e).__name__}: {e})") from None
    return fingerprint, pairs
