"""Text to speech: waves of whole frames, seeded by id; the pool's order; files that are whole."""
import importlib.util
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile

from slam.tts import speak, speakers, spoken, write_audio
from synth_stories import Config


def test_waves_are_whole_frames_and_depend_on_the_seed():
    """40 ms a frame at 16 kHz: sentences joined keep their frames."""
    one, two = speak(("hibari", ["Hello.", "How are you?"], 0, "american", True))
    for wave in (one, two):
        assert wave.dtype == np.float32 and len(wave) % 640 == 0 and np.abs(wave).max() > 0.05
        assert 0.4 < len(wave) / 16_000 < 5
    again, = speak(("hibari", ["Hello."], 0, "american", True))
    other, = speak(("hibari", ["Hello."], 1, "american", True))
    assert (again == one).all() and (len(other) != len(one) or (other != one).any())


def test_texts_come_in_order_and_a_wave_does_not_depend_on_the_others():
    texts = {f"t{i}": [f"Number {i}."] for i in range(5)}
    with ThreadPoolExecutor(2) as pool:
        waves = dict(spoken(Config(), pool, texts, "speaking"))
        alone = dict(spoken(Config(), pool, {"t3": texts["t3"]}, "speaking"))
        reseeded = dict(spoken(Config(seed=1), pool, {"t3": texts["t3"]}, "speaking"))
        assert list(spoken(Config(), pool, {}, "speaking")) == []
    assert list(waves) == list(texts)
    assert np.array_equal(waves["t3"][0], alone["t3"][0]) and not np.array_equal(waves["t3"][0], reseeded["t3"][0])


def test_a_sentence_that_cannot_be_spoken():
    number = f"{10 ** 90}."  # hibari has no name for it
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(SystemExit, match="hibari can't speak '10000.*all before it is kept"):
            list(spoken(Config(), pool, {"a": ["Hello."], "b": [number]}, "speaking"))
        waves = dict(spoken(Config(), pool, {"a": ["Hello."], "b": [number]}, "speaking", strict=False))
    assert len(waves["a"][0]) and not len(waves["b"][0])


def test_a_killed_speaker_ends_the_run_and_does_not_hang_it():
    with speakers("hibari", 1) as pool:
        found = spoken(Config(workers=1), pool, {f"{i}": ["Hello."] for i in range(9)}, "speaking")
        next(found)
        os.kill(next(iter(pool._processes)), signal.SIGKILL)
        with pytest.raises(SystemExit, match="was killed.*with fewer --workers than 1"):
            list(found)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_audio_is_written_whole(tmp_path, suffix):
    wave = np.sin(np.arange(8000) / 20).astype(np.float32) / 2
    write_audio(tmp_path / "new" / f"a.{suffix}", wave)
    assert [p.name for p in (tmp_path / "new").iterdir()] == [f"a.{suffix}"]  # nothing temporary is left
    read, rate = soundfile.read(tmp_path / "new" / f"a.{suffix}")
    assert rate == 16_000 and np.abs(read - wave).max() < 1e-4


def test_a_tts_that_is_not_there():
    if importlib.util.find_spec("kokoro"):
        pytest.skip("kokoro is installed")
    with pytest.raises(SystemExit, match="pip install kokoro"):
        with speakers("kokoro", 1):
            pass
