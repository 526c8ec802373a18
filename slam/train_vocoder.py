"""Train a vocoder of units: the network is Vocos (slam/vocoder.py); resume, log and folder are as in train.py.

In:  unit files with durations (prepare_units.py --durations) and the audio that they came from.
Out: a run folder: vocoder.safetensors (the averaged weights) · samples/ · log.jsonl · state/ (for --resume)

    python -m slam.train_vocoder config/vocoder_embedded.py
    python -m slam.train_vocoder config/vocoder_gpu.py --units out/my_units --audio my_speech --out out/my_vocoder
"""
import copy
import functools
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from config import load_config
from slam.audio import SAMPLE_RATE, load_audio
from slam.checkpoint import write_folder
from slam.device import autocast, pick_device, put
from slam.mel import magnitudes, mel_cepstral_distance, mel_filters, png, spectrogram
from slam.optim import update
from slam.run import Run
from slam.units import Fingerprint, UnitReader, require_same, write_atomic
from slam.vocoder import EMBEDDED_VOCODER, Vocos


@dataclass
class Config:
    """Train a vocoder on units, durations and audio."""
    units: str = "out/corpus_units"  # unit files with durations
    audio: str = "out/corpus/audio"  # folder that the units' ids are relative to
    out: str = "out/vocoder"  # run folder
    init: str = ""  # a vocoder of ours (a file, or embedded) for these units, to start from: for another voice, say
    width: int = 256  # channels
    blocks: int = 5  # ConvNeXt blocks at the unit rate, and as many again at 100 Hz
    minutes: float = 60.0  # length of the training; validation and saving are not counted
    steps: int | None = None  # length of the training in steps; none: minutes decide
    batch: int = 16  # crops in a step
    crop_seconds: float = 1.28  # of each crop
    lr: float = 1e-3  # peak; 100 steps of warm-up, cosine to zero
    grad_clip: float = 1.0  # largest gradient norm
    ema: float = 0.999  # decay of the averaged weights that are kept
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the computation; spectra are float32
    max_hours: float = 50.0  # audio kept in memory, 0.12 GB an hour; of a larger corpus, only the beginning
    val_every: int = 25  # one utterance in this many is held out
    log_every: int = 50  # steps
    save_every: int = 1000  # steps; at each save held-out utterances are spoken into samples/
    seed: int = 0  # of weights and crops
    resume: bool = False  # go on with the run in `out`
    overwrite: bool = False  # start anew

    tokens = None  # not settings: `Run` reads these two
    time_budget_hours = property(lambda self: self.minutes / 60)

    def problems(self) -> list[str]:
        positive = "width blocks minutes steps batch lr grad_clip log_every save_every max_hours".split()
        wrong = {f"{x} must be positive": getattr(self, x) is not None and getattr(self, x) <= 0 for x in positive}
        wrong |= {"crop_seconds must be at least 0.2": self.crop_seconds < 0.2, "seed is negative": self.seed < 0,
                  "val_every must be at least 2": self.val_every < 2, "ema must be in [0, 1)": not 0 <= self.ema < 1,
                  "resume and overwrite exclude each other": self.resume and self.overwrite}
        return [problem for problem, found in wrong.items() if found]


# ---------------------------------------------------------------- loss
def spectral_loss(ours: Tensor, real: Tensor) -> Tensor:
    """Distance of waves (B, T) in log-mel and linear spectra of four resolutions; phases do not matter.

    Log-mel L1 (Kong et al. 2020), log-magnitude L1 and spectral convergence (Yamamoto et al. 2020), their mean.
    """
    total = 0.0
    for n_fft, n_mels in ((2048, 160), (1024, 80), (512, 40), (256, 20)):
        a, b = (magnitudes(x, n_fft, n_fft // 4) for x in (ours, real))
        filters = mel_filters(n_fft, n_mels, SAMPLE_RATE, ours.device)
        mel_a, mel_b = ((filters @ x).clamp(min=1e-4).log() for x in (a, b))
        total = total + F.l1_loss(mel_a, mel_b) + (a - b).norm() / (2 * b.norm().clamp(min=1e-3)) + \
            F.l1_loss(a.clamp(min=1e-3).log(), b.clamp(min=1e-3).log()) / 2
    return total / 4


# ---------------------------------------------------------------- data
Utterance = tuple[np.ndarray, np.ndarray, np.ndarray]  # units (N,), durations (N,) in frames, wave (T,) int16


def load_corpus(cfg: Config, reader: UnitReader) -> list[Utterance]:
    """Every utterance with its audio, up to `max_hours`; utterances without audio of the right length are skipped.

    SystemExit if the units have no durations, or fewer than two utterances have audio.
    """
    if reader.durations(0) is None:
        raise SystemExit(f"{cfg.units}: has no durations; make it with prepare_units.py --durations")
    hop, corpus, hours, skipped = round(SAMPLE_RATE / reader.fingerprint.unit_rate_hz), [], 0.0, 0
    load = functools.lru_cache(maxsize=1)(load_audio)  # utterances of one recording follow each other
    for i, id in enumerate(tqdm(reader.ids(), disable=None, desc="audio", unit="file")):
        if hours > cfg.max_hours:
            break
        units, durations, n_samples = reader.units(i), reader.durations(i), int(reader.durations(i).sum()) * hop
        file, _, start = id.rpartition("@") if re.fullmatch(r".*@[\d.]+", id) else (id, "", "")
        try:
            wave = load(Path(cfg.audio) / file)
        except ValueError:
            wave = np.zeros(0)
        if start:  # prepare_units.py has cut the utterance out of a recording; it starts at so many seconds
            wave = wave[round(float(start) * SAMPLE_RATE):][:n_samples]
        if not len(wave) or abs(len(wave) // hop * hop - n_samples) > hop:
            skipped += 1
            continue
        wave = np.pad(wave, (0, max(0, n_samples - len(wave))))[:n_samples]
        corpus.append((units, durations, (wave * 32767).round().clip(-32768, 32767).astype(np.int16)))
        hours += n_samples / SAMPLE_RATE / 3600
    print(f"{len(corpus)} of {len(reader)} utterances, {hours:.2f} h (max_hours {cfg.max_hours:g}); {skipped} skipped, "
          f"as their audio is missing or of another length")
    if len(corpus) < 2:
        raise SystemExit(f"{cfg.audio}: holds too little of the audio that {cfg.units} names, such as "
                         f"{next(iter(reader.ids()))}; what is in archives must be unpacked")
    return corpus


def crops(items: list[Utterance], frames: int, hop: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A random crop of each utterance: units per frame (B, frames) int64, waves (B, frames * hop) float32.

    Shorter utterances are repeated: padding would teach the vocoder to speak silence into silence.
    """
    rows = []
    for units, durations, wave in items:
        x = np.repeat(units.astype(np.int64), durations)
        n = -(-frames // len(x))
        x, wave = np.tile(x, n), np.tile(wave, n)
        start = int(rng.integers(0, len(x) - frames + 1))
        rows.append((x[start:start + frames], wave[start * hop:(start + frames) * hop]))
    x, waves = (torch.from_numpy(np.stack(part)) for part in zip(*rows))
    return x, waves.float() / 32767


def duration_loss(vocoder: Vocos, items: list[Utterance], rng: np.random.Generator) -> Tensor:
    """Mean squared error of the predicted log-durations, over 64 consecutive units of each utterance, ().

    Shorter utterances are repeated. Over whole utterances, a depthwise convolution's backward pass would take a CPU
    longer than all the rest.
    """
    rows = []
    for units, durations, _ in items:
        at = int(rng.integers(0, max(1, len(units) - 63)))
        rows.append([np.resize(x[at:], 64).astype(np.int64) for x in (units, durations)])
    units, durations = torch.from_numpy(np.stack(rows, 1)).to(vocoder.device)  # (B, 64) each
    return (vocoder.log_durations(units).float() - durations.clamp(min=1).log()).square().mean()


# ---------------------------------------------------------------- training
METRIC = "val_mel_cepstral_distance_db"


class Training(nn.Module):
    """All weights of a run: the vocoder and their running average, which is the run's product."""

    def __init__(self, vocoder: Vocos):
        super().__init__()
        self.vocoder, self.average = vocoder, copy.deepcopy(vocoder).eval().requires_grad_(False)

    def save_pretrained(self, folder: Path, slam: dict, trainer: dict) -> None:
        """As UnitLM's, for `Run.save`."""
        write_folder(folder, {}, self.state_dict(), slam, trainer)


def new_vocoder(cfg: Config, fingerprint: Fingerprint, resuming: bool) -> Vocos:
    """A vocoder of the settings' shape, with `init`'s weights if the run is new. SystemExit if these do not fit."""
    try:
        vocoder = Vocos(fingerprint, cfg.width, cfg.blocks)
    except ValueError as e:
        raise SystemExit(f"{cfg.units}: {e}") from None
    if cfg.init and not resuming:
        start = Vocos.read(EMBEDDED_VOCODER if cfg.init == "embedded" else Path(cfg.init))
        require_same(fingerprint, cfg.units, start.fingerprint, cfg.init)
        if (start.width, start.blocks) != (cfg.width, cfg.blocks):
            raise SystemExit(f"{cfg.init}: width {start.width} and {start.blocks} blocks; expected {cfg.width} and "
                             f"{cfg.blocks}")
        vocoder.load_state_dict(start.state_dict())
    return vocoder


@torch.inference_mode()
def evaluate(run: Run, average: Vocos, held_out: list[Utterance]) -> None:
    """Write vocoder.safetensors, and log how well it speaks 16 held-out utterances with their own durations.

    The first three are written to samples/, with their spectrograms below those of the originals.
    """
    import soundfile
    distances, clipped = [], []
    for i, (units, durations, wave) in enumerate(held_out[:16]):
        real, (ours, rate) = wave.astype(np.float32) / 32767, average.synthesize(units, durations)
        distances.append(mel_cepstral_distance(ours, real))
        clipped.append(float((np.abs(ours) >= 1).mean()))
        if i < 3:
            name = f"{run.out}/samples/{i}_step{run.step:06d}"
            both = np.concatenate([spectrogram(x[:10 * rate], rate) for x in (real, ours)])
            write_atomic(f"{name}.png", png(both.repeat(2, 0)))
            soundfile.write(f"{name}.wav", ours, rate)
            soundfile.write(f"{run.out}/samples/{i}_original.wav", real, rate)
    report = {METRIC: float(np.mean(distances)), "val_clipped_share": float(np.mean(clipped)),
              "val_duration_loss": duration_loss(average, held_out[:64], np.random.default_rng(1)).item()}
    with run.writing():
        average.save(run.out / "vocoder.safetensors", config=asdict(run.cfg), report=report | {"step": run.step})
    run.results({METRIC: {"value": report[METRIC], "n": len(distances), "step": run.step}})
    run.log(" | ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in report.items()), **report)


def main(cfg: Config) -> None:
    # ------------------------------------------------ hardware, and the run's folder
    device = pick_device()
    torch.manual_seed(cfg.seed)
    if Path(cfg.out, "vocoder.safetensors").exists() and not (cfg.overwrite or any(Path(cfg.out).glob("state*"))):
        raise SystemExit(f"{cfg.out} holds a vocoder.safetensors but no state/ to --resume from. Choose another --out, "
                         f"with --init {cfg.out}/vocoder.safetensors to start from its weights, or --overwrite")
    run = Run(cfg, "vocoder", folder="state", reads=(cfg.units, cfg.audio))

    # ------------------------------------------------ data
    reader = UnitReader(cfg.units)
    run.starts_from(units=reader.digest())
    if run.resumed and run.progress() >= 1 and run.evaluated(METRIC):
        return
    model = Training(new_vocoder(cfg, reader.fingerprint, run.resumed)).to(device)
    corpus = load_corpus(cfg, reader)
    held_out, corpus = corpus[::cfg.val_every], [x for i, x in enumerate(corpus) if i % cfg.val_every]

    # ------------------------------------------------ model and optimiser
    vocoder = model.vocoder
    optimizer = torch.optim.AdamW(vocoder.parameters(), betas=(0.8, 0.99), weight_decay=0.01, fused=True)
    if run.resumed:
        model.load_state_dict(load_file(run.checkpoint / "model.safetensors"))
        run.restore(optimizer)
    run.open()
    print(f"{sum(p.numel() for p in vocoder.parameters()) / 1e6:.2f}M parameters; {len(corpus)} utterances to train "
          f"on, {len(held_out)} held out; {device}")

    # ------------------------------------------------ loop
    frames_per_crop, pending = round(cfg.crop_seconds * reader.fingerprint.unit_rate_hz), []
    while run.progress() < 1 and not run.stopping:
        if run.step and run.step % cfg.save_every == 0 and not run.evaluated(METRIC):
            with run.pause():
                evaluate(run, model.average, held_out)
        scale = min(1, (run.step + 1) / 100) * (1 + math.cos(math.pi * run.progress())) / 2  # of the learning rate
        rng = np.random.default_rng((cfg.seed, run.step))
        items = [corpus[i] for i in rng.integers(0, len(corpus), cfg.batch)]
        frames, real = (put(x, device) for x in crops(items, frames_per_crop, vocoder.hop, rng))
        with autocast(device, cfg.dtype):
            ours, durations = vocoder.waves(frames), duration_loss(vocoder, items, rng)
        spectral = spectral_loss(ours, real)
        loss = spectral + 0.2 * durations
        loss.backward()
        norm = update(vocoder, optimizer, cfg.lr * scale, cfg.grad_clip)
        run.step, run.tokens = run.step + 1, run.tokens + frames.numel()
        decay = min(cfg.ema, (1 + run.step) / (10 + run.step))  # the first weights are soon forgotten
        torch._foreach_lerp_(list(model.average.parameters()), [p.detach() for p in vocoder.parameters()], 1 - decay)
        pending.append(torch.stack([loss, spectral, durations, norm]).detach())
        run.tick()
        saving = run.step % cfg.save_every == 0
        if saving or run.step % cfg.log_every == 0 or run.progress() >= 1 or run.stopping:
            means = torch.stack(run.gather(pending, norm)).mean(0).tolist()
            pending, means = [], dict(zip(("loss", "spectral", "duration", "norm"), means)) | {"lr": cfg.lr * scale}
            run.log(" | ".join(f"{k} {v:.4g}" for k, v in means.items()) + f" | {run.clock()}", **means)
        if saving and run.progress() < 1:
            with run.pause():
                run.save(model, optimizer, reader.fingerprint, [])
    with run.pause():
        run.save(model, optimizer, reader.fingerprint, [])
        evaluate(run, model.average, held_out)
    run.exit_if_stopping()
    print(f"wrote {run.out / 'vocoder.safetensors'}; listen to {run.out / 'samples'}")


if __name__ == "__main__":
    main(load_config(Config, sys.argv[1:], __doc__))
