"""Speech unlike the stories (dev/voices.py): random words, other voices, and people, who are understood from units."""
import shutil
import sys

import numpy as np
import pytest
from conftest import ROOT, refused, run

sys.path.insert(0, str(ROOT / "dev"))
import voices

from slam.audio import SAMPLE_RATE, load_audio
from slam.metrics import word_error_rate
from slam.speech import transcribe
from slam.tokenizer import SpeechTokenizer
from slam.units import UnitReader
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


def test_examples_of_wordnet_are_sentences_and_none_comes_twice():
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        pytest.skip("no apt-get here")
    try:
        texts = voices.example_texts(3000, 0)
    except SystemExit as e:
        assert "can't be had" in str(e)
        pytest.skip(str(e))
    sentences = [sentence for text in texts.values() for sentence in text]
    assert len(texts) == 3000 and all(1 <= len(text) <= 4 for text in texts.values())
    assert len(set(sentences)) == len(sentences) > 6000
    assert all(x[0].isupper() and x[-1] in ".!?" and 5 <= len(x.split()) <= 16 for x in sentences)
    assert "The more hieratic sculptures leave the viewer curiously unmoved." in sentences


@pytest.mark.parametrize("seed", range(8))
def test_another_voice_scales_speed_and_pitch(seed):
    tone = np.sin(2 * np.pi * 1000 * np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE).astype(np.float32)
    copy = voices.another_voice(tone, np.random.default_rng(seed))
    loudest = np.abs(np.fft.rfft(copy * np.hanning(len(copy)))).argmax() * SAMPLE_RATE / len(copy)
    assert 0.74 < len(tone) / len(copy) < 1.35 and loudest == pytest.approx(1000 * len(tone) / len(copy), rel=0.01)
    assert copy.dtype == np.float32 and 0.09 < np.abs(copy).max() < 0.91


def test_other_voices_begin_stories_and_the_tts_goes_on(stories, tmp_path):
    """Two copies of each training story: most end in its own frames, begin in others, and none is made twice."""
    def others() -> str:
        return run("dev/voices.py", "others", f"--stories={stories}", f"--out={tmp_path}").stdout

    said, own, new = others(), UnitReader(stories / "units/train"), UnitReader(tmp_path)
    assert others() == said and len(UnitReader(tmp_path)) == len(new) == 2 * len(own)
    ids, texts = own.ids(), [record["text"] for record in own.records()]
    shared = []
    for i, record in enumerate(new.records()):
        story = ids.index(record["id"][:-2])
        assert record["text"] == texts[story]
        a, b = (np.repeat(r.units(j), r.durations(j)) for r, j in ((own, story), (new, i)))
        n = min(len(a), len(b))
        same = a[::-1][:n] == b[::-1][:n]
        shared.append((same.argmin() if not same.all() else n) / len(a))
    assert max(shared) < 0.95 and sum(x > 0.05 for x in shared) >= len(new) / 3
    shutil.copytree(stories, tmp_path / "stories")
    error = refused("dev/voices.py", "others", f"--stories={tmp_path / 'stories'}", f"--out={tmp_path}")
    assert "holds other stories than" in error


def test_pairs_in_another_voice_are_not_mixed_with_other_pairs(stories, tmp_path):
    """The names of their recordings recur in every set."""
    (tmp_path / "slt").mkdir()
    shutil.copy(stories / "sblimp" / "manifest.jsonl", tmp_path / "slt")
    error = refused("dev/voices.py", "flite", f"--set={stories / 'tstorycloze'}", f"--out={tmp_path}")
    assert "holds other pairs than" in error


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
