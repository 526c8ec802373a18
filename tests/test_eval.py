"""eval.py: metrics against brute force."""
import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import N_UNITS, markov
from test_train import tiny

from eval import (Config, Fork, auto_bleu, load_judge, ngram_loss, ngram_nlls, ngrams, pair_accuracy, pair_nlls,
                  perplexity, score_pairs, table, text_nlls, word_error_rate, words)
from train import merge_results
from units import to_tokens


def test_pair_accuracy():
    assert pair_accuracy(np.array([1.0, 2.0]), np.array([1.5, 2.0])) == {"value": 75.0, "se": 25.0, "n": 2, "ties": 1}
    a = np.random.default_rng(0).normal(size=(2, 1000))
    result = pair_accuracy(*a)
    p = sum(x < y for x, y in a.T) / 1000
    assert result["value"] == pytest.approx(100 * p)
    assert result["se"] == pytest.approx(100 * math.sqrt(p * (1 - p) / 999))


def test_accuracy_of_pairs_that_are_not_independent():
    """One item in four voices: the error is that of the items, not of their copies."""
    rng = np.random.default_rng(0)
    item, gap = np.repeat(np.arange(50), 4), np.repeat(rng.normal(0.3, 1, 50), 4)
    alone = pair_accuracy(np.zeros(50), gap[::4])
    copies = pair_accuracy(np.zeros(200), gap, [str(i) for i in item])
    assert copies["value"] == alone["value"] and copies["n"] == 200 and copies["items"] == 50
    assert copies["se"] == pytest.approx(alone["se"], rel=0.1)
    assert copies["interval"] == pytest.approx([copies["value"] + 1.96 * x * copies["se"] for x in (-1, 1)], abs=2)
    failed = pair_accuracy(np.array([1.0, np.nan, 2.0]), np.array([2.0, 1.0, 1.0]))
    assert failed["value"] == 50 and failed["n"] == 2 and failed["failed"] == 1


def test_nlls_are_those_of_each_utterance_by_itself():
    """Pairs that share a beginning, nothing, or everything; EOS is scored, BOS is not."""
    lm = tiny().eval()
    a, b, c, d, e = (to_tokens(x) for x in markov(5, np.random.default_rng(0)))
    pairs = [(a, b), (c, c[:7] + d[3:]), (d, d), (e, e[:-2] + [1]), (c[:2] + [1], c)]

    def nlls(tokens: list[int]) -> np.ndarray:
        x = torch.tensor([tokens])
        return -lm(x)[0].log_softmax(-1)[0, :-1].gather(1, x[0, 1:, None])[:, 0].detach().numpy()

    found, sums = pair_nlls(lm, pairs, 128), pair_nlls(lm, pairs, 128, "sum")
    ends = pair_nlls(lm, pairs, 128, score_prompt=False)
    for i, both in enumerate(pairs):
        shared = len(Fork.of(*both).prefix) - 1
        for side, tokens in enumerate(both):
            assert found[i, side] == pytest.approx(nlls(tokens).mean(), rel=1e-5)
            assert sums[i, side] == pytest.approx(nlls(tokens).sum(), rel=1e-5)
            if i != 2:
                assert ends[i, side] == pytest.approx(nlls(tokens)[shared:].mean(), rel=1e-5)
    assert found[2, 0] == found[2, 1]  # a tie
    assert Fork.of(*pairs[1]).prefix == c[:7] and Fork.of(d, d).n_inputs == len(d) - 1
    assert pair_nlls(lm, pairs[1:2], 16) == pytest.approx(found[1:2], rel=1e-5)  # longer than a row


def test_results_of_a_benchmark():
    """Micro over pairs; macro as ZeroSpeech: voices, then items."""
    right = {("x", "1"): (1, 1, 1, 0), ("x", "2"): (0, 0), ("y", "3"): (1,)}
    pairs = [{"id": f"{item}{v}", "item": item, "type": t, "voice": f"v{v}"} for (t, item), all_ in right.items()
             for v, _ in enumerate(all_)]
    nll = np.array([[1.0, 2.0] if x else [2.0, 1.0] for all_ in right.values() for x in all_])
    result = score_pairs(nll, pairs)
    assert result["value"] == pytest.approx(100 * 4 / 7) and result["n"] == 7 and result["ties"] == 0
    assert result["macro"] == pytest.approx(100 * np.mean([3 / 4, 0, 1]))
    assert {t: (r["value"], r["n"]) for t, r in result["by"]["type"].items()} == {"x": (50, 6), "y": (100, 1)}
    assert result["by"]["voice"]["v1"]["n"] == 2
    assert "by" not in score_pairs(nll[:2], [{"id": "a"}, {"id": "b"}])


def test_text_judge():
    good, bad = text_nlls(["The dog is sleeping near the tree.", "Dog the sleeping near is tree the."],
                          "embedded:smollm2-135m")
    assert good < bad - 1


def test_ngrams_by_brute_force():
    rng = np.random.default_rng(0)
    train, val = ([np.array(to_tokens(x)) for x in markov(n, rng)] for n in (150, 50))
    unigram, bigram = (ngram_loss(logp, val) for logp in ngrams(train, N_UNITS + 2).values())
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
    logp, pair = ngrams(train, N_UNITS + 2)["bigram"], ([1, 5, 6, 1], [1, 5, 7, 8, 1])
    for x, nll in zip(pair, ngram_nlls(logp, pair, "mean", True)):
        assert nll == pytest.approx(ngram_loss(logp, [np.array(x)]))
    assert ngram_nlls(logp, pair, "sum", False)[0] == pytest.approx(-logp[5, 6] - logp[6, 1])
    assert sum(p2(5, b) for b in range(N_UNITS + 2)) == pytest.approx(1)


def test_auto_bleu():
    assert auto_bleu("a b a b", 2) == pytest.approx(2 / 3)
    assert auto_bleu("ha ha ha", 2) == 1.0
    assert auto_bleu("one two three", 2) == 0.0 and auto_bleu("", 2) == 0.0 and auto_bleu("one", 2) == 0.0
    text = "the cat saw the dog and the cat saw the bird ."
    grams = list(zip(text.split(), text.split()[1:]))
    assert auto_bleu(text, 2) == pytest.approx(sum(grams.count(g) > 1 for g in grams) / len(grams))
    # GSLM's: elsewhere is where no word is shared.
    assert auto_bleu("ha ha ha", overlapping=False) == 0 and auto_bleu("ha ha ha ha", overlapping=False) == 2 / 3
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens = rng.choice(list("abc"), 12).tolist()
        grams = list(zip(tokens, tokens[1:]))
        expected = np.mean([any(g == h and abs(i - j) >= 2 for j, h in enumerate(grams)) for i, g in enumerate(grams)])
        assert auto_bleu(" ".join(tokens), overlapping=False) == pytest.approx(expected)
    assert words("Don't stop, he said.") == ["Don't", "stop", ",", "he", "said", "."]


def test_word_error_rate():
    assert word_error_rate("The cat sat.", "the cat sat") == (0, 3)
    assert word_error_rate("the cat sat", "the hat") == (2, 3)
    assert word_error_rate("the cat", "") == (2, 2)


def test_perplexity_counts_empty_texts():
    fluent, other = "Once upon a time, there was a little girl who lived in a small house.", "He ran. He sat down."
    cfg = Config(val=("x",), judge="embedded:smollm2-135m")
    alone = perplexity([fluent], cfg)
    assert alone["value"] < 20 and alone["empty"] == 0 and alone["se"] is None
    with_empty = perplexity([fluent, "", " "], cfg)
    assert with_empty["value"] == pytest.approx(alone["value"]) and with_empty["empty"] == 2
    assert perplexity([""], cfg)["value"] is None
    model, tokenizer = load_judge(cfg.judge)
    losses = []
    for text in (fluent, other):
        ids = torch.tensor([tokenizer(text).input_ids])
        logp = model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])
        losses.append(-logp.mean().item())
    both = perplexity([fluent, other], replace(cfg, n_seeds=2))
    assert both["value"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)
    assert both["seeds"] == pytest.approx([math.exp(x) for x in losses], rel=1e-3)


def test_results_merge(tmp_path):
    merge_results(tmp_path / "results.json", {"a": {"value": 1}, "b": {"value": 2}})
    merge_results(tmp_path / "results.json", {"b": {"value": 3}})
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": {"value": 1}, "b": {"value": 3}}


def test_table():
    text = table({"x": {"val_loss": {"value": 1.234}, "tsc": {"value": 78.0, "se": 0.91}}, "y": {"tsc": {"value": 5}}})
    assert "val_loss" in text and "78.00 ± 0.9" in text and text.splitlines()[1].split() == ["val_loss", "1.23", "-"]
