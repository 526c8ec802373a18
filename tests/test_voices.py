"""Copies of speech in other voices (dev/voices.py) keep its time; people are understood from their units."""
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "dev"))
import voices

from slam.audio import SAMPLE_RATE, load_audio
from slam.metrics import word_error_rate
from slam.speech import transcribe
from slam.tokenizer import SpeechTokenizer
from slam.vocoder import Vocoder


def pitch(wave: np.ndarray) -> float:
    """The strongest frequency, Hz."""
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return float(spectrum.argmax() * SAMPLE_RATE / len(wave))


def bursts(rate: float) -> np.ndarray:
    """Half-second tones of 220 Hz with pauses, `rate` times as fast: their own pitch stays."""
    n = round(0.5 * SAMPLE_RATE / rate)
    tone = np.sin(2 * np.pi * 220 * np.arange(n) / SAMPLE_RATE)
    return np.tile(np.concatenate([tone, np.zeros(n)]), 4).astype(np.float32)


def loudness(wave: np.ndarray) -> np.ndarray:
    """Of every 20 ms."""
    return np.sqrt((wave[:len(wave) // 320 * 320].reshape(-1, 320) ** 2).mean(1))


def test_a_wave_is_followed_at_another_speed_with_its_pitch():
    slow, fast = bursts(1.0), bursts(1.25)
    again = voices.follow(fast, np.arange(0, len(slow), 256) / 1.25)[:len(slow)]
    assert pitch(again) == pytest.approx(220, abs=3)
    a, b = loudness(slow), loudness(again)
    assert np.corrcoef(a, b)[0, 1] > 0.97 > np.corrcoef(a, np.roll(b, 3))[0, 1]


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_a_shifted_voice_keeps_its_time(factor):
    wave = bursts(1.0)
    shifted = voices.shift(wave, factor)
    assert len(shifted) == len(wave) and pitch(shifted) == pytest.approx(220 * factor, rel=0.02)
    assert np.corrcoef(loudness(wave), loudness(shifted))[0, 1] > 0.97


def test_changes_are_random_but_repeatable_and_keep_the_words_in_place(voice):
    wave, found = voice("Once upon a time, a little fox lived in the woods.").astype(np.float32), []
    for seed in range(8):
        changed = voices.change(wave, np.random.default_rng(seed))
        assert changed.shape == wave.shape and np.isfinite(changed).all() and 0.09 < np.abs(changed).max() <= 1
        assert np.array_equal(changed, voices.change(wave, np.random.default_rng(seed)))
        found.append(np.corrcoef(np.log(loudness(wave) + 1e-3), np.log(loudness(changed) + 1e-3))[0, 1])
    assert min(found) > 0.5 and np.mean(found) > 0.75


def test_alignment_finds_a_known_warp():
    rng = np.random.default_rng(0)
    b = np.cumsum(rng.standard_normal((60, 16)), 0)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    true = np.concatenate([np.arange(0, 20, 0.5), np.arange(20, 40), np.arange(40, 60, 2)])
    a = b[true.astype(int)]
    assert np.abs(voices.align(a, b) - true).max() < 1.5


def test_people_are_understood_from_their_units(tmp_path):
    """Five sentences that a person read for LibriVox, from Debian's mirror: no voice of theirs was heard in fitting."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        pytest.skip("no apt-get here")
    done = run("dev/voices.py", "people", "--sets=audiobook", f"--out={tmp_path}", check=False)
    if done.returncode:
        assert "can't be had" in done.stderr
        pytest.skip(done.stderr.strip().splitlines()[-1])
    waves = [load_audio(path) for path in sorted((tmp_path / "audiobook").glob("*.wav"))]
    assert len(waves) == 5
    tokenizer, vocoder = SpeechTokenizer.load("embedded"), Vocoder.load("embedded")
    again = [vocoder.synthesize(*tokenizer.encode(wave, SAMPLE_RATE))[0] for wave in waves]
    heard = transcribe(waves + again, "embedded:whisper-tiny.en", batch=10)
    errors, words = map(sum, zip(*(word_error_rate(a, b) for a, b in zip(heard[:5], heard[5:]))))
    assert words > 60 and errors / words <= 0.1
