"""Replicas of a model on one machine hold its weights once."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ranks import pool
from torch import nn


def _shared():
    """On each of two processes: what is saved, what it sees of the other's change, its own rest."""
    from lirpa_megatron.parallel.shared_weights import share_weights

    rank = dist.get_rank()
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2).to(torch.bfloat16))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        model[0].bias[2] += rank  # differs
    own = model[0].bias.clone()
    saved = share_weights(model, dist.group.WORLD)
    same = all(torch.equal(x, before[name]) for name, x in model.state_dict().items()
               if name != "0.bias") and torch.equal(model[0].bias, own)
    dist.barrier()
    if rank == 0:
        with torch.no_grad():
            model[0].weight[1, 1] = 9.0
            model[0].bias[0] = 9.0
    dist.barrier()
    return saved, same, model[0].weight[1, 1].item(), model[0].bias[0].item()


def test_equal_weights_are_held_once_and_others_stay():
    first, second = pool(2, 1).run(_shared)
    weights = 4 * 35 + 4 * 7 * 4 + 8 + 2 * 16  # of the norm: two weights, two numbers' statistics
    assert (first[0], second[0]) == (0, weights)
    assert first[1] and second[1]
    assert second[2] == 9.0 and second[3] != 9.0
