"""Units to speech: our own vocoder and its training, and the published unit HiFi-GAN.

In:  unit files with durations (prepare_units.py --durations) and the audio they came from.
Out: a run folder: vocoder.safetensors, which carries the fingerprint of the units that it speaks, log.jsonl, and
     samples/ to listen to and to look at.

    python vocoder.py train config/vocoder_embedded.py     # 45 minutes on two CPU cores for assets/'s
    python vocoder.py train config/vocoder_gpu.py --units out/my_units --audio my_speech --out out/my_vocoder

Ours is of the Vocos kind (Siuzdak 2023): ConvNeXt blocks that end in magnitudes and phases, 100 frames a second, and an
inverse STFT. Nothing is computed at the sample rate, so it speaks many times faster than real time on a laptop; and as
the inverse STFT knows what a wave is, spectral losses alone teach it to be understood, where there is no GPU for
discriminators.
"""
import copy
import functools
import json
import math
import os
import re
import shutil
import signal
import struct
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Iterable, Iterator, Literal

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from tqdm import tqdm

from audio import SAMPLE_RATE, load_audio
from config import load_config, save_config
from embedded import TWIST_URL, check_sha256, download
from units import Fingerprint, UnitReader, find_speaking, published_fingerprint, require_same, same_units

EMBEDDED_VOCODER = Path(__file__).parent / "assets" / "vocoder.safetensors"
# The vocoder of mHuBERT-25hz's 500 units and its config; of their sha256 the first and last digits are known.
PUBLISHED = {"hifigan_lj_mhubert_base_25hz.pt": ("d88224e9", "3b79"),
             "hifigan_lj_mhubert_base_25hz_config.json": ("116dc39b", "6afc7")}


@dataclass
class Config:
    """Train a vocoder on units, durations and audio."""
    units: str = "out/corpus_units"  # unit files with durations
    audio: str = "out/corpus/audio"  # folder that the units' ids are relative to
    out: str = "out/vocoder"  # run folder: vocoder.safetensors, log.jsonl, trainer.pt, samples/
    init: str = ""  # a vocoder of ours (a file, or embedded) to start from, to learn another voice, say
    width: int = 256  # channels
    blocks: int = 5  # ConvNeXt blocks at the unit rate, and as many again at 100 Hz
    minutes: float = 60.0  # length of the training; validation and saving are not counted
    steps: int | None = None  # length of the training in steps; none: minutes decide
    batch: int = 16  # crops in a step
    crop_seconds: float = 1.28  # of each crop
    lr: float = 1e-3  # peak; 100 steps of warm-up, cosine to zero
    clip: float = 1.0  # gradient norm
    ema: float = 0.999  # decay of the averaged weights that are kept
    adversarial: bool | None = None  # discriminators beside the spectral losses; none: on a GPU
    adversarial_from: float = 0.1  # share of the training after which they join
    adversarial_lr: float = 2e-4  # of the discriminators
    disc_width: int = 32  # channels of the discriminators' first layers
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the computation; spectra are float32
    max_hours: float = 50.0  # audio kept in memory, 0.12 GB an hour; of a larger corpus its beginning
    val_every: int = 25  # one utterance in so many is held out
    log_every: int = 50  # steps
    save_every: int = 1000  # steps; with each save held-out utterances are spoken into samples/
    seed: int = 0  # of weights and crops
    resume: bool = False  # go on with the run in `out`
    overwrite: bool = False  # start anew

    def problems(self) -> list[str]:
        """Cross-field checks of the loader."""
        positive = ("width", "blocks", "minutes", "batch", "lr", "disc_width", "log_every", "save_every", "max_hours")
        found = [f"{name} must be positive" for name in positive if getattr(self, name) <= 0]
        found += ["steps must be positive"] * (self.steps is not None and self.steps <= 0)
        found += ["crop_seconds must be at least 0.2"] * (self.crop_seconds < 0.2)
        found += ["val_every must be at least 2"] * (self.val_every < 2) + ["ema must be in [0, 1)"] * (
            not 0 <= self.ema < 1) + ["resume or overwrite, not both"] * (self.resume and self.overwrite)
        return found


# ---------------------------------------------------------------- spectra: to learn from, to measure, to look at

def mel_filters(n_fft: int, n_mels: int, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Slaney's triangular mel filters, (n_mels, n_fft // 2 + 1), from 0 Hz to half the sample rate."""
    from transformers.audio_utils import mel_filter_bank
    bank = mel_filter_bank(n_fft // 2 + 1, n_mels, 0.0, sample_rate / 2, sample_rate, norm="slaney", mel_scale="slaney")
    return torch.tensor(bank.T, dtype=torch.float32)


def magnitudes(wave: Tensor, n_fft: int, hop: int) -> Tensor:
    """(..., T) -> (..., n_fft // 2 + 1, T // hop + 1)."""
    window = torch.hann_window(n_fft, device=wave.device)
    return torch.stft(wave, n_fft, hop, window=window, return_complex=True).abs()


def log_mel(wave: Tensor, sample_rate: int = SAMPLE_RATE, n_mels: int = 80) -> Tensor:
    """(T,) -> (frames, n_mels), natural log of mel magnitudes every 10 ms."""
    n_fft = 2 ** round(math.log2(sample_rate * 0.064))
    wave = F.pad(wave, (0, max(0, n_fft - len(wave))))
    mel = mel_filters(n_fft, n_mels, sample_rate).to(wave.device) @ magnitudes(wave, n_fft, sample_rate // 100)
    return mel.clamp(min=1e-4).log().T


def mel_cepstral_distance(a: np.ndarray, b: np.ndarray, sample_rate: int = SAMPLE_RATE) -> float:
    """Mean distance in dB of 13 mel-cepstral coefficients, loudness left out, of waves aligned in time (Kubichek 1993).

    Both are cut to the shorter. 0 for equal waves; stories in the embedded voice are 9.5 dB from each other, and 3.3 dB
    from themselves 20 ms later.
    """
    n = min(len(a), len(b))
    mel_a, mel_b = (log_mel(torch.from_numpy(x[:n]).float(), sample_rate) for x in (a, b))
    return cepstral_distance(mel_a, mel_b).mean().item()


def cepstral_distance(mel_a: Tensor, mel_b: Tensor) -> Tensor:
    """Log-mels (frames, n_mels) -> dB (frames,): 10 / ln 10 * sqrt(2 * the sum of 13 squared differences).

    Coefficients as in log |H| = c_0 + sum c_m cos(m w), so that a ripple of one neper is 6.14 dB.
    """
    n_mels = mel_a.shape[1]
    angles = math.pi * torch.arange(1, 14)[:, None] * (torch.arange(n_mels) + 0.5) / n_mels
    return 10 / math.log(10) * math.sqrt(2) * ((mel_a - mel_b) @ (2 / n_mels * angles.cos()).T).norm(dim=1)


def spectrogram(wave: np.ndarray, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """(T,) -> a picture (80, frames) uint8 of the log-mel spectrogram, low tones below; 255 is 80 dB above 0."""
    mel = log_mel(torch.from_numpy(np.asarray(wave, dtype=np.float32)), sample_rate).numpy().T[::-1]
    return (255 * np.clip(1 + (mel - max(0.0, mel.max())) / 9.2, 0, 1)).round().astype(np.uint8)


def png(levels: np.ndarray) -> bytes:
    """An image file of levels (height, width) uint8, from black by way of violet and orange to white."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    stops = np.array([[4, 4, 18], [72, 18, 100], [188, 54, 84], [249, 142, 60], [252, 253, 220]])
    palette = np.stack([np.interp(np.arange(256), np.linspace(0, 255, 5), c) for c in stops.T], 1).round()
    rows = np.pad(levels, ((0, 0), (1, 0)))  # each row begins with the number of its filter, 0 for none
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", *levels.shape[::-1], 8, 3, 0, 0, 0)) + \
        chunk(b"PLTE", palette.astype(np.uint8).tobytes()) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + \
        chunk(b"IEND", b"")


# ---------------------------------------------------------------- what speaks units

def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (T,) int64 -> (B, T) with zeros behind them, and the mask (B, T) of what is theirs."""
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


class Vocoder(nn.Module):
    """What speaks units: `Vocoder.load("embedded").synthesize([413, 77, 20]) -> (wave, 16000)`.

    A kind of vocoder (`Vocos`, `HifiGan`) has these fields and the first two methods; the rest follows.
    """
    fingerprint: Fingerprint  # of the units
    sample_rate: int
    hop: int  # samples of a frame, that is of one unit of duration 1
    context: int  # how many frames away a frame can still be heard
    duration_context: int  # how many units away a unit can still change a predicted duration

    def waves(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        """Units per frame (B, T) int64, mask (B, T) bool (None: all are) -> waves (B, T * hop), float32."""
        raise NotImplementedError

    def frame_counts(self, units: Tensor, mask: Tensor | None) -> Tensor:
        """Units (B, N) int64, mask (B, N) bool (None: all are) -> predicted frames of each (B, N) int64, at least 1."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def check(self, units: Iterable[int]) -> Tensor:
        """Units as a tensor (N,) on the device. ValueError if there are none, or some are out of range."""
        units = np.asarray(units, dtype=np.int64)
        if not len(units) or units.min() < 0 or units.max() >= self.fingerprint.n_units:
            raise ValueError(f"units must be a non-empty list of numbers from 0 to {self.fingerprint.n_units - 1}")
        return torch.from_numpy(units).to(self.device)

    @torch.inference_mode()
    def predict_durations(self, units: list[int]) -> np.ndarray:
        """Units (N,) -> frames of each (N,), at least 1."""
        return self.frame_counts(self.check(units)[None], None)[0].cpu().numpy()

    @torch.inference_mode()
    def synthesize_batch(self, batch: list[list[int]], durations: list | None = None) -> list[np.ndarray]:
        """Several times units (N,), and durations (N,) in frames (None: predicted) -> waves (T,) float32 in [-1, 1].

        Each wave is what it would be by itself, of sum(durations) * hop samples. ValueError as in `check`.
        """
        rows = [self.check(units) for units in batch]
        if durations is None:
            units, mask = pad(rows)
            counts = [c[:len(row)] for c, row in zip(self.frame_counts(units, None if mask.all() else mask), rows)]
        else:
            counts = [torch.as_tensor(np.asarray(d, dtype=np.int64)).to(self.device) for d in durations]
        frames, mask = pad([row.repeat_interleave(c) for row, c in zip(rows, counts)])
        waves = self.waves(frames, None if mask.all() else mask).clamp(-1, 1).cpu().numpy()
        return [wave[:n * self.hop] for wave, n in zip(waves, mask.sum(1).tolist())]

    def synthesize(self, units: list[int], durations: list[int] | None = None) -> tuple[np.ndarray, int]:
        """Units (N,), durations (N,) in frames (None: predicted) -> wave (T,) float32 in [-1, 1], sample rate."""
        return self.synthesize_batch([units], None if durations is None else [durations])[0], self.sample_rate

    @torch.inference_mode()
    def stream(self, parts: Iterable[list[int]]) -> Iterator[np.ndarray]:
        """Units, a part at a time -> pieces of the wave that `synthesize` makes of all, each as soon as it is settled.

        A piece comes when the units after it, `context` frames and `duration_context` units, are there.
        """
        units, counts, said = [], torch.zeros(0, dtype=torch.int64, device=self.device), 0
        for part in chain(parts, [None]):  # None: there is no more to come
            units += [] if part is None else list(part)
            if not units:
                continue
            row = self.check(units)
            start = max(0, len(counts) - self.duration_context)
            fresh = self.frame_counts(row[None, start:], None)[0]
            settled = len(units) - (0 if part is None else self.duration_context)
            counts = torch.cat([counts, fresh[len(counts) - start:max(0, settled - start)]])
            frames = row[:len(counts)].repeat_interleave(counts)
            ready = len(frames) - (0 if part is None else self.context)
            if ready > said:
                first = max(0, said - self.context)
                wave = self.waves(frames[None, first:], None)[0, (said - first) * self.hop:(ready - first) * self.hop]
                yield wave.clamp(-1, 1).cpu().numpy()
                said = ready

    @classmethod
    def load(cls, name: str = "embedded", speaker: int = 0) -> "Vocoder":
        """Load `embedded`, `published`, a .safetensors of ours, or a unit HiFi-GAN (.pt with its config beside it).

        speaker: of a HiFi-GAN with several. `published` is fetched into the cache. SystemExit if it is missing, altered
        or not a vocoder.
        """
        if name == "published":
            path, _ = (download(TWIST_URL + file, *sha256) for file, sha256 in PUBLISHED.items())
        else:
            path = EMBEDDED_VOCODER if name == "embedded" else Path(name)
        if not path.is_file():
            raise SystemExit(f"{path}: no such vocoder; `python vocoder.py train` makes one")
        vocoder = HifiGan.read(path, speaker) if path.suffix == ".pt" else Vocos.read(path)
        return vocoder.eval()


def find_vocoder(fingerprint: Fingerprint, published: bool = False, folder: str = "out") -> str:
    """The vocoder of these units: `embedded`, a file below a folder, or `published`. SystemExit if there is none.

    published: the units are known to be of the published codebook.
    """
    def read(path: Path) -> Fingerprint:
        with safe_open(path, "pt") as f:
            return Fingerprint.of(json.loads(f.metadata()["fingerprint"]))

    found = find_speaking(fingerprint, EMBEDDED_VOCODER, folder, "duration_units.weight", read)
    known = published or not fingerprint.codebook_sha256
    if not found and known and same_units(fingerprint, published_fingerprint(502)):
        return "published"
    if not found:
        raise SystemExit(f"no vocoder below {folder}/ speaks {fingerprint}; `python vocoder.py train` makes one, and "
                         f"--vocoder names one that is elsewhere")
    return found


def vocoder_for(tokenizer, name: str, speaker: int = 0, durations: bool = False) -> tuple[Vocoder, str]:
    """A vocoder for a SpeechTokenizer's units, on its device, and the vocoder's name; an empty `name`: one is found.

    durations: they will be known, so that it need not predict any. SystemExit if it does not fit.
    """
    fingerprint = tokenizer.base_fingerprint
    name = name or find_vocoder(fingerprint, tokenizer.published)
    vocoder = Vocoder.load(name, speaker).to(tokenizer.encoder.device)
    require_same(fingerprint, "tokenizer", vocoder.fingerprint, f"vocoder {name}")
    try:
        durations or vocoder.predict_durations([0])
    except ValueError as e:
        raise SystemExit(f"{name}: {e}") from None
    return vocoder, name


# ---------------------------------------------------------------- ours

HOP, N_FFT = 160, 640  # 100 frames a second, four of which overlap


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


class Block(nn.Module):
    """ConvNeXt block over time (Liu et al. 2022): depthwise convolution, norm, MLP, residual; (B, T, C), masked."""
    REACH = 3  # frames to either side

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 2 * self.REACH + 1, padding=self.REACH, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.conv(masked(x, mask).transpose(1, 2)).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm(y))))


class Vocos(Vocoder):
    """Units -> magnitudes and phases -> inverse STFT; a duration predictor beside it."""
    sample_rate = SAMPLE_RATE

    def __init__(self, fingerprint: Fingerprint, width: int = 256, blocks: int = 5):
        super().__init__()
        self.fingerprint, self.width, self.blocks = fingerprint, width, blocks
        self.hop = round(SAMPLE_RATE / fingerprint.unit_rate_hz)
        self.upsampling = self.hop // HOP
        if self.hop % HOP:
            raise ValueError(f"units at {fingerprint.unit_rate_hz:g} Hz; {SAMPLE_RATE // HOP} must be a multiple of it")
        self.units = nn.Embedding(fingerprint.n_units, width)
        self.low = nn.ModuleList(Block(width) for _ in range(blocks))
        self.spread = nn.Linear(width, self.upsampling * width)
        self.high = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, N_FFT + 2))
        self.duration_units = nn.Embedding(fingerprint.n_units, width)
        self.duration_blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.duration = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        self.register_buffer("window", torch.hann_window(N_FFT) / 2, persistent=False)  # four of them add up to one
        self.context = blocks * Block.REACH + -(-(blocks * Block.REACH + N_FFT // HOP) // self.upsampling)
        self.duration_context = 2 * Block.REACH

    def waves(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        mask, x = mask if mask is None else mask[..., None], self.units(frames)
        for block in self.low:
            x = block(x, mask)
        x = self.spread(x).unflatten(-1, (self.upsampling, self.width)).flatten(1, 2)
        mask = mask if mask is None else mask.repeat_interleave(self.upsampling, 1)
        for block in self.high:
            x = block(x, mask)
        magnitude, phase = self.head(x).float().chunk(2, -1)
        magnitude = magnitude.clamp(max=7.0).exp()
        return self.inverse_stft(torch.polar(magnitude if mask is None else magnitude * mask, phase))

    def inverse_stft(self, spectrum: Tensor) -> Tensor:
        """(B, T, N_FFT // 2 + 1) complex -> (B, T * HOP): windowed frames, each about its own HOP samples, added up.

        torch.istft divides by the sum of the windows that are there, so that its edges depend on the padding.
        """
        B, T, _ = spectrum.shape
        parts = (torch.fft.irfft(spectrum, N_FFT) * self.window).unflatten(-1, (N_FFT // HOP, HOP))
        wave = parts.new_zeros(B, T + N_FFT // HOP - 1, HOP)
        for i in range(N_FFT // HOP):
            wave[:, i:i + T] += parts[:, :, i]
        before = (N_FFT - HOP) // 2
        return wave.flatten(1)[:, before:before + T * HOP]

    def log_durations(self, units: Tensor, mask: Tensor | None) -> Tensor:
        """Units (B, N), mask (B, N) -> log frames of each (B, N)."""
        x = self.duration_units(units)
        for block in self.duration_blocks:
            x = block(x, mask if mask is None else mask[..., None])
        return self.duration(x)[..., 0]

    def frame_counts(self, units: Tensor, mask: Tensor | None) -> Tensor:
        return self.log_durations(units, mask).float().exp().round().clamp(min=1).long()

    @classmethod
    def read(cls, path: Path) -> "Vocos":
        """From a file that `save` wrote. SystemExit if it is none."""
        try:
            with safe_open(path, "pt") as f:
                meta = {k: json.loads(v) for k, v in f.metadata().items()}
                state = {k: f.get_tensor(k).float() for k in f.keys()}
            vocoder = cls(Fingerprint.of(meta["fingerprint"]), meta["width"], meta["blocks"])
            vocoder.load_state_dict(state)
        except Exception as e:  # a file can be wrong in many ways
            raise SystemExit(f"{path}: not a vocoder file ({str(e).splitlines()[0]})") from None
        return vocoder

    def save(self, path: Path, **report) -> None:
        """Write weights (fp16), shape, fingerprint and `report` as one safetensors file."""
        state = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        meta = {"fingerprint": self.fingerprint.to_dict(), "width": self.width, "blocks": self.blocks} | report
        path.with_suffix(".part").write_bytes(save(state, {k: json.dumps(v) for k, v in meta.items()}))
        os.replace(path.with_suffix(".part"), path)


# ---------------------------------------------------------------- the published one

def fold_weight_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """weight_g, weight_v -> weight = g v / |v|, a norm per entry of the first dimension (Salimans & Kingma 2016)."""
    folded = {k: v for k, v in state.items() if not k.endswith((".weight_g", ".weight_v"))}
    for name in (k.removesuffix("_v") for k in state if k.endswith(".weight_v")):
        g, v = state[f"{name}_g"].float(), state[f"{name}_v"].float()
        folded[name] = v * (g / v.flatten(1).norm(dim=1).view_as(g))
    return folded


class ResBlock(nn.Module):
    """HiFi-GAN's residual block: pairs of a dilated and a plain convolution; (B, C, T)."""

    def __init__(self, width: int, kernel: int, dilations: list[int]):
        super().__init__()
        self.convs1 = nn.ModuleList(nn.Conv1d(width, width, kernel, dilation=d, padding=(kernel - 1) * d // 2)
                                    for d in dilations)
        self.convs2 = nn.ModuleList(nn.Conv1d(width, width, kernel, padding=kernel // 2) for _ in dilations)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for first, second in zip(self.convs1, self.convs2):
            y = masked(first(F.leaky_relu(x, 0.1)), mask)
            x = x + masked(second(F.leaky_relu(y, 0.1)), mask)
        return x


class DurationPredictor(nn.Module):
    """FastSpeech 2's variance predictor, without its dropout: (B, N, D) -> log(frames + 1), (B, N)."""

    def __init__(self, encoder_embed_dim: int, var_pred_hidden_dim: int, var_pred_kernel_size: int, **_):
        super().__init__()
        width, kernel = var_pred_hidden_dim, var_pred_kernel_size
        self.conv1 = nn.Sequential(nn.Conv1d(encoder_embed_dim, width, kernel, padding=(kernel - 1) // 2), nn.ReLU())
        self.ln1 = nn.LayerNorm(width)
        self.conv2 = nn.Sequential(nn.Conv1d(width, width, kernel, padding=(kernel - 1) // 2), nn.ReLU())
        self.ln2 = nn.LayerNorm(width)
        self.proj = nn.Linear(width, 1)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for conv, norm in ((self.conv1, self.ln1), (self.conv2, self.ln2)):
            x = norm(conv(masked(x, mask).transpose(1, 2)).transpose(1, 2))
        return self.proj(x)[..., 0]


class HifiGan(Vocoder):
    """The unit HiFi-GAN that came with TWIST, for inference (Kong et al. 2020, Polyak et al. 2021, Hassid et al. 2023).

    Names and config fields are those of the published files, whose weight norm is folded into the weights.
    """

    def __init__(self, config: dict, fingerprint: Fingerprint, speaker: int = 0):
        super().__init__()
        c, width = config, config["upsample_initial_channel"]
        rates, kernels = c["upsample_rates"], c["upsample_kernel_sizes"]
        if c.get("f0") or c.get("f0_quant_num_bin") or c.get("multispkr") and c.get("embedder_params"):
            raise ValueError("it wants a pitch curve or a speaker's embedding, which units do not have")
        self.fingerprint, self.speaker, self.rates = fingerprint, speaker, rates
        self.sample_rate, self.hop = c["sampling_rate"], math.prod(rates)
        self.dict = nn.Embedding(c["num_embeddings"], c["embedding_dim"])
        # Further embeddings, each beside every frame: which speaker, and which style, the first.
        self.spkr = nn.Embedding(c.get("num_speakers") or 200, c["embedding_dim"]) if c.get("multispkr") else None
        self.style = nn.Embedding(c.get("num_styles") or 100, c["embedding_dim"]) if c.get("multistyle") else None
        if self.spkr and not 0 <= speaker < self.spkr.num_embeddings:
            raise ValueError(f"speaker {speaker}; it has speakers 0 to {self.spkr.num_embeddings - 1}")
        self.conv_pre = nn.Conv1d(c["model_in_dim"], width, 7, padding=3)
        self.ups = nn.ModuleList(nn.ConvTranspose1d(width >> i, width >> i + 1, k, r, padding=(k - r) // 2)
                                 for i, (k, r) in enumerate(zip(kernels, rates)))
        shapes = list(zip(c["resblock_kernel_sizes"], c["resblock_dilation_sizes"]))
        self.resblocks = nn.ModuleList(ResBlock(width >> i + 1, *shape) for i in range(len(rates)) for shape in shapes)
        self.conv_post = nn.Conv1d(width >> len(rates), 1, 7, padding=3)
        predictor = c.get("dur_predictor_params")
        self.dur_predictor = DurationPredictor(**predictor) if predictor else None
        self.duration_context = 2 * (predictor["var_pred_kernel_size"] // 2) if predictor else 0
        reach, rate = 3.0, 1  # in frames; steps per frame
        for k, r in zip(kernels, rates):
            reach, rate = reach + k / r / rate, rate * r
            reach += max(kernel // 2 * sum(d + 1 for d in dilations) for kernel, dilations in shapes) / rate
        self.context = math.ceil(reach + 3 / rate)

    def waves(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        mask, x = mask if mask is None else mask[:, None], self.dict(frames)
        for index, table in ((self.speaker, self.spkr), (0, self.style)):
            if table:
                x = torch.cat([x, table.weight[index].expand(*x.shape[:2], -1)], -1)
        x = masked(self.conv_pre(masked(x.transpose(1, 2), mask)), mask)
        n = len(self.resblocks) // len(self.ups)
        for i, (up, rate) in enumerate(zip(self.ups, self.rates)):
            mask, n_steps = mask if mask is None else mask.repeat_interleave(rate, 2), x.shape[2] * rate
            x = masked(up(F.leaky_relu(x, 0.1))[..., :n_steps], mask)  # a kernel may make it one longer
            x = sum(block(x, mask) for block in self.resblocks[i * n:i * n + n]) / n
        return self.conv_post(F.leaky_relu(x)).tanh()[:, 0].float()  # the last slope is 0.01, as published

    def frame_counts(self, units: Tensor, mask: Tensor | None) -> Tensor:
        if not self.dur_predictor:
            raise ValueError("this vocoder has no duration predictor; give the durations")
        log = self.dur_predictor(self.dict(units), mask if mask is None else mask[..., None])
        return (log.float().exp() - 1).round().clamp(min=1).long()

    @classmethod
    def read(cls, path: Path, speaker: int = 0) -> "HifiGan":
        """From NAME.pt and NAME_config.json, or config.json, beside it. SystemExit if these are not whole."""
        beside = [path.with_name(f"{path.stem}_config.json"), path.with_name("config.json")]
        config_path = next((p for p in beside if p.is_file()), None)
        if not config_path:
            raise SystemExit(f"{path}: no {beside[0].name} or config.json beside it")
        for p in (path, config_path):
            if p.name in PUBLISHED:
                check_sha256(p, *PUBLISHED[p.name])
        try:
            config = json.loads(config_path.read_text())
            # `code_hop_size` may be missing or stale: nothing that speaks with these files needs it.
            hop = math.prod(config["upsample_rates"])
            if config.get("code_hop_size", hop) != hop:
                print(f"{config_path}: code_hop_size is {config['code_hop_size']}, but upsample_rates make frames of "
                      f"{hop} samples; {hop} is used", file=sys.stderr)
            # Whose units it speaks its files do not say; "fingerprint" in the config is for those who do.
            fingerprint = Fingerprint.of(config["fingerprint"]) if "fingerprint" in config else replace(
                published_fingerprint(config["num_embeddings"] + 2),
                unit_rate_hz=config["sampling_rate"] / hop)
            vocoder = cls(config, fingerprint, speaker)
            state = torch.load(path, map_location="cpu", weights_only=True)["generator"]
            vocoder.load_state_dict(fold_weight_norm(state))
        except Exception as e:  # a pickle can be damaged in many ways
            raise SystemExit(f"{path}: not a unit HiFi-GAN with {config_path.name} "
                             f"({type(e).__name__}: {str(e).splitlines()[0]})") from None
        return vocoder


# ---------------------------------------------------------------- losses and discriminators

class SpectralLoss(nn.Module):
    """Distance of waves (B, T) in log-mel and linear spectra of four resolutions; phases do not matter.

    Log-mel L1 (Kong et al. 2020), log-magnitude L1 and spectral convergence (Yamamoto et al. 2020), their mean.
    """
    RESOLUTIONS = {2048: 160, 1024: 80, 512: 40, 256: 20}  # window in samples: mel bands

    def __init__(self):
        super().__init__()
        for n_fft, n_mels in self.RESOLUTIONS.items():
            self.register_buffer(f"mel{n_fft}", mel_filters(n_fft, n_mels))

    def forward(self, ours: Tensor, real: Tensor) -> Tensor:
        total = 0.0
        for n_fft in self.RESOLUTIONS:
            a, b = (magnitudes(x, n_fft, n_fft // 4) for x in (ours, real))
            mel_a, mel_b = ((getattr(self, f"mel{n_fft}") @ x).clamp(min=1e-4).log() for x in (a, b))
            total = total + F.l1_loss(mel_a, mel_b) + (a - b).norm() / (2 * b.norm().clamp(min=1e-3)) + \
                F.l1_loss(a.clamp(min=1e-3).log(), b.clamp(min=1e-3).log()) / 2
        return total / len(self.RESOLUTIONS)


class Discriminator(nn.Module):
    """Convolutions over a wave folded by a period (Kong et al. 2020), or over its spectrogram (Jang et al. 2021)."""

    def __init__(self, width: int, period: int = 0, n_fft: int = 0):
        super().__init__()
        self.period, self.n_fft = period, n_fft
        kernel, stride = ((5, 1), (3, 1)) if period else ((3, 9), (1, 2))
        sizes = (1, width, 2 * width, 4 * width, 4 * width) if period else (1,) + 4 * (width,)
        padding = tuple(k // 2 for k in kernel)
        self.convs = nn.ModuleList(weight_norm(nn.Conv2d(a, b, kernel, stride, padding))
                                   for a, b in zip(sizes, sizes[1:]))
        self.last = weight_norm(nn.Conv2d(sizes[-1], 1, 3, padding=1))

    def forward(self, wave: Tensor) -> list[Tensor]:
        """(B, T) -> the feature maps of all layers, the verdict last."""
        if self.period:
            wave = F.pad(wave, (0, -wave.shape[1] % self.period), mode="reflect")
            x = wave.unflatten(1, (-1, self.period))[:, None]
        else:
            x = magnitudes(wave, self.n_fft, self.n_fft // 4).transpose(1, 2)[:, None]
        maps = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            maps.append(x)
        return [*maps, self.last(x)]


def discriminators(width: int) -> nn.ModuleList:
    """Five periods and three resolutions."""
    return nn.ModuleList([*(Discriminator(width, period=p) for p in (2, 3, 5, 7, 11)),
                          *(Discriminator(width, n_fft=n) for n in (1024, 512, 256))])


def discriminator_loss(discs: nn.ModuleList, real: Tensor, ours: Tensor) -> Tensor:
    """Least squares (Mao et al. 2017): real speech is 1, ours 0; the mean over discriminators."""
    verdicts = [(disc(real)[-1], disc(ours.detach())[-1]) for disc in discs]
    return sum((a.float() - 1).square().mean() + b.float().square().mean() for a, b in verdicts) / len(discs)


def adversarial_loss(discs: nn.ModuleList, real: Tensor, ours: Tensor) -> Tensor:
    """Ours should be taken for 1, and look like real speech in every layer (feature matching, twice as heavy)."""
    total = 0.0
    for disc in discs:
        with torch.no_grad():
            wanted = disc(real)[:-1]
        *maps, verdict = disc(ours)
        total = total + (verdict.float() - 1).square().mean() + \
            2 * sum(F.l1_loss(a.float(), b.float()) for a, b in zip(maps, wanted))
    return total / len(discs)


# ---------------------------------------------------------------- training

Utterance = tuple[np.ndarray, np.ndarray, np.ndarray]  # units (N,), durations (N,), wave (T,) int16


def load_corpus(cfg: Config, reader: UnitReader) -> list[Utterance]:
    """Every utterance with its audio; skips, counted, what has none or another's."""
    if reader.durations(0) is None:
        raise SystemExit(f"{cfg.units}: has no durations; make it with prepare_units.py --durations")
    hop, corpus, seconds, skipped = round(SAMPLE_RATE / reader.fingerprint.unit_rate_hz), [], 0.0, 0
    load = functools.lru_cache(maxsize=1)(load_audio)  # utterances of one recording follow each other
    for i, id in enumerate(tqdm(reader.ids(), disable=None, desc="audio", unit="file")):
        units, durations = reader.units(i), reader.durations(i).astype(np.int64)
        n = int(durations.sum())
        file, _, at = id.rpartition("@") if re.fullmatch(r".*@[\d.]+", id) else (id, "", "")
        try:
            wave = load(Path(cfg.audio) / file)
        except ValueError:
            skipped += 1
            continue
        if at:  # an utterance that prepare_units.py has cut out of a recording, and where it begins in seconds
            wave = wave[round(float(at) * SAMPLE_RATE):][:n * hop]
        if abs(len(wave) // hop - n) > 1:
            skipped += 1
            continue
        wave = np.pad(wave, (0, max(0, n * hop - len(wave))))[:n * hop]
        corpus.append((units, durations, (wave * 32767).round().clip(-32768, 32767).astype(np.int16)))
        seconds += n * hop / SAMPLE_RATE
        if seconds > 3600 * cfg.max_hours:
            print(f"{cfg.max_hours:g} hours are enough (max_hours); {len(reader) - i - 1} utterances are left alone")
            break
    print(f"{len(corpus)} utterances, {seconds / 3600:.2f} h; {skipped} skipped, as their audio is missing or of "
          f"another length")
    if len(corpus) < 2:
        raise SystemExit(f"{cfg.audio}: holds too little of the audio that {cfg.units} names, such as "
                         f"{next(iter(reader.ids()))}; what is in archives must be unpacked")
    return corpus


def crops(items: list[Utterance], frames: int, hop: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A random crop of each: units per frame (B, frames) int64, waves (B, frames * hop) float32.

    What is shorter is repeated: padding would teach it to speak silence into silence.
    """
    rows = []
    for units, durations, wave in items:
        x = np.repeat(units.astype(np.int64), durations)
        if len(x) < frames:
            n = -(-frames // len(x))
            x, wave = np.tile(x, n), np.tile(wave, n)
        start = int(rng.integers(0, len(x) - frames + 1))
        rows.append((x[start:start + frames], wave[start * hop:(start + frames) * hop]))
    x, waves = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
    return x, waves.float() / 32767


def duration_loss(vocoder: Vocos, items: list[Utterance], rng: np.random.Generator) -> Tensor:
    """Mean squared error of the log-durations, over 64 units in a row of each utterance.

    Of whole utterances a depthwise convolution's backward pass takes a CPU longer than all the rest.
    """
    starts = [int(rng.integers(0, max(1, len(units) - 63))) for units, _, _ in items]
    units, wanted = ([torch.from_numpy(item[k][at:at + 64].astype(np.int64)) for item, at in zip(items, starts)]
                     for k in (0, 1))
    (units, mask), (wanted, _) = pad(units), pad(wanted)
    units, mask, wanted = (x.to(vocoder.device) for x in (units, mask, wanted))
    error = vocoder.log_durations(units, mask).float() - wanted.clamp(min=1).log()
    return (error.square() * mask).sum() / mask.sum()


class Training:
    """What a run is made of, and what of it is kept for `--resume`."""
    MAY_CHANGE = {"out", "audio", "init", "minutes", "steps", "lr", "adversarial_lr", "clip", "log_every", "save_every",
                  "resume", "overwrite"}

    def __init__(self, cfg: Config, fingerprint: Fingerprint, device: torch.device, resuming: bool):
        torch.manual_seed(cfg.seed)
        self.cfg, self.out, self.device = cfg, Path(cfg.out), device
        self.vocoder = Vocos(fingerprint, cfg.width, cfg.blocks).to(device)
        if cfg.init and not resuming:
            start = Vocos.read(EMBEDDED_VOCODER if cfg.init == "embedded" else Path(cfg.init))
            require_same(fingerprint, cfg.units, start.fingerprint, cfg.init)
            if (start.width, start.blocks) != (cfg.width, cfg.blocks):
                raise SystemExit(f"{cfg.init}: width {start.width} and {start.blocks} blocks; expected {cfg.width} and "
                                 f"{cfg.blocks}")
            self.vocoder.load_state_dict(start.state_dict())
        self.average = copy.deepcopy(self.vocoder).eval().requires_grad_(False)
        self.discs = discriminators(cfg.disc_width).to(device) if cfg.adversarial else nn.ModuleList()
        how = {"betas": (0.8, 0.99), "weight_decay": 0.01, "fused": True}
        self.optimizer = torch.optim.AdamW(self.vocoder.parameters(), cfg.lr, **how)
        if self.discs:
            self.disc_optimizer = torch.optim.AdamW(self.discs.parameters(), cfg.adversarial_lr, **how)
        self.spectral = SpectralLoss().to(device)
        self.step, self.seconds = 0, 0.0

    @property
    def progress(self) -> float:
        return self.step / self.cfg.steps if self.cfg.steps else self.seconds / 60 / self.cfg.minutes

    def parts(self) -> dict:
        """What has a state."""
        both = {"vocoder": self.vocoder, "average": self.average, "discs": self.discs, "optimizer": self.optimizer}
        return both | ({"disc_optimizer": self.disc_optimizer} if self.discs else {})

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts().items()}
        path = self.out / "trainer.pt"
        torch.save(state | {"step": self.step, "seconds": self.seconds, "config": asdict(self.cfg)},
                   path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self) -> None:
        path = self.out / "trainer.pt"
        state = torch.load(path, map_location=self.device, weights_only=True)
        changed = [f"{k} was {v!r}, now {getattr(self.cfg, k)!r}" for k, v in state["config"].items()
                   if k not in self.MAY_CHANGE and getattr(self.cfg, k, v) != v]
        if changed:
            raise SystemExit(f"{self.out}: cannot resume with other settings: {'; '.join(changed)}")
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        print(f"resuming {self.out} at step {self.step}")

    def update(self, items: list[Utterance], rng: np.random.Generator, autocast) -> dict[str, Tensor]:
        """One step on crops of `items`; the losses, and the gradient's norm, on the device."""
        cfg, vocoder = self.cfg, self.vocoder
        frames, real = crops(items, round(cfg.crop_seconds * vocoder.fingerprint.unit_rate_hz), vocoder.hop, rng)
        frames, real = frames.to(self.device), real.to(self.device)
        self.optimizer.param_groups[0]["lr"] = lr = \
            cfg.lr * min(1, (self.step + 1) / 100) * (1 + math.cos(math.pi * min(1.0, self.progress))) / 2
        with autocast():
            ours, durations = vocoder.waves(frames, None), duration_loss(vocoder, items, rng)
        losses = {"spectral": self.spectral(ours, real), "duration": durations}
        loss = losses["spectral"] + 0.2 * durations
        if self.discs and self.progress >= cfg.adversarial_from:
            with autocast():
                losses["discriminators"] = discriminator_loss(self.discs, real, ours)
            losses["discriminators"].backward()
            self.disc_optimizer.param_groups[0]["lr"] = cfg.adversarial_lr * lr / cfg.lr
            self.disc_optimizer.step()
            self.disc_optimizer.zero_grad()
            self.discs.requires_grad_(False)  # their gradients would be computed for nothing
            with autocast():
                losses["adversarial"] = adversarial_loss(self.discs, real, ours)
            loss = loss + 0.1 * losses["adversarial"]
        loss.backward()
        self.discs.requires_grad_(True)
        losses["norm"] = nn.utils.clip_grad_norm_(vocoder.parameters(), cfg.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        decay = min(cfg.ema, (1 + self.step) / (10 + self.step))  # the first weights are soon forgotten
        torch._foreach_lerp_(list(self.average.parameters()), [p.detach() for p in vocoder.parameters()], 1 - decay)
        return {name: x.detach() for name, x in losses.items()}

    @torch.inference_mode()
    def validate(self, held_out: list[Utterance]) -> dict:
        """Held-out utterances spoken with their own durations by the averaged weights; the first three are kept."""
        distances, clipped, n = [], 0, 0
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        for i, (units, durations, wave) in enumerate(held_out[:16]):
            real, (ours, rate) = wave.astype(np.float32) / 32767, self.average.synthesize(units, durations)
            distances.append(mel_cepstral_distance(ours, real))
            clipped, n = clipped + int((np.abs(ours) >= 1).sum()), n + len(ours)
            if i < 3:
                soundfile.write(folder / f"{i}_original.wav", real, rate)
                soundfile.write(folder / f"{i}_step{self.step:06d}.wav", ours, rate)
                both = np.concatenate([spectrogram(x[:10 * rate], rate) for x in (real, ours)])  # ours below
                (folder / f"{i}_step{self.step:06d}.png").write_bytes(png(both.repeat(2, 0)))
        durations = duration_loss(self.average, held_out[:64], np.random.default_rng(1)).item()
        return {"step": self.step, "minutes": round(self.seconds / 60, 2),
                "val_mel_cepstral_distance_db": round(float(np.mean(distances)), 3),
                "val_duration_loss": round(durations, 4), "val_clipped_share": clipped / n}


def train(cfg: Config) -> None:
    from train import autocast, pick_device
    device, out = pick_device(), Path(cfg.out)
    cfg.adversarial = device.type == "cuda" if cfg.adversarial is None else cfg.adversarial
    resuming, found = cfg.resume and (out / "trainer.pt").exists(), {p.name for p in out.glob("*")}
    if found and not resuming and not (cfg.resume and found <= {"config.json", "log.jsonl"}):
        if not cfg.overwrite:
            raise SystemExit(f"{out} exists; --resume goes on with a run of ours, --overwrite starts anew")
        if "log.jsonl" not in found:
            raise SystemExit(f"{out} is not a run's folder, so --overwrite leaves it alone; choose another --out")
    reader = UnitReader(cfg.units)
    try:
        run = Training(cfg, reader.fingerprint, device, resuming)
    except ValueError as e:
        raise SystemExit(f"{cfg.units}: {e}") from None
    if resuming:
        run.load()
        if run.progress >= 1:
            print(f"{out} is finished already")
            return
    corpus = load_corpus(cfg, reader)
    held_out, corpus = corpus[::cfg.val_every], [x for i, x in enumerate(corpus) if i % cfg.val_every]
    if cfg.overwrite:
        shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    save_config(cfg, out / "config.json")
    log = out / "log.jsonl"
    lines = log.read_text().split("\n")[:-1] if resuming and log.exists() else []  # the last may have been cut
    log.with_suffix(".part").write_text("".join(x + "\n" for x in lines if json.loads(x)["step"] <= run.step))
    os.replace(log.with_suffix(".part"), log)
    print(f"{sum(p.numel() for p in run.vocoder.parameters()) / 1e6:.2f}M parameters"
          + f" and {sum(p.numel() for p in run.discs.parameters()) / 1e6:.2f}M of discriminators" * cfg.adversarial
          + f"; {len(corpus)} utterances to train on, {len(held_out)} held out; {device}")

    asked_to_stop = []

    def stop(number: int, _) -> None:
        if asked_to_stop:  # twice: at once
            raise SystemExit(asked_to_stop[0])
        asked_to_stop.append(128 + number)
        print("saving after this step", file=sys.stderr)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    bar = tqdm(total=100, disable=None, desc="vocoder", bar_format="{l_bar}{bar}| {postfix}")

    def record(line: str, **values) -> None:
        bar.write(line)
        with open(log, "a") as f:
            f.write(json.dumps(values) + "\n")

    def save() -> None:
        """Keep the run, and its averaged weights as a vocoder, and say how good these are."""
        run.save()
        report = run.validate(held_out)
        run.average.save(out / "vocoder.safetensors", report=report, config=asdict(cfg))
        record(json.dumps(report), **report)

    pending, before = [], run.seconds

    def report() -> None:
        """A log line about the steps since the last one. SystemExit if one of them was not finite."""
        nonlocal pending, before
        means = {k: torch.stack([x[k] for x in pending if k in x]).mean().item() for k in pending[-1]}
        if not all(map(math.isfinite, means.values())):
            raise SystemExit(f"step {run.step}: {means}: stopped. {out} keeps the last save; lower lr (now {cfg.lr:g}) "
                             f"or look at the audio before --resume")
        speed = len(pending) * cfg.batch * cfg.crop_seconds / max(1e-9, run.seconds - before)
        lr, minutes = run.optimizer.param_groups[0]["lr"], run.seconds / 60
        record(f"step {run.step:06d} | " + " | ".join(f"{k} {v:.4f}" for k, v in means.items()) + f" | lr {lr:.1e}"
               f" | {speed:.0f}x real time | {minutes:.2f} min"
               f" | eta {max(0.0, minutes / run.progress - minutes):.1f} min",
               step=run.step, **means, lr=lr, times_real_time=speed, minutes=minutes)
        pending, before = [], run.seconds

    started = time.perf_counter() - run.seconds
    while run.progress < 1 and not asked_to_stop:
        rng = np.random.default_rng((cfg.seed, run.step))
        items = [corpus[i] for i in rng.integers(0, len(corpus), cfg.batch)]
        pending.append(run.update(items, rng, lambda: autocast(device, cfg.dtype)))
        run.seconds = time.perf_counter() - started
        bar.update(min(100, 100 * run.progress) - bar.n)
        last, saving = run.progress >= 1 or asked_to_stop, run.step % cfg.save_every == 0
        if run.step % cfg.log_every == 0 or saving or last:
            report()
        if saving and not last:
            save()
            started = time.perf_counter() - run.seconds
    bar.close()
    save()
    if asked_to_stop:
        print(f"stopped at step {run.step}; --resume goes on", file=sys.stderr)
        raise SystemExit(asked_to_stop[0])
    print(f"wrote {out / 'vocoder.safetensors'}; listen to {out / 'samples'}")


if __name__ == "__main__":
    training = sys.argv[1:2] == ["train"]
    if not training and not {"--help", "-h"} & set(sys.argv):
        raise SystemExit(f"{__doc__.strip()}\n\nusage: python vocoder.py train [CONFIG.py ...] [--key=value ...]")
    train(load_config(Config, sys.argv[1 + training:], __doc__))
