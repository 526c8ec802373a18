"""Recordings as windows for a speech encoder, read and decoded by threads ahead of it, in bounded memory."""
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from slam.audio import SAMPLE_RATE, Item, read_blocks, split_at_silences, unusable
from slam.tokenizer import windows


@dataclass
class Utterance:
    """A recording, or a part of one between two silences; one entry of a unit file."""
    id: str
    problem: str = ""  # why it can't be used
    fatal: bool = False  # that problem loses an unknown number of other recordings
    frames: list[np.ndarray] = field(default_factory=list)  # units of its pieces, one per frame


@dataclass
class Piece:
    """A window of an utterance: wave (T,) at 16 kHz. Its frames first:last are kept; the others are context."""
    utterance: Utterance
    wave: np.ndarray
    first: int
    last: int | None  # None: to the end of the utterance


def read_recording(item: Item, encoder, max_utterance_seconds: float) -> Iterator[Piece | list[Utterance]]:
    """Decode a recording into pieces, then give the list of its utterances: the whole one, or several if it is cut.

    If it can't be read to its end, the list has one utterance, with the problem, whatever pieces came before.
    """
    utterances = []
    try:
        if item.problem:
            raise ValueError(item.problem)
        for start, blocks in split_at_silences(read_blocks(item.source, item.id), max_utterance_seconds):
            id = f"{item.id}@{start / SAMPLE_RATE:.2f}" if max_utterance_seconds else item.id
            utterance, peak = Utterance(id), 0.0
            utterances.append(utterance)
            for wave, first, last in windows(blocks, encoder):
                peak = max(peak, float(np.abs(wave).max(initial=0)))
                if last is None:
                    too_short = "" if encoder.n_frames(len(wave)) else "shorter than a frame of the encoder"
                    utterance.problem = unusable(len(wave), peak) or too_short
                if not utterance.problem:
                    yield Piece(utterance, wave, first, last)
    except ValueError as e:
        utterances = [Utterance(item.id, problem=str(e).removeprefix(f"{item.id}: "), fatal=item.fatal)]
    yield utterances


def ahead(pool: Executor, values: Iterator, n: int) -> Iterator:
    """The values of an iterator in order; a thread computes them, n at a time, one such chunk ahead of their use.

    It starts at once, not when the first value is asked for. What the iterator raises is raised here.
    """
    def take() -> list:
        return list(islice(values, n))

    def rest(future: Future) -> Iterator:
        while len(taken := future.result()) == n:
            future = pool.submit(take)
            yield from taken
        yield from taken

    return rest(pool.submit(take))


def read_ahead(pool: Executor, recordings: Iterable[Iterator], n_recordings: int) -> Iterator:
    """The values of each recording in turn; threads run ahead by `n_recordings`, and by 3 to 6 values of each."""
    line = deque()
    for recording in ahead(pool, iter(recordings), 4):
        line.append(ahead(pool, recording, 3))
        if len(line) > n_recordings:
            yield from line.popleft()
    while line:
        yield from line.popleft()
