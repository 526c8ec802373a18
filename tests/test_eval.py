"""eval.py: metrics against brute force."""
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import N_UNITS, markov
from test_train import tiny

from eval import (Fork, auto_bleu, mean_nlls, ngram_losses, pair_accuracy, read_manifest, score_pairs, table,
                  text_perplexity, word_error_rate, words)
from train import merge_results
from units import to_tokens


def test_pair_accuracy():
    assert pair_accuracy(np.array([1.0, 2.0]), np.array([1.5, 2.0])) == {"value": 75.0, "se": 25.0, "n": 2}
    a = np.random.default_rng(0).normal(size=(2, 1000))
    result = pair_accuracy(*a)
    p = sum(x < y for x, y in a.T) / 1000
    assert result["value"] == pytest.approx(100 * p)
    assert result["se"] == pytest.approx(100 * math.sqrt(p * (1 - p) / 999))


def test_mean_nlls_are_those_of_each_utterance_by_itself():
    """Pairs that share a beginning, nothing, or everything; EOS is scored, BOS is not."""
    lm = tiny().eval()
    a, b, c, d, e = (to_tokens(x) for x in markov(5, np.random.default_rng(0)))
    pairs = [(a, b), (c, c[:7] + d[3:]), (d, d), (e, e[:-2] + [1]), (c[:2] + [1], c)]
    found = mean_nlls(lm, pairs, 128)
    for both, nlls in zip(pairs, found):
        for tokens, nll in zip(both, nlls):
            x = torch.tensor([tokens])
            logp = lm(x)[0].log_softmax(-1)[0, :-1].gather(1, x[0, 1:, None])
            assert nll == pytest.approx(-logp.mean().item(), rel=1e-5)
    assert found[2, 0] == found[2, 1]  # a tie
    assert Fork.of(*pairs[1]).prefix == c[:7] and Fork.of(d, d).n_inputs == len(d) - 1
    assert mean_nlls(lm, pairs[1:2], 16) == pytest.approx(found[1:2], rel=1e-5)  # longer than a row


def test_score_pairs_by_type():
    lm, rng = tiny().eval(), np.random.default_rng(0)
    utterances = [to_tokens(x) for x in markov(8, rng)]
    result = score_pairs(lm, [{"type": t} for t in "aabb"], utterances, 128)
    assert set(result["by_type"]) == {"a", "b"} and result["by_type"]["a"]["n"] == 2
    assert result["value"] == pytest.approx(np.mean([r["value"] for r in result["by_type"].values()]))


def test_ngrams_by_brute_force():
    rng = np.random.default_rng(0)
    train, val = ([np.array(to_tokens(x)) for x in markov(n, rng)] for n in (150, 50))
    unigram, bigram = ngram_losses(train, val, N_UNITS + 2)
    one = Counter(t for x in train for t in x[1:].tolist())
    total = sum(one.values()) + N_UNITS + 2
    two = Counter(p for x in train for p in zip(x.tolist(), x[1:].tolist()))
    heads, kinds = Counter(a for a, _ in two.elements()), Counter(a for a, _ in two)
    def p1(b):
        return (one[b] + 1) / total

    def p2(a, b):
        return (two[a, b] + kinds[a] * p1(b)) / (heads[a] + kinds[a])
    targets = [p for x in val for p in zip(x.tolist(), x[1:].tolist())]
    assert unigram == pytest.approx(-np.mean([math.log(p1(b)) for _, b in targets]))
    assert bigram == pytest.approx(-np.mean([math.log(p2(a, b)) for a, b in targets]))
    assert bigram < unigram - 0.3
    assert sum(p2(5, b) for b in range(N_UNITS + 2)) == pytest.approx(1)


def test_auto_bleu():
    assert auto_bleu("a b a b", 2) == pytest.approx(2 / 3)
    assert auto_bleu("ha ha ha", 2) == 1.0
    assert auto_bleu("one two three", 2) == 0.0 and auto_bleu("", 2) == 0.0 and auto_bleu("one", 2) == 0.0
    text = "the cat saw the dog and the cat saw the bird ."
    grams = list(zip(text.split(), text.split()[1:]))
    assert auto_bleu(text, 2) == pytest.approx(sum(grams.count(g) > 1 for g in grams) / len(grams))
    assert words("Don't stop, he said.") == ["Don't", "stop", ",", "he", "said", "."]


def test_word_error_rate():
    assert word_error_rate("The cat sat.", "the cat sat") == (0, 3)
    assert word_error_rate("the cat sat", "the hat") == (2, 3)
    assert word_error_rate("the cat", "") == (2, 2)


def test_text_perplexity_counts_empty_texts():
    fluent = "Once upon a time, there was a little girl who lived in a small house."
    alone, _ = text_perplexity([fluent], "embedded:smollm2-135m")
    with_empty, empty = text_perplexity([fluent, "", " "], "embedded:smollm2-135m")
    assert with_empty == pytest.approx(alone) and empty == 2 and alone < 20
    assert math.isnan(text_perplexity([""], "embedded:smollm2-135m")[0])


def test_results_merge(tmp_path):
    merge_results(tmp_path / "results.json", {"a": {"value": 1}, "b": {"value": 2}})
    merge_results(tmp_path / "results.json", {"b": {"value": 3}})
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": {"value": 1}, "b": {"value": 3}}


def test_table():
    text = table({"x": {"val_loss": {"value": 1.234}, "tsc": {"value": 78.0, "se": 0.91}}, "y": {"tsc": {"value": 5}}})
    assert "val_loss" in text and "78.00 ± 0.9" in text and text.splitlines()[1].split() == ["val_loss", "1.23", "-"]


def test_bad_manifests(tmp_path):
    with pytest.raises(SystemExit, match="no manifest"):
        read_manifest(str(tmp_path))
    (tmp_path / "manifest.jsonl").write_text('{"positive": "a.wav", "negative": "b.wav"}\n')
    with pytest.raises(SystemExit, match="a.wav is missing"):
        read_manifest(str(tmp_path))
    (tmp_path / "manifest.jsonl").write_text('{"positive": 3}\n')
    with pytest.raises(SystemExit, match=":1: not a pair"):
        read_manifest(str(tmp_path))
