"""Train a vocoder of units: python -m slam.train_vocoder config/vocoder_embedded.py."""
import copy
import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from tqdm import tqdm

from config import load_config, save_config
from slam.audio import SAMPLE_RATE, load_audio
from slam.mel import magnitudes, mel_cepstral_distance, mel_filters, png, spectrogram
from slam.units import Fingerprint, UnitReader, require_same
from slam.vocoder import EMBEDDED_VOCODER, Vocos, pad


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
    grad_clip: float = 1.0  # gradient norm
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
    MAY_CHANGE = {"out", "audio", "init", "minutes", "steps", "lr", "adversarial_lr", "grad_clip", "log_every", "save_every",
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
        losses["norm"] = nn.utils.clip_grad_norm_(vocoder.parameters(), cfg.grad_clip)
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
    from slam.device import autocast, pick_device
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
    train(load_config(Config, sys.argv[1:], __doc__))
