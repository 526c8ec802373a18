"""slam.packing."""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from slam.units import IGNORE, PAD, UnitReader


# ---------------------------------------------------------------- data: (seed, step, rank) -> rows
def cut(lengths: np.ndarray, context: int) -> np.ndarray:
    """Utterances of so many tokens as pieces (n, 3): utterance, first input, number of inputs, at most `context`.

    An utterance of n tokens has n - 1 inputs, and as targets each token but BOS once: cut([5], 3) -> [[0, 0, 3],
    [0, 3, 1]]
    """
    inputs = np.asarray(lengths) - 1
    n_pieces = -(-inputs // context)
    utterance = np.repeat(np.arange(len(inputs)), n_pieces)
    start = (np.arange(len(utterance)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)) * context
    return np.stack([utterance, start, np.minimum(context, inputs[utterance] - start)], 1)


class Packed:
    """Pieces in rows of at most `context` inputs, nearly full: best-fit decreasing in groups drawn at random.

    (Ding et al. 2024, "Fewer truncations improve language modeling".) rng None: groups in order, for evaluation.
    `packed[r]` -> the pieces (n, 3) of row r.
    """

    def __init__(self, pieces: np.ndarray, context: int, rng: np.random.Generator | None, group: int = 4096):
        order = rng.permutation(len(pieces)) if rng else np.arange(len(pieces))
        row_of, n = np.empty(len(pieces), dtype=np.int64), 0
        for at in range(0, len(order), group):
            members = order[at:at + group]
            members = members[np.argsort(-pieces[members, 2], kind="stable")]
            rows_with, rooms = [[] for _ in range(context + 1)], 0  # rows by free room; bit f of rooms: there are some
            row = []
            for length in pieces[members, 2].tolist():
                fitting = rooms >> length
                if fitting:
                    room = length + (fitting & -fitting).bit_length() - 1  # the tightest
                    row.append(rows_with[room].pop())
                    rooms ^= (not rows_with[room]) << room
                else:
                    room, n = context, n + 1
                    row.append(n - 1)
                rows_with[room - length].append(row[-1])
                rooms |= (room > length) << room - length
            row_of[members] = row
        self.pieces = pieces[np.argsort(row_of, kind="stable")]
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=n))])

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.pieces[self.starts[row]:self.starts[row + 1]]


def collate(reader: UnitReader, rows: list[np.ndarray], context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of pieces -> tokens, targets, positions (B, context) int64; positions restart with every piece."""
    tokens = np.full((len(rows), context), PAD, dtype=np.int64)
    targets = np.full((len(rows), context), IGNORE, dtype=np.int64)
    positions = np.zeros((len(rows), context), dtype=np.int64)  # padding: utterances of one token, attending to itself
    for b, row in enumerate(rows):
        at = 0
        for utterance, start, length in row.tolist():
            x, span = reader.tokens(utterance)[start:start + length + 1], slice(at, at + length)
            tokens[b, span], targets[b, span], positions[b, span] = x[:-1], x[1:], np.arange(length)
            at += length
    return torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(positions)


class Epochs:
    """0..n-1 in a new order every epoch, for ever: `epochs[i]` is a pure function of (seed, i)."""

    def __init__(self, n: int, *seed: int):
        self.n, self.seed, self.epoch, self.order = n, seed, -1, None

    def __getitem__(self, index: int) -> int:
        epoch, i = divmod(index, self.n)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((*self.seed, epoch)).permutation(self.n)
        return int(self.order[i])


class Rows:
    """The rows of a training run: `rows.step(s)` is a pure function of (seed, s, rank); an epoch sees every token once.

    Rows are packed once, since nothing is seen across utterances, and drawn in a new order every epoch. sizes: number
    of utterances of each source. With weights each source has its own rows and epochs, and of every BLOCK rows it gets
    its share; without, they are one.
    """
    BLOCK = 1000

    def __init__(self, lengths: np.ndarray, context: int, rows_per_step: int, seed: int, rank: int = 0, world: int = 1,
                 sizes: list[int] = (), weights: tuple[float, ...] = ()):
        self.context, self.rows_per_step, self.rank, self.world = context, rows_per_step, rank, world
        pieces, ends = cut(lengths, context), np.cumsum(sizes if weights else [len(lengths)])
        source = np.searchsorted(ends, pieces[:, 0], side="right")
        self.sources = [Packed(pieces[source == k], context, np.random.default_rng((seed, k)))
                        for k in range(len(ends))]
        self.orders = [Epochs(len(rows), seed, k) for k, rows in enumerate(self.sources)]
        shares = np.cumsum(weights or [1]) / sum(weights or [1])
        self.counts = np.diff(np.round(shares * self.BLOCK).astype(int), prepend=0)  # of each source's rows in a block
        if 0 in self.counts:
            raise SystemExit(f"weights: a share below 1/{self.BLOCK} would give no rows at all")
        self.seed, self.block, self.turns = seed, -1, np.zeros((self.BLOCK, 2), dtype=np.int64)

    def row(self, index: int) -> np.ndarray:
        """Row `index` of the endless sequence: its pieces (n, 3)."""
        block, at = divmod(index, self.BLOCK)
        if block != self.block:  # whose turn it is at each place of the block, and which of its rows it gives
            turns = [(k, block * n + i) for k, n in enumerate(self.counts.tolist()) for i in range(n)]
            order = np.argsort(np.random.default_rng((self.seed, 2**31, block)).permutation(
                np.repeat(np.arange(len(self.counts)), self.counts)), kind="stable")  # a source's rows stay in order
            self.block, self.turns[order] = block, turns
        k, i = self.turns[at].tolist()
        return self.sources[k][self.orders[k][i]]

    def step(self, step: int) -> tuple[list[np.ndarray], int]:
        """This rank's rows of an optimiser step, and the number of targets of all ranks' rows."""
        first = step * self.rows_per_step
        rows = [self.row(i) for i in range(first, first + self.rows_per_step)]
        return rows[self.rank::self.world], sum(int(row[:, 2].sum()) for row in rows)

    def fill(self) -> float:
        """Share of the places in the rows that hold a token."""
        rows = sum(map(len, self.sources))
        return sum(int(x.pieces[:, 2].sum()) for x in self.sources) / (rows * self.context)


class Loader:
    """The micro-batches of a step, made in a thread while the step before is being computed."""

    def __init__(self, reader: UnitReader, rows: Rows, micro_batch: int, device: torch.device):
        self.reader, self.rows, self.micro_batch, self.device = reader, rows, micro_batch, device
        self.thread, self.next = ThreadPoolExecutor(1), {}

    def _make(self, step: int) -> tuple[list[tuple[Tensor, Tensor, Tensor]], int]:
        self.reader.check()
        rows, n_targets = self.rows.step(step)
        return [batch(self.reader, rows[at:at + self.micro_batch], self.rows.context, self.device)
                for at in range(0, len(rows), self.micro_batch)], n_targets

    def step(self, step: int) -> tuple[list[tuple[Tensor, Tensor, Tensor]], int]:
        """[(tokens, targets, positions)], each (micro_batch, context), in pinned memory; targets on all ranks."""
        made = self.next.pop(step, None) or self.thread.submit(self._make, step)
        self.next = {step + 1: self.thread.submit(self._make, step + 1)}
        return made.result()


def batch(reader: UnitReader, rows: list[np.ndarray], context: int, device: torch.device) -> tuple[Tensor, ...]:
    """`collate`, in memory from which a copy to the GPU needs no waiting."""
    tensors = collate(reader, rows, context)
    return tuple(x.pin_memory() for x in tensors) if device.type == "cuda" else tensors
