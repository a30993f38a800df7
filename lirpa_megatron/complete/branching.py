"""Which neuron a domain is split at: scores from its bound, then a trial of the best few.

**Score.** The bound of a row loses at an unstable neuron what lies between its line and the ReLU.
With A at the neuron's output from the pass that gave the bound:

    A < 0: the upper line is used; it is off by at most its intercept -l u / (u - l), at z = 0
    A > 0: the line alpha z is used; it is off by at most max(-alpha l, (1 - alpha) u), at an end

so |A| times that is the most that the neuron can cost, and splitting it costs nothing: both
children have y = z or y = 0 there. (BaBSR, Bunel et al. 2020, estimates the same with a fixed
alpha and the layer's bias.) What other functions cost, and where their intervals are cut, is in
`curve_cuts`.

**Trial** (filtered smart branching, De Palma et al. 2021). The best few are tried: both children
are bounded once, with the parent's alpha and beta. The one with the best pair of bounds is chosen.
"""

from __future__ import annotations

import torch

from lirpa_megatron.complete.agreement import best_of_all_ranks
from lirpa_megatron.complete.batch import Batch
from lirpa_megatron.complete.bounding import Bounded, Bounder
from lirpa_megatron.complete.curve_cuts import cut_points, losses

_NOISE = 64
"""Scores of fewer units in the last place of the bound are 0."""
_SAME = 1e-5
"""Pairs of bounds that differ by less, relative to the parent's, are equally good."""


def scores(found: Bounded) -> torch.Tensor:
    """What each neuron that can be split costs in each open domain: [O, N]; others: -1."""
    lines, A = found.batch.lines, found.seen
    alpha = _alpha(found)
    # u = intercept / slope and -l = intercept / (1 - slope), from the upper line
    up = lines.intercept / lines.upper_slope
    down = lines.intercept / (1 - lines.upper_slope)
    if found.primal is None:
        most = torch.where(A > 0, torch.maximum(alpha * down, (1 - alpha) * up), lines.intercept)
    else:
        z = torch.minimum(torch.maximum(found.primal, -down), up)
        line = torch.where(A > 0, alpha * z, lines.upper_slope * z + lines.intercept)
        most = (line - z.clamp(min=0)).abs()
    costs = torch.where(lines.unstable, (A.abs() * most).nan_to_num(), -1.0)
    for curve in found.batch.curves:
        at, z = curve.place.at, found.primal
        costs[:, at] = losses(curve, A[:, at], alpha[:, at], None if z is None else z[:, at])
    return costs


def _alpha(found: Bounded) -> torch.Tensor:
    """Of the best rows, [O, N]."""
    every = torch.arange(len(found.row), device=found.row.device)
    return found.batch.alpha[found.row, every]


def candidates(bounder: Bounder, found: Bounded, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What to try in each open domain, the most promising first: numbers of neurons [O, count], -1
    for none; and points [O, count] float64."""
    own, roots = scores(found), bounder.roots
    # What is nothing but rounding differs between tensor-parallel sizes.
    least = _NOISE * torch.finfo(own.dtype).eps * found.margins[found.open].abs().to(own)
    own[(own >= 0) & (own < least[:, None])] = 0.0
    own[:, ~bounder.counted[:-1]] = -1.0
    numbers = best_of_all_ranks(bounder.tp, own, roots.number_of.expand(len(own), -1), count)
    return numbers, _points(bounder, found, numbers)


def _points(bounder: Bounder, found: Bounded, numbers: torch.Tensor) -> torch.Tensor:
    """Where neurons are cut, by the rank that counts them: [O, count] float64."""
    points = torch.zeros(numbers.shape, dtype=torch.float64, device=numbers.device)
    if not found.batch.curves:
        return points
    places = bounder.roots.place_of[numbers]
    for lines in found.batch.curves:
        r = lines.place
        own = (places >= r.first) & (places < r.first + r.size) & bounder.counted[places]
        if not bool(own.any()):
            continue
        column = (places - r.first).clamp(0, r.size - 1)
        A = found.seen[:, r.at].gather(1, column)
        at = cut_points(r.curve, lines.lower.gather(1, column), lines.upper.gather(1, column), A)
        points = torch.where(own, at, points)
    return bounder.tp.reduce_from(points)


def children(
    bounder: Bounder, parents: Batch, tried: torch.Tensor, points: torch.Tensor
) -> tuple[Batch, torch.Tensor, bool]:
    """Both children of each parent, split at the best of the neurons that are tried.

    Args:
        bounder: bounds them.
        parents: D domains.
        tried: numbers of neurons, [D, c]; -1 for none, never the first.
        points: where, [D, c].

    Returns:
        2 D domains, first those with sign +1; which of those tried was chosen [D]; whether time is
        over.
    """
    D, parents = len(parents), bounder.narrowed(parents)
    known, A, over = bounder.quickly(parents)
    chosen = torch.zeros(D, dtype=torch.int64, device=tried.device)
    if tried.shape[1] > 1:
        value = torch.full(tried.shape, -torch.inf, dtype=torch.float64, device=tried.device)
        for i in range(tried.shape[1]):
            some = (tried[:, i] >= 0).nonzero().flatten()
            if not len(some) or over:
                continue
            pair = _pair(bounder, parents.at(some), tried[some, i], points[some, i])
            margins, _, over = bounder.quickly(pair)
            # A child's bound is its parent's at least.
            value[some, i] = _worth(*torch.maximum(margins, known[some].repeat(2)).chunk(2))
        # Of those that are as good up to rounding, which differs between ranks' sums, the first.
        enough = value.amax(1) - _SAME * known.abs()
        chosen = (value >= enough[:, None]).to(torch.int8).argmax(1)
    neurons, at = (t.gather(1, chosen[:, None])[:, 0] for t in (tried, points))
    return _pair(bounder, parents, neurons, at, A), chosen, over


def _pair(
    bounder: Bounder, parents: Batch, neurons: torch.Tensor, points: torch.Tensor,
    A: torch.Tensor | None = None,
) -> Batch:
    both = torch.arange(len(parents), device=neurons.device).repeat(2)
    signs = torch.ones_like(both)
    signs[len(parents) :] = -1
    return parents.at(both).split(
        bounder.roots, neurons.repeat(2), signs, points.repeat(2), bounder.units,
        None if A is None else A[:, both],
    )


def _worth(on: torch.Tensor, off: torch.Tensor) -> torch.Tensor:
    """Of a pair of children's margins: what is left to prove, as little as possible.

    The worse child counts, and the other one as a tie-break; what is proved is proved.
    """
    on, off = on.clamp(max=0), off.clamp(max=0)
    return torch.minimum(on, off) + 0.1 * torch.maximum(on, off)
