"""Scores of unit sequences, in nats: validation loss, log-probabilities of pairs, n-gram baselines.

    validation_loss(lm, UnitReader("out/units/val"), context=1024, micro_batch=8, dtype="bfloat16") -> (1.93, 80_512)
    pair_nlls(lm, [([1, 7, 8, 1], [1, 7, 9, 1])], context=1024) -> array([[1.71, 2.05]])
"""
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from slam.device import autocast, over_ranks, put
from slam.packing import Packed, collate, cut, on_device
from slam.units import IGNORE, UnitReader


@torch.inference_mode()
def validation_loss(lm: torch.nn.Module, reader: UnitReader, context: int, micro_batch: int, dtype: str, rank: int = 0,
                    world: int = 1) -> tuple[float, int]:
    """Mean cross-entropy (nats per target) over a corpus, and its number of targets; ranks divide the rows."""
    reader.check()
    rows, total, n = list(Packed(cut(reader.lengths, context), context, None))[rank::world], 0.0, 0
    for at in range(0, len(rows), micro_batch):
        part = collate(reader, rows[at:at + micro_batch], context, lm.device.type == "cuda")
        n += int((part[1] != IGNORE).sum())
        with autocast(lm.device, dtype):
            total += lm(*on_device(part, lm.device, dtype), reduction="sum")[1].item()
    total, n = over_ranks([total, n])
    return total / n, int(n)


# ---------------------------------------------------------------- pairs with a shared prefix
class PrefixPair(NamedTuple):
    """Two token sequences with the same prefix, laid out in one row that holds the prefix once."""
    prefix: list[int]  # at least one token
    first: list[int]  # the rest of the first sequence
    second: list[int]  # the rest of the second

    @classmethod
    def of(cls, a: list[int], b: list[int]) -> "PrefixPair":
        """PrefixPair.of([1, 7, 8, 1], [1, 7, 9, 1]) -> PrefixPair([1, 7], [8, 1], [9, 1])"""
        n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        return cls(a[:n], a[n:], b[n:])

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Numbers of targets in prefix, first and second; BOS is not a target."""
        return len(self.prefix) - 1, len(self.first), len(self.second)

    @property
    def n_inputs(self) -> int:
        return sum(self.lengths)

    def row(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Inputs, targets, positions, and the part each target belongs to (0 prefix, 1 first, 2 second).

        The prefix's last token predicts the first token of both, so it is an input twice. The position drops there,
        so `second` attends to the prefix and to itself, not to `first` (slam/attention.py).
        PrefixPair([1, 7, 8], [11, 1], [6, 1]).row()
            -> [1, 7, 8, 11, 8, 6], [7, 8, 11, 1, 6, 1], [0, 1, 2, 3, 2, 3], [0, 0, 1, 1, 2, 2]
        """
        p, a, b = map(len, self)
        inputs = [*self.prefix, *self.first[:-1]][:p + a - 1] + [self.prefix[-1], *self.second[:-1]][:b]
        return (inputs, self.prefix[1:] + self.first + self.second, [*range(p + a - 1), *range(p - 1, p + b - 1)],
                [0] * (p - 1) + [1] * a + [2] * b)


def pack(pairs: list[PrefixPair], context: int) -> list[list[int]]:
    """Rows of pairs, by index, filled with at most `context` inputs: lengths 6, 5, 2 in 8 -> [[0, 2], [1]]."""
    chunks = np.array([(i, 0, pair.n_inputs) for i, pair in enumerate(pairs)])
    return [row[:, 0].tolist() for row in Packed(chunks, context, None)]


def row_logps(forward: Callable, rows: list[list[PrefixPair]], width: int, device: torch.device, dtype: str) -> Tensor:
    """Log-probabilities (n, 3), fp32, of the n pairs in `rows`: prefix given BOS, first and second given the prefix.

    They are sums over tokens. Rows are padded on the right to `width` tokens, or to the longest row if it is 0.
    """
    if device.type == "cpu" and not width:  # one row, which needs no padding
        rows = [[pair for row in rows for pair in row]]
    width = width or max(sum(pair.n_inputs for pair in row) for row in rows)
    values, n = torch.zeros(4, len(rows), width, dtype=torch.long), 0  # what `PrefixPair.row` returns; 0 is PAD
    values[1] = IGNORE
    for b, row in enumerate(rows):
        at = 0
        for pair in row:
            ours = torch.tensor(pair.row())  # (4, n_inputs)
            ours[3] += 3 * n  # where in the result the target's log-probability is added
            values[:, b, at:at + pair.n_inputs] = ours
            at, n = at + pair.n_inputs, n + 1
        values[2, b, at:] = torch.arange(width - at)  # of the padding, which is a segment
    places = put(values[3], device)
    with autocast(device, dtype):
        loss = forward(*on_device(values[:3], device, dtype), reduction="none")[1]
    return -loss.new_zeros(3 * n).index_add(0, places.flatten(), loss.flatten()).view(n, 3)


@torch.inference_mode()
def pair_logps(lm: torch.nn.Module, pairs: list[PrefixPair], context: int, dtype: str, desc: str) -> Tensor:
    """`row_logps` (n, 3) of any number of pairs, on the CPU; a pair longer than `context` tokens has its own row.

    Fewer rows are computed at once when a GPU's memory runs out. A row that does not fit by itself gives NaN.
    """
    short = [i for i, pair in enumerate(pairs) if pair.n_inputs <= context]
    rows = [[short[i] for i in row] for row in pack([pairs[i] for i in short], context)]
    rows += [[i] for i, pair in enumerate(pairs) if pair.n_inputs > context]
    order, found, at, n_rows = [], [], 0, 64 if lm.device.type == "cuda" else 4
    with tqdm(total=len(pairs), disable=None, desc=desc, unit="pair", leave=False) as bar:
        while at < len(rows):
            part = rows[at:at + n_rows]
            try:
                logps = row_logps(lm, [[pairs[i] for i in row] for row in part], 0, lm.device, dtype)
            except torch.OutOfMemoryError:
                if len(part) > 1:
                    n_rows = len(part) // 2
                    continue
                logps = torch.full((len(part[0]), 3), torch.nan, device=lm.device)
            order += [i for row in part for i in row]
            found.append(logps)  # on the GPU, which computes while the CPU makes the next rows
            bar.update(len(logps))
            at += len(part)
    return torch.cat(found).cpu()[np.argsort(order)] if found else torch.zeros(0, 3)


def pair_nlls(lm: torch.nn.Module, pairs: list[tuple[list[int], list[int]]], context: int, score: str = "mean",
              score_prompt: bool = True, dtype: str = "float32") -> np.ndarray:
    """Negative log-likelihoods (n, 2) of the two utterances of each pair: mean over tokens, or their sum.

    score_prompt: include the prefix that both share. NaN where a pair did not fit into memory.
    """
    pairs = [PrefixPair.of(*pair) for pair in pairs]
    logps = pair_logps(lm, pairs, context, dtype, "scoring").double().numpy()
    lengths = np.array([pair.lengths for pair in pairs])
    nll = -logps[:, 1:] - score_prompt * logps[:, :1]
    return nll / np.maximum(lengths[:, 1:] + score_prompt * lengths[:, :1], 1) if score == "mean" else nll


# ---------------------------------------------------------------- n-grams: the floor a loss is compared with
def ngrams(train: list[np.ndarray], n_tokens: int) -> dict[str, np.ndarray]:
    """Log-probabilities (V, V), [token before, token], of "unigram" and "bigram" models of utterances `1 units 1`.

    Every token but BOS is a target, as for the LM. Unigrams have add-one smoothing. Bigrams are smoothed by unigrams
    (Witten & Bell 1991): p(b | a) = (count(a, b) + kinds(a) p(b)) / (count(a) + kinds(a)), where kinds(a) is how many
    different tokens follow a.
    """
    counts = np.zeros((n_tokens, n_tokens))
    for x in train:
        np.add.at(counts, (x[:-1], x[1:]), 1)
    unigram = (counts.sum(0) + 1) / (counts.sum() + n_tokens)
    kinds = (counts > 0).sum(1, keepdims=True)
    bigram = (counts + kinds * unigram) / np.maximum(counts.sum(1, keepdims=True) + kinds, 1)
    bigram[kinds[:, 0] == 0] = unigram
    return {"unigram": np.log(np.broadcast_to(unigram, counts.shape)), "bigram": np.log(bigram)}


def ngram_loss(logp: np.ndarray, val: list[np.ndarray]) -> float:
    """Cross-entropy (nats per target) of one of the `ngrams`: 0.69 if each target has probability 1/2."""
    return float(-np.concatenate([logp[x[:-1], x[1:]] for x in val]).mean())


def ngram_nlls(logp: np.ndarray, pair: tuple[list[int], list[int]], score: str, score_prompt: bool) -> list[float]:
    """NLLs (nats) of a pair's two utterances under an n-gram model, logp (V, V) of `ngrams`; options as `pair_nlls`."""
    start = 0 if score_prompt else PrefixPair.of(*pair).lengths[0]
    nlls = [-logp[x[:-1], x[1:]][start:] for x in pair]
    return [nll.sum() / max(1, len(nll)) if score == "mean" else nll.sum() for nll in nlls]
