"""Where functions of one variable lose, and where their intervals are cut.

**Score.** A row with A at the neuron's output uses the line below f where A > 0, the one above it
elsewhere. At the pre-activation z at which the bound is attained it loses |A| times the distance of
the line from f there: as much as the bound would rise if this neuron were exact and nothing else
moved. Alpha and beta end where z is at a point that the line touches, or between two of them, and
the average of z over some steps is not exactly there: so that the mean distance over the interval
counts, too, with a smaller weight.

**Point** (general nonlinear branching, Shi et al. 2024: points that make the relaxations of both
sides tightest). Of a grid over the interval and the kinks and inflection points of f inside it, the
point at which the lines used in the two parts have the smallest area between them and f.

A point is a sum of few powers of two, at most 2^-8 of the width apart: float32 has it, and what is
rounding in the interval's ends does not change it. An interval is not cut whose width is less than
2^-14 of its larger end, or 4 times what a relaxation takes for a point.

Shapes: O open domains, n neurons of one operator on this rank, c of them tried in each domain, G
points.
"""

from __future__ import annotations

import math

import torch

from lirpa_megatron.complete.split_curve import CurveLines
from lirpa_megatron.operators.elementwise.curves import Curve
from lirpa_megatron.operators.elementwise.tangent_lines import Relaxation

_SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)
"""Where an interval may be cut."""
_SAMPLES = 8
"""Points of an interval at which a line's distance from f is measured."""
_SPREAD = 0.25
"""Weight of the mean distance."""
_BITS = 8
_LEAST = 2.0**-14
_SAME = 1e-6
"""Areas that differ by less, as a share, are equal: the first point is taken."""


def losses(
    lines: CurveLines, A: torch.Tensor, alpha: torch.Tensor, z: torch.Tensor | None
) -> torch.Tensor:
    """What each neuron costs: [O, n]; -1 where its interval cannot be cut.

    Args:
        lines: of the operator.
        A: at its output, [O, n].
        alpha: of the lines that are used, [O, n].
        z: where bounds are attained; None: not known.
    """
    low, high, curve = lines.lower, lines.upper, lines.place.curve
    slope, intercept = lines.used(A, alpha)

    def distance(x: torch.Tensor) -> torch.Tensor:
        return (slope * x + intercept - curve.value(x)).abs()

    shares = _middles(_SAMPLES, low)
    every = distance(low + (high - low) * shares.view(-1, 1, 1))
    cost = _SPREAD * every.mean(0)
    if z is not None:
        cost = cost + distance(torch.minimum(torch.maximum(z, low), high))
    sides = [lines.every.line(side) for side in (lines.every.lower, lines.every.upper)]
    (k, b), (K, B) = sides
    ends = torch.stack([low, low / 2 + high / 2, high])
    wide = (ends * (K - k) + B - b).amax(0)
    noise = 64 * torch.finfo(low.dtype).eps * (curve.value(ends).abs().amax(0) + 1e-3)
    can = (high - low > _least_width(curve, low, high)) & ~(wide <= noise)
    can &= low.isfinite() & high.isfinite()
    return torch.where(can, (A.abs() * cost).nan_to_num(), -1.0)


def cut_points(
    curve: Curve, low: torch.Tensor, high: torch.Tensor, A: torch.Tensor
) -> torch.Tensor:
    """Where to cut intervals.

    Args:
        curve: f.
        low, high: that can be cut, [O, c].
        A: at these neurons' outputs, [O, c].

    Returns:
        [O, c] float64; numbers that float32 has.
    """
    low, high, A = low.double(), high.double(), A.double()
    width = high - low
    step = torch.exp2(width.clamp(min=1e-300).log2().floor() - _BITS)
    shares = low.new_tensor(_SHARES)
    grid = low[..., None] + width[..., None] * shares
    grid = (grid / step[..., None]).round() * step[..., None]
    special = [float(torch.tensor(x, dtype=torch.float32)) for x in curve.breaks]
    points = torch.cat([low.new_tensor(special).expand(*low.shape, -1), grid], -1)
    # the middle comes first of equal ones
    middle = len(special) + _SHARES.index(0.5)
    order = [middle, *(i for i in range(points.shape[-1]) if i != middle)]
    points = points[..., order]
    inside = (points > low[..., None]) & (points < high[..., None])
    ends = torch.where(inside, points, (low / 2 + high / 2)[..., None])
    area = _area(curve, low[..., None].expand_as(ends), ends, A)
    area = area + _area(curve, ends, high[..., None].expand_as(ends), A)
    area = torch.where(inside, area.nan_to_num(math.inf), math.inf)
    best = area.amin(-1, keepdim=True)
    which = (area <= best * (1 + _SAME)).to(torch.int8).argmax(-1, keepdim=True)
    return points.gather(-1, which)[..., 0]


def _area(curve: Curve, low: torch.Tensor, high: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """Between f and the line that is used, [O, c, G]."""
    every = Relaxation(curve, low, high)
    slope, intercept = every.line(
        every.lower.where((A > 0)[..., None].expand_as(low), every.upper)
    )
    x = low + (high - low) * _middles(_SAMPLES, low).view(-1, 1, 1, 1)
    return (slope * x + intercept - curve.value(x)).abs().mean(0) * (high - low)


def _middles(count: int, like: torch.Tensor) -> torch.Tensor:
    return (torch.arange(count, dtype=like.dtype, device=like.device) + 0.5) / count


def _least_width(curve: Curve, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    largest = torch.maximum(low.abs(), high.abs())
    point = 4 * math.sqrt(torch.finfo(low.dtype).eps) * largest.clamp(min=curve.grain)
    return torch.maximum(point, _LEAST * largest)
