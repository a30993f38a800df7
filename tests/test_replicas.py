"""Work shared out over replicas: dealt, done again where one is killed, ended where one fails."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
from ranks import RankPool, pool

from lirpa_megatron.errors import ReplicaError
from lirpa_megatron.parallel import runtime, spmd
from lirpa_megatron.parallel.replicas import Replicas

ITEMS = list(range(10))


def squares(own):
    """A share's result, with a tensor and numbers."""
    return torch.tensor(own, dtype=torch.float64) ** 2, own, runtime.tp_rank()


def shared(items=ITEMS, at_least=1, times=1):
    """Of one rank: what is shared in some rounds, and who takes part."""
    replicas = Replicas.of_megatron()
    with replicas.guard("a test"), spmd.guard(replicas.tp, "a test"):
        for _ in range(times):
            parts = replicas.share("squares", items, squares, at_least)
    return [(own, x.tolist(), told, tp) for own, (x, told, tp) in parts], replicas.members


def check(parts, shares, tp):
    assert [own for own, *_ in parts] == shares
    for own, values, told, place in parts:
        # each rank hears of the ranks with its own place in their replicas
        assert values == [float(x) ** 2 for x in own] and told == own and place == tp


@pytest.mark.parametrize("tp", [1, 2])
def test_items_are_dealt_and_all_hear_of_all_results(tp):
    for rank, (parts, members) in enumerate(pool(2 * tp, tp).run(shared, times=3)):
        check(parts, [ITEMS[::2], ITEMS[1::2]], rank % tp)
        assert members == (0, 1)


def test_few_items_are_one_replicas():
    for parts, _ in pool(2, 1).run(shared, ITEMS[:3], at_least=2):
        check(parts, [ITEMS[:3]], 0)


def test_large_results_arrive():
    """Longer than what one message holds."""
    for parts, _ in pool(2, 1).run(shared, list(range(200_000))):
        assert sum(sum(values) for _, values, *_ in parts) == sum(x**2 for x in range(200_000))


def failing(rank, place):
    """One rank fails at its work, before or after what the ranks of its replica agree on."""
    replicas = Replicas.of_megatron()

    def work(own):
        spmd.gather_objects(1, replicas.tp)
        if torch.distributed.get_rank() == rank:
            raise ZeroDivisionError("nothing can be divided")
        if place == "before":
            spmd.gather_objects(2, replicas.tp)
        return own

    with replicas.guard("a test"), spmd.guard(replicas.tp, "a test"):
        replicas.share("work", ITEMS, work)
        replicas.share("more work", ITEMS, lambda own: own)


@pytest.mark.parametrize("size, tp, rank, place", [
    (2, 1, 0, "before"), (2, 1, 1, "before"), (4, 2, 3, "before"), (4, 2, 2, "after"),
    (4, 2, 0, "after"),
])
def test_a_rank_that_fails_ends_all_with_its_message(size, tp, rank, place):
    own = pool(size, tp)
    begin = time.monotonic()
    for r, outcome in enumerate(own.outcomes(failing, rank, place, timeout=60)):
        assert "nothing can be divided" in outcome.message, outcome
        # whom it hears of it from, a rank of its replica or of the other one, is a matter of time
        others = ("RemoteRankError", "ReplicaError")
        assert outcome.error in (("ZeroDivisionError",) if r == rank else others)
    assert time.monotonic() - begin < 20
    # and they go on together
    for r, (parts, members) in enumerate(own.run(shared)):
        check(parts, [ITEMS[::2], ITEMS[1::2]], r % tp)
        assert members == (0, 1)


def disagreeing():
    replicas = Replicas.of_megatron()
    with replicas.guard("a test"):
        replicas.share(f"work {torch.distributed.get_rank()}", ITEMS, squares)


def test_replicas_at_different_steps_end():
    for outcome in pool(2, 1).outcomes(disagreeing, timeout=60):
        assert outcome.error in ("SPMDError", "ReplicaError")
        assert "replicas disagree" in outcome.message


def mistaken():
    replicas = Replicas.of_megatron()
    with replicas.guard("a test"):
        replicas.share("work", [3, 4, 5 + torch.distributed.get_rank()], squares)


def test_replicas_with_other_items_end():
    """They would work on the same ones, or on none of them."""
    for outcome in pool(2, 1).outcomes(mistaken, timeout=60):
        assert outcome.error in ("SPMDError", "ReplicaError")
        assert "replicas disagree" in outcome.message and "of 3" in outcome.message


def killed(victim, moment):
    """Of one rank: all shares where a rank is killed, and who is left."""
    replicas = Replicas.of_megatron()
    rank, count = torch.distributed.get_rank(), 0

    def work(own):
        nonlocal count
        count += 1
        if rank == victim and count == 2 and moment == "working":
            os.kill(os.getpid(), signal.SIGKILL)
        if replicas.tp is not None:
            spmd.gather_objects(count, replicas.tp)
        return list(own)

    with replicas.guard("a test"), spmd.guard(replicas.tp, "a test"):
        every = [replicas.share("work", ITEMS, work) for _ in range(3)]
        if rank == victim and moment == "at the end":
            os.kill(os.getpid(), signal.SIGKILL)
    with replicas.guard("another test"), spmd.guard(replicas.tp, "another test"):
        every.append(replicas.share("work", ITEMS, work))
    return [sorted(x for own, _ in parts for x in own) for parts in every], replicas.members


@pytest.mark.parametrize("size, tp, victim, moment", [
    (2, 1, 0, "working"), (4, 2, 3, "working"), (3, 1, 1, "working"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (3, 1, 0, "at the end"), (4, 2, 0, "working"), (2, 1, 1, "at the end"),
        (6, 2, 2, "working"), (6, 2, 5, "at the end"),
    )),
])
def test_a_killed_replicas_work_is_done_by_the_others(size, tp, victim, moment):
    own = RankPool(size, tp)
    begin = time.monotonic()
    try:
        outcomes = own.outcomes(killed, victim, moment, timeout=60)
    finally:
        own.close()
    assert time.monotonic() - begin < 30
    left = tuple(r for r in range(size // tp) if r != victim // tp)
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            assert outcome.error == "Died"
        elif rank // tp == victim // tp:  # a rank that its replica has besides
            assert outcome.error in ("RemoteRankError", "ReplicaError", "RuntimeError"), outcome
        else:
            assert outcome.error is None, outcome
            every, members = outcome.value
            assert every == [ITEMS] * 4 and members == left


def late():
    """One replica is slower than the group's timeout allows."""
    rank = torch.distributed.get_rank()
    replicas = Replicas(torch.distributed.new_group([0, 1], timeout=timedelta(seconds=2)))

    def work(own):
        if rank == 1:
            time.sleep(4)
        return own

    said = []
    for _ in range(2):
        try:
            with replicas.guard("a test"):
                said.append(len(replicas.share("work", ITEMS, work)))
        except ReplicaError as error:
            said.append(str(error))
    return said, replicas.members


@pytest.mark.slow
def test_a_replica_that_waits_too_long_leaves_and_the_late_one_goes_on():
    """Two that both went on would both write results."""
    own = RankPool(2, 1)
    try:
        (first, _), (second, left) = own.run(late)
    finally:
        own.close()
    assert "replica 1 has said nothing" in first[0] and "or left" in first[1]
    assert second == [2, 1] and left == (1,)
