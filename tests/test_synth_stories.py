"""synth_stories.py: the same seed gives the same files, also after a kill."""
import hashlib
import json
import re
import signal

import numpy as np
import pytest
import soundfile
from conftest import SYNTH, refused, run, start

from slam.units import UnitReader, read_pairs
from synth_stories import (
    GRAMMAR,
    Config,
    exchange,
    grammar_pair,
    make_sblimp,
    opening,
    read_openings,
    split_sentences,
    tidy,
    write_benchmark,
)


def test_split_and_tidy():
    assert split_sentences('Hi. "Go!" He ran') == ["Hi.", '"Go!"']
    story = "One came. Two went home. Three ate an apple. Four slept well. Five woke up. And six"
    assert tidy(story) == split_sentences(story)
    assert tidy("Too short. Only two.") is None
    assert tidy(story.replace("Five woke up.", "Four slept well.")) is None  # repeats itself
    assert tidy(story.replace("apple", "apple 🍎")) is None
    assert tidy(story.replace("apple", f"{10 ** 30} apples")) is None  # a TTS has no name for such numbers
    story = story.replace("And six", "Four slept well. Seven left.")
    assert tidy(story) == split_sentences(story)[:5]  # it ends before the repetition


def test_openings_differ():
    rng, lists = np.random.default_rng(0), read_openings("assets/openings.json")
    openings = [opening(lists, rng) for _ in range(1000)]
    assert len(set(openings)) == 1000 and all(2 <= len(split_sentences(o)) <= 3 for o in openings)
    assert not any(re.search(r"[{}_]|\ba [aeiou]|\ban [^aeiou]", o) for o in openings)
    shape = {"shape": ["{name} met {a_hero} and {a_hero2}. The {hero} ran."], "name": ["Mia"], "hero": ["ant", "owl"]}
    assert {opening(shape, rng) for _ in range(50)} == {
        f"Mia met an {a} and an {b}. The {a} ran." for a in ("ant", "owl") for b in ("ant", "owl")}


def test_sentences_are_not_those_of_the_test():
    """assets/sentences.json gives eight sentences a story, whole and different, and none of an sBLIMP-style pair."""
    rng, lists = np.random.default_rng(0), read_openings("assets/sentences.json")
    stories = [tidy(opening(lists, rng), max_sentences=8) for _ in range(1000)]
    made = {sentence for story in stories if story for sentence in story}
    assert sum(story is not None and len(story) == 8 for story in stories) > 980 and len(made) > 6000
    assert not any(re.search(r"[{}_]|\ba [aeiou]|\ban [^aeiouh]", sentence) for sentence in made)
    asked = {sentence for kind in GRAMMAR for i in range(500) for sentence in grammar_pair(kind, i, rng)}
    assert len(asked) > 2500 and not made & asked


def test_openings_that_are_not(tmp_path):
    path = tmp_path / "openings.json"
    for text, message in (("{", "not a JSON file of lists"), ("[]", "not a JSON file of lists"),
                          ('{"name": ["Mia"]}', "'shape' is missing"),
                          ('{"shape": ["{name} saw {a_hero2}."], "name": ["Mia"]}', "'hero' is missing"),
                          ('{"shape": ["{event}"], "event": ["{name} ran."]}', "'name' is missing")):
        path.write_text(text)
        with pytest.raises(SystemExit, match=message):
            read_openings(str(path))
    path.write_text('{"shape": ["A {hero} ran."], "hero": ["fox"]}')
    assert read_openings(str(path))["hero"] == ["fox"]


def digest(folder) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix in (".wav", ".flac", ".jsonl")}


def test_what_there_is(stories):
    train, val = UnitReader(stories / "units" / "train"), UnitReader(stories / "units" / "val")
    assert len(train) == 6 and len(val) == 4 and not set(train.ids()) & set(val.ids())
    for split, reader in (("train", train), ("val", val)):
        fingerprint, pairs = read_pairs(stories / f"pairs_{split}.jsonl")
        assert fingerprint == reader.fingerprint and len(pairs) == len(reader)
        texts = {r["id"]: r["text"] for r in reader.records()}
        for pair in pairs:
            own = texts[pair["id"]]
            assert f"{pair['prompt_text']} {pair['chosen_text']}" in own and pair["rejected_text"] not in own
    for name, n in (("tstorycloze", 4), ("sblimp", 8)):
        pairs = [json.loads(x) for x in (stories / name / "manifest.jsonl").read_text().splitlines()]
        assert len(pairs) == n
        for pair in pairs:
            for side in ("positive", "negative"):
                wave, rate = soundfile.read(stories / name / pair[side])
                assert rate == 16_000 and 0.5 < len(wave) / rate < 60 and np.abs(wave).max() > 0.05
    assert {p["type"] for p in pairs} == set(GRAMMAR)
    assert len(list((stories / "audio").glob("*.flac"))) == 10


def test_killed_and_resumed_gives_the_same_files(stories, tmp_path):
    """kill -9 while it writes and again while it speaks; then resumed: every file as of the undisturbed run."""
    out = tmp_path / "data"
    command = ["synth_stories.py", "config/demo_stories.py", f"--out={out}", *SYNTH]
    for moment in (lambda: (out / "stories.jsonl").exists(), lambda: len(list((out / "audio").glob("*.flac"))) > 5):
        process = start(*command)
        process.until(moment)
        process.kill()
        assert process.end().returncode == -signal.SIGKILL
    run(*command)
    assert digest(out) == digest(stories)
    for split in ("train", "val"):
        a, b = UnitReader(out / "units" / split), UnitReader(stories / "units" / split)
        assert a.ids() == b.ids() and all((a.tokens(i) == b.tokens(i)).all() for i in range(len(a)))


def test_refusals(stories, tmp_path):
    error = refused("synth_stories.py", "config/demo_stories.py", f"--out={stories}", *SYNTH, "--seed=7")
    assert "seed was 0, now 7" in error
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    assert "not made by" in refused("synth_stories.py", f"--out={tmp_path / 'mine'}")
    assert "not made by" in refused("synth_stories.py", f"--out={tmp_path / 'mine'}", "--overwrite")
    assert "not made by" in refused("synth_stories.py", f"--out={tmp_path / 'mine' / 'precious.txt'}")
    assert (tmp_path / "mine" / "precious.txt").exists()
    assert "did you mean" in refused("synth_stories.py", "config/demo_storys.py")
    assert "n_train" in refused("synth_stories.py", "--n_trian=5")
    assert "config: n_train, seed must not be negative" in refused("synth_stories.py", "--n_train=-5", "--seed=-1")
    assert "config: n_val must not be negative" in refused("synth_stories.py", "--swag=train.csv", "--n_val=-5")
    (tmp_path / "empty").mkdir()
    assert "not a whole checkpoint folder" in refused("synth_stories.py", f"--writer={tmp_path}/empty",
                                                      f"--out={tmp_path}/x")
    assert "hibari has american, not bf_emma" in refused("synth_stories.py", "--voices=bf_emma")


def test_exchange_leaves_nothing_in_place():
    for n in (2, 3, 10):
        out = exchange(list(range(n)), seed=1)
        assert sorted(out) == list(range(n)) and all(i != x for i, x in enumerate(out))


def test_grammar_pairs():
    rng = np.random.default_rng(0)
    for kind in GRAMMAR:
        for i in range(24):
            good, bad = grammar_pair(kind, i, rng)
            assert good != bad and good.endswith(".") and abs(len(good.split()) - len(bad.split())) <= 1
    # either member of a minimal pair is right in half of the cases, so the words alone give nothing away
    good = [grammar_pair("subject_verb_agreement", i, rng)[0].split() for i in range(200)]
    plural = sum(any(w in ("are", "were", "have") for w in g) for g in good)
    assert plural == 100


def test_too_many_sentences_for_the_templates(tmp_path):
    with pytest.raises(SystemExit, match="different pairs, not 9,000"):
        make_sblimp(Config(n_sblimp=9_000, out=str(tmp_path)), None)


def test_a_benchmark_without_pairs_is_an_empty_manifest(tmp_path):
    write_benchmark(Config(out=str(tmp_path / "new")), None, "sstorycloze", [], {})
    assert (tmp_path / "new" / "sstorycloze" / "manifest.jsonl").read_text() == ""
