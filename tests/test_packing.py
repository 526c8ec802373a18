"""slam.packing: chunks, rows, their order, and batches."""
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import N_UNITS

from model import ModelConfig, UnitLM
from slam.attention import attention_mask
from slam.packing import Loader, Packed, Rows, collate, cut
from slam.units import IGNORE, UnitReader


def test_cut_by_hand():
    assert cut([5], 3).tolist() == [[0, 0, 3], [0, 3, 1]]
    assert cut([4, 2, 7], 3).tolist() == [[0, 0, 3], [1, 0, 1], [2, 0, 3], [2, 3, 3]]


def test_every_token_but_bos_is_a_target_once(corpus):
    reader = UnitReader(corpus / "train")
    rows = Packed(cut(reader.lengths, 32), 32, np.random.default_rng(0))
    tokens, targets, positions = collate(reader, list(rows), 32)
    seen = Counter(targets[targets != IGNORE].tolist())
    expected = Counter(t for i in range(len(reader)) for t in reader.tokens(i)[1:].tolist())
    assert seen == expected and seen[1] == len(reader)  # 1: EOS, once an utterance
    # what is predicted is what comes next, and an utterance's start is never predicted
    inner = (targets[:, :-1] != IGNORE) & (positions[:, 1:] > 0)
    assert torch.equal(targets[:, :-1][inner], tokens[:, 1:][inner])
    assert (targets != IGNORE).float().mean() > 0.95
    assert positions.max() < 32 and all(len(r) and r[:, 2].sum() <= 32 for r in rows)


def test_packing_is_best_fit_decreasing():
    """Against the rule, word for word."""
    chunks = np.array([[i, 0, n] for i, n in enumerate(np.random.default_rng(0).integers(1, 33, 300))])
    rows = []
    for chunk in sorted(chunks.tolist(), key=lambda p: -p[2]):
        room = [(32 - sum(p[2] for p in row), i) for i, row in enumerate(rows)]
        fitting = [free for free, _ in room if free >= chunk[2]]
        if fitting:
            next(row for row, (free, _) in zip(rows, room) if free == min(fitting)).append(chunk)
        else:
            rows.append([chunk])
    packed = Packed(chunks, 32, None)
    # Of rows with equal room either may be taken, so what is compared is how full they get.
    assert sorted(row[:, 2].sum() for row in packed) == sorted(sum(p[2] for p in row) for row in rows)


def same(a, b) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def test_order_is_a_pure_function_of_seed_step_and_rank(corpus):
    lengths = UnitReader(corpus / "train").lengths
    a, b = Rows(lengths, 64, 8, seed=3), Rows(lengths, 64, 8, seed=3)
    backwards = [b.step(s)[0] for s in (70, 5, 30)]
    assert all(same(x, a.step(s)[0]) for x, s in zip(backwards, (70, 5, 30)))
    assert not same(Rows(lengths, 64, 8, seed=4).step(0)[0], a.step(0)[0])
    halves = [Rows(lengths, 64, 8, 3, rank, 2).step(30) for rank in (0, 1)]
    assert same([row for two in zip(halves[0][0], halves[1][0]) for row in two], a.step(30)[0])
    assert halves[0][1] == halves[1][1] == a.step(30)[1] == sum(row[:, 2].sum() for row in a.step(30)[0])
    n = len(a.packed)
    one = Rows(lengths, 64, 1, seed=3)
    first, second = ([one.step(i)[0][0].tolist() for i in range(k * n, (k + 1) * n)] for k in (0, 1))
    assert sorted(first) == sorted(second) == sorted(row.tolist() for row in a.packed) and first != second


def test_no_utterance_leaks_into_another(corpus):
    """Changing one utterance changes no other one's loss, nor its gradient."""
    reader = UnitReader(corpus / "train")
    torch.manual_seed(0)
    lm = UnitLM(ModelConfig(vocab_size=N_UNITS + 2, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                            num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    rows = list(Packed(cut(reader.lengths, 64), 64, None))
    row = max(rows, key=len)
    tokens, targets, positions = collate(reader, [row], 64)
    assert len(row) >= 3
    start, length = int(row[0, 2]), int(row[1, 2])  # the second chunk
    other = tokens.clone()
    other[0, start:start + length] = 2 + (other[0, start:start + length] + 5) % N_UNITS
    losses = [lm(x, targets, positions, reduction="none")[1][0] for x in (tokens, other)]
    same_loss = losses[0] == losses[1]
    table = lm.model.embed_tokens.weight
    gradients = [torch.autograd.grad(lm(x, targets, positions, reduction="none")[1][0, :start].sum(), table)[0]
                 for x in (tokens, other)]
    assert torch.equal(*gradients)
    assert same_loss[:start].all() and same_loss[start + length:].all() and not same_loss[start:start + length].any()


def test_the_loader_gives_each_step_once_in_any_order(corpus):
    reader = UnitReader(corpus / "train")
    rows = Rows(reader.lengths, 64, 8, seed=3)
    loader = Loader(reader, rows, 3, torch.device("cpu"))
    for step in (0, 1, 2, 7, 7, 3):
        micro, n = loader.step(step)
        assert [len(m[0]) for m in micro] == [3, 3, 2] and n == sum(int((m[1] != IGNORE).sum()) for m in micro)
        expected = collate(reader, rows.step(step)[0], 64)
        assert all(torch.equal(torch.cat(x), y) for x, y in zip(zip(*micro), expected))


def test_keys_are_what_attention_sees(corpus):
    """On average over the tokens of an epoch; the padding of a row is one more segment."""
    reader = UnitReader(corpus / "train")
    rows, context = Rows(reader.lengths, 64, 8, seed=3), 64
    _, targets, positions = collate(reader, list(rows.packed), context)
    seen = attention_mask(positions)[:, 0].sum(2)
    assert rows.keys() == pytest.approx(seen[targets != IGNORE].float().mean().item())
    padding = (targets == IGNORE).sum(1)
    assert padding.max() > 1 and torch.equal(seen[:, -1][padding > 0], padding[padding > 0])
