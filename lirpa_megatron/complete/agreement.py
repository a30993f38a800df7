"""What the ranks tell each other during branch and bound: decisions, never coefficients.

Bounds are sums over ranks whose last bits may differ, and each rank sees scores of its own neurons
alone. Rank 0's bounds and clock, and the best scores of all ranks, decide everywhere.
"""

from __future__ import annotations

import torch

from lirpa_megatron.parallel import spmd
from lirpa_megatron.parallel.collectives import Collectives


def from_rank_zero(
    tp: Collectives, values: torch.Tensor, is_over: bool
) -> tuple[torch.Tensor, bool]:
    """Rank 0's values (any shape, float64), and whether its time is over."""
    if tp.size == 1:
        return values, is_over
    packed = torch.cat([values.flatten(), values.new_tensor([float(is_over)])])
    packed = spmd.broadcast_tensor(packed, tp.group)
    return packed[:-1].view_as(values), bool(packed[-1])


def best_of_all_ranks(
    tp: Collectives, scores: torch.Tensor, neurons: torch.Tensor, count: int
) -> torch.Tensor:
    """The neurons with the highest scores.

    Args:
        tp: the ranks, each with neurons of its own.
        scores: [D, n], below 0 where there is none.
        neurons: their numbers, [D, n].
        count: how many.

    Returns:
        [D, at most count] numbers, the best first, then the smaller number; -1 where there is none.
    """
    missing = count - scores.shape[1]
    if missing > 0:
        scores = torch.cat([scores, scores.new_full((len(scores), missing), -1.0)], 1)
        neurons = torch.cat([neurons, neurons.new_full((len(neurons), missing), -1)], 1)
    # Of equal ones topk takes any: where many are 0, as after most splits, the smaller number.
    scores = scores.double() - neurons * torch.finfo(torch.float64).tiny
    best, which = scores.topk(count, 1)
    own = torch.stack([best, neurons.gather(1, which).double()])  # [2, D, count]
    if tp.size > 1:
        own = tp.gather_results(own[None]).permute(1, 2, 0, 3).flatten(2)
    numbers, order = own[1].sort(1)
    best = own[0].gather(1, order)
    best, order = best.sort(dim=1, descending=True, stable=True)
    chosen = numbers.gather(1, order).long()[:, :count]
    return torch.where(best[:, :count] > -0.5, chosen, -1)


def mean_over_ranks(
    tp: Collectives, sums: torch.Tensor, counts: torch.Tensor, sharded: torch.Tensor
) -> torch.Tensor:
    """Means of numbers of which sharded ones lie on all ranks.

    Args:
        tp: the ranks.
        sums, counts: of this rank's, [..., n].
        sharded: [n]; others are on every rank.
    """
    if tp.size > 1:
        parts = tp.gather_results(torch.stack([sums, counts.expand_as(sums)])[None])
        whole = parts.sum(0)
        sums, counts = (
            torch.where(sharded, all_of, of_first)
            for all_of, of_first in zip(whole, parts[0], strict=True)
        )
    return sums / counts.clamp(min=1)


def unstable_numbers(
    tp: Collectives, unstable: torch.Tensor, numbers: torch.Tensor, sharded: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The unstable neurons of one ReLU, of all ranks.

    Args:
        tp: the ranks.
        unstable: [K, n] of this rank's.
        numbers: their numbers, [n].
        sharded: whether each rank has its own.

    Returns:
        boxes and numbers, [U] each, the same on every rank.
    """
    box, place = unstable.nonzero(as_tuple=True)
    own = list(zip(box.tolist(), numbers[place].tolist(), strict=True))
    parts = spmd.gather_objects(own, tp.group)
    found = sorted(pair for part in (parts if sharded else parts[:1]) for pair in part)
    both = torch.tensor(found, dtype=torch.int64, device=numbers.device).view(-1, 2)
    return both[:, 0], both[:, 1]
