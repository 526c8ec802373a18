"""Speech in other voices: people's, to measure the embedded parts on, and copies of a corpus, to train the vocoder on.

    python dev/voices.py people                             # out/people/telephone, out/people/audiobook: from Debian
    python eval.py --resynth_from out/people/telephone
    python dev/voices.py copies --corpus out/corpus         # out/voices: 420 stories in four versions; 10 CPU minutes

A copy keeps the time of the original, frame by frame. `changed1` and `changed2` have another pitch and vocal tract,
another room, telephones, noise and levels; in `flite`, four other voices (Debian's flite) say the same text, warped to
the original's time. OUT/units_audio and OUT/clean_audio have the same names below them: prepare_units.py reads the
copies in the first, and slam.train_vocoder finds the original of each in the second.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import functools
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.signal import fftconvolve, firwin, lfilter, resample_poly
from tqdm import tqdm

from config import load_config
from slam.audio import SAMPLE_RATE, load_audio
from slam.tokenizer import SpeechTokenizer, windows
from slam.tts import write_audio

PEOPLE = {"telephone": ("asterisk-core-sounds-en-wav", "usr/share/asterisk/sounds"),  # a woman's prompts, 8 kHz
          "audiobook": ("pocketsphinx-testdata", "usr/share/pocketsphinx/test/data/librivox")}  # five sentences
VOICES = "awb", "rms", "slt", "kal16"  # of flite
KINDS = "clean", "changed1", "changed2", "flite"


@dataclass
class PeopleConfig:
    """Fetch people's recordings: telephone prompts and audiobook sentences (Debian packages)."""
    out: str = "out/people"  # folder to write
    sets: tuple[Literal["telephone", "audiobook"], ...] = ("telephone", "audiobook")  # what to fetch
    min_seconds: float = 2.9  # recordings at least this long (and at most 30 s); shorter ones have few words


@dataclass
class CopiesConfig:
    """Make copies of a corpus in other voices."""
    corpus: str = "out/corpus"  # folder of synth_stories.py, with its audio kept
    out: str = "out/voices"  # folder to write; an interrupted run resumes in it
    stories: int = 420  # the first so many; 0: all
    workers: int = 2  # processes


# ---------------------------------------------------------------- packages
def unpack(packages: list[str], folder: Path) -> None:
    """Download Debian packages and unpack them in a folder; nothing is installed. SystemExit if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            subprocess.run(["apt-get", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=20", "download",
                            *packages], cwd=temporary, check=True, capture_output=True, timeout=600)
            for file in Path(temporary).glob("*.deb"):
                subprocess.run(["dpkg-deb", "-x", file, folder], check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as e:
            said = (getattr(e, "stderr", None) or b"").decode().strip()
            raise SystemExit(f"{' '.join(packages)}: can't be had ({said or e}); on Debian or Ubuntu with a network, "
                             f"`apt-get update` may help") from None


def people(cfg: PeopleConfig) -> None:
    """Write OUT/telephone/*.wav and OUT/audiobook/*.wav."""
    for name in cfg.sets:
        package, folder = PEOPLE[name]
        out = Path(cfg.out, name)
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            unpack([package], Path(temporary))
            found = sorted(Path(temporary, folder).rglob("*.wav"))
            for file in (f for f in found if f.parent.name != "silence"):
                if cfg.min_seconds <= len(load_audio(file)) / SAMPLE_RATE <= 30:
                    shutil.copy(file, out / f"{file.parent.name}_{file.name}")
        print(f"{out}: {len(list(out.glob('*.wav')))} recordings")


# ---------------------------------------------------------------- other voices, rooms and lines
def follow(wave: np.ndarray, positions: np.ndarray, n: int = 512, tolerance: int = 160) -> np.ndarray:
    """Read a wave (T,) at source `positions` (M,), one for each n // 2 samples of the output, with its pitch kept.

    WSOLA (Verhelst & Roelands 1993): of the windows within `tolerance` samples, that which best continues the last.
    """
    hop, window = n // 2, np.hanning(n + 1)[:n]
    padded = np.pad(wave, (n, 2 * n + tolerance)).astype(np.float64)
    out, at = np.zeros((len(positions) + 1) * hop), None
    for i, start in enumerate(np.clip(np.round(positions), 0, len(wave)).astype(int) + n - hop):
        if at is not None and len(natural := padded[at + hop:at + hop + n]) == n:
            low = max(0, start - tolerance)
            region = padded[low:start + tolerance + n:2]  # every other sample suffices to find the lag
            energy = np.convolve(region ** 2, np.ones(n // 2), "valid")
            start = low + 2 * int(np.argmax(np.correlate(region, natural[::2], "valid") / np.sqrt(energy + 1e-4)))
        at = min(max(0, start), len(padded) - n)
        out[i * hop:i * hop + n] += padded[at:at + n] * window
    return out[hop:][:len(positions) * hop].astype(np.float32)


def fit_length(wave: np.ndarray, n: int) -> np.ndarray:
    """A wave cut or padded to n samples."""
    return np.pad(wave, (0, max(0, n - len(wave))))[:n]


def shift(wave: np.ndarray, factor: float) -> np.ndarray:
    """Pitch and formants times `factor`, at the same speed."""
    n = round(1000 / factor)
    faster = resample_poly(wave, n, 1000).astype(np.float32)
    return fit_length(follow(faster, np.arange(0, len(wave), 256) * n / 1000), len(wave))


def room(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Reverberation: noise that decays by 60 dB in 0.1 to 0.6 s, 0 to 15 dB below the direct sound."""
    n = round(rng.uniform(0.1, 0.6) * SAMPLE_RATE)
    tail = rng.standard_normal(n) * 10 ** (-3 * np.arange(n) / n)
    tail[:SAMPLE_RATE // 500] = 0
    tail *= 10 ** (-rng.uniform(0, 15) / 20) / np.linalg.norm(tail)
    tail[0] = 1
    return fftconvolve(wave, tail)[:len(wave)]


def equalise(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A smooth random gain of up to 8 dB either way."""
    frequencies = np.fft.rfftfreq(len(wave), 1 / SAMPLE_RATE)
    gain = np.interp(frequencies, (0, 300, 800, 1800, 3500, 8000), rng.uniform(-8, 8, 6))
    return np.fft.irfft(np.fft.rfft(wave) * 10 ** (gain / 20), len(wave))


def telephone(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A band of about 300 to 3400 Hz at 8 kHz, half of the time in 8 bits (mu-law)."""
    taps = firwin(401, (rng.uniform(100, 350), rng.uniform(3200, 3700)), pass_zero=False, fs=SAMPLE_RATE)
    x = resample_poly(np.convolve(wave, taps, "same"), 1, 2)
    if rng.random() < 0.5:
        peak = np.abs(x).max() + 1e-9
        levels = np.round(127 * np.sign(x) * np.log1p(255 * np.abs(x) / peak) / np.log(256)) / 127
        x = np.sign(levels) * np.expm1(np.abs(levels) * np.log(256)) / 255 * peak
    return fit_length(resample_poly(x, 2, 1), len(wave))


def noise(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White or low-pitched noise, 15 to 45 dB below the wave."""
    x = rng.standard_normal(len(wave))
    x = lfilter([1], [1, -0.95], x) if rng.random() < 0.6 else x
    return wave + x * np.sqrt((wave ** 2).mean() / (x ** 2).mean()) * 10 ** (-rng.uniform(15, 45) / 20)


def change(wave: np.ndarray, rng: np.random.Generator, voice: bool = True) -> np.ndarray:
    """A random change of voice (if asked for), spectrum, room, band, noise and level (peak 0 to -20 dB)."""
    if voice and rng.random() < 0.85:
        wave = shift(wave, np.exp(rng.uniform(-0.22, 0.22)))
    if rng.random() < 0.6:
        wave = equalise(wave, rng)
    if rng.random() < 0.3:
        wave = room(wave, rng)
    band = rng.random()
    if band < 0.4:
        wave = telephone(wave, rng)
    elif band < 0.6:
        wave = np.convolve(wave, firwin(401, rng.uniform(3500, 7000), fs=SAMPLE_RATE), "same")
    if rng.random() < 0.5:
        wave = noise(wave, rng)
    return (wave / (np.abs(wave).max() + 1e-9) * 10 ** (rng.uniform(-20, 0) / 20)).astype(np.float32)


# ---------------------------------------------------------------- the same text in another voice
def align(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dynamic time warping: the row of b (M, D), as a float, that is heard at each row of a (N, D); unit vectors."""
    distance, (n, m) = 1 - a @ b.T, (len(a), len(b))
    cost = np.full((n + 1, m + 1), np.inf)
    cost[0, 0] = 0
    for s in range(2, n + m + 1):  # an anti-diagonal at a time
        i = np.arange(max(1, s - m), min(n, s - 1) + 1)
        j, here = s - i, distance[i - 1, s - i - 1]
        stay = np.minimum(cost[i - 1, j], cost[i, j - 1]) + 0.02
        cost[i, j] = np.minimum(cost[i - 1, j - 1], stay) + here
    i, j, heard = n, m, [[] for _ in range(n)]
    while i and j:
        heard[i - 1].append(j - 1)
        step = np.argmin((cost[i - 1, j - 1], cost[i - 1, j], cost[i, j - 1]))
        i, j = i - (step < 2), j - (step != 1)
    rows = np.array([np.mean(x) for x in heard])
    return np.convolve(np.pad(rows, 1, mode="edge"), (0.25, 0.5, 0.25), "valid")


def flite(text: str, voice: str, folder: Path) -> np.ndarray:
    """Text in a voice of flite, unpacked in a folder: wave (T,) at 16 kHz."""
    folder = folder.resolve()
    library = next(folder.glob("usr/lib/*/libflite.so.1")).parent
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary, "text").write_text(text)
        subprocess.run([folder / f"usr/bin/flite_cmu_us_{voice}", "-f", "text", "-o", "said.wav"], cwd=temporary,
                       check=True, capture_output=True, timeout=120, env=os.environ | {"LD_LIBRARY_PATH": str(library)})
        return load_audio(f"{temporary}/said.wav")


@functools.cache
def encoder():
    """The embedded encoder, once per process."""
    torch.set_num_threads(1)
    return SpeechTokenizer.load("embedded").encoder


def features(wave: np.ndarray) -> np.ndarray:
    """Unit vectors (frames, D) for `align`: the encoder's features minus their mean."""
    x = torch.cat([encoder()([piece])[0][first:last] for piece, first, last in windows([wave], encoder())])
    return torch.nn.functional.normalize(x - x.mean(0), dim=1).numpy()


def copy(job: tuple[str, str, list[str], int]) -> None:
    """Write the copies of one story that are not there yet."""
    out, source, sentences, number = job
    wave, name = load_audio(source), Path(source).name
    for kind in KINDS[1:]:
        target = Path(out, "units_audio", kind, name)
        rng = np.random.default_rng(zlib.crc32(f"{kind} {name}".encode()))
        if target.exists():
            continue
        if kind == "flite":
            said = flite(" ".join(sentences), VOICES[number % len(VOICES)], Path(out, "packages"))
            spf, rows = encoder().samples_per_frame, align(features(wave), features(said))
            centres = (np.arange(len(rows)) + 0.5) * spf
            times = np.interp(np.arange(0, len(wave), 256), centres, (rows + 0.5) * spf)
            said = fit_length(follow(said, times), len(wave))
            said = change(said, rng, voice=rng.random() < 0.4) if rng.random() < 0.7 else said
        else:
            said = change(wave, rng)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_audio(target, np.clip(said, -1, 1))


def copies(cfg: CopiesConfig) -> None:
    """Write units_audio/{clean,changed1,changed2,flite}, and clean_audio with the original under the same names."""
    corpus, out = Path(cfg.corpus), Path(cfg.out)
    if not (corpus / "audio").is_dir():
        raise SystemExit(f"--corpus={corpus}: no audio/; `python synth_stories.py config/corpus_stories.py` makes "
                         "one")
    if not (out / "packages" / "usr").is_dir():
        unpack(["flite", "libflite1"], out / "packages")
    stories = [json.loads(line) for line in (corpus / "stories.jsonl").read_text().splitlines()][:cfg.stories or None]
    jobs = [(str(out), str(path), story["sentences"], i) for i, story in enumerate(stories)
            if (path := corpus / "audio" / f"{story['id']}.flac").is_file()]
    originals = out / "units_audio" / "clean"
    links = {originals / Path(path).name: path for _, path, *_ in jobs}
    links |= {out / "clean_audio" / kind: originals for kind in KINDS}
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(Path(target).absolute())
    with multiprocessing.get_context("spawn").Pool(cfg.workers) as pool:
        list(tqdm(pool.imap_unordered(copy, jobs), total=len(jobs), disable=None, desc="copies", unit="story"))
    print(f"{out}: {len(jobs)} stories in {len(KINDS)} versions")


if __name__ == "__main__":
    command, arguments = "".join(sys.argv[1:2]), sys.argv[2:]
    Settings = {"people": PeopleConfig, "copies": CopiesConfig}
    if command not in Settings:
        raise SystemExit(__doc__)
    {"people": people, "copies": copies}[command](load_config(Settings[command], arguments, __doc__))
