"""slam/alignment.py: word times by Whisper's attention, and unit files with words."""
import itertools

import numpy as np
import pytest
from conftest import refused, run

from slam.alignment import first_units, monotone_path, transcript, word_times
from slam.interleave import TextTokenizer
from slam.speech import load_asr
from slam.units import UnitReader, UnitWriter

WORDS = """The little rabbit found a golden apple under an enormous tree. Seven hungry children carried wooden boats
across our quiet river, because nobody wanted another rainy afternoon inside.""".split()


def test_the_path_is_the_cheapest_monotone_one():
    assert monotone_path(np.array([[0, 0, 1, 1], [1, 1, 0, 0.0]])).tolist() == [0, 2]
    rng = np.random.default_rng(0)
    for _ in range(50):
        N, T = rng.integers(1, 5), rng.integers(1, 7)
        cost, best = rng.normal(size=(N, T)), np.inf
        for n in range(max(N, T) - 1, N + T - 1):  # every path of n steps from (0, 0) to (N - 1, T - 1)
            for steps in itertools.product([(1, 0), (0, 1), (1, 1)], repeat=n):
                path = np.cumsum([(0, 0), *steps], 0)
                if tuple(path[-1]) == (N - 1, T - 1):
                    total = cost[path[:, 0], path[:, 1]].sum()
                    if total < best:
                        best, first = total, [path[path[:, 0] == i, 1].min() for i in range(N)]
        assert monotone_path(cost).tolist() == first


def test_first_units():
    assert first_units([0.1, 0.5], np.array([5, 5, 5]), 25.0).tolist() == [0, 2]
    assert first_units([0.0, 0.19, 0.21, 0.2], np.array([5, 5, 5]), 25.0).tolist() == [0, 1, 1, 1]


def test_times_of_words_spoken_one_by_one(voice):
    """The true times are known: each word is spoken by itself, without the silence around it, and all are joined."""
    spoken = []
    for word in WORDS:
        wave = voice(word)
        loud = np.flatnonzero(np.abs(wave) > 0.02)
        spoken.append(wave[loud[0]:loud[-1]])
    truth = np.cumsum([0, *(len(x) for x in spoken[:-1])]) / 16_000
    half = len(WORDS) // 2
    waves = [np.concatenate(x) for x in (spoken[:half], spoken[half:])]
    found = word_times(waves, [" ".join(x) for x in (WORDS[:half], WORDS[half:])], "embedded:whisper-tiny.en")
    errors = np.abs(np.concatenate([truth[:half], truth[half:] - truth[half]]) - np.concatenate(found))
    print(f"median {1000 * np.median(errors):.0f} ms, mean {1000 * errors.mean():.0f} ms, largest {errors.max():.2f} s")
    assert np.median(errors) <= 0.06 and errors.mean() < 0.15


def test_a_very_short_wave_has_times():
    model, before = load_asr("embedded:whisper-tiny.en")[0], []
    model.set_attn_implementation("sdpa")
    hook = model.model.encoder.register_forward_hook(lambda *_: before.append(model.config._attn_implementation))
    assert word_times([np.zeros(800, np.float32)], ["Hi there."], "embedded:whisper-tiny.en")[0][0] == 0
    hook.remove()
    assert before == ["sdpa"] and model.config._attn_implementation == "sdpa"  # fast for the encoder, and afterwards


def test_texts_that_cannot_be_aligned_are_counted(stories, tmp_path):
    assert "config: batch: at least 1" in refused("-m", "slam.alignment", "--batch=0")
    units = UnitReader(stories / "units" / "val")
    with UnitWriter(tmp_path / "units", units.fingerprint, durations=True) as writer:
        for i, (record, text) in enumerate(zip(units.records(), ["word " * 500, "-", "He ran.", " "])):
            writer.add(record["id"], units.units(i), units.durations(i), text=text)
            (tmp_path / f"{record['id']}.flac").symlink_to(stories / "audio" / f"{record['id']}.flac")
        writer.add("latin", units.units(0), units.durations(0))
    (tmp_path / "latin.flac").symlink_to(stories / "audio" / f"{record['id']}.flac")
    (tmp_path / "latin.txt").write_bytes(b"The caf\xe9.")
    done = run("-m", "slam.alignment", f"--units={tmp_path}/units", f"--audio={tmp_path}", "--suffix=.flac",
               "--text_lm=embedded:smollm2-135m", f"--out={tmp_path}/words", "--max_skipped=1")
    assert "500 tokens of text, and Whisper aligns 1 to 440" in done.stderr
    assert "skipped latin: 'utf-8' codec can't decode" in done.stderr
    assert "words of 2 of 5 utterances; 3 skipped" in done.stdout


def test_transcripts_beside_the_audio(tmp_path):
    (tmp_path / "19").mkdir()
    (tmp_path / "19" / "19-1.trans.txt").write_text("19-1-0000 HELLO THERE\n19-1-0001 GO ON\n")
    (tmp_path / "x.txt").write_text("Good morning.\n")
    assert transcript(tmp_path, "19/19-1-0001.flac") == "go on"
    assert transcript(tmp_path, "x.wav") == "Good morning." and transcript(tmp_path, "y.wav") is None


def test_a_corpus(stories, tmp_path):
    out, args = tmp_path / "words", ["--text_lm=embedded:smollm2-135m", "--suffix=.flac", f"--audio={stories}/audio"]
    run("-m", "slam.alignment", f"--units={stories}/units/val", f"--out={out}", *args)
    before, reader, tokenizer = UnitReader(stories / "units" / "val"), UnitReader(out), TextTokenizer(args[0][10:])
    assert reader.ids() == before.ids() and reader.fingerprint == tokenizer.fingerprint(before.fingerprint)
    assert reader.fingerprint.speech() == before.fingerprint and str(reader.fingerprint) != str(before.fingerprint)
    for i, record in enumerate(reader.records()):
        text, words = reader.words(i)
        assert (reader.tokens(i) == before.tokens(i)).all() and (reader.durations(i) == before.durations(i)).all()
        assert tokenizer.tokenizer.decode(text) == record["text"] and len(words) == len(record["text"].split())
        assert (np.diff(words[:, 0]) > 0).all() and (np.diff(words[:, 1]) >= 0).all() and (words[0] == 0).all()
        # in any story a word takes a few units, and they are spread over all of it
        assert words[-1, 1] > 0.8 * len(reader.units(i)) and (np.diff(words[:, 1]) == 0).mean() < 0.1
    again = run("-m", "slam.alignment", f"--units={stories}/units/val", f"--out={out}", *args)
    assert "words of 4 of 4" in again.stdout
    assert "more than 5 % were skipped" in refused("-m", "slam.alignment", f"--units={stories}/units/train",
                                                  f"--out={tmp_path}/none", args[0], "--audio=/nowhere")


@pytest.mark.parametrize("name", ["units", "audio"])
def test_refusals(name):
    assert f"{name}: name a folder" in refused("-m", "slam.alignment", f"--{'audio' if name == 'units' else 'units'}=x")
