"""slam.scoring."""
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from slam.device import autocast, over_ranks, put
from slam.packing import Packed, batch, cut
from slam.units import IGNORE, PAD, UnitReader


# ---------------------------------------------------------------- the loop
@torch.inference_mode()
def validation_loss(lm: torch.nn.Module, reader: UnitReader, context: int, micro_batch: int, dtype: str, rank: int = 0,
                    world: int = 1) -> tuple[float, int]:
    """Mean cross-entropy in nats per target over a whole corpus, and the number of targets; shared out over ranks."""
    reader.check()
    packed, total, n = Packed(cut(reader.lengths, context), context, None), 0.0, 0
    rows = list(packed)[rank::world]
    for at in range(0, len(rows), micro_batch):
        tokens, targets, positions = batch(reader, rows[at:at + micro_batch], context, lm.device)
        n += int((targets != IGNORE).sum())
        with autocast(lm.device, dtype):
            total += lm(*(x.to(lm.device, non_blocking=True) for x in (tokens, targets, positions)),
                        reduction="sum")[1].item()
    total, n = over_ranks([total, n])
    return total / n, int(n)


# ---------------------------------------------------------------- n-gram models: what a loss means
def ngrams(train: list[np.ndarray], n_tokens: int) -> dict[str, np.ndarray]:
    """Log-probabilities of unigram and bigram models, (V, V) each: token before, token.

    Sequences are tokens `1 units 1`; targets are all but BOS, as for the LM. Witten-Bell smoothed, lest they be straw
    men.
    """
    pairs = np.zeros((n_tokens, n_tokens))
    for x in train:
        np.add.at(pairs, (x[:-1].astype(int), x[1:].astype(int)), 1)
    counts = pairs.sum(0)
    unigram = (counts + 1) / (counts + 1).sum()
    kinds = (pairs > 0).sum(1, keepdims=True)  # continuations seen after each token
    bigram = (pairs + kinds * unigram) / np.maximum(pairs.sum(1, keepdims=True) + kinds, 1)
    bigram[kinds[:, 0] == 0] = unigram
    return {"unigram": np.log(np.broadcast_to(unigram, pairs.shape)), "bigram": np.log(bigram)}


def ngram_loss(logp: np.ndarray, val: list[np.ndarray]) -> float:
    """Cross-entropy in nats per target of one of `ngrams`."""
    before, after = (np.concatenate(x).astype(int) for x in ([t[:-1] for t in val], [t[1:] for t in val]))
    return float(-logp[before, after].mean())


# ---------------------------------------------------------------- pairs
class PrefixPair(NamedTuple):
    """Two sequences of tokens with the same beginning, in one row that has it once."""
    prefix: list[int]  # at least one token
    first: list[int]  # what follows it; so does
    second: list[int]  # this

    @classmethod
    def of(cls, a: list[int], b: list[int]) -> "PrefixPair":
        """Of two utterances: PrefixPair.of([1, 7, 8, 1], [1, 7, 9, 1]) -> [1, 7], [8, 1], [9, 1]"""
        n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        return cls(a[:n], a[n:], b[n:])

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Targets in prefix, first and second."""
        return len(self.prefix) - 1, len(self.first), len(self.second)

    @property
    def n_inputs(self) -> int:
        return sum(self.lengths)

    def row(self) -> tuple[list[int], list[int], list[int], list[int]]:
        """Inputs, targets, positions, and which part each target is of (0 prefix, 1 first, 2 second).

        Positions fall back where the second continuation begins, so that it sees the prefix and not the first
        (`UnitLM.forward`). The prefix's last token stands there again, as it predicts the first token of both.
        """
        p, a, b = map(len, self)
        inputs = [*self.prefix, *self.first[:-1]][:p + a - 1] + [self.prefix[-1], *self.second[:-1]][:b]
        return (inputs, self.prefix[1:] + self.first + self.second, [*range(p + a - 1), *range(p - 1, p + b - 1)],
                [0] * (p - 1) + [1] * a + [2] * b)


def pack(forks: list[PrefixPair], context: int) -> list[np.ndarray]:
    """Rows of forks, by number, nearly full (train.Packed)."""
    pieces = np.array([(i, 0, fork.n_inputs) for i, fork in enumerate(forks)])
    return [row[:, 0] for row in Packed(pieces, context, None)]


def row_logps(forward: Callable, rows: list[list[PrefixPair]], width: int, device: torch.device, dtype: str) -> Tensor:
    """Log-probabilities (n, 3) of n forks' prefixes, BOS aside, and of each of the two continuations given these.

    Summed over tokens, in fp32. width: the rows are padded on the right to so many tokens; 0: to the longest.
    """
    if device.type == "cpu" and not width:  # one row, which needs no padding
        rows = [[fork for row in rows for fork in row]]
    parts = [[fork.row() for fork in row] for row in rows]
    width = width or max(sum(len(x[0]) for x in row) for row in parts)
    inputs, targets, positions, sums = (torch.full((len(rows), width), fill) for fill in (PAD, IGNORE, 0, 0))
    n = 0
    for b, row in enumerate(parts):
        at = 0
        for ours in row:
            span = slice(at, at := at + len(ours[0]))
            for tensor, values in zip((inputs, targets, positions, sums), ours):
                tensor[b, span] = torch.tensor(values)
            sums[b, span] += 3 * n
            n += 1
    inputs, targets, positions, sums = (put(x, device) for x in (inputs, targets, positions, sums))
    with autocast(device, dtype):
        loss = forward(inputs, targets, positions, reduction="none")[1]
    return -loss.new_zeros(3 * n).index_add(0, sums.flatten(), loss.flatten()).view(n, 3)


@torch.inference_mode()
def pair_logps(lm: torch.nn.Module, forks: list[PrefixPair], context: int, dtype: str, desc: str) -> Tensor:
    """`row_logps` of all forks, on the CPU, in rows of `context` tokens; as many rows at once as fit into memory.

    A longer fork has a row of its own. NaN for a row that does not even fit by itself.
    """
    short, long = ([i for i, fork in enumerate(forks) if (fork.n_inputs > context) == x] for x in (False, True))
    rows = [np.array(short)[row] for row in pack([forks[i] for i in short], context)] if short else []
    n_short, out = len(rows), torch.zeros(len(forks), 3)
    rows += [np.array([i]) for i in long]
    batch, at = 64 if lm.device.type == "cuda" else 4, 0
    with tqdm(total=len(forks), disable=None, desc=desc, unit="pair", leave=False) as bar:
        while at < len(rows):
            part = rows[at:min(at + batch, n_short) if at < n_short else at + 1]
            try:
                logps = row_logps(lm, [[forks[i] for i in row] for row in part], 0, lm.device, dtype)
            except (torch.OutOfMemoryError, MemoryError):
                if len(part) > 1:
                    batch = len(part) // 2
                    continue
                logps = torch.full((len(part[0]), 3), torch.nan)
            out[np.concatenate(part)] = logps.cpu()
            bar.update(sum(map(len, part)))
            at += len(part)
    return out


def pair_nlls(lm: torch.nn.Module, pairs: list[tuple[list[int], list[int]]], context: int, score: str = "mean",
              score_prompt: bool = True, dtype: str = "float32") -> np.ndarray:
    """Negative log-likelihood (nats) of both utterances of each pair, (n, 2): per token, or their sum.

    score_prompt: with the beginning that they share, or without. NaN where a pair did not fit into memory.
    """
    forks = [PrefixPair.of(*pair) for pair in pairs]
    logps = pair_logps(lm, forks, context, dtype, "scoring").double().numpy()
    lengths = np.array([fork.lengths for fork in forks])
    nll = -logps[:, 1:] - score_prompt * logps[:, :1]
    return nll / np.maximum(lengths[:, 1:] + score_prompt * lengths[:, :1], 1) if score == "mean" else nll


def ngram_nlls(logp: np.ndarray, pair: tuple[list[int], list[int]], score: str, score_prompt: bool) -> list[float]:
    """`pair_nlls` of one pair by one of `ngrams`."""
    start = 0 if score_prompt else PrefixPair.of(*pair).lengths[0]
    nlls = [-logp[x[:-1], x[1:]][start:] for x in pair]
    return [nll.sum() / max(1, len(nll)) if score == "mean" else nll.sum() for nll in nlls]
