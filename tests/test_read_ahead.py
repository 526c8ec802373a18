"""slam/read_ahead.py: the order is kept, errors arrive, and what is read ahead is bounded."""
from concurrent.futures import ThreadPoolExecutor

import pytest

from slam.audio import Item
from slam.read_ahead import read_ahead, read_recording


def numbers(n):
    yield from ((n, i) for i in range(n))


def test_the_order_is_kept():
    with ThreadPoolExecutor(3) as pool:
        assert list(read_ahead(pool, map(numbers, range(40)), 5)) == [(n, i) for n in range(40) for i in range(n)]
        assert list(read_ahead(pool, [], 5)) == []


def test_errors_are_raised_where_the_values_are_used():
    def broken():
        yield numbers(3)
        raise SystemExit("the list ends badly")

    with pytest.raises(SystemExit, match="ends badly"), ThreadPoolExecutor(3) as pool:
        list(read_ahead(pool, broken(), 5))


def test_what_is_read_ahead_is_bounded():
    """Of a thousand long recordings, few are begun, and few values of each are made, when the first is used."""
    begun, made = [], []

    def recording(n):
        for i in range(1000):
            made.append((n, i))
            yield n, i

    with ThreadPoolExecutor(3) as pool:
        values = read_ahead(pool, (begun.append(n) or recording(n) for n in range(1000)), 5)
        assert next(values) == (0, 0)
    assert len(begun) <= 5 + 2 * 4 and len(made) <= 4 * (len(begun) + 1)


def test_a_recording_that_is_known_to_be_bad():
    utterance, = [*read_recording(Item("a", problem="a link inside the archive", fatal=True), None, 0.0)][0]
    assert (utterance.id, utterance.problem, utterance.fatal) == ("a", "a link inside the archive", True)
