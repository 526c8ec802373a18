"""Spoken benchmark pairs: what the wrong member of a pair is, and that nothing else tells it apart."""
import re
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest

from slam.benchmarks import read_manifest
from slam.speech import continuation_scores
from slam.spoken_pairs import GRAMMAR, exchange, grammar_pair, make_sblimp, make_sstorycloze, write_benchmark
from synth_stories import Config, read_openings, split_sentences

NAMES = read_openings("assets/openings.json")["name"]


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


CLOSE = ["Tom had a red ball. He took the ball to the park. He kicked the ball very far. It rolled under a tree. "
         "Tom ran to the tree and found his ball.",
         "Tom saw a big dog in the park. The dog was sleeping under a tree. Tom sat down beside the dog. The dog woke "
         "up and licked his face. Tom laughed, and the dog wagged its tail.",
         "Sam was hungry. Sam went to the kitchen. There was a cake on the table. He ate the cake. Sam was not hungry "
         "any more after the cake.",
         "Mia made soup in the kitchen. The soup was too hot. Mia blew on the soup. Then the soup was cold. Mia put "
         "the cold soup on the table and ate it."]


def test_hard_negatives(tmp_path, capsys):
    """The wrong ending has this story's hero in it, and fits less, in the writer's opinion; none is used twice."""
    stories = [{"id": str(i), "sentences": split_sentences(text)} for i, text in enumerate(CLOSE)]
    with ThreadPool(1) as pool:
        make_sstorycloze(Config(out=str(tmp_path / "few")), pool, stories[::3])  # about nothing that they share
        make_sstorycloze(Config(out=str(tmp_path)), pool, stories)
    assert "sstorycloze: 0 pairs; 2 stories have no close ending" in capsys.readouterr().out
    assert "no pairs in it" in str(pytest.raises(SystemExit, read_manifest, f"{tmp_path}/few/sstorycloze").value)
    pairs = read_manifest(str(tmp_path / "sstorycloze")).pairs
    assert 2 <= len(pairs) <= 4
    endings = [re.sub("|".join(NAMES), "", split_sentences(pair["negative_text"])[4]) for pair in pairs]
    assert len(set(endings)) == len(pairs)
    for pair in pairs:
        right, wrong = (split_sentences(pair[f"{side}_text"]) for side in ("positive", "negative"))
        assert right[:4] == wrong[:4] and right[4] != wrong[4]
        beginning = " ".join(right[:4])
        heroes = set(re.findall(r"\w+", wrong[4])) & set(NAMES)
        assert heroes <= {next(w for w in re.findall(r"\w+", beginning) if w in NAMES)}
        fits, less = continuation_scores([beginning] * 2, [right[4], wrong[4]], "embedded:smollm2-135m")
        assert less <= fits - 0.29


def test_too_many_sentences_for_the_templates(tmp_path):
    with pytest.raises(SystemExit, match="different pairs, not 9,000"):
        make_sblimp(Config(n_sblimp=9_000, out=str(tmp_path)), None)


def test_a_benchmark_without_pairs_is_an_empty_manifest(tmp_path):
    write_benchmark(Config(out=str(tmp_path / "new")), None, "sstorycloze", [], {})
    assert (tmp_path / "new" / "sstorycloze" / "manifest.jsonl").read_text() == ""
