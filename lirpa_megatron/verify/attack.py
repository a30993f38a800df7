"""Projected-gradient search for a counterexample, on the sharded model itself.

Each restart walks from its own starting point along the sign of the gradient of one disjunct's
slack, `max over rows (c . y - d)`, which is at most 0 exactly when the disjunct is satisfied.

    R  restarts, walked as one batch        J  disjuncts attacked        S  rows

Every rank takes the same steps: points and decisions are rank 0's (broadcast), because the last
bits of a reduction may differ between ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lirpa_megatron.parallel import spmd
from lirpa_megatron.verify.property import Property, Region
from lirpa_megatron.verify.specification import region_rows, specification_matrix


@dataclass(frozen=True)
class AttackOptions:
    """How hard to search."""

    # gradient steps of each restart; 0: no attack
    steps: int = 40
    # starting points, walked as one batch
    restarts: int = 20
    # seed of the starting points
    seed: int = 0
    # first step as a fraction of the box's width; later ones shrink linearly
    step_size: float = 0.25
    # stop once a slack is below minus this fraction of the largest output
    clear_margin: float = 1e-5


class _Slacks:
    """Slack of each attacked disjunct as a function of the outputs."""

    def __init__(self, prop: Property, region: Region, disjuncts: list[int], like: torch.Tensor):
        rows = region_rows(region)
        used = [prop.rows[row] for row in rows]
        self.matrix = specification_matrix(used, prop.n_out, like.dtype, like.device)[0]
        self.bounds = torch.tensor([r.bound for r in used], dtype=like.dtype, device=like.device)
        position = {row: index for index, row in enumerate(rows)}
        chosen = [[position[row] for row in region.disjuncts[d]] for d in disjuncts]
        longest = max(len(c) for c in chosen)
        padded = [c + c[:1] * (longest - len(c)) for c in chosen]  # a repeated row changes no max
        self.index = torch.tensor(padded, device=like.device)

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        """y [R, n_out] -> slacks [R, J]."""
        margins = y @ self.matrix.to(y.dtype).T - self.bounds.to(y.dtype)
        return margins[:, self.index].amax(dim=-1)


def find_counterexample(
    model: nn.Module,
    prop: Property,
    region: Region,
    disjuncts: list[int],
    options: AttackOptions,
    group: dist.ProcessGroup | None,
    like: torch.Tensor,
) -> list[float] | None:
    """Looks for an input in the region's box whose output satisfies one of the disjuncts.

    Args:
        model: x [R, n_in] -> y [R, n_out], both replicated; its inner layers may be sharded.
        prop, region: what is attacked.
        disjuncts: positions in `region.disjuncts` that are still open.
        options: how hard to search.
        group: the tensor-parallel group.
        like: a tensor with the model's dtype and device.

    Returns:
        the input in float64, inside the box exactly; rounded to the model's dtype it is the point
        at which the network was evaluated. None if none was found.
    """
    if options.steps < 1 or options.restarts < 1 or not disjuncts:
        return None
    lower = torch.from_numpy(region.lower).to(like)
    upper = torch.from_numpy(region.upper).to(like)
    vacuous = any(not region.disjuncts[d] for d in disjuncts)
    if vacuous:  # the outputs are not constrained: every point of the box will do
        return _inside(lower, region)
    slacks = _Slacks(prop, region, disjuncts, like)
    best = _walk(model, slacks, lower, upper, options, group)
    with torch.no_grad():
        y = model(best)
    holds = bool((slacks(y.double()) <= 0).any()) and bool(torch.isfinite(y).all())
    return _inside(best[0], region) if spmd.broadcast_object(holds, group) else None


def _walk(model, slacks, lower, upper, options, group) -> torch.Tensor:
    """The point [1, n_in] with the smallest slack on all walks; the same on every rank."""
    x = _starting_points(lower, upper, options, group)
    width = upper - lower
    best, best_slack, targets = x[:1], None, None
    for step in range(options.steps + 1):
        x = x.requires_grad_(True)
        y = model(x)
        slack = slacks(y)
        smallest = slack.detach().amin(dim=1)
        leader = int(smallest.nan_to_num(nan=torch.inf).argmin())
        if best_slack is None or smallest[leader] < best_slack:
            best, best_slack = x.detach()[leader : leader + 1], smallest[leader]
        if step == options.steps:
            break
        if targets is None:
            targets = _targets(slack.detach(), group)
        (gradient,) = torch.autograd.grad(slack.gather(1, targets).sum(), x)
        rate = options.step_size * (1.0 - step / options.steps)
        x = (x.detach() - rate * width * gradient.sign()).clamp(lower, upper)
        clear = best_slack < -options.clear_margin * y.detach().abs().max().clamp(min=1.0)
        x, clear = _from_rank_zero(x, clear, group)
        if clear:
            break
    return spmd.broadcast_tensor(best, group).detach()


def _from_rank_zero(x: torch.Tensor, decision: torch.Tensor, group) -> tuple[torch.Tensor, bool]:
    """Rank 0's points and decision in one broadcast."""
    packed = spmd.broadcast_tensor(torch.cat([x.flatten(), decision.to(x)[None]]), group)
    return packed[:-1].view_as(x), bool(packed[-1])


def _starting_points(lower, upper, options, group) -> torch.Tensor:
    """[R, n_in]: the centre, then random points of the box."""
    generator = torch.Generator().manual_seed(options.seed)
    fractions = torch.rand(options.restarts, lower.numel(), generator=generator)
    fractions[0] = 0.5
    points = lower + fractions.to(lower) * (upper - lower)
    return spmd.broadcast_tensor(points.clamp(lower, upper), group).detach()


def _targets(slack: torch.Tensor, group) -> torch.Tensor:
    """[R, 1]: the disjunct each restart pursues; the closest ones at the centre come first."""
    restarts, count = slack.shape
    order = slack[0].argsort()
    targets = order[torch.arange(restarts, device=slack.device) % count]
    return spmd.broadcast_tensor(targets, group)[:, None]


def _inside(point: torch.Tensor, region: Region) -> list[float]:
    """A point of the rounded box [n_in], moved into the exact one.

    The box's ends were rounded to nearest, so a coordinate outside the exact box is such an end:
    the exact end rounds back to it, and the network sees the same point.
    """
    exact = point.detach().double().cpu().numpy()
    return np.clip(exact, region.lower, region.upper).tolist()
