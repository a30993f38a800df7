"""Projected-gradient search for counterexamples, on the sharded model itself.

Each restart walks from its own starting point towards one disjunct: against the sign of the
gradient of its excess, the sum of `c . y - d` over the rows that are not satisfied, each divided by
how much it varies over the box. (The gradient of the slack, the largest of them, goes to and fro
between rows of conjunctions.) The disjunct is satisfied where the slack is at most 0.

    K  targets: a region and its open disjuncts        R  restarts of each, walked as one batch
    J  disjuncts attacked        S  rows        L  rows of a disjunct        P  samples of a box
    W = K R  walks, those of the first target first

Every rank takes the same steps: points and decisions are rank 0's (broadcast), because the last
bits of a reduction may differ between ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lirpa_megatron.parallel.model_ranks import ModelRanks
from lirpa_megatron.verify.properties.property import Property, Region
from lirpa_megatron.verify.properties.specification import (
    inward_box,
    region_rows,
    specification_matrix,
)

Target = tuple[Region, Sequence[int]]
"""A region, and positions in its disjuncts."""

_SAMPLES = 4096
"""Points among which starting points are chosen, at most, for all targets together; and"""
_ELEMENTS = 2**23
"""numbers that their coordinates and slacks may have."""


@dataclass(frozen=True)
class AttackOptions:
    """How hard to search."""

    # gradient steps of each restart; 0: no attack
    steps: int = 40
    # starting points, walked as one batch
    restarts: int = 20
    # seed of the starting points
    seed: int = 0
    # first step as a fraction of the box's width; later ones shrink with the cube of what is left
    step_size: float = 0.5
    # stop once a slack is below minus this fraction of the largest output
    clear_margin: float = 1e-5
    # points among which each starting point is chosen
    samples: int = 25


@dataclass(frozen=True)
class Candidate:
    """A point that may be a counterexample."""

    # position among the targets
    target: int
    # its best disjunct, a position in the region's
    disjunct: int
    # [n_in], in the target's box
    point: torch.Tensor
    # of that disjunct, as the attack computes it
    slack: float


class _Disjuncts:
    """The attacked disjuncts of each target as functions of the outputs.

    `scale` [K, J, L] is 1 over how much each row varies over the box, once samples have shown it.
    """

    def __init__(self, prop: Property, targets: Sequence[Target], like: torch.Tensor) -> None:
        rows = [region_rows(region) for region, _ in targets]
        most = max(map(len, rows))
        chosen = []
        self.matrix = like.new_zeros(len(targets), most, prop.n_out)
        self.bounds = like.new_zeros(len(targets), most)
        for k, (own, (region, disjuncts)) in enumerate(zip(rows, targets, strict=True)):
            used = [prop.rows[row] for row in own]
            matrix = specification_matrix(used, prop.n_out, like.dtype, like.device)
            self.matrix[k, : len(own)] = matrix[0]
            self.bounds[k, : len(own)] = torch.tensor([float(row.bound) for row in used]).to(like)
            position = {row: index for index, row in enumerate(own)}
            chosen.append([[position[row] for row in region.disjuncts[d]] for d in disjuncts])
        longest = max(len(c) for each in chosen for c in each)
        count = max(map(len, chosen))
        # a repeated row changes no max, and a repeated disjunct no min
        padded = [
            [c + c[:1] * (longest - len(c)) for c in (each * count)[:count]]
            for each in chosen
        ]
        self.index = torch.tensor(padded, device=like.device)
        self.scale = torch.ones_like(self.index, dtype=like.dtype)

    def measure(self, margins: torch.Tensor) -> None:
        """Sets `scale` from the margins [K P, J, L] of samples."""
        spread = margins.unflatten(0, (len(self.index), -1)).std(1, correction=0)
        self.scale = torch.where(spread > 0, 1 / spread, 1.0).nan_to_num(nan=1.0, posinf=1.0)

    def excess(self, margins: torch.Tensor) -> torch.Tensor:
        """[W, J, L] -> [W, J], see above; the slack where that is at most 0."""
        slack = margins.amax(-1)
        by_target = margins.unflatten(0, (len(self.index), -1)) * self.scale.unsqueeze(1)
        return torch.where(slack > 0, by_target.relu().sum(-1).flatten(0, 1), slack)

    def margins(self, y: torch.Tensor) -> torch.Tensor:
        """y [W, n_out] -> `c . y - d` of each row [W, J, L]."""
        by_target = y.to(self.matrix.dtype).view(len(self.matrix), -1, y.shape[-1])
        margins = by_target @ self.matrix.transpose(1, 2) - self.bounds.unsqueeze(1)
        index = self.index.unsqueeze(1).expand(-1, margins.shape[1], -1, -1)
        return margins.gather(2, index.flatten(2)).view(index.shape).flatten(0, 1)


def find_candidates(
    model: nn.Module,
    prop: Property,
    targets: Sequence[Target],
    options: AttackOptions,
    ranks: ModelRanks,
    like: torch.Tensor,
) -> list[Candidate]:
    """Looks for inputs in the regions' boxes whose outputs satisfy one of the disjuncts.

    Args:
        model: x [N, n_in] -> y [N, n_out], both replicated, of any float type; its inner layers may
            be sharded.
        prop: the property.
        targets: what is attacked; each disjunct has rows.
        options: how hard to search.
        ranks: that hold the model.
        like: a tensor with the model's dtype and device.

    Returns:
        of each walk the point with the smallest slack, those with the smallest ones first; the same
        on every rank. Whether any is a counterexample is for others to confirm.
    """
    boxes = [inward_box(region, like.dtype, like.device) for region, _ in targets]
    lower, upper = (torch.stack(ends) for ends in zip(*boxes, strict=True))
    disjuncts = _Disjuncts(prop, targets, like)
    x, pursued = _starting_points(model, disjuncts, lower, upper, options, ranks)
    lower, upper = (ends.repeat_interleave(options.restarts, 0) for ends in (lower, upper))
    width = upper - lower
    best, best_slack = x, None
    for step in range(options.steps + 1):
        x = x.requires_grad_(True)
        y = model(x)
        margins = disjuncts.margins(y)
        smallest, which = margins.detach().amax(-1).nan_to_num(nan=torch.inf).min(dim=1)
        if best_slack is None:
            best, best_slack, best_of = x.detach(), smallest, which
        else:
            closer = smallest < best_slack
            best = torch.where(closer[:, None], x.detach(), best)
            best_slack = torch.where(closer, smallest, best_slack)
            best_of = torch.where(closer, which, best_of)
        if step == options.steps:
            break
        excess = disjuncts.excess(margins).gather(1, pursued)
        (gradient,) = torch.autograd.grad(excess.sum(), x)
        rate = options.step_size * (1.0 - step / options.steps) ** 3
        x = (x.detach() - rate * width * gradient.sign()).clamp(lower, upper)
        size = y.detach().abs().max().clamp(min=1.0)
        x, clear = _from_rank_zero(x, best_slack.min() < -options.clear_margin * size, ranks)
        if clear:
            break
    best = ranks.broadcast_tensor(best, "the closest points")
    found = ranks.broadcast_object((best_slack.tolist(), best_of.tolist()), "their slacks")
    candidates = []
    for w, (slack, which) in enumerate(zip(*found, strict=True)):
        k = w // options.restarts
        of = targets[k][1]
        candidates.append(Candidate(k, of[which % len(of)], best[w], slack))
    return sorted(candidates, key=lambda candidate: candidate.slack)


def _from_rank_zero(
    x: torch.Tensor, decision: torch.Tensor, ranks: ModelRanks
) -> tuple[torch.Tensor, bool]:
    """Rank 0's points and decision in one broadcast."""
    packed = ranks.broadcast_tensor(torch.cat([x.flatten(), decision.to(x)[None]]), "a step")
    return packed[:-1].view_as(x), bool(packed[-1])


def _starting_points(
    model: nn.Module, disjuncts: _Disjuncts, lower: torch.Tensor, upper: torch.Tensor,
    options: AttackOptions, ranks: ModelRanks,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [W, n_in] and the disjunct [W, 1] that each walk pursues.

    Of the centre, random points of the box and random corners of it, each walk takes the one with
    the smallest excess of its disjunct that no other walk has; every second walk takes a random
    one, so that walks do not all end in one place. Disjuncts closest at the centre come first.
    """
    targets, restarts = len(lower), options.restarts
    each = max(lower.shape[1], disjuncts.index[0].numel())
    affordable = min(_SAMPLES, _ELEMENTS // each) // targets
    count = max(restarts, min(options.samples * restarts, affordable))
    generator = torch.Generator().manual_seed(options.seed)
    fractions = torch.rand(count, lower.shape[1], generator=generator)
    fractions[restarts::2] = fractions[restarts::2].round()
    fractions[0] = 0.5
    fractions = fractions.to(lower)
    points = lower[:, None] + fractions * (upper - lower)[:, None]
    points = points.clamp(lower[:, None], upper[:, None])  # [K, P, n_in]
    with torch.no_grad():
        margins = disjuncts.margins(model(points.flatten(0, 1)))
        disjuncts.measure(margins)
        excess = disjuncts.excess(margins).view(targets, count, -1).nan_to_num(nan=torch.inf)
    order = excess[:, 0].argsort(dim=1)  # [K, J]
    walks = torch.arange(restarts, device=lower.device)
    pursued = order[:, walks % order.shape[1]]  # [K, R]
    chosen = walks.repeat(targets, 1)
    for r in range(2, restarts, 2):
        own = excess.gather(2, pursued[:, r, None, None].expand(-1, count, 1))[..., 0]
        own = own.scatter(1, chosen[:, :r], torch.inf)
        chosen[:, r] = own.argmin(dim=1)
    x = points.gather(1, chosen[..., None].expand(-1, -1, points.shape[2])).flatten(0, 1)
    x = ranks.broadcast_tensor(x, "the starting points")
    return x, ranks.broadcast_tensor(pursued.flatten(), "the disjuncts pursued")[:, None]
