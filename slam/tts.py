"""Text to speech: three voices by name, and a pool of processes that speak.

    with speakers("hibari", workers=2) as pool:
        for id, waves in spoken(cfg, pool, {"a": ["Hello.", "How are you?"]}, "speaking"):
            write_audio(Path(f"{id}.flac"), np.concatenate(waves))

Another TTS is a loader here and its line in `TTS`.
"""
import functools
import io
import multiprocessing
import os
import signal
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from slam.audio import SAMPLE_RATE, resample
from slam.units import write_atomic


def load_hibari():
    """hibari (Apache-2.0): one American English voice; (text, seed, voice) -> (float32 wave (T,), 24 kHz)."""
    try:
        from hibari import Hibari
    except ImportError:
        raise SystemExit("hibari-tts is not installed: pip install --no-deps -r requirements-embedded.txt") from None
    voice = Hibari(threads=1)
    return lambda text, seed, _: (voice(text, seed=seed), voice.sample_rate)


def load_kokoro():
    """Kokoro-82M (Apache-2.0; its package downloads it): speak(text, seed, voice) -> (wave (T,), 24000); no seed."""
    try:
        from kokoro import KPipeline
    except ImportError:
        raise SystemExit("kokoro is not installed: pip install kokoro") from None
    pipeline = functools.cache(lambda language: KPipeline(lang_code=language))  # a: American, b: British
    return lambda text, seed, voice: (np.concatenate(
        [np.zeros(0, np.float32)] + [np.asarray(audio) for *_, audio in pipeline(voice[0])(text, voice=voice)]), 24_000)


def load_fastspeech2():
    """FastSpeech2Conformer with HiFi-GAN (ESPnet, LJSpeech) from the hub, by transformers; needs g2p_en; 22.05 kHz."""
    import torch
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


@functools.cache
def load(tts: str):
    """A TTS by name, once per process. SystemExit if it can't be loaded."""
    return TTS[tts][0]()


def speak(job: tuple[str, list[str], int, str, bool]) -> list[np.ndarray]:
    """Sentences -> waves (T,) float32 at 16 kHz, padded to whole frames (40 ms), so each begins at a frame border.

    A sentence that can't be spoken raises ValueError, or with strict False has a wave of no samples.
    """
    tts, sentences, seed, voice, strict = job
    waves = []
    for i, sentence in enumerate(sentences):
        try:
            wave = resample(*load(tts)(sentence, seed + i, voice), SAMPLE_RATE)
        except Exception as e:  # whatever it is that this TTS raises
            if strict:
                raise ValueError(f"{tts} can't speak {sentence!r} ({e!r})") from None
            wave = np.zeros(0)
        waves.append(np.pad(wave, (0, -len(wave) % 640)).astype(np.float32))
    return waves


def end_with_parent() -> None:
    """End this process with the one that started it, even if that is killed; an executor's workers would wait on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C reaches all of them, and is for the first
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


@contextmanager
def speakers(tts: str, workers: int) -> Iterator[Executor]:
    """Processes that speak. SystemExit if the TTS can't be loaded."""
    load(tts)  # so that one process says what is missing, and not each worker
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    pool = ProcessPoolExecutor(workers, spawn, end_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def spoken(cfg, pool, texts: dict[str, list[str]], desc: str,
           voices: dict[str, str] | None = None, strict: bool = True) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Speak {id: sentences} with `cfg.tts`; yields (id, a wave per sentence) in order. Seeded by (cfg.seed, id).

    voices: {id: voice}; without them, all are spoken in the first of `cfg.voices`, or of the TTS. strict: SystemExit if
    a sentence can't be spoken; otherwise it has no samples.
    """
    first = (cfg.voices or TTS[cfg.tts][1])[0]
    jobs = [(cfg.tts, sentences, zlib.crc32(f"{cfg.seed} {id}".encode()), voices[id] if voices else first, strict)
            for id, sentences in texts.items()]
    # By 512: map speaks all its jobs at once, and the waves of a large set don't fit into memory.
    waves = (wave for at in range(0, len(jobs), 512) for wave in pool.map(speak, jobs[at:at + 512], chunksize=2))
    bar = tqdm(waves, total=len(jobs), disable=None, desc=desc, unit="text")
    try:
        yield from ((id, wave) for wave, id in zip(bar, texts))  # zip asks the bar first, so that it reaches its end
    except ValueError as e:
        raise SystemExit(f"{e}; all before it is kept: take it out of the texts and start again") from None
    except BrokenProcessPool:
        raise SystemExit(f"a TTS process was killed, perhaps because memory ran out; all before it is kept: start "
                         f"again, with fewer --workers than {cfg.workers}") from None


def write_audio(path: Path, wave: np.ndarray) -> None:
    """Write a wave (T,) at 16 kHz in the format of the file's suffix, atomically."""
    import soundfile
    content = io.BytesIO()
    soundfile.write(content, wave, SAMPLE_RATE, format=path.suffix[1:].upper())
    write_atomic(path, content.getvalue())
