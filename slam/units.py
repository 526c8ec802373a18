"""The contract between the stages: vocabulary, tokeniser fingerprint, unit files and pair files.

Vocabulary: PAD 0, BOS = EOS 1, unit u is token u + 2. An utterance is the tokens `1 units 1`.

A unit file is a safetensors file, so its JSON header can be read by eye and its tokens are memory-mapped:
    tokens    uint16 (n_tokens,)        every utterance as `1 units 1`, one after the other
    offsets   int64  (n_utterances + 1,)
    durations uint16 (n_tokens,)        frames per unit, 0 at BOS and EOS; only where asked for
    records   uint8                     JSON lines, one per utterance: {"id": ..., "text": ...}
    header    format, version, fingerprint, source, n_utterances, n_tokens, skipped,
              hours (0 if durations are not known)
A corpus is a folder of numbered such shards, several processes writing each its own. A shard is written under a
temporary name and renamed, so one that has its name is whole; the same utterances make the same bytes.
"""
import contextlib
import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

PAD, BOS, EOS, OFFSET = 0, 1, 1, 2


VERSION = 2


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write a file under another name, then rename it into place: a file that has its name is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
    os.replace(part, path)


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
    """Runs of equal units (T,) -> (units, durations); the durations sum to T.

    dedup([7, 7, 7, 2, 2, 7]) -> [7, 2, 7], [3, 2, 1]
    """
    frames = np.asarray(frames)
    starts = np.flatnonzero(np.diff(frames, prepend=-1))
    return frames[starts], np.diff(starts, append=len(frames))


def to_bytes(text: str) -> bytes:
    """UTF-8, in which a file name that is not UTF-8 survives as it is."""
    return text.encode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Fingerprint:
    """What a speech tokeniser is; units with different fingerprints mean different sounds."""
    encoder: str  # a hub id or embedded:NAME
    layer: int  # hidden state, 0 = the input of the first transformer layer
    unit_rate_hz: float
    n_units: int
    dedup: bool
    codebook_sha256: str

    @classmethod
    def of(cls, values: dict) -> "Fingerprint":
        return cls(**values)

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        return (f"{self.encoder} layer {self.layer}, {self.unit_rate_hz:g} Hz, {self.n_units} units, "
                f"{'dedup' if self.dedup else 'no dedup'}, codebook {self.codebook_sha256[:12] or 'not recorded'}")


def published_fingerprint(vocab: int) -> Fingerprint:
    """What SlamKit's checkpoints and unit files, which do not say it, are taken to speak; no codebook is recorded."""
    return Fingerprint("slprl/mhubert-base-25hz", 11, 25.0, vocab - OFFSET, True, "")


def same_units(a: Fingerprint, b: Fingerprint) -> bool:
    """Whether both speak the same units; a codebook that is not recorded is taken to be the other's."""
    return a == b or "" in (a.codebook_sha256, b.codebook_sha256) and \
        replace(a, codebook_sha256="") == replace(b, codebook_sha256="")


def require_same(a: Fingerprint, a_name, b: Fingerprint, b_name) -> None:
    """SystemExit naming both files and both fingerprints unless they are equal; says so if a codebook is unrecorded."""
    if bool(a.codebook_sha256) != bool(b.codebook_sha256):
        silent, other = (a_name, b_name) if b.codebook_sha256 else (b_name, a_name)
        print(f"{silent} does not say which codebook its units are of; taken to be that of {other}", file=sys.stderr)
    if not same_units(a, b):
        raise SystemExit(f"units of different tokenisers:\n  {a_name}: {a}\n  {b_name}: {b}\n"
                         f"  make one of them again with the other's tokeniser (prepare_units.py)")


def find_speaking(fingerprint: Fingerprint, embedded: Path, folder: str, tensor: str,
                  read: Callable[[Path], Fingerprint]) -> str | None:
    """The name of the codebook or vocoder of these units: `embedded`, or else the newest file below a folder.

    embedded: the embedded one's file. tensor: by its name a file is known to be of the kind. read: its fingerprint.
    """
    found = []
    for path in Path(folder).rglob("*.safetensors"):
        with contextlib.suppress(OSError):  # a broken link, or gone meanwhile
            found.append((path.stat().st_mtime, str(path), path))
    for name, path in [("embedded", embedded), *(x[1:] for x in sorted(found, reverse=True))]:
        with contextlib.suppress(SafetensorError, OSError, SystemExit):  # other people's files, and half-written ones
            with safe_open(path, "numpy") as f:
                known = tensor in f.keys()
            if known and read(path) == fingerprint:
                return name
    return None


# ---------------------------------------------------------------- unit files
class UnitWriter:
    """Write a corpus as numbered shards: `with UnitWriter(folder, fingerprint) as w: w.add(id, units)`.

    Reopening a folder resumes it: `w.done` holds the ids already there. What is not in a whole shard when the process
    dies, or the `with` block raises, is lost, and `add` can be called for it again. A shard is written when it has
    `shard_tokens`; with None, only when `flush` is called. Processes that share a folder each have a `prefix`.
    """

    def __init__(self, folder: str | Path, fingerprint: Fingerprint, source: str = "", durations: bool = False,
                 shard_tokens: int | None = 50_000_000, prefix: str = ""):
        self.folder, self.fingerprint, self.source, self.prefix = Path(folder), fingerprint, source, prefix
        self.with_durations, self.shard_tokens = durations, shard_tokens
        self.folder.mkdir(parents=True, exist_ok=True)
        self.done: set[str] = set()
        self.skipped: list[dict] = []  # what was to come before the next shard's end and is not in it, and why
        self.shards: list[Shard] = []  # that were there under this prefix
        if any(self.folder.glob("*.safetensors")):
            there = UnitReader(self.folder)
            require_same(there.fingerprint, folder, fingerprint, "the tokeniser to write with")
            self.done = set(there.ids())
            self.shards = [s for s in there.shards if s.path.stem.startswith(prefix)
                           and s.path.stem.removeprefix(prefix).isdecimal()]
        self.number = max((int(s.path.stem.removeprefix(prefix)) + 1 for s in self.shards), default=0)  # of the next
        self._clear()

    def _clear(self) -> None:
        self.tokens, self.durations, self.records, self.lengths = [], [], [], []
        self.n_tokens = self.n_frames = 0  # of the shard to be

    def add(self, id: str, units: np.ndarray, durations: np.ndarray | None, **record) -> None:
        """Add an utterance: units and durations (T,) ints; `record`: what else to keep, e.g. text="…"."""
        units = np.asarray(units)
        durations = np.zeros_like(units) if durations is None else np.asarray(durations)
        assert units.shape == durations.shape and len(units), f"{id}: {units.shape} units, {durations.shape} durations"
        assert units.min() >= 0 and units.max() < self.fingerprint.n_units, f"{id}: unit out of range"
        self.tokens.append(np.array(to_tokens(units), dtype="<u2"))
        self.durations.append(np.array([0, *np.minimum(durations, 65_535), 0], dtype="<u2"))  # 43 min of one unit
        self.records.append(json.dumps({"id": id} | record, ensure_ascii=False))
        self.lengths.append(len(units) + 2)
        self.n_tokens += len(units) + 2
        self.n_frames += int(durations.sum())
        self.done.add(id)
        if self.shard_tokens and self.n_tokens >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last shard as a new shard."""
        if not self.lengths:
            return
        tensors = {"tokens": np.concatenate(self.tokens),
                   "offsets": np.concatenate([[0], np.cumsum(self.lengths)]).astype("<i8"),
                   "records": np.frombuffer(to_bytes("\n".join(self.records)), dtype=np.uint8)}
        if self.with_durations:
            tensors["durations"] = np.concatenate(self.durations)
        header = {"format": "slam-units", "version": VERSION, "fingerprint": self.fingerprint.to_dict(),
                  "source": self.source, "n_utterances": len(self.lengths), "n_tokens": self.n_tokens,
                  "hours": self.n_frames / self.fingerprint.unit_rate_hz / 3600, "skipped": self.skipped}
        path = self.folder / f"{self.prefix}{self.number:05d}.safetensors"
        temporary = path.with_suffix(".part")
        temporary.write_bytes(save(tensors, {"slam": json.dumps(header)}))  # several keys would have no fixed order
        os.replace(temporary, path)
        self.number += 1
        self.skipped = []
        self._clear()

    def __enter__(self) -> "UnitWriter":
        return self

    def __exit__(self, error, *_) -> None:
        if error is None:
            self.flush()


class Shard:
    """One unit file, memory-mapped. SystemExit, naming the file, if it is not whole or not a unit file."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.stat = path.stat().st_size, path.stat().st_mtime_ns
            with open(path, "rb") as f:
                length, = struct.unpack("<Q", f.read(8))
                if length > 100_000_000:
                    raise ValueError("no safetensors header")
                tensors = json.loads(f.read(length))
            header = self.header = json.loads(tensors.pop("__metadata__", {}).get("slam", "{}"))
            if header.get("format") != "slam-units" or header.get("version") != VERSION:
                raise ValueError(f"format {header.get('format')!r} version {header.get('version')}, expected "
                                 f"'slam-units' version {VERSION}")
            self.fingerprint = Fingerprint.of(header["fingerprint"])
            self.hours = float(header["hours"])
            dtypes = {"U16": "<u2", "I64": "<i8", "U8": "u1"}
            arrays = {}
            for name, t in tensors.items():
                begin, end = t["data_offsets"]
                if 8 + length + end > self.stat[0]:
                    raise ValueError("file is cut short")
                arrays[name] = np.memmap(path, dtypes[t["dtype"]], "r", 8 + length + begin, tuple(t["shape"]))
            self.tokens, self.offsets, self._records = arrays["tokens"], arrays["offsets"], arrays["records"]
            self.durations = arrays.get("durations")
            if self.offsets[-1] != len(self.tokens) or header["n_tokens"] != len(self.tokens):
                raise ValueError("header, offsets and tokens disagree")
        except (OSError, ValueError, KeyError, TypeError, struct.error) as e:
            raise SystemExit(f"{path}: not a whole unit file ({e}); remove it and run the stage again") from None

    def check(self) -> None:
        """SystemExit if the file is no longer there as it was: reading on would kill the process, or lie."""
        try:
            now = self.path.stat()
        except OSError as e:
            raise SystemExit(f"{self.path}: gone while in use ({e.strerror})") from None
        if (now.st_size, now.st_mtime_ns) != self.stat:
            raise SystemExit(f"{self.path}: changed while in use")

    def problems(self) -> list[str]:
        """What is wrong inside a file that looks whole."""
        tokens, offsets, found = self.tokens, self.offsets, []
        n, n_records = len(offsets) - 1, int((self._records == ord("\n")).sum()) + 1
        if self.header["n_utterances"] != n or n_records != n:
            found.append(f"{n} utterances, but {self.header['n_utterances']} by its header and {n_records} records")
        if offsets[0] != 0 or (np.diff(offsets) < 3).any():
            found.append("its offsets do not rise by an utterance each")
            return found
        special = np.zeros(len(tokens), bool)
        special[offsets[:-1]] = special[offsets[1:] - 1] = True
        if (tokens[special] != BOS).any() or (tokens[~special] < OFFSET).any():
            found.append("its utterances are not `1 units 1`")
        if tokens.max() >= vocab_size(self.fingerprint.n_units):
            found.append(f"token {tokens.max()}, but a vocabulary of {vocab_size(self.fingerprint.n_units)}")
        if self.durations is not None:
            hours = self.durations.sum(dtype=np.int64) / self.fingerprint.unit_rate_hz / 3600
            if self.durations[special].any() or not self.durations[~special].all() or abs(hours - self.hours) > 1e-6:
                found.append(f"its durations are not one or more frames per unit, {self.hours:.4f} h in all")
        return found

    def records(self) -> list[dict]:
        return [json.loads(x) for x in self._records.tobytes().decode("utf-8", "surrogateescape").split("\n")]


class UnitReader:
    """Read a unit file, a folder of them, or several; utterance i of all of them in order.

    `tokens(i)` -> uint16 `1 units 1`; `units(i)` -> int64 (T,); `durations(i)` -> (T,) or None; `records()`.
    SystemExit if a path is missing, a shard is not whole, or two have different fingerprints.
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
        self.hours = sum(s.hours for s in self.shards)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def digest(self) -> str:
        """sha256 of the shards' headers, which differ if a shard is added, removed or written anew; reads no tokens."""
        return hashlib.sha256(json.dumps([self.sizes, [s.header for s in self.shards]]).encode()).hexdigest()

    def check(self) -> None:
        """SystemExit, naming it, if a file has vanished or changed since it was opened."""
        for shard in self.shards:
            shard.check()

    def _slice(self, i: int) -> tuple[Shard, slice]:
        s = int(np.searchsorted(self.starts, i, side="right")) - 1
        shard, j = self.shards[s], i - self.starts[s]
        return shard, slice(shard.offsets[j], shard.offsets[j + 1])

    def tokens(self, i: int) -> np.ndarray:
        shard, span = self._slice(i)
        return shard.tokens[span]

    def units(self, i: int) -> np.ndarray:
        return self.tokens(i)[1:-1].astype(np.int64) - OFFSET

    def durations(self, i: int) -> np.ndarray | None:
        shard, span = self._slice(i)
        return None if shard.durations is None else shard.durations[span][1:-1].astype(np.int64)

    def records(self) -> Iterator[dict]:
        for shard in self.shards:
            yield from shard.records()

    def ids(self) -> list[str]:
        return [r["id"] for r in self.records()]


# ---------------------------------------------------------------- pair files
def write_pairs(path: str | Path, fingerprint: Fingerprint, pairs: Iterable[dict]) -> int:
    """Write preference pairs as JSON lines, the first one the fingerprint; the number of pairs.

    A pair: {"id", "prompt", "chosen", "rejected"} (lists of units) and, if known, their texts. "chosen_ended" and
    "rejected_ended": false if the completion was cut off rather than ended, so that no EOS follows it; absent: true.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, n = path.with_name(path.name + ".part"), 0
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(json.dumps({"format": "slam-pairs", "version": VERSION, "fingerprint": fingerprint.to_dict()}) + "\n")
        for pair in pairs:
            f.write(json.dumps(pair, ensure_ascii=False) + "\n")
            n += 1
    os.replace(temporary, path)
    return n


def read_pairs(path: str | Path) -> tuple[Fingerprint, list[dict]]:
    """Read a pair file. SystemExit, naming file and line, if it is missing or malformed."""
    pairs = []
    try:
        with open(path, encoding="utf-8") as f:
            fingerprint = Fingerprint.of(json.loads(f.readline())["fingerprint"])
            for text in f:
                pair = json.loads(text)
                for key in ("prompt", "chosen", "rejected"):
                    if not pair[key] or not all(0 <= u < fingerprint.n_units for u in pair[key]):
                        raise ValueError(f"{key} must be a non-empty list of units below {fingerprint.n_units}")
                for key in ("chosen_ended", "rejected_ended"):
                    if not isinstance(pair.get(key, True), bool):
                        raise ValueError(f"{key} must be true or false, not {pair[key]!r}")
                pairs.append(pair)
    except FileNotFoundError:
        raise SystemExit(f"{path}: no such pair file; synth_stories.py writes one") from None
    except (ValueError, KeyError, TypeError) as e:
        raise SystemExit(f"{path}: pair {len(pairs) + 1}: not a preference pair ({type(e).__name__}: {e})") from None
    return fingerprint, pairs


IGNORE = -100  # target that counts for nothing
