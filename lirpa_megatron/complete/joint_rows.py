"""The best weighted sum of a goal's rows over a box, from the rows' linear lower bounds.

A goal of several rows holds where at least one of them is above its threshold. With lower bounds
l_r(x) = a_r . x + c_r of row r minus its threshold, and weights w >= 0 of sum 1,

    max_r l_r(x) >= sum_r w_r l_r(x) >= min over the box of (sum_r w_r a_r) . x + sum_r w_r c_r

so the goal holds in the box if the right side is positive for some w. It is concave in w, with the
subgradient g_r = l_r(x*) at the corner x* where the minimum is attained, and is ascended by
multiplicative steps, which stay among the weights. (The best w is the solution of the dual of: is
there a point of the box where no l_r is positive?)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_STEPS, _SIZE, _DECAY = 24, 2.0, 0.9
"""How many, the first one's size in units of the largest |g_r|, and by how much each is smaller."""


@dataclass(frozen=True)
class Joint:
    """What rows together say of D parts and J goals; all float64."""

    margins: torch.Tensor
    """Lower bounds of the largest l_r, [D, J]; -inf where a row is not finite."""
    size: torch.Tensor
    """Sums of the terms' sizes, [D, J], which rounding is measured by."""
    points: torch.Tensor
    """Where they are attained, [D, J, n]."""


def joint(
    slopes: torch.Tensor, constants: torch.Tensor, thresholds: torch.Tensor, low: torch.Tensor,
    high: torch.Tensor,
) -> Joint:
    """Bounds of rows together.

    Args:
        slopes: of the rows' lower bounds, [D, J, R, n].
        constants: theirs, [D, J, R].
        thresholds: [D, J, R] float64.
        low, high: of the parts, [D, n].
    """
    a, bias = slopes.double(), constants.double()
    ends = low.double()[:, None], high.double()[:, None]
    c = bias - thresholds
    w = torch.full_like(c, 1 / c.shape[2])
    best = torch.full_like(c[..., 0], -torch.inf)
    chosen = w
    for step in range(_STEPS):
        x, value, g = _at(a, c, w, *ends)
        better = value > best  # not NaN
        best = torch.where(better, value, best)
        chosen = torch.where(better[..., None], w, chosen)
        unit = g.abs().amax(2, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
        w = w * torch.exp(_SIZE * _DECAY**step * (g / unit).nan_to_num())
        w = w / w.sum(2, keepdim=True)
    x, value, _ = _at(a, c, chosen, *ends)
    terms = (a * x[:, :, None]).abs().sum(3) + bias.abs() + thresholds.abs()
    margins = torch.where(value.isfinite(), value, -torch.inf)
    return Joint(margins, (chosen * terms).sum(2), x)


def _at(
    a: torch.Tensor, c: torch.Tensor, w: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the sum with weights w is least, its value there, and each row's."""
    slope = torch.einsum("djr,djrn->djn", w, a)
    x = torch.where(slope > 0, low, high)
    g = torch.einsum("djrn,djn->djr", a, x) + c
    return x, (w * g).sum(2), g
