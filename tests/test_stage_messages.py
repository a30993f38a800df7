"""Messages between pipeline stages: on GPUs each direction has a communicator of its own.

Its making is a test, too: stages are in different numbers of Megatron's groups."""

from __future__ import annotations

from collections import deque

import pytest
import stage_models
import torch
from ranks import pool

from lirpa_megatron.operators.tuning import Tuning


def _operations(cuts):
    """What a rank asks of its communicators in a call of many chunks, in order: (kind, direction,
    the other rank). The communicators of both directions are two, as they are on GPUs."""
    from megatron.core import parallel_state

    from lirpa_megatron.compat.group_names import new_group
    from lirpa_megatron.parallel.pipeline import DOWN, UP, Pipeline

    pipeline = Pipeline.of(parallel_state.get_pipeline_model_parallel_group())
    kept, send, receive = pipeline._data, pipeline._isend, pipeline._recv
    pipeline._data = {way: new_group(pipeline._ranks, "gloo") for way in (UP, DOWN)}
    ways, found = {id(group): way for way, group in pipeline._data.items()}, []

    def noted(kind, function):
        def call(way, x, group):
            if id(group) in ways:  # else it is a header
                found.append((kind, ways[id(group)], pipeline.stage + way))
            return function(way, x, group)
        return call

    pipeline._isend, pipeline._recv = noted("send", send), noted("receive", receive)
    try:
        options = {"tuning": Tuning(numbers_for_stages=1)}  # many chunks
        with torch.no_grad():
            stage_models.mlp_bounds(cuts, "tanh", ("CROWN",), torch.float64, options)
    finally:
        del pipeline._isend, pipeline._recv
        pipeline._data = kept
    return found


def _left(ranks, communicator):
    """Operations that are never done where each communicator does its own one after the other, and
    a send when the other side receives; a rank sends what it has computed of what it received.

    Args:
        ranks: the operations of each rank.
        communicator: (direction, pair of ranks) -> which one of the pair's.
    """
    queues, received = {}, [0] * len(ranks)
    for rank, operations in enumerate(ranks):
        before = 0
        for kind, way, other in operations:
            pair = min(rank, other), max(rank, other)
            queue = queues.setdefault((pair, communicator(way)), {}).setdefault(rank, deque())
            queue.append((kind, before))
            before += kind == "receive"
    moved = True
    while moved:
        moved = False
        for (pair, _), ends in queues.items():
            heads = {rank: ends[rank][0] for rank in pair if ends.get(rank)}
            sender = next((rank for rank in heads if heads[rank][0] == "send"), None)
            if {kind for kind, _ in heads.values()} != {"send", "receive"}:
                continue
            if received[sender] < heads[sender][1]:
                continue
            for rank in pair:
                received[rank] += ends[rank].popleft()[0] == "receive"
            moved = True
    return sum(len(queue) for ends in queues.values() for queue in ends.values())


@pytest.mark.parametrize(("pp", "cuts"), [
    (2, (4,)), pytest.param(4, (2, 4, 8), marks=pytest.mark.slow),
])
def test_no_transfer_waits_for_ever_if_each_direction_has_a_communicator(pp, cuts):
    ranks = pool(pp, 1, pp).run(_operations, cuts)
    assert sum(map(len, ranks)) > 50
    assert _left(ranks, lambda way: way) == 0
    assert _left(ranks, lambda way: 0) > 0  # with one for both they would
