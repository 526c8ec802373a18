"""Speech to units: the speech tokeniser (encoder + k-means + dedup), fitting its codebook, tokenising a corpus.

In:  audio files (a folder, searched recursively; any rate, any number of channels).
Out: a folder of unit files (units.py), or a codebook (.safetensors) that is the whole definition of a tokeniser.

    python prepare_units.py config/units_embedded.py --input my_speech --out out/my_units
    python prepare_units.py fit config/fit_embedded.py --input my_speech --codebook my_codebook.safetensors

Two cores tokenise about 80 times faster than real time with the embedded encoder; an hour of units takes 0.15 MB.
"""
import hashlib
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from config import load_config
from embedded import resolve
from units import Fingerprint, UnitWriter, dedup

ASSETS = Path(__file__).parent / "assets"
EMBEDDED_TOKENIZER = ASSETS / "codebook.safetensors"
SAMPLE_RATE = 16_000  # of every encoder here
AUDIO_SUFFIXES = {".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".aif", ".au"}


@dataclass
class Config:
    """Tokenise a folder of audio files."""
    input: str = ""  # folder of audio files (searched recursively), or one file
    out: str = "out/units"  # folder of unit files to write; an interrupted run resumes in it
    tokenizer: str = "embedded"  # codebook file; `embedded` is the one shipped in assets/
    durations: bool = False  # keep frames per unit beside the units (training a vocoder needs them)
    batch_seconds: float = 60.0  # audio encoded together
    shard_tokens: int = 1_000_000  # tokens per unit file; a killed run loses at most one
    overwrite: bool = False  # start anew instead of resuming


@dataclass
class FitConfig:
    """Fit a codebook (k-means on an encoder's features)."""
    input: str = ""  # folder of audio files
    codebook: str = "out/codebook.safetensors"  # file to write
    encoder: str = "embedded:whisper-tiny.en"  # hub id, folder or embedded:NAME of a Whisper or HuBERT model
    layer: int = 3  # hidden state to cluster (0 = before the first transformer layer)
    n_units: int = 500  # clusters
    hours: float = 1.5  # audio to fit on, drawn at random from the folder
    iterations: int = 30  # of Lloyd's algorithm, at most
    seed: int = 0  # of the draw and of the k-means++ start
    overwrite: bool = False  # replace an existing codebook


# ---------------------------------------------------------------- audio

def resample(wave: np.ndarray, rate: int, to: int) -> np.ndarray:
    """Polyphase resampling of (T,) float32 from `rate` to `to` Hz, with scipy's anti-aliasing filter."""
    if rate == to:
        return wave
    from scipy.signal import resample_poly
    g = math.gcd(rate, to)
    return resample_poly(wave, to // g, rate // g).astype(np.float32)


def check_wave(wave: np.ndarray, name="audio") -> None:
    """ValueError, naming the audio, if (T,) samples at 16 kHz hold nothing that a tokeniser could hear."""
    if not np.isfinite(wave).all():
        raise ValueError(f"{name}: holds NaN or infinite samples; export it again")
    if len(wave) < SAMPLE_RATE // 25:
        raise ValueError(f"{name}: {1000 * len(wave) / SAMPLE_RATE:.0f} ms of audio; a unit needs at least 40 ms")
    if np.abs(wave).max() < 1e-4:
        raise ValueError(f"{name}: silent (peak below -80 dB); record it again")


def load_audio(path: str | Path, rate: int = SAMPLE_RATE) -> np.ndarray:
    """Any libsndfile file as mono float32 (T,) at `rate` Hz. ValueError naming the file if there is nothing to use."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such audio file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: empty file")
    try:
        with soundfile.SoundFile(path) as f:
            promised, file_rate, notes = f.frames, f.samplerate, f.extra_info
            wave = f.read(dtype="float32", always_2d=True).mean(1)
    except soundfile.LibsndfileError as e:
        raise ValueError(f"{path}: not readable as audio ({e.error_string}); wav, flac, ogg and mp3 are") from None
    # libsndfile opens a wav cut short by a broken copy and only notes what its header promised; 4 GB is a stream's.
    cut = re.search(r"data : (\d+) \(should be (\d+)\)", notes)
    if len(wave) < promised or cut and int(cut[2]) < int(cut[1]) < 0xFFFFFF00:
        raise ValueError(f"{path}: truncated: it holds less audio than its header promises; copy it again")
    wave = resample(wave, file_rate, SAMPLE_RATE)
    check_wave(wave, path)
    return resample(wave, SAMPLE_RATE, rate)


# ---------------------------------------------------------------- encoders

class WhisperFrames:
    """Whisper's encoder as a 25 Hz frame extractor: log-mel -> `layer` blocks -> pairs of frames averaged.

    The encoder runs on the real length, not padded to 30 s. Longer audio is cut into 30 s windows every 20 s, and each
    frame is taken from the window in which it is most central; that cut is part of the tokeniser's definition.
    """
    rate_hz, samples_per_frame = 25.0, 640
    window, hop = 750, 500  # frames

    def __init__(self, name: str, layer: int, device: str):
        from transformers import WhisperFeatureExtractor, WhisperModel
        folder = resolve(name)
        self.encoder = WhisperModel.from_pretrained(folder, dtype=torch.float32).encoder.eval().to(device)
        if not 0 <= layer <= len(self.encoder.layers):
            raise SystemExit(f"{name}: no layer {layer}; it has {len(self.encoder.layers)}")
        extractor = WhisperFeatureExtractor.from_pretrained(folder)
        self.mel_filters = torch.tensor(extractor.mel_filters, dtype=torch.float32, device=device)  # (201, 80)
        self.hann = torch.hann_window(400, device=device)
        self.layer, self.device = layer, device

    def log_mel(self, wave: Tensor) -> Tensor:
        """(T,) at 16 kHz -> Whisper's log-mel (80, T // 160)."""
        power = torch.stft(wave, 400, 160, window=self.hann, return_complex=True)[:, :-1].abs() ** 2
        log = (self.mel_filters.T @ power).clamp(min=1e-10).log10()
        return (torch.maximum(log, log.max() - 8) + 4) / 4

    def spans(self, n_frames: int) -> list[tuple[int, int, int, int]]:
        """Windows over n frames: (start, end) of the window and of the part kept from it."""
        if n_frames <= self.window:
            return [(0, n_frames, 0, n_frames)]
        margin = (self.window - self.hop) // 2
        starts = list(range(0, n_frames - self.window, self.hop)) + [n_frames - self.window]
        keep = [0] + [s + margin for s in starts[1:]] + [n_frames]
        return [(s, s + self.window, a, b) for s, a, b in zip(starts, keep, keep[1:])]

    @torch.inference_mode()
    def __call__(self, waves: list[np.ndarray]) -> list[Tensor]:
        """Waves (T,) -> features (T // 640, 384) and their positions in the encoder's window (T // 640,)."""
        pieces = [(i, span) for i, wave in enumerate(waves) for span in self.spans(len(wave) // 640)]
        mels = [self.log_mel(torch.from_numpy(waves[i][a * 640:b * 640]).to(self.device)) for i, (a, b, _, _) in pieces]
        features = self.encode(mels)
        out = [[] for _ in waves]
        for (i, (start, _, keep_from, keep_to)), x in zip(pieces, features):
            kept = slice(keep_from - start, keep_to - start)
            out[i].append((x[kept], torch.arange(kept.start, kept.stop, device=self.device)))
        return [(torch.cat([x for x, _ in parts]), torch.cat([p for _, p in parts])) for parts in out]

    def encode(self, mels: list[Tensor]) -> list[Tensor]:
        """Log-mels (80, 4n) -> features (n, 384); masked, so that no file's frames see another's padding."""
        lengths = torch.tensor([m.shape[1] for m in mels], device=self.device)
        mel = torch.stack([F.pad(m, (0, int(lengths.max()) - m.shape[1])) for m in mels])
        inside = torch.arange(mel.shape[2], device=self.device) < lengths[:, None]
        e = self.encoder
        x = F.gelu(e.conv1(mel)) * inside[:, None]  # a lone file's second convolution meets zeros past its end
        x = F.gelu(e.conv2(x)).transpose(1, 2)
        inside = inside[:, ::2]
        x = x + e.embed_positions.weight[:x.shape[1]]
        mask = None if inside.all() else torch.where(inside, 0.0, -torch.inf)[:, None, None, :]
        for block in e.layers[:self.layer]:
            x = block(x, attention_mask=mask)
            x = x[0] if isinstance(x, tuple) else x  # transformers returned tuples once
        x = (x[:, 0::2] + x[:, 1::2]) / 2
        return [row[:n // 4] for row, n in zip(x, lengths.tolist())]


class HubertFrames:
    """HuBERT as a frame extractor: `hidden_states[layer]`, the wave padded by 40 samples on each side.

    Its first convolution is group-normalised over time, so padding would change every frame: one file at a time.
    """

    def __init__(self, name: str, layer: int, device: str):
        from transformers import HubertModel
        self.model = HubertModel.from_pretrained(resolve(name), dtype=torch.float32).eval().to(device)
        if not 0 < layer <= len(self.model.encoder.layers):
            raise SystemExit(f"{name}: no layer {layer}; it has {len(self.model.encoder.layers)}")
        self.model.encoder.layers = self.model.encoder.layers[:layer]  # what lies above is never needed
        self.samples_per_frame = math.prod(self.model.config.conv_stride)
        self.rate_hz, self.layer, self.device = SAMPLE_RATE / self.samples_per_frame, layer, device

    @torch.inference_mode()
    def __call__(self, waves: list[np.ndarray]) -> list[Tensor]:
        """Waves (T,) -> features (frames, hidden) and None (HuBERT's positions are relative)."""
        out = []
        for wave in waves:
            x = F.pad(torch.from_numpy(wave).to(self.device), (40, 40))[None]
            out.append((self.model(x, output_hidden_states=True).hidden_states[self.layer][0], None))
        return out


def load_encoder(name: str, layer: int, device: str = "cpu"):
    """The frame extractor for a Whisper- or HuBERT-type model, told by its config.json."""
    from transformers import AutoConfig
    from transformers.utils.logging import disable_progress_bar
    disable_progress_bar()  # the pipeline's own bars say enough
    try:
        kind = AutoConfig.from_pretrained(resolve(name)).model_type
    except OSError as e:
        raise SystemExit(f"{name}: no speech encoder there ({str(e).splitlines()[0]})") from None
    kinds = {"whisper": WhisperFrames, "hubert": HubertFrames}
    if kind not in kinds:
        raise SystemExit(f"{name}: a {kind!r} model; speech encoders here are {' and '.join(kinds)}")
    return kinds[kind](name, layer, device)


# ---------------------------------------------------------------- tokeniser

class SpeechTokenizer:
    """Encoder + k-means + dedup; defined by a codebook file (centroids, position mean, name and layer of the encoder).

    tokenizer = SpeechTokenizer.load("embedded")
    units, durations = tokenizer.encode(wave, 16_000)   # (T,) int64 each; the durations sum to the frames
    """

    def __init__(self, encoder, centroids: Tensor, position_mean: Tensor | None, fingerprint: Fingerprint):
        self.encoder, self.fingerprint = encoder, fingerprint
        self.centroids, self.position_mean = centroids, position_mean

    @classmethod
    def load(cls, name: str = "embedded", device: str = "cpu") -> "SpeechTokenizer":
        """Load a codebook file, or `embedded`. SystemExit if it is missing or not a codebook."""
        path = EMBEDDED_TOKENIZER if name == "embedded" else Path(name)
        if not path.is_file():
            raise SystemExit(f"{path}: no such codebook; `python prepare_units.py fit` makes one")
        try:
            with safe_open(path, "pt") as f:
                meta = f.metadata() or {}
                centroids = f.get_tensor("centroids").float().to(device)
                mean = f.get_tensor("position_mean").float().to(device) if "position_mean" in f.keys() else None
            encoder, layer = meta["encoder"], int(meta["layer"])
        except Exception as e:  # safetensors has no public base class for its errors
            raise SystemExit(f"{path}: not a codebook ({e}); `python prepare_units.py fit` makes one") from None
        frames = load_encoder(encoder, layer, device)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return cls(frames, centroids, mean,
                   Fingerprint(encoder, layer, frames.rate_hz, len(centroids), True, sha256))

    def features(self, waves: list[np.ndarray]) -> list[Tensor]:
        """Waves (T,) at 16 kHz -> what k-means sees, (frames, hidden), free of the encoder's absolute position."""
        return [x if self.position_mean is None else x - self.position_mean[p] for x, p in self.encoder(waves)]

    def frames(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        """Waves (T,) at 16 kHz -> one unit per frame, before dedup."""
        for wave in waves:
            check_wave(wave)
        return [assign(x, self.centroids).cpu().numpy() for x in self.features(waves)]

    def encode_batch(self, waves: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Waves (T,) at 16 kHz -> (units, durations) of each; the same whatever else is in the batch."""
        return [dedup(frames) for frames in self.frames(waves)]

    def encode(self, wave: np.ndarray, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
        """Mono float wave (T,) -> units (N,), durations (N,) in frames. ValueError if it is silent, NaN or too short.

        encode(two seconds of speech, 16_000) -> [413, 77, 20, …], [2, 1, 1, …] with durations summing to 50
        """
        return self.encode_batch([resample(np.asarray(wave, dtype=np.float32), sample_rate, SAMPLE_RATE)])[0]


def assign(x: Tensor, centroids: Tensor, chunk: int = 1 << 16) -> Tensor:
    """Index (N,) of the nearest centroid (K, D) of each row of x (N, D)."""
    half_norm = centroids.square().sum(1) / 2
    return torch.cat([(half_norm - part @ centroids.T).argmin(1) for part in x.split(chunk)])


# ---------------------------------------------------------------- fitting

def kmeans(x: Tensor, k: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Lloyd's algorithm from a k-means++ start (Arthur & Vassilvitskii 2007): centroids (k, D) and mean inertia."""
    start = x[torch.randperm(len(x), generator=generator)[:50 * k]]
    centroids = start[:1]
    nearest = (start - centroids).square().sum(1)
    for _ in tqdm(range(k - 1), disable=None, desc="k-means++", leave=False):
        chosen = start[torch.multinomial(nearest, 1, generator=generator)]
        centroids = torch.cat([centroids, chosen])
        nearest = torch.minimum(nearest, (start - chosen).square().sum(1))
    inertia = math.inf
    bar = tqdm(range(iterations), disable=None, desc="k-means")
    for _ in bar:
        labels = assign(x, centroids)
        distance = (x - centroids[labels]).square().sum(1)
        previous, inertia = inertia, distance.mean().item()
        bar.set_postfix(inertia=f"{inertia:.4f}")
        if previous - inertia < 1e-5 * inertia:
            break
        counts = torch.bincount(labels, minlength=k)
        centroids = torch.zeros_like(centroids).index_add_(0, labels, x) / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        centroids[empty] = x[distance.topk(len(empty)).indices]  # re-seed with the worst-served frames
    return centroids, inertia


def position_mean(encoder, waves: list[np.ndarray], rng: np.random.Generator) -> Tensor:
    """Mean feature at each position of the encoder's window, (window, D), smoothed over a second.

    Whisper's features drift with absolute position. The mean is taken over full windows cut anywhere out of the joined
    corpus: over whole files it would also remove what files tend to begin with.
    """
    joined = np.concatenate(waves)
    size = encoder.window * encoder.samples_per_frame
    if len(joined) < 2 * size:
        raise SystemExit(f"{len(joined) / SAMPLE_RATE:.0f} s of audio; fitting a codebook needs minutes at least")
    n = min(120, len(joined) // size)
    total = 0
    for start in tqdm(rng.integers(0, len(joined) - size, n), disable=None, desc="position mean"):
        total = total + encoder([joined[start:start + size]])[0][0]
    mean = (total / n).T[None]
    return F.avg_pool1d(F.pad(mean, (12, 12), mode="replicate"), 25, stride=1)[0].T.contiguous()


def crop_agreement(tokenizer: SpeechTokenizer, waves: list[np.ndarray], rng: np.random.Generator, n: int = 20) -> float:
    """Share of frames that keep their unit when 10 s are cut out of a longer recording (30 s of joined files)."""
    spf = tokenizer.encoder.samples_per_frame
    joined, rate = np.concatenate(waves), round(tokenizer.encoder.rate_hz)
    equal = []
    for start in rng.integers(0, max(1, len(joined) - 30 * SAMPLE_RATE), n):
        whole = joined[start:start + 30 * SAMPLE_RATE]
        offset = int(rng.integers(0, max(1, len(whole) // spf - 10 * rate)))
        crop = whole[offset * spf:(offset + 10 * rate) * spf]
        a, b = tokenizer.frames([whole])[0], tokenizer.frames([crop])[0]
        b = b[:len(a) - offset]
        equal.append((a[offset:offset + len(b)] == b).mean())
    return float(np.mean(equal))


def fit(cfg: FitConfig) -> None:
    """Fit a codebook and write it with what it was fitted on and how well it does."""
    out = Path(cfg.codebook)
    if out.exists() and not cfg.overwrite:
        raise SystemExit(f"{out} exists; --overwrite replaces it")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load_encoder(cfg.encoder, cfg.layer, device)
    rng = np.random.default_rng(cfg.seed)
    paths = find_audio(cfg.input)
    waves, seconds, skipped = [], 0.0, []
    bar = tqdm(total=cfg.hours, disable=None, desc="reading", unit="h")
    for i in rng.permutation(len(paths)):
        try:
            waves.append(load_audio(paths[i]))
        except ValueError as e:
            skipped.append(e)
            continue
        seconds += len(waves[-1]) / SAMPLE_RATE
        bar.update(len(waves[-1]) / SAMPLE_RATE / 3600)
        if seconds >= cfg.hours * 3600:
            break
    bar.close()
    mean = position_mean(encoder, waves, rng) if isinstance(encoder, WhisperFrames) else None
    x = []
    for wave in tqdm(waves, disable=None, desc="features"):
        features, positions = encoder([wave])[0]
        x.append(features if mean is None else features - mean[positions])
    x = torch.cat(x)
    if len(x) < 10 * cfg.n_units:
        raise SystemExit(f"{cfg.input}: {len(x)} frames are too few for {cfg.n_units} units")
    centroids, inertia = kmeans(x, cfg.n_units, cfg.iterations, torch.Generator().manual_seed(cfg.seed))
    tensors = {"centroids": centroids.half().contiguous()}
    if mean is not None:
        tensors["position_mean"] = mean.half().contiguous()
    placeholder = Fingerprint(cfg.encoder, cfg.layer, encoder.rate_hz, cfg.n_units, True, "")
    tokenizer = SpeechTokenizer(encoder, tensors["centroids"].float(),
                                None if mean is None else tensors["position_mean"].float(), placeholder)
    agreement = crop_agreement(tokenizer, waves, rng)
    units_per_second = np.mean([len(dedup(f)[0]) / (len(f) / encoder.rate_hz) for f in tokenizer.frames(waves[:20])])
    report = {"encoder": cfg.encoder, "layer": cfg.layer, "n_units": cfg.n_units, "hours": round(seconds / 3600, 3),
              "inertia": round(inertia, 4), "crop_agreement": round(agreement, 4),
              "units_per_second": round(float(units_per_second), 2), "seed": cfg.seed}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out.with_suffix(".part"), metadata={k: str(v) for k, v in report.items()})
    os.replace(out.with_suffix(".part"), out)
    print(json.dumps(report))
    report_skipped(skipped)
    print(f"wrote {out}")


# ---------------------------------------------------------------- a corpus

def find_audio(folder: str) -> list[Path]:
    """Audio files below a folder (or the one file), sorted. SystemExit if there are none."""
    root = Path(folder)
    if not folder or not root.exists():
        raise SystemExit(f"--input={folder}: no such folder or file; give a folder of audio files")
    paths = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
    if not paths:
        raise SystemExit(f"{root}: no audio files in it ({', '.join(sorted(AUDIO_SUFFIXES))})")
    return paths


def report_skipped(skipped: list) -> None:
    for reason in skipped:
        print(f"skipped {reason}", file=sys.stderr)


def main(cfg: Config) -> None:
    paths, root = find_audio(cfg.input), Path(cfg.input)
    tokenizer = SpeechTokenizer.load(cfg.tokenizer, "cuda" if torch.cuda.is_available() else "cpu")
    out = Path(cfg.out)
    if cfg.overwrite:
        for old in out.glob("[0-9]" * 5 + ".safetensors"):  # unit files, and nothing that only ends like them
            old.unlink()
    skipped, seconds = [], 0.0
    with UnitWriter(out, tokenizer.fingerprint, str(root), cfg.durations, cfg.shard_tokens) as writer:
        names = {p: str(p.relative_to(root) if root.is_dir() else p.name) for p in paths}
        todo = [p for p in paths if names[p] not in writer.done]
        resumed = len(paths) - len(todo)
        batch, waves = [], []
        for i, path in enumerate(tqdm(todo, disable=None, desc="units", unit="file")):
            try:
                waves.append(load_audio(path))
                batch.append(names[path])
            except ValueError as e:
                skipped.append(e)
            if waves and (sum(map(len, waves)) >= cfg.batch_seconds * SAMPLE_RATE or i == len(todo) - 1):
                for name, wave, (units, durations) in zip(batch, waves, tokenizer.encode_batch(waves)):
                    writer.add(name, units, durations)
                    seconds += len(wave) / SAMPLE_RATE
                batch, waves = [], []
    report_skipped(skipped)
    print(f"{out}: {len(todo) - len(skipped)} files, {seconds / 3600:.2f} h added; {resumed} were there already; "
          f"{len(skipped)} skipped")
    if skipped and len(skipped) == len(paths):
        raise SystemExit(f"{root}: not one usable file")


if __name__ == "__main__":
    if sys.argv[1:2] == ["fit"]:
        fit(load_config(FitConfig, sys.argv[2:], __doc__))
    else:
        main(load_config(Config, sys.argv[1:], __doc__))
