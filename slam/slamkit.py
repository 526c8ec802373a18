"""SlamKit's unit files (features.jsonl, tokens.jsonl, preference features): whose units they hold, and reading them."""
import re
import sys

import numpy as np

from slam.tokenizer import Bpe, codebook_fingerprints, read_codebook
from slam.units import Fingerprint, dedup, published_fingerprint, vocab_size


def slamkit_tokenizer(path: str, tokenizer: str) -> tuple[Fingerprint, Fingerprint, Bpe | None]:
    """Fingerprints of the units to write and of the units in a SlamKit file, and the BPE that makes one of the other.

    The file names no tokeniser. `tokenizer`, a codebook file, does; if it is empty, SlamKit's default, the published
    mHuBERT, is assumed and a line on stderr says so.
    """
    if tokenizer:
        tensors, meta = read_codebook(tokenizer)
        return *codebook_fingerprints(tensors, meta), Bpe.of(tensors)
    published = published_fingerprint(vocab_size(500))
    print(f"{path} does not name its tokeniser; its units are taken to be of {published}. If they are of another, name "
          f"its codebook: --tokenizer", file=sys.stderr)
    return published, published, None


def slamkit_units(record: dict, n_units: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Units (T,) of a recording, a line of the file, and, if recorded, durations (T,) in frames; runs are merged.

    slamkit_units({"units": [1, 1, 2], "duration": [2, 3, 1]}, 500) -> [1, 2], [5, 1]
    slamkit_units({"audio_repr": "<Un3><Un49>"}, 500) -> [3, 49], None
    ValueError, KeyError or TypeError if these are not units below `n_units`.
    """
    found = record.get("audio_repr", record)
    if isinstance(found, str):
        if re.sub(r"<Un\d+>", "", found):
            raise ValueError(f"{found[:40]!r} is not <Un3><Un49>…")
        found = {"units": [int(u) for u in re.findall(r"<Un(\d+)>", found)]}
    units, durations = np.array(found["units"]), found.get("duration")
    if units.ndim != 1 or units.dtype.kind != "i" or not len(units) or units.min() < 0 or units.max() >= n_units:
        raise ValueError(f"expected a list of units below {n_units}")
    merged, runs = dedup(units)
    if durations is not None:
        durations = np.array(durations, dtype=np.int64)
        if durations.shape != units.shape or durations.min() < 1:
            raise ValueError(f"{durations.shape} durations for {units.shape} units, each at least 1")
        durations = np.add.reduceat(durations, np.cumsum(runs) - runs)
    return merged, durations
