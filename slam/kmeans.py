"""Codebooks: fit k-means to an encoder's features (`fit`), or read a published k-means (`convert`).

    python prepare_units.py fit config/fit_embedded.py --input my_speech --codebook my_codebook.safetensors
    python prepare_units.py convert   # fetches the published k-means of mHuBERT-25hz
"""
import io
import json
import math
import pickle
import re
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from slam.audio import SAMPLE_RATE, check_wave, read_blocks, read_input
from slam.embedded import file_digest
from slam.tokenizer import PUBLISHED_KMEANS, assign, load_encoder, windows, write_codebook


@dataclass
class FitConfig:
    """Fit a codebook (k-means on an encoder's features)."""
    input: str = ""  # folder of audio files, or any other input of prepare_units.py
    codebook: str = "out/codebook.safetensors"  # file to write
    encoder: str = "embedded:whisper-tiny.en"  # hub id, folder or embedded:NAME of a Whisper or HuBERT model
    layer: int = 3  # hidden state to cluster (0: before the first transformer layer)
    n_units: int = 500  # clusters
    hours: float = 1.5  # audio to fit on, drawn at random from the input; all features are kept in memory
    seconds_per_file: float = 60.0  # at most this much of each file, from its beginning
    iterations: int = 30  # of k-means, at most
    minibatch: int = 0  # frames per iteration (mini-batch k-means, for many hours); 0: all frames (Lloyd's)
    seed: int = 0  # of the draw and of the k-means++ start
    overwrite: bool = False  # replace an existing codebook

    def problems(self) -> list[str]:
        found = []
        if min(self.n_units, self.hours, self.seconds_per_file, self.iterations) <= 0 or self.seed < 0:
            found.append("n_units, hours, seconds_per_file and iterations are positive, seed not negative")
        if self.minibatch and self.minibatch < self.n_units:
            found.append("minibatch: at least n_units frames, or 0")
        return found


@dataclass
class ConvertConfig:
    """Make a codebook of a published k-means (scikit-learn's, written by joblib); no code in the file is run."""
    source: str = ""  # the file; empty: the published one of mHuBERT-25hz's 500 units, which is fetched
    codebook: str = "out/mhubert25.safetensors"  # file to write
    encoder: str = "slprl/mhubert-base-25hz"  # hub id or folder of the model whose features it clusters
    layer: int = 11  # hidden state that it clusters
    unit_rate_hz: float = 25.0  # frames per second of that model
    overwrite: bool = False  # replace an existing codebook


# ---------------------------------------------------------------- fitting
def draw(input: str, seconds: float, seconds_per_file: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Waves (T,) at 16 kHz of recordings drawn at random, `seconds` in all; an archive is read from its beginning.

    Recordings that can't be used are named on stderr. SystemExit if none can be used.
    """
    total, items = read_input(input)
    if total is None:
        print(f"{input}: an archive is read from its beginning, not at random", file=sys.stderr)
    else:
        items = np.array(list(items), dtype=object)[rng.permutation(total)]
    waves, missing = [], seconds
    for item in tqdm(items, disable=None, desc=f"reading {seconds / 3600:.3g} h", unit="file"):
        try:
            if item.problem:
                raise ValueError(f"{item.id}: {item.problem}")
            # Two blocks: a truncated file is noticed only after its first block.
            blocks = islice(read_blocks(item.source, item.id, seconds_per_file), 2)
            wave = np.concatenate([np.zeros(0, np.float32), *blocks])[:round(seconds_per_file * SAMPLE_RATE)]
            check_wave(wave, item.id)
        except ValueError as e:
            print(f"skipped {e}", file=sys.stderr)
            continue
        waves.append(wave)
        missing -= len(wave) / SAMPLE_RATE
        if missing <= 0:
            break
    if not waves:
        raise SystemExit(f"{input}: not one usable recording")
    return waves


def position_mean(encoder, waves: list[np.ndarray], rng: np.random.Generator) -> Tensor:
    """Mean feature (window, dim) at each position of the encoder's window, smoothed over a second.

    Whisper's features drift with absolute position. The mean is over full windows cut at random from the joined waves:
    over whole files it would also remove how files tend to begin. SystemExit if there are fewer than two windows.
    """
    joined = np.concatenate(waves)
    size = encoder.window * encoder.samples_per_frame
    if len(joined) < 2 * size:
        raise SystemExit(f"{len(joined) / SAMPLE_RATE:.0f} s of audio; fitting a codebook needs minutes at least")
    n = min(120, len(joined) // size)
    total = 0
    for start in tqdm(rng.integers(0, len(joined) - size, n), disable=None, desc="position mean"):
        total = total + encoder([joined[start:start + size]])[0]
    mean = (total / n).T[None]
    return F.avg_pool1d(F.pad(mean, (12, 12), mode="replicate"), 25, stride=1)[0].T.contiguous()


def kmeans(x: Tensor, k: int, iterations: int, generator: torch.Generator,
           minibatch: int = 0) -> tuple[Tensor, float]:
    """Centroids (k, D) of x (N, D) and their inertia (mean squared distance), from a k-means++ start.

    Arthur & Vassilvitskii 2007; then Lloyd's algorithm, or with `minibatch` frames an iteration Sculley's (2010), where
    a centroid is the mean of all frames it was ever given. An empty cluster moves to a frame far from its centroid.
    """
    start = x[torch.randperm(len(x), generator=generator)[:50 * k].to(x.device)]
    centroids = start[:1]
    nearest = (start - centroids).square().sum(1)
    for _ in tqdm(range(k - 1), disable=None, desc="k-means++", leave=False):
        chosen = start[torch.multinomial(nearest.cpu(), 1, generator=generator).to(x.device)]
        centroids = torch.cat([centroids, chosen])
        nearest = torch.minimum(nearest, (start - chosen).square().sum(1))
    inertia, seen = math.inf, torch.zeros(k, 1, device=x.device)
    bar = tqdm(range(iterations), disable=None, desc="k-means")
    for _ in bar:
        part = x[torch.randint(len(x), (minibatch,), generator=generator).to(x.device)] if minibatch else x
        labels = assign(part, centroids)
        distance = (part - centroids[labels]).square().sum(1)
        previous, inertia = inertia, distance.mean().item()
        bar.set_postfix(inertia=f"{inertia:.4f}")
        if not minibatch and previous - inertia < 1e-5 * inertia:
            break
        counts = torch.bincount(labels, minlength=k)[:, None]
        seen = seen + counts if minibatch else counts
        sums = torch.zeros_like(centroids).index_add_(0, labels, part)
        centroids = centroids + (sums - counts * centroids) / seen.clamp(min=1)
        empty = (seen == 0).nonzero()[:, 0]
        centroids[empty] = part[distance.topk(len(empty)).indices]
    if minibatch:
        inertia = torch.cat([(p - centroids[assign(p, centroids)]).square().sum(1) for p in x.split(1 << 16)]).mean()
    return centroids, float(inertia)


def fit(cfg: FitConfig) -> None:
    """Fit a codebook; write it with the hours that it was fitted on and its inertia."""
    out = Path(cfg.codebook)
    if out.exists() and not cfg.overwrite:
        raise SystemExit(f"{out} exists; --overwrite replaces it")
    encoder = load_encoder(cfg.encoder, cfg.layer, "cuda" if torch.cuda.is_available() else "cpu", "float32")
    rng = np.random.default_rng(cfg.seed)
    waves = draw(cfg.input, cfg.hours * 3600, cfg.seconds_per_file, rng)
    mean = position_mean(encoder, waves, rng) if encoder.position_dependent else None
    x = []
    for wave in tqdm(waves, disable=None, desc="features"):
        for piece, first, last in windows([wave], encoder):
            features = encoder([piece])[0]
            x.append((features if mean is None else features - mean[:len(features)])[first:last].cpu())
    x = torch.cat(x).to(encoder.device)  # 20 h of a base-sized HuBERT are 5.5 GB, so not twice on a GPU
    if len(x) < 10 * cfg.n_units:
        raise SystemExit(f"{cfg.input}: {len(x)} frames are too few for {cfg.n_units} units")
    centroids, inertia = kmeans(x, cfg.n_units, cfg.iterations, torch.Generator().manual_seed(cfg.seed), cfg.minibatch)
    tensors = {"centroids": centroids.half()} | ({} if mean is None else {"position_mean": mean.half()})
    meta = {"encoder": cfg.encoder, "layer": cfg.layer, "unit_rate_hz": encoder.rate_hz, "n_units": cfg.n_units,
            "hours": round(sum(map(len, waves)) / SAMPLE_RATE / 3600, 3), "inertia": round(inertia, 4),
            "seed": cfg.seed}
    write_codebook(out, tensors, meta)
    print(json.dumps(meta))
    print(f"wrote {out}")


# ---------------------------------------------------------------- a published k-means
class StandIn:
    """Takes the place of every class and function that a pickle names, so that nothing in it is run.

    Keeps the arguments and the state of what it stands for.
    """
    args, state = (), None

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class KMeansUnpickler(pickle.Unpickler):
    """Reads a k-means of scikit-learn that joblib wrote, as stand-ins and numpy arrays."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.file = file

    def find_class(self, module: str, name: str) -> type:
        read = {"__setstate__": lambda wrapper, state: setattr(wrapper, "array", self.read_array(state))}
        return type(name, (StandIn,), read if name == "NumpyArrayWrapper" else {})

    def read_array(self, state: dict) -> np.ndarray:
        """The array that follows its wrapper in the file, after some padding."""
        dtype = state["dtype"]
        code, endian = str(dtype.args[0]), dtype.state[1] if dtype.state else "|"
        if not re.fullmatch(r"[biuf][1248]", code) or endian not in "<>|":
            raise pickle.UnpicklingError(f"an array of {code!r}, not of numbers")
        if state.get("numpy_array_alignment_bytes") is not None:
            self.file.read(self.file.read(1)[0])
        dtype = np.dtype(endian + code)
        content = self.file.read(math.prod(state["shape"]) * dtype.itemsize)
        return np.frombuffer(content, dtype).reshape(state["shape"], order=state["order"])


def read_kmeans(path: Path) -> np.ndarray:
    """Centroids (K, D) float32 of an uncompressed k-means written by joblib. SystemExit for any other file."""
    try:
        centroids = KMeansUnpickler(io.BytesIO(path.read_bytes())).load().state["cluster_centers_"].array
        if centroids.ndim != 2 or not np.isfinite(centroids).all():
            raise ValueError(f"centroids of shape {centroids.shape}")
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, LookupError, OverflowError,
            MemoryError) as e:
        raise SystemExit(f"{path}: not a k-means that joblib wrote ({type(e).__name__}: {e})") from None
    return np.ascontiguousarray(centroids, dtype=np.float32)


def convert(cfg: ConvertConfig) -> None:
    """Write a published k-means as a codebook."""
    from slam.download import published
    out = Path(cfg.codebook)
    if out.exists() and not cfg.overwrite:
        raise SystemExit(f"{out} exists; --overwrite replaces it")
    source = Path(cfg.source) if cfg.source else published(*PUBLISHED_KMEANS)
    if not source.is_file():
        raise SystemExit(f"--source={cfg.source}: no such file")
    centroids = torch.from_numpy(read_kmeans(source))
    meta = {"encoder": cfg.encoder, "layer": cfg.layer, "unit_rate_hz": cfg.unit_rate_hz,
            "n_units": len(centroids), "source": source.name, "source_sha256": file_digest(source)}
    write_codebook(out, {"centroids": centroids}, meta)
    print(f"wrote {out}: {len(centroids)} units, {centroids.shape[1]} dimensions, of {cfg.encoder} layer {cfg.layer}")
