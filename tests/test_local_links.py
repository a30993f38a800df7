"""Messages between ranks of one machine: all hear all, in order, and none waits for one that left.

The ranks are threads of this process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lirpa_megatron.parallel.local_links import LONGEST, Links, connect


class Gatherings:
    """An `all_gather` among threads; `heard` is called with what each rank says."""

    def __init__(self, size: int, heard: Callable[[int, Any], Any] = lambda rank, said: said):
        self.barrier, self.said, self.heard = threading.Barrier(size), [None] * size, heard

    def of(self, rank: int) -> Callable[[Any], list[Any]]:
        def all_gather(value: Any) -> list[Any]:
            self.said[rank] = self.heard(rank, value)
            self.barrier.wait(30)
            found = list(self.said)
            self.barrier.wait(30)
            return found
        return all_gather


def on_ranks(size: int, function: Callable[[int], Any]) -> list[Any]:
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(function, range(size)))


def connected(size: int, timeout: float = 30.0, **kwargs: Any) -> list[Links | None]:
    gatherings = Gatherings(size, **kwargs)
    return on_ranks(size, lambda rank: connect(rank, size, timeout, gatherings.of(rank)))


def test_every_rank_hears_what_all_ranks_say_in_rank_order():
    links = connected(3)

    def talk(rank: int) -> list[list[bytes]]:
        return [links[rank].begin(f"{rank}, {i}".encode()).wait() for i in range(5)]

    for heard in on_ranks(3, talk):
        assert heard == [[f"{rank}, {i}".encode() for rank in range(3)] for i in range(5)]


def test_the_longest_messages_of_several_rounds_need_not_be_read_at_once():
    links = connected(2)
    rounds = [links[0].begin(bytes([i]) * LONGEST) for i in range(3)]
    for i, begun in enumerate(rounds):
        links[1].begin(b"")
        assert begun.wait() == [bytes([i]) * LONGEST, b""]


def test_what_was_said_in_a_round_that_nobody_waited_for_is_passed_over():
    first, second = connected(2)
    first.begin(b"never heard")
    second.begin(b"nor this")
    later = first.begin(b"a")
    assert not later.is_done()
    assert second.begin(b"b").wait() == [b"a", b"b"]
    assert later.is_done() and later.wait() == [b"a", b"b"]


def test_a_rank_that_closes_its_ends_ends_the_others_waiting():
    links = connected(3)
    begun = [links[rank].begin(b"a") for rank in (0, 1)]
    links[2] = None
    for each in begun:
        assert each.is_done()
        with pytest.raises(ConnectionError, match="closed"):
            each.wait()


def test_a_rank_that_says_nothing_is_waited_for_no_longer_than_the_timeout():
    first, second = connected(2, timeout=0.2)
    with pytest.raises(TimeoutError, match="timed out"):
        first.begin(b"a").wait()
    del second


@pytest.mark.parametrize("wrong", [None, "/nowhere/rank"])
def test_no_rank_has_links_where_one_cannot_be_reached(wrong):
    """A folder of another machine, and one that cannot be made."""
    def heard(rank, said):
        return wrong if rank == 1 and isinstance(said, str) else said

    assert connected(3, heard=heard) == [None] * 3


def test_nothing_is_left_in_the_folder_for_temporary_files():
    seen = []

    def heard(rank, said):
        if isinstance(said, str):
            assert Path(said).exists() and Path(said).parent.stat().st_mode & 0o777 == 0o700
            seen.append(Path(said))
        return said

    links = connected(2, heard=heard)
    assert links[0].begin(b"") and len(seen) == 2
    assert not any(path.parent.exists() for path in seen)
