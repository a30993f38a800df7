"""Where in a domain its goal may fail: a smaller box, and narrower intervals of neurons.

An ascent leaves for each row r of a goal, and for their weighted sum, a lower bound that is affine
in the input, L_r(x) = A_r . x + d_r <= c_r . y(x) - t_r for all x of the domain (with its splits:
their multipliers are in it). The goal fails at x only if L_r(x) <= 0 for every r. So that with a
slack e >= 0 what has to be proved is left to

    V = {x in [l, u]: A_r . x + d_r <= e for all r},

and outside of V the goal's margin is above e. (Bounds of inner neurons under constraints on outputs
are INVPROP's, Kotha et al. 2023; of inputs this is the fixing by reduced costs of integer
programming.)

**Box.** With m_r = min over [l, u] of A_r . x + d_r, each x in V has

    A_ri (x_i - l_i) <= e - m_r  if A_ri > 0,        A_ri (x_i - u_i) <= e - m_r  if A_ri < 0,

as all other terms are at least what they are at the minimiser.

**Intervals.** For an affine lower bound a . x + b <= z of a neuron and any lambda >= 0,

    min over V of z >= min over [l, u] of (a + lambda A_r) . x + b + lambda (d_r - e).

That is concave and piecewise linear in lambda. Its slope is A_r . x* + d_r - e at the minimiser x*,
and falls by |A_ri| (u_i - l_i) where lambda passes -a_i / A_ri > 0, at which x*_i changes its end;
the best lambda is where it passes 0.

Degenerate cases: A_ri = 0 or u_i = l_i leave x_i as it is. Where V is empty (m_r > e) lambda has no
best value; the last one at which something changes is as good as any. Forms that are not finite
say nothing: they are replaced by 0 . x - 1 <= 0.

Shapes: M halfspaces, D domains, S rows, n inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ROUNDS = 2
_NUMBERS = 2**20


@dataclass(frozen=True)
class Halfspaces:
    """A . x + d <= 0."""

    A: torch.Tensor
    """[M, D, n]"""
    d: torch.Tensor
    """[M, D] float64"""

    @classmethod
    def of(cls, A: torch.Tensor, d: torch.Tensor) -> Halfspaces:
        """Without what is not finite."""
        finite = A.isfinite().all(2) & d.isfinite()
        return cls(torch.where(finite[..., None], A, 0.0), torch.where(finite, d, -1.0))


def shrunk(
    halfspaces: Halfspaces, low: torch.Tensor, high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes [D, n] that contain all points of boxes that are in all halfspaces.

    A box stays as it is where nothing is left of it.
    """
    eps = torch.finfo(low.dtype).eps
    l, u = low.double(), high.double()
    wider = 4 * eps * torch.maximum(l.abs(), u.abs())
    for _ in range(_ROUNDS):
        for A, d in zip(halfspaces.A.double(), halfspaces.d, strict=True):
            # by how much the value may exceed the least one
            room = -(torch.minimum(A * l, A * u).sum(1) + d)
            step = torch.where(A != 0, room[:, None] / A.abs(), torch.inf) + wider
            step = torch.where(room[:, None] >= 0, step, torch.inf)
            l, u = (torch.where(A < 0, torch.maximum(l, u - step), l),
                    torch.where(A > 0, torch.minimum(u, l + step), u))
    return torch.maximum(low, l.to(low)), torch.minimum(high, u.to(high))


def least(
    a: torch.Tensor, b: torch.Tensor, halfspaces: Halfspaces, low: torch.Tensor,
    high: torch.Tensor,
) -> torch.Tensor:
    """Lower bounds of rows over the part of each box that is in all halfspaces.

    Args:
        a: [S, D, n], or [S, 1, n] where all domains have the same rows.
        b: [S, D] or [S, 1].
        low, high: [D, n].

    Returns:
        [S, D] float64: the best of those that one halfspace gives.
    """
    D, n = low.shape
    step = max(1, _NUMBERS // (D * n))
    return torch.cat([
        _least(some, b[i * step : (i + 1) * step], halfspaces, low, high)
        for i, some in enumerate(a.split(step))
    ])


def _least(
    a: torch.Tensor, b: torch.Tensor, halfspaces: Halfspaces, low: torch.Tensor,
    high: torch.Tensor,
) -> torch.Tensor:
    width, best = high - low, None
    start = torch.where(a > 0, low, high)
    for A, d in zip(halfspaces.A, halfspaces.d, strict=True):
        slope = (A * start).sum(2) + d.to(A)  # [S, D]
        turn = torch.where(A * a < 0, -a / A, torch.inf)
        turn, order = turn.expand(len(a), *A.shape).sort(2)
        falls = (A.abs() * width).expand_as(turn).gather(2, order).cumsum(2)
        at = (falls < slope[..., None]).sum(2, keepdim=True).clamp(max=turn.shape[2] - 1)
        # what does not change its end never does
        last = turn.isfinite().sum(2, keepdim=True) - 1
        where = torch.minimum(at, last)
        best_turn = turn.gather(2, where.clamp(min=0))[..., 0]
        lam = torch.where((slope > 0) & (where[..., 0] >= 0), best_turn, 0.0)
        lam = lam.nan_to_num(0.0, 0.0, 0.0).double()
        form = a.double() + lam[..., None] * A.double()
        value = torch.minimum(form * low.double(), form * high.double()).sum(2)
        value = value + b.double() + lam * d
        best = value if best is None else torch.maximum(best, value.nan_to_num(nan=-torch.inf))
    return best
