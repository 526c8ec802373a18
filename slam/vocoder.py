"""Units to speech, inference only: what all vocoders share, and our own. The published one is in slam/hifigan.py.

    python sample.py --prompt hello.wav --resynth                # a recording spoken again from its units
    python -m slam.train_vocoder config/vocoder_embedded.py      # trains one of ours

Ours is a Vocos (Siuzdak 2023): ConvNeXt blocks predict magnitudes and phases, 100 frames a second, and an inverse STFT
makes the wave. No layer runs at the sample rate, so it is many times faster than real time on a laptop.
"""
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from slam.audio import SAMPLE_RATE
from slam.units import Fingerprint, find_speaking, published_fingerprint, require_same, same_units, write_atomic

EMBEDDED_VOCODER = Path(__file__).parent.parent / "assets" / "vocoder.safetensors"


# ---------------------------------------------------------------- every vocoder
class Vocoder(nn.Module):
    """Speaks units: `Vocoder.load("embedded").synthesize([413, 77, 20])` -> wave, 16000.

    Durations are in frames, 1 / unit_rate_hz long each. A subclass sets the fields below and has the methods
        waves(frames (B, T) int64) -> (B, T * hop) float32: one unit per frame to samples
        frame_counts(units (B, N) int64) -> (B, N) int64, at least 1: predicted durations in frames
    """
    fingerprint: Fingerprint  # of the units it speaks
    sample_rate: int  # Hz
    hop: int  # samples per frame
    context: int  # a frame's sound depends on this many frames to either side
    duration_context: int  # a unit's predicted duration depends on this many units to either side

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def check(self, units: Iterable[int]) -> Tensor:
        """Units as a tensor (N,) on the device. ValueError if there are none or one is out of range."""
        units = np.asarray(units, dtype=np.int64)
        if not len(units) or units.min() < 0 or units.max() >= self.fingerprint.n_units:
            raise ValueError(f"units must be a non-empty list of numbers from 0 to {self.fingerprint.n_units - 1}")
        return torch.from_numpy(units).to(self.device)

    @torch.inference_mode()
    def predict_durations(self, units: list[int]) -> np.ndarray:
        """Units (N,) -> predicted duration of each in frames (N,) int64, at least 1."""
        return self.frame_counts(self.check(units)[None])[0].cpu().numpy()

    @torch.inference_mode()
    def synthesize(self, units: list[int], durations: list[int] | None = None) -> tuple[np.ndarray, int]:
        """Units (N,), durations (N,) in frames (None: predicted) -> wave (T,) float32 in [-1, 1], sample rate in Hz.

        T is sum(durations) * hop. ValueError as in `check`.
        """
        row = self.check(units)
        durations = self.frame_counts(row[None])[0] if durations is None else durations
        frames = row.repeat_interleave(torch.as_tensor(durations, device=self.device).long())
        return self.waves(frames[None])[0].clamp(-1, 1).cpu().numpy(), self.sample_rate

    @torch.inference_mode()
    def stream(self, parts: Iterable[list[int]]) -> Iterator[np.ndarray]:
        """Yield the wave of `synthesize` in pieces (T,), one for each part of the units and one at the end.

        A piece ends `duration_context` units and `context` frames before the newest unit: nothing that follows can
        change it. It may be empty.
        """
        units, counts, said = [], torch.zeros(0, dtype=torch.int64, device=self.device), 0  # `said` frames are out
        for part in chain(parts, [None]):  # None: no units follow
            more = part is not None
            units += list(part) if more else []
            if not units:
                continue
            row, n = self.check(units), len(counts)
            start, settled = max(0, n - self.duration_context), max(n, len(units) - more * self.duration_context)
            counts = torch.cat([counts, self.frame_counts(row[None, start:])[0, n - start:settled - start]])
            frames = row[:settled].repeat_interleave(counts)
            ready, first = max(said, len(frames) - more * self.context), max(0, said - self.context)
            wave = self.waves(frames[None, first:])[0].clamp(-1, 1).cpu() if ready > said else torch.zeros(0)
            yield wave[(said - first) * self.hop:(ready - first) * self.hop].numpy()
            said = ready

    @classmethod
    def load(cls, name: str = "embedded", speaker: int = 0) -> "Vocoder":
        """Load `embedded`, `published` (from the web, cached), a file of ours (.safetensors) or a unit HiFi-GAN (.pt).

        speaker: the voice of a HiFi-GAN with several. SystemExit if the file is missing, altered or not a vocoder.
        """
        if name == "published" or name.endswith(".pt"):
            from slam.hifigan import HifiGan
            return HifiGan.read(name, speaker).eval()
        return Vocos.read(EMBEDDED_VOCODER if name == "embedded" else Path(name)).eval()


def find_vocoder(fingerprint: Fingerprint, published: bool = False, folder: str = "out") -> str:
    """Name of a vocoder that speaks these units: `embedded`, a file below a folder, or `published`; else SystemExit.

    published: the units are those of the published codebook.
    """
    found = find_speaking(fingerprint, EMBEDDED_VOCODER, folder, lambda path: Vocos.read(path).fingerprint)
    if found:
        return found
    if (published or not fingerprint.codebook_sha256) and same_units(fingerprint, published_fingerprint(502)):
        return "published"
    raise SystemExit(f"no vocoder below {folder}/ speaks {fingerprint}; train one (`python -m slam.train_vocoder`) or "
                     f"name one with --vocoder")


def vocoder_for(tokenizer, name: str, speaker: int = 0) -> tuple[Vocoder, str]:
    """A vocoder for a SpeechTokenizer's units, on its device, and its name; name "": find one. SystemExit if none."""
    fingerprint = tokenizer.base_fingerprint
    name = name or find_vocoder(fingerprint, tokenizer.published)
    vocoder = Vocoder.load(name, speaker).to(tokenizer.encoder.device)
    require_same(fingerprint, "tokenizer", vocoder.fingerprint, f"vocoder {name}")
    return vocoder, name


# ---------------------------------------------------------------- ours
HOP, N_FFT = 160, 640  # samples: 100 frames a second, and any sample lies in four windows


class Block(nn.Module):
    """ConvNeXt block (Liu et al. 2022), (B, T, C) -> (B, T, C): depthwise convolution, norm, MLP, residual."""
    REACH = 3  # frames to either side

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 2 * self.REACH + 1, padding=self.REACH, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm(y))))


class Vocos(Vocoder):
    """Units -> magnitudes and phases -> inverse STFT, and a duration predictor. ValueError for a rate it can't make."""
    sample_rate = SAMPLE_RATE

    def __init__(self, fingerprint: Fingerprint, width: int = 256, blocks: int = 5):
        super().__init__()
        self.fingerprint, self.width, self.blocks = fingerprint, width, blocks
        self.hop = round(SAMPLE_RATE / fingerprint.unit_rate_hz)
        self.upsampling = self.hop // HOP
        if self.hop % HOP:
            raise ValueError(f"units at {fingerprint.unit_rate_hz:g} Hz; {SAMPLE_RATE // HOP} must be a multiple of it")
        self.units = nn.Embedding(fingerprint.n_units, width)
        self.low = nn.Sequential(*(Block(width) for _ in range(blocks)))  # at the unit rate
        self.spread = nn.Linear(width, self.upsampling * width)
        self.high = nn.Sequential(*(Block(width) for _ in range(blocks)))  # at 100 Hz
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, N_FFT + 2))
        self.duration_units = nn.Embedding(fingerprint.n_units, width)
        self.duration_blocks = nn.Sequential(Block(width), Block(width))
        self.duration = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        self.register_buffer("window", torch.hann_window(N_FFT) / 2, persistent=False)  # four of them add up to one
        self.context = blocks * Block.REACH + -(-(blocks * Block.REACH + N_FFT // HOP) // self.upsampling)
        self.duration_context = 2 * Block.REACH

    def waves(self, frames: Tensor) -> Tensor:
        x = self.low(self.units(frames))  # (B, T, width)
        x = self.spread(x).unflatten(-1, (self.upsampling, self.width)).flatten(1, 2)
        magnitude, phase = self.head(self.high(x)).float().chunk(2, -1)
        return self.inverse_stft(torch.polar(magnitude.clamp(max=7.0).exp(), phase))

    def inverse_stft(self, spectrum: Tensor) -> Tensor:
        """(B, T, N_FFT // 2 + 1) complex -> (B, T * HOP): overlap-add of windows, each centred on its own HOP samples.

        torch.istft divides by the sum of the windows present, so a part of the frames would have other edges.
        """
        n = N_FFT // HOP
        parts = (torch.fft.irfft(spectrum, N_FFT) * self.window).unflatten(-1, (n, HOP))  # (B, T, n, HOP)
        wave = sum(F.pad(parts[:, :, i], (0, 0, i, n - 1 - i)) for i in range(n)).flatten(1)
        return wave[:, (N_FFT - HOP) // 2:][:, :spectrum.shape[1] * HOP]

    def log_durations(self, units: Tensor) -> Tensor:
        """Units (B, N) int64 -> log of the predicted durations in frames (B, N)."""
        return self.duration(self.duration_blocks(self.duration_units(units)))[..., 0]

    def frame_counts(self, units: Tensor) -> Tensor:
        return self.log_durations(units).float().exp().round().clamp(min=1).long()

    @classmethod
    def read(cls, path: Path) -> "Vocos":
        """Read a file that `save` wrote. SystemExit if it is missing or not one."""
        if not path.is_file():
            raise SystemExit(f"{path}: no such vocoder; `python -m slam.train_vocoder` makes one")
        try:
            with safe_open(path, "pt") as f:
                meta = {k: json.loads(v) for k, v in f.metadata().items()}
                vocoder = cls(Fingerprint(**meta["fingerprint"]), meta["width"], meta["blocks"])
                vocoder.load_state_dict({k: f.get_tensor(k).float() for k in f.keys()})
        except Exception as e:  # a damaged or foreign file fails in many ways
            raise SystemExit(f"{path}: not a vocoder file ({str(e).splitlines()[0]})") from None
        return vocoder

    def save(self, path: Path, **report) -> None:
        """Write one safetensors file: weights (fp16); shape, fingerprint and `report` (JSON) as its metadata."""
        state = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        meta = {"fingerprint": self.fingerprint.to_dict(), "width": self.width, "blocks": self.blocks} | report
        write_atomic(path, save(state, {k: json.dumps(v) for k, v in meta.items()}))
