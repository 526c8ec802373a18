"""Spoken benchmark pairs: what the wrong member of a pair is, and that nothing else tells it apart."""
import numpy as np
import pytest

from slam.spoken_pairs import GRAMMAR, exchange, grammar_pair, make_sblimp, write_benchmark
from synth_stories import Config


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
