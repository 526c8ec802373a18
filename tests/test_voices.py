"""Speech unlike the stories (dev/voices.py): random words, and people, who are understood from their units."""
import shutil
import sys

import pytest
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "dev"))
import voices

from slam.audio import SAMPLE_RATE, load_audio
from slam.metrics import word_error_rate
from slam.speech import transcribe
from slam.tokenizer import SpeechTokenizer
from slam.vocoder import Vocoder


def test_random_words_are_words_and_repeat():
    texts, again, other = (voices.word_texts(20, seed) for seed in (0, 0, 1))
    assert texts == again != other and len(texts) == 20
    words = [word for text in texts.values() for sentence in text for word in sentence.rstrip(".").lower().split()]
    assert all(len(text) == 4 for text in texts.values()) and 20 * 4 * 6 <= len(words) <= 20 * 4 * 12
    assert len(set(words)) > 0.7 * len(words) and all(word.isalpha() for word in words)


def test_random_words_are_spoken(tmp_path):
    run("dev/voices.py", "words", f"--out={tmp_path}", "--recordings=2", "--workers=1")
    assert [2 < len(load_audio(tmp_path / f"0000{i}.flac")) / SAMPLE_RATE < 60 for i in (0, 1)] == [True, True]


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
    assert words > 60 and errors / words <= 0.15
