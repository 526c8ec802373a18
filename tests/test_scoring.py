"""slam.scoring: log-probabilities of pairs against each sequence by itself, n-grams against counting."""
import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import N_UNITS, markov
from test_train import tiny

from slam.scoring import PrefixPair, ngram_loss, ngram_nlls, ngrams, pack, pair_logps, pair_nlls, row_logps
from slam.units import to_tokens


def some_pairs(n: int, seed: int = 0) -> list[PrefixPair]:
    rng = np.random.default_rng(seed)

    def tokens() -> list[int]:
        return rng.integers(2, N_UNITS + 2, rng.integers(1, 20)).tolist()

    return [PrefixPair([1, *tokens()], [*tokens(), 1], [*tokens(), 1]) for _ in range(n)]


def logp_alone(lm, prompt: list[int], completion: list[int]) -> float:
    x = torch.tensor([prompt + completion])
    return lm(x)[0].log_softmax(-1)[0, :-1].gather(1, x[0, 1:, None])[-len(completion):].sum().item()


def test_the_row_of_a_pair():
    assert PrefixPair.of([1, 7, 8, 1], [1, 7, 9, 1]) == PrefixPair([1, 7], [8, 1], [9, 1])
    pair = PrefixPair([1, 7, 8], [11, 1], [6, 1])
    assert pair.lengths == (2, 2, 2) and pair.n_inputs == 6
    assert pair.row() == ([1, 7, 8, 11, 8, 6], [7, 8, 11, 1, 6, 1], [0, 1, 2, 3, 2, 3], [0, 0, 1, 1, 2, 2])
    cut = PrefixPair([1, 7, 8], [11], [6])  # both without an EOS
    assert cut.row() == ([1, 7, 8, 8], [7, 8, 11, 6], [0, 1, 2, 2], [0, 0, 1, 2])
    assert pack([PrefixPair([1], [2] * n, []) for n in (6, 5, 2)], 8) == [[0, 2], [1]]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))])
def test_logps_are_those_of_each_completion_by_itself(device):
    """Whatever shares its row or batch, padded or not, compiled or not."""
    lm, pairs = tiny().eval().to(device), some_pairs(9)
    with torch.no_grad():
        expected = torch.tensor([[logp_alone(lm.cpu(), p.prefix, end) for end in (p.first, p.second)] for p in pairs])
        lm.to(device)
        rows = [[pairs[i] for i in row] for row in pack(pairs, 64)]
        order = np.concatenate(pack(pairs, 64))
        assert max(map(len, rows)) > 1 and len(rows) > 1
        for forward, layout, width in ((lm, rows, 0), (lm, rows, 80), (lm, [pairs], 0), (lm, [[p] for p in pairs], 0)):
            found = row_logps(forward, layout, width, torch.device(device), "float32").cpu()[:, 1:]
            torch.testing.assert_close(found, expected[order if layout is rows else range(9)], atol=1e-4, rtol=1e-4)
        found = pair_logps(lm, pairs, 64, "float32", "x")[:, 1:]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


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
    assert pair_nlls(lm, pairs, 16) == pytest.approx(found, rel=1e-5)  # most are longer than a row


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
