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

from eval import Config, perplexity, table
from slam.run import merge_results
from slam.scoring import PrefixPair, ngram_loss, ngram_nlls, ngrams, pair_nlls
from slam.speech import load_judge
from slam.units import to_tokens


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
        shared = len(PrefixPair.of(*both).prefix) - 1
        for side, tokens in enumerate(both):
            assert found[i, side] == pytest.approx(nlls(tokens).mean(), rel=1e-5)
            assert sums[i, side] == pytest.approx(nlls(tokens).sum(), rel=1e-5)
            if i != 2:
                assert ends[i, side] == pytest.approx(nlls(tokens)[shared:].mean(), rel=1e-5)
    assert found[2, 0] == found[2, 1]  # a tie
    assert PrefixPair.of(*pairs[1]).prefix == c[:7] and PrefixPair.of(d, d).n_inputs == len(d) - 1
    assert pair_nlls(lm, pairs[1:2], 16) == pytest.approx(found[1:2], rel=1e-5)  # longer than a row


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
