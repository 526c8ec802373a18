"""slam.tts."""
import contextlib
import functools
import multiprocessing
import os
import zlib
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from slam.audio import SAMPLE_RATE, resample


# ---------------------------------------------------------------- speaking
def load_hibari():
    """hibari (Apache-2.0): one American English voice; (text, seed, voice) -> float32 at 24 kHz."""
    try:
        from hibari import Hibari
    except ImportError:
        raise SystemExit("hibari-tts is not installed: pip install --no-deps -r requirements-embedded.txt") from None
    voice = Hibari(threads=1)
    return lambda text, seed, _: (voice(text, seed=seed), voice.sample_rate)


def load_kokoro():
    """Kokoro-82M (Apache-2.0) by its package, which fetches it from the hub: SpokenSwag's four voices, 24 kHz."""
    try:
        from kokoro import KPipeline
    except ImportError:
        raise SystemExit("kokoro is not installed: pip install kokoro") from None
    pipeline = functools.cache(lambda language: KPipeline(lang_code=language))  # a: American, b: British
    return lambda text, seed, voice: (np.concatenate(
        [np.zeros(0, np.float32)] + [np.asarray(audio) for *_, audio in pipeline(voice[0])(text, voice=voice)]), 24_000)


def load_fastspeech2():
    """FastSpeech2Conformer with HiFi-GAN (ESPnet, LJSpeech) from the hub, by transformers; needs g2p_en; 22.05 kHz."""
    from transformers import FastSpeech2ConformerTokenizer, FastSpeech2ConformerWithHifiGan
    try:
        tokenizer = FastSpeech2ConformerTokenizer.from_pretrained("espnet/fastspeech2_conformer")
        model = FastSpeech2ConformerWithHifiGan.from_pretrained("espnet/fastspeech2_conformer_with_hifigan").eval()
    except (OSError, ImportError) as e:
        raise SystemExit(f"fastspeech2 can't be loaded: {e}") from None

    @torch.inference_mode()
    def speak(text: str, seed: int, voice: str) -> tuple[np.ndarray, int]:
        return model(tokenizer(text, return_tensors="pt")["input_ids"]).waveform[0].numpy(), 22_050

    return speak


# name -> (() -> (text, seed, voice) -> (wave, sample rate), voices)
TTS = {"hibari": (load_hibari, ("american",)),
       "kokoro": (load_kokoro, ("af_heart", "am_fenrir", "bf_emma", "bm_george")),
       "fastspeech2": (load_fastspeech2, ("ljspeech",))}


_speak = None  # a worker process's voice


def _start_worker(tts: str) -> None:
    global _speak
    _speak = TTS[tts][0]()


def speak(job: tuple[list[str], int, str]) -> list[np.ndarray]:
    """Sentences -> waves at 16 kHz, each padded to whole frames (40 ms) so that sentence borders are frame borders."""
    sentences, seed, voice = job
    waves = []
    for i, sentence in enumerate(sentences):
        wave = resample(*(_speak(sentence, seed + i, voice)), SAMPLE_RATE)
        waves.append(np.pad(wave, (0, -len(wave) % 640)).astype(np.float32))
    return waves


@contextlib.contextmanager
def speakers(cfg):
    """A pool of processes that speak; None where all has been said already. SystemExit if the TTS can't be loaded."""
    if kind_of(cfg.swag) in ("parquet", "jsonl"):
        yield None
        return
    TTS[cfg.tts][0]()  # what it lacks is said here, and once
    # spawn, not fork: a forked child of a process that has run torch's threads may hang
    with multiprocessing.get_context("spawn").Pool(cfg.workers, _start_worker, (cfg.tts,)) as pool:
        yield pool


def spoken(cfg, pool, texts: dict[str, list[str]], desc: str, voices: dict[str, str] | None = None):
    """Yield (id, sentence waves) of each text in order, spoken by the pool's processes; seeded by (seed, id).

    voices: {id: voice}; without, all are in the first.
    """
    first = (cfg.voices or TTS[cfg.tts][1])[0]
    jobs = [(sentences, zlib.crc32(f"{cfg.seed} {id}".encode()), voices[id] if voices else first)
            for id, sentences in texts.items()]
    parts = (jobs[at:at + 512] for at in range(0, len(jobs), 512))  # lest waves pile up that nobody takes
    waves = (wave for part in parts for wave in pool.imap(speak, part, chunksize=2))
    waves = tqdm(waves, total=len(jobs), disable=None, desc=desc, unit="text")
    yield from ((id, w) for w, id in zip(waves, texts))  # in this order zip exhausts the bar


def write_audio(path: Path, wave: np.ndarray) -> None:
    """Write a wave (T,) at 16 kHz; a file that has its name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    soundfile.write(temporary, wave, SAMPLE_RATE, format=path.suffix[1:].upper())
    os.replace(temporary, path)


def kind_of(swag: str) -> str:
    """parquet (audio), jsonl (units) or csv (text); empty for nothing."""
    return "parquet" if swag and Path(swag).is_dir() else Path(swag).suffix[1:]
