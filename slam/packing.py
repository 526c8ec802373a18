"""From unit files to batches: `cut` utterances into chunks, pack chunks into rows, draw rows, fill them with tokens.

Chunks are an int64 array (n, 3): utterance, its first input, number of inputs.
"""
from bisect import bisect_left, insort
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from slam.attention import Mask, packed_mask
from slam.device import compute_dtype, put
from slam.units import IGNORE, PAD, UnitReader


# ---------------------------------------------------------------- chunks and rows
def cut(lengths: np.ndarray, context: int) -> np.ndarray:
    """Cut utterances of these lengths in tokens into chunks (n, 3) of at most `context` inputs.

    An utterance of n tokens has n - 1 inputs; each of its tokens but BOS is a target once.
    cut([5], 3) -> [[0, 0, 3], [0, 3, 1]]
    """
    inputs = np.asarray(lengths) - 1
    n_chunks = -(-inputs // context)
    utterance = np.repeat(np.arange(len(inputs)), n_chunks)
    start = (np.arange(len(utterance)) - np.repeat(np.cumsum(n_chunks) - n_chunks, n_chunks)) * context
    return np.stack([utterance, start, np.minimum(context, inputs[utterance] - start)], 1)


class Packed:
    """Chunks packed into rows of at most `context` inputs; `packed[r]` -> the chunks (n, 3) of row r.

    Best-fit decreasing (Ding et al. 2024, "Fewer truncations improve language modeling"): the longest chunk first, into
    the row with the least room that still holds it. It packs groups of `group` chunks, drawn by `rng` or, without one,
    in the order of the corpus.
    """

    def __init__(self, chunks: np.ndarray, context: int, rng: np.random.Generator | None, group: int = 4096):
        order = rng.permutation(len(chunks)) if rng else np.arange(len(chunks))
        row_of, n_rows = np.empty(len(chunks), dtype=np.int64), 0
        for at in range(0, len(order), group):
            members = order[at:at + group]
            members = members[np.argsort(-chunks[members, 2], kind="stable")]
            open_rows = []  # sorted: the room left, the latest first, the row
            for time, (chunk, length) in enumerate(zip(members.tolist(), chunks[members, 2].tolist())):
                best = bisect_left(open_rows, (length,))
                if best < len(open_rows):
                    room, _, row = open_rows.pop(best)
                else:
                    room, row, n_rows = context, n_rows, n_rows + 1
                row_of[chunk] = row
                if room > length:
                    insort(open_rows, (room - length, -time, row))
        self.chunks = chunks[np.argsort(row_of, kind="stable")]
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=n_rows))])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.chunks[self.starts[row]:self.starts[row + 1]]


def collate(reader: UnitReader, rows: list[np.ndarray], context: int, pin: bool = False) -> tuple[Tensor, ...]:
    """Fill rows of chunks with tokens -> tokens, targets, positions (B, context) int64.

    Positions restart with every chunk, which attends only to itself, and with the padding, whose targets are IGNORE.
    `1 7 8 1`, `1 9 1` in a row of 7: tokens 1 7 8 1 9 0 0, targets 7 8 1 9 1 -100 -100, positions 0 1 2 0 1 0 1.
    pin: into pinned memory, so that the copy to a GPU need not be waited for.
    """
    tokens = np.full((len(rows), context), PAD, dtype=np.int64)
    targets = np.full((len(rows), context), IGNORE, dtype=np.int64)
    positions = np.zeros((len(rows), context), dtype=np.int64)
    for b, row in enumerate(rows):
        at = 0
        for utterance, start, length in row.tolist():
            x, span = reader.tokens(utterance)[start:start + length + 1], slice(at, at + length)
            tokens[b, span], targets[b, span], positions[b, span] = x[:-1], x[1:], np.arange(length)
            at += length
        positions[b, at:] = np.arange(context - at)
    filled = map(torch.from_numpy, (tokens, targets, positions))
    return tuple(x.pin_memory() if pin else x for x in filled)


def on_device(rows: tuple[Tensor, ...], device: torch.device, dtype: str) -> tuple[Tensor, Tensor, Tensor, Mask]:
    """Tokens, targets and positions (B, T) on the CPU -> these and their mask on the device; does not wait for copies.

    They are the first arguments of `UnitLM.forward`. dtype: a Config's.
    """
    tokens, targets, positions = (put(x, device) for x in rows)
    return tokens, targets, positions, packed_mask(rows[2], device, compute_dtype(device, dtype))


# ---------------------------------------------------------------- the order of a training run
class Epochs:
    """0 to n - 1 in a new order every epoch, endlessly: `epochs[i]` is a pure function of (seed, i)."""

    def __init__(self, n: int, *seed: int):
        self.n, self.seed, self.epoch, self.order = n, seed, -1, None

    def __getitem__(self, index: int) -> int:
        epoch, i = divmod(index, self.n)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((*self.seed, epoch)).permutation(self.n)
        return int(self.order[i])


class Rows:
    """The rows of a training run: `rows.step(s)` is a pure function of (seed, s, rank).

    Rows are packed once, and drawn in a new order every epoch, in which every token but BOS is a target once.
    """

    def __init__(self, lengths: np.ndarray, context: int, rows_per_step: int, seed: int, rank: int = 0, world: int = 1):
        self.context, self.rows_per_step, self.rank, self.world = context, rows_per_step, rank, world
        self.packed = Packed(cut(lengths, context), context, np.random.default_rng((seed, 0)))
        self.order = Epochs(len(self.packed), seed, 0)

    def row(self, index: int) -> np.ndarray:
        """The chunks (n, 3) of row number `index` of the run."""
        return self.packed[self.order[index]]

    def step(self, step: int) -> tuple[list[np.ndarray], int]:
        """This rank's rows of an optimiser step, each its chunks (n, 3), and the number of targets over all ranks."""
        first = step * self.rows_per_step
        rows = [self.row(i) for i in range(first, first + self.rows_per_step)]
        return rows[self.rank::self.world], sum(int(row[:, 2].sum()) for row in rows)

    def keys(self) -> float:
        """Number of keys that a token attends to, on average: chunks of n tokens have n (n + 1) / 2 pairs."""
        n = self.packed.chunks[:, 2]
        return float((n * (n + 1) / 2).sum() / n.sum())

    def fill(self) -> float:
        """Share of the positions in the rows that hold a token."""
        return int(self.packed.chunks[:, 2].sum()) / (len(self.packed) * self.context)


class Loader:
    """The micro-batches of a step, made in a thread while the step before is computed."""

    def __init__(self, reader: UnitReader, rows: Rows, micro_batch: int, device: torch.device):
        self.reader, self.rows, self.micro_batch, self.pin = reader, rows, micro_batch, device.type == "cuda"
        self.thread, self.next = ThreadPoolExecutor(1), {}

    def _make(self, step: int) -> tuple[list[tuple[Tensor, ...]], int]:
        self.reader.check()
        rows, n_targets = self.rows.step(step)
        return [collate(self.reader, rows[at:at + self.micro_batch], self.rows.context, self.pin)
                for at in range(0, len(rows), self.micro_batch)], n_targets

    def step(self, step: int) -> tuple[list[tuple[Tensor, ...]], int]:
        """[(tokens, targets, positions)], each (micro_batch, context), and the number of targets of all ranks."""
        made = self.next.pop(step, None) or self.thread.submit(self._make, step)
        self.next = {step + 1: self.thread.submit(self._make, step + 1)}
        return made.result()
