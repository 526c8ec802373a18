"""Units to speech, inference only: what all vocoders share, and our own. The published one is in slam/hifigan.py.

    python sample.py --prompt hello.wav --resynth                # a recording spoken again from its units
    python -m slam.train_vocoder config/vocoder_embedded.py      # trains one of ours

Ours is a Vocos (Siuzdak 2023): ConvNeXt blocks predict magnitudes and phases, 100 frames a second, and an inverse STFT
makes the wave. No layer runs at the sample rate, so it is many times faster than real time on a laptop, and spectral
losses alone train it to be understood, without discriminators.
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
def pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows (T,) int64, none negative -> (B, T) with zeros on the right, and its mask (B, T), False at padding."""
    x = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    return x.clamp(min=0), x >= 0


def masked(x: Tensor, mask: Tensor | None, time: int = 1) -> Tensor:
    """x with zeros where mask (B, T) is False (None: nowhere); dimension `time` of x has T steps or a multiple of T."""
    if mask is None:
        return x
    return x * mask.repeat_interleave(x.shape[time] // mask.shape[1], 1).unsqueeze(3 - time)


class Vocoder(nn.Module):
    """Speaks units: `Vocoder.load("embedded").synthesize([413, 77, 20])` -> wave, 16000.

    A frame is the time of a unit of duration 1. A subclass sets the fields below and has the methods
        waves(frames (B, T) int64, mask) -> (B, T * hop) float32: one unit per frame to samples
        frame_counts(units (B, N) int64, mask) -> (B, N) int64, at least 1: predicted durations in frames
    """
    fingerprint: Fingerprint  # of the units it speaks
    sample_rate: int  # Hz
    hop: int  # samples per frame
    context: int  # a frame's sound depends on this many frames to either side
    duration_context: int  # a unit's predicted duration depends on this many units to either side
    predicts_durations = True

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
        return self.frame_counts(self.check(units)[None], None)[0].cpu().numpy()

    @torch.inference_mode()
    def synthesize_batch(self, batch: list[list[int]], durations: list | None = None) -> list[np.ndarray]:
        """Several utterances' units (N,) and durations (N,) in frames -> waves (T,) float32 in [-1, 1].

        durations None: predicted. Each wave has sum(durations) * hop samples and does not depend on the rest of the
        batch. ValueError as in `check`.
        """
        rows = [self.check(units) for units in batch]
        if durations is None:
            units, mask = pad(rows)
            counts = self.frame_counts(units, None if mask.all() else mask)
            durations = [n[:len(row)] for n, row in zip(counts, rows)]
        durations = [torch.as_tensor(d, device=self.device).long() for d in durations]
        frames, mask = pad([row.repeat_interleave(d) for row, d in zip(rows, durations)])
        waves = self.waves(frames, None if mask.all() else mask).clamp(-1, 1).cpu().numpy()
        return [wave[:n * self.hop] for wave, n in zip(waves, mask.sum(1).tolist())]

    def synthesize(self, units: list[int], durations: list[int] | None = None) -> tuple[np.ndarray, int]:
        """Units (N,), durations (N,) in frames (None: predicted) -> wave (T,) float32 in [-1, 1], sample rate in Hz."""
        return self.synthesize_batch([units], None if durations is None else [durations])[0], self.sample_rate

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
            counts = torch.cat([counts, self.frame_counts(row[None, start:], None)[0, n - start:settled - start]])
            frames = row[:settled].repeat_interleave(counts)
            ready, first = max(said, len(frames) - more * self.context), max(0, said - self.context)
            wave = self.waves(frames[None, first:], None)[0].clamp(-1, 1).cpu() if ready > said else torch.zeros(0)
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
    """Name of a vocoder that speaks these units: `embedded`, a file below a folder, or `published`.

    published: the units are those of the published codebook. SystemExit if no vocoder speaks them.
    """
    found = find_speaking(fingerprint, EMBEDDED_VOCODER, folder, "duration_units.weight",
                          lambda path: Vocos.read(path).fingerprint)
    if found:
        return found
    if (published or not fingerprint.codebook_sha256) and same_units(fingerprint, published_fingerprint(502)):
        return "published"
    raise SystemExit(f"no vocoder below {folder}/ speaks {fingerprint}; train one (`python -m slam.train_vocoder`) or "
                     f"name one with --vocoder")


def vocoder_for(tokenizer, name: str, speaker: int = 0, durations: bool = False) -> tuple[Vocoder, str]:
    """A vocoder for a SpeechTokenizer's units, on the tokenizer's device, and its name; name "": find one.

    durations: the caller knows the durations, so the vocoder need not predict them. SystemExit if it does not fit.
    """
    fingerprint = tokenizer.base_fingerprint
    name = name or find_vocoder(fingerprint, tokenizer.published)
    vocoder = Vocoder.load(name, speaker).to(tokenizer.encoder.device)
    require_same(fingerprint, "tokenizer", vocoder.fingerprint, f"vocoder {name}")
    if not (durations or vocoder.predicts_durations):
        raise SystemExit(f"{name}: has no duration predictor; name another --vocoder")
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

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.conv(masked(x, mask).transpose(1, 2)).transpose(1, 2)
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
        self.low = nn.ModuleList(Block(width) for _ in range(blocks))  # at the unit rate
        self.spread = nn.Linear(width, self.upsampling * width)
        self.high = nn.ModuleList(Block(width) for _ in range(blocks))  # at 100 Hz
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, N_FFT + 2))
        self.duration_units = nn.Embedding(fingerprint.n_units, width)
        self.duration_blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.duration = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        self.register_buffer("window", torch.hann_window(N_FFT) / 2, persistent=False)  # four of them add up to one
        self.context = blocks * Block.REACH + -(-(blocks * Block.REACH + N_FFT // HOP) // self.upsampling)
        self.duration_context = 2 * Block.REACH

    def waves(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        x = self.units(frames)
        for block in self.low:
            x = block(x, mask)
        x = self.spread(x).unflatten(-1, (self.upsampling, self.width)).flatten(1, 2)
        for block in self.high:
            x = block(x, mask)
        magnitude, phase = self.head(x).float().chunk(2, -1)
        return self.inverse_stft(torch.polar(masked(magnitude.clamp(max=7.0).exp(), mask), phase))

    def inverse_stft(self, spectrum: Tensor) -> Tensor:
        """(B, T, N_FFT // 2 + 1) complex -> (B, T * HOP): overlap-add of windows, each centred on its own HOP samples.

        torch.istft divides by the sum of the windows present, so its edges would change with the padding.
        """
        n = N_FFT // HOP
        parts = (torch.fft.irfft(spectrum, N_FFT) * self.window).unflatten(-1, (n, HOP))  # (B, T, n, HOP)
        wave = sum(F.pad(parts[:, :, i], (0, 0, i, n - 1 - i)) for i in range(n)).flatten(1)
        return wave[:, (N_FFT - HOP) // 2:][:, :spectrum.shape[1] * HOP]

    def log_durations(self, units: Tensor, mask: Tensor | None) -> Tensor:
        """Units (B, N) int64, mask (B, N) bool -> log of the predicted durations in frames (B, N)."""
        x = self.duration_units(units)
        for block in self.duration_blocks:
            x = block(x, mask)
        return self.duration(x)[..., 0]

    def frame_counts(self, units: Tensor, mask: Tensor | None) -> Tensor:
        return self.log_durations(units, mask).float().exp().round().clamp(min=1).long()

    @classmethod
    def read(cls, path: Path) -> "Vocos":
        """Read a file that `save` wrote. SystemExit if it is missing or not one."""
        if not path.is_file():
            raise SystemExit(f"{path}: no such vocoder; `python -m slam.train_vocoder` makes one")
        try:
            with safe_open(path, "pt") as f:
                meta = {k: json.loads(v) for k, v in f.metadata().items()}
                state = {k: f.get_tensor(k).float() for k in f.keys()}
            vocoder = cls(Fingerprint.of(meta["fingerprint"]), meta["width"], meta["blocks"])
            vocoder.load_state_dict(state)
        except Exception as e:  # a damaged or foreign file fails in many ways
            raise SystemExit(f"{path}: not a vocoder file ({str(e).splitlines()[0]})") from None
        return vocoder

    def save(self, path: Path, **report) -> None:
        """Write one safetensors file: weights (fp16); shape, fingerprint and `report` (JSON) as its metadata."""
        state = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        meta = {"fingerprint": self.fingerprint.to_dict(), "width": self.width, "blocks": self.blocks} | report
        write_atomic(path, save(state, {k: json.dumps(v) for k, v in meta.items()}))
