"""Units to speech: a small network from units to a log-mel spectrogram and a duration predictor, then Griffin-Lim.

In:  unit files with durations (prepare_units.py --durations) and the audio they came from.
Out: a vocoder file (.safetensors), which carries the fingerprint of the units that it speaks.

    python vocoder.py train config/vocoder_embedded.py     # 16 minutes on two CPU cores for the one in assets/
    python vocoder.py train config/vocoder_embedded.py --resume

A regression to the mel spectrogram needs neither a GPU nor a discriminator to be understood; it is not pretty.
"""
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from audio import load_audio
from config import load_config
from units import Fingerprint, UnitReader

EMBEDDED_VOCODER = Path(__file__).parent / "assets" / "vocoder.safetensors"


@dataclass
class Config:
    """Train a vocoder on units, durations and audio."""
    units: str = "out/corpus_units"  # unit files with durations
    audio: str = "out/corpus/audio"  # folder that the units' ids are relative to
    out: str = "out/vocoder"  # run folder: vocoder.safetensors, log.jsonl, trainer.pt
    width: int = 256  # channels
    blocks: int = 4  # ConvNeXt blocks at the unit rate, and as many again at the mel rate
    minutes: float = 16.0  # length of the training
    batch: int = 16  # crops in a step
    crop_seconds: float = 4.0  # of each crop
    lr: float = 1e-3  # peak; 2 % warm-up, cosine to zero
    ema: float = 0.99  # decay of the averaged weights that are kept
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the computation
    val_every: int = 25  # one utterance in so many is held out
    save_every: int = 500  # steps
    seed: int = 0  # of weights and crops
    resume: bool = False  # go on with the run in `out`
    overwrite: bool = False  # start anew


# ---------------------------------------------------------------- spectra

SAMPLE_RATE, N_FFT, HOP, N_MELS = 16_000, 1024, 160, 80


def mel_filters() -> Tensor:
    """Slaney-style triangular mel filters, (N_MELS, N_FFT // 2 + 1), 0 to 8 kHz."""
    from transformers.audio_utils import mel_filter_bank
    bank = mel_filter_bank(N_FFT // 2 + 1, N_MELS, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    return torch.tensor(bank.T, dtype=torch.float32)


class Spectra(nn.Module):
    """Waves to log-mel spectrograms and back; no parameters."""

    def __init__(self):
        super().__init__()
        filters = mel_filters()
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("inverse", torch.linalg.pinv(filters), persistent=False)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    def log_mel(self, wave: Tensor) -> Tensor:
        """(T,) -> (T // HOP, N_MELS), natural log of mel magnitudes."""
        spectrum = torch.stft(wave, N_FFT, HOP, window=self.window, return_complex=True)[..., :-1].abs()
        return (self.filters @ spectrum).clamp(min=1e-4).log().T

    def griffin_lim(self, log_mel: Tensor, iterations: int = 48, momentum: float = 0.99) -> Tensor:
        """(frames, N_MELS) -> (frames * HOP,): fast Griffin-Lim (Perraudin et al. 2013)."""
        mel = log_mel.exp().T
        magnitude = (self.inverse @ mel).clamp(min=1e-6)
        for _ in range(10):  # multiplicative updates towards a non-negative inverse of the filters
            magnitude *= (self.filters.T @ mel) / (self.filters.T @ (self.filters @ magnitude)).clamp(min=1e-8)
        length = mel.shape[1] * HOP
        magnitude = torch.cat([magnitude, magnitude[:, -1:]], 1)  # a centred STFT has one frame more
        generator = torch.Generator(mel.device).manual_seed(0)
        phase = torch.rand(magnitude.shape, generator=generator, device=mel.device) * 2 * math.pi
        angles, previous = torch.polar(torch.ones_like(phase), phase), 0.0
        for _ in range(iterations):
            wave = torch.istft(magnitude * angles, N_FFT, HOP, window=self.window, length=length)
            rebuilt = torch.stft(wave, N_FFT, HOP, window=self.window, return_complex=True)
            angles = rebuilt - momentum / (1 + momentum) * previous
            angles = angles / angles.abs().clamp(min=1e-8)
            previous = rebuilt
        return torch.istft(magnitude * angles, N_FFT, HOP, window=self.window, length=length)


# ---------------------------------------------------------------- network

class Block(nn.Module):
    """ConvNeXt block over time (Liu et al. 2022): depthwise convolution, norm, MLP, residual; (B, T, C), masked."""

    def __init__(self, width: int, kernel: int = 7):
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.conv((x * mask).transpose(1, 2)).transpose(1, 2)
        return x + self.down(F.gelu(self.up(self.norm(y))))


class Vocoder(nn.Module):
    """Unit vocoder: `Vocoder.load("embedded").synthesize([413, 77, 20]) -> (wave, 16000)`."""

    def __init__(self, fingerprint: Fingerprint, width: int = 256, blocks: int = 4):
        super().__init__()
        self.fingerprint, self.width, self.blocks = fingerprint, width, blocks
        self.frames_per_unit = round(SAMPLE_RATE / HOP / fingerprint.unit_rate_hz)  # mel frames per unit frame
        self.units = nn.Embedding(fingerprint.n_units, width)
        self.low = nn.ModuleList(Block(width) for _ in range(blocks))
        self.spread = nn.Linear(width, self.frames_per_unit * width)
        self.high = nn.ModuleList(Block(width) for _ in range(blocks))
        self.mel = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, N_MELS))
        self.duration_units = nn.Embedding(fingerprint.n_units, width)
        self.duration_blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.duration = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        self.spectra = Spectra()

    def forward(self, frames: Tensor, mask: Tensor) -> Tensor:
        """Units per frame (B, T) int64, mask (B, T) bool -> log-mel (B, T * frames_per_unit, N_MELS)."""
        mask, k = mask[..., None], self.frames_per_unit
        x = self.units(frames)
        for block in self.low:
            x = block(x, mask)
        x = self.spread(x).unflatten(-1, (k, self.width)).flatten(1, 2)
        mask = mask.repeat_interleave(k, 1)
        for block in self.high:
            x = block(x, mask)
        return self.mel(x)

    def log_durations(self, units: Tensor, mask: Tensor) -> Tensor:
        """Deduplicated units (B, N), mask (B, N) -> log frames per unit (B, N)."""
        x = self.duration_units(units)
        for block in self.duration_blocks:
            x = block(x, mask[..., None])
        return self.duration(x)[..., 0]

    @torch.inference_mode()
    def predict_durations(self, units: list[int]) -> np.ndarray:
        """Units (N,) -> frames per unit (N,), at least 1."""
        x = torch.as_tensor(np.asarray(units, dtype=np.int64), device=self.units.weight.device)[None]
        log = self.log_durations(x, torch.ones_like(x, dtype=torch.bool))[0]
        return log.exp().round().clamp(min=1).long().cpu().numpy()

    @torch.inference_mode()
    def synthesize(self, units: list[int], durations: list[int] | None = None) -> tuple[np.ndarray, int]:
        """Units (N,), durations (N,) in frames (None: predicted) -> wave (T,) float32 in [-1, 1], sample rate.

        T is sum(durations) * sample_rate / unit_rate. ValueError for no units, or units out of range.
        """
        units = np.asarray(units, dtype=np.int64)
        if not len(units) or units.min() < 0 or units.max() >= self.fingerprint.n_units:
            raise ValueError(f"units must be a non-empty list of numbers from 0 to {self.fingerprint.n_units - 1}")
        durations = self.predict_durations(units) if durations is None else np.asarray(durations)
        frames = torch.from_numpy(np.repeat(units, durations)).to(self.units.weight.device)[None]
        log_mel = self(frames, torch.ones_like(frames, dtype=torch.bool))[0]
        wave = self.spectra.griffin_lim(log_mel.float()).cpu().numpy()
        return wave / max(1.0, np.abs(wave).max()), SAMPLE_RATE

    # ------------------------------------------------------------ files

    @classmethod
    def load(cls, name: str = "embedded") -> "Vocoder":
        """Load a vocoder file, or `embedded`. SystemExit if it is missing or not a vocoder."""
        path = EMBEDDED_VOCODER if name == "embedded" else Path(name)
        if not path.is_file():
            raise SystemExit(f"{path}: no such vocoder; `python vocoder.py train` makes one")
        try:
            with safe_open(path, "pt") as f:
                meta = {k: json.loads(v) for k, v in f.metadata().items()}
                state = {k: f.get_tensor(k).float() for k in f.keys()}
            vocoder = cls(Fingerprint.of(meta["fingerprint"]), meta["width"], meta["blocks"])
            vocoder.load_state_dict(state)
        except Exception as e:  # safetensors has no public base class for its errors
            raise SystemExit(f"{path}: not a vocoder file ({e})") from None
        return vocoder.eval()

    def save(self, path: Path, **report) -> None:
        """Write weights (fp16), shape, fingerprint and `report` as one safetensors file."""
        state = {k: v.half().contiguous() for k, v in self.state_dict().items()}
        meta = {"fingerprint": self.fingerprint.to_dict(), "width": self.width, "blocks": self.blocks} | report
        path.with_suffix(".part").write_bytes(save(state, {k: json.dumps(v) for k, v in meta.items()}))
        os.replace(path.with_suffix(".part"), path)


# ---------------------------------------------------------------- training

def load_corpus(cfg: Config, reader: UnitReader, spectra: Spectra) -> list[tuple[np.ndarray, np.ndarray, Tensor]]:
    """(units, durations, log-mel fp16) of every utterance; skips, counted, what has no audio."""
    if reader.durations(0) is None:
        raise SystemExit(f"{cfg.units}: has no durations; make it with prepare_units.py --durations")
    k = round(SAMPLE_RATE / HOP / reader.fingerprint.unit_rate_hz)
    corpus, skipped = [], 0
    for i, id in enumerate(tqdm(reader.ids(), disable=None, desc="log-mels", unit="file")):
        units, durations = reader.units(i), reader.durations(i)
        try:
            wave = torch.from_numpy(load_audio(Path(cfg.audio) / id))
        except ValueError:
            skipped += 1
            continue
        corpus.append((units, durations, spectra.log_mel(wave)[:k * durations.sum()].half()))
    print(f"{len(corpus)} utterances, {skipped} skipped for want of audio")
    if not corpus:
        raise SystemExit(f"{cfg.audio}: holds none of the audio that {cfg.units} names")
    return corpus


def crop(item: tuple, frames: int, k: int, rng: np.random.Generator) -> tuple[np.ndarray, Tensor]:
    """A random crop of an utterance: units per frame (frames,), log-mel (frames * k, N_MELS); padded with -1."""
    units, durations, mel = item
    x = np.repeat(units, durations)
    start = int(rng.integers(0, max(1, len(x) - frames + 1)))
    x, mel = x[start:start + frames], mel[start * k:(start + frames) * k]
    short = frames - len(x)
    return np.pad(x, (0, short), constant_values=-1), F.pad(mel[:len(x) * k], (0, 0, 0, frames * k - len(mel)))


def loss_of(vocoder: Vocoder, items: list[tuple], frames: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mean absolute error of the log-mels, and mean squared error of the log-durations, over crops of `items`."""
    k, device = vocoder.frames_per_unit, vocoder.units.weight.device
    crops = [crop(item, frames, k, rng) for item in items]
    x = torch.from_numpy(np.stack([c[0] for c in crops])).to(device)
    target = torch.stack([c[1].float() for c in crops]).to(device)
    mask = x >= 0
    error = (vocoder(x.clamp(min=0), mask).float() - target).abs().mean(-1)
    inside = mask.repeat_interleave(k, 1)
    mel_loss = (error * inside).sum() / inside.sum()

    n = max(len(item[0]) for item in items)
    units = torch.tensor(np.stack([np.pad(item[0], (0, n - len(item[0])), constant_values=-1) for item in items]))
    durations = torch.tensor(np.stack([np.pad(item[1], (0, n - len(item[1])), constant_values=1) for item in items]))
    mask = (units >= 0).to(device)
    predicted = vocoder.log_durations(units.clamp(min=0).to(device), mask).float()
    duration_loss = ((predicted - durations.to(device).log()).square() * mask).sum() / mask.sum()
    return mel_loss, duration_loss


def train(cfg: Config) -> None:
    from train import autocast, pick_device
    device = pick_device()
    out = Path(cfg.out)
    state_path = out / "trainer.pt"
    if out.exists() and any(out.iterdir()) and not (cfg.resume or cfg.overwrite):
        raise SystemExit(f"{out} exists; --resume goes on with it, --overwrite starts anew")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(cfg.seed)
    reader = UnitReader(cfg.units)
    vocoder = Vocoder(reader.fingerprint, cfg.width, cfg.blocks)
    corpus = load_corpus(cfg, reader, vocoder.spectra)
    held_out, corpus = corpus[::cfg.val_every], [x for i, x in enumerate(corpus) if i % cfg.val_every]
    vocoder.to(device)
    average = AveragedModel(vocoder, multi_avg_fn=get_ema_multi_avg_fn(cfg.ema))
    optimizer = torch.optim.AdamW(vocoder.parameters(), cfg.lr, betas=(0.9, 0.98), weight_decay=0.01)
    step, seconds = 0, 0.0
    if cfg.resume and state_path.exists():
        state = torch.load(state_path, weights_only=True)
        vocoder.load_state_dict(state["vocoder"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
        print(f"resuming {out} at step {step}")
    else:
        (out / "log.jsonl").write_text("")
    frames = round(cfg.crop_seconds * reader.fingerprint.unit_rate_hz)
    n_params = sum(p.numel() for p in vocoder.parameters())
    print(f"{n_params / 1e6:.2f}M parameters; {len(corpus)} utterances to train on, {len(held_out)} held out")

    def save() -> dict:
        with torch.inference_mode():
            rng, parts = np.random.default_rng(1), held_out[:64]
            losses = torch.tensor([loss_of(average.module.eval(), parts[i:i + 16], frames, rng)
                                   for i in range(0, len(parts), 16)]).mean(0).tolist()
        report = {"step": step, "minutes": round(seconds / 60, 2), "val_mel_l1": round(losses[0], 4),
                  "val_log_duration_mse": round(losses[1], 4)}
        temporary = state_path.with_suffix(".part")
        torch.save({"vocoder": vocoder.state_dict(), "average": average.state_dict(), "step": step, "seconds": seconds,
                    "optimizer": optimizer.state_dict()}, temporary)
        os.replace(temporary, state_path)
        average.module.save(out / "vocoder.safetensors", report=report, config=asdict(cfg))
        with open(out / "log.jsonl", "a") as f:
            f.write(json.dumps(report) + "\n")
        return report

    bar = tqdm(total=cfg.minutes, initial=seconds / 60, disable=None, desc="vocoder",
               bar_format="{l_bar}{bar}| {n:.1f}/{total:.1f} min{postfix}")
    while seconds < 60 * cfg.minutes:
        started, progress = time.perf_counter(), seconds / 60 / cfg.minutes
        rng = np.random.default_rng((cfg.seed, step))
        items = [corpus[i] for i in rng.integers(0, len(corpus), cfg.batch)]
        warmup, cosine = min(1, progress / 0.02 + 0.01), (1 + math.cos(math.pi * progress)) / 2
        optimizer.param_groups[0]["lr"] = cfg.lr * warmup * cosine
        with autocast(device, cfg.dtype):
            mel_loss, duration_loss = loss_of(vocoder, items, frames, rng)
        (mel_loss + 0.2 * duration_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(vocoder.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise SystemExit(f"step {step}: gradient norm {norm.item()}; stopped, {out} holds the last good state")
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(vocoder)
        step += 1
        elapsed = time.perf_counter() - started
        seconds += elapsed
        bar.update(min(elapsed / 60, bar.total - bar.n))
        if step % 10 == 0:
            bar.set_postfix(step=step, mel=f"{mel_loss.item():.3f}", duration=f"{duration_loss.item():.3f}")
        if step % cfg.save_every == 0:
            bar.write(json.dumps(save()))
    bar.close()
    print(json.dumps(save()))
    print(f"wrote {out / 'vocoder.safetensors'}")


if __name__ == "__main__":
    if sys.argv[1:2] != ["train"]:
        raise SystemExit(__doc__)
    train(load_config(Config, sys.argv[2:], __doc__))
