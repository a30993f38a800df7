"""Floating-point numbers of 53 bits: what one operation, a sum of products and a margin may be off.

Standard model (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., (2.4), (2.8),
(3.2)): fl(a op b) = (a op b)(1 + d) with |d| <= u, also = (a op b) / (1 + d'), u = 2^-53; a product
that underflows is off by TINY at most, with subnormal numbers or with zero in their place. A sum of
n products, in whatever order, blocked, over ranks or with fused multiply-adds, is off by
gamma_n sum |a_i| |b_i|, gamma_n = n u / (1 - n u).
"""

from __future__ import annotations

from typing import Any

import torch

UNIT = 2.0**-53
TINY = 2.0**-1022
"""Most that a product which underflows is off."""
_FLOOR = 2.0**-960
"""Added to every margin: what underflow takes from the margins themselves, with fewer than 2^60
terms, is less."""
_SLACK = 1 + 2.0**-6
"""Margins are sums of positive numbers, computed with a relative error of gamma of all their
roundings: with fewer than 2^40 of them that is less than 2^-12."""


def gamma(n: int) -> float:
    """gamma_n; its own rounding is covered by the slack of every margin."""
    return n * UNIT / (1 - n * UNIT)


def dot(A: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """sum |A| v for each row: A [R, B, *shape], v [B, *shape] >= 0 -> [R, B]."""
    return torch.einsum("rbf,bf->rb", A.abs().flatten(2), v.flatten(1))


def margin(bound: torch.Tensor, error: torch.Tensor | float) -> torch.Tensor:
    """What to take from a lower bound (or add to an upper one) that is off by `error` at most.

    fl(bound - margin) <= bound - error: the slack covers how `error` was computed, and
    fl(bound - margin) is off by u (|bound| + margin).

    Args:
        bound: any shape.
        error: of the same shape, or a number.

    Returns:
        without a gradient.
    """
    return (error * _SLACK + 4 * UNIT * bound.detach().abs() + _FLOOR).detach()


def widened(
    lower: torch.Tensor, upper: torch.Tensor, error: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds that hold whatever is off by `error` in those given."""
    return lower - margin(lower, error), upper + margin(upper, error)


def box_around(x: torch.Tensor, eps: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest floating-point box around [x - eps, x + eps].

    What the rounded sum s = fl(x + e) is off is a floating-point number itself, computed without an
    error (Knuth's TwoSum); where it is not 0 on the outer side, the next number is taken. Gradients
    are those of x - eps and x + eps.

    Args:
        x: any shape.
        eps: a number, or a tensor that goes with x.
    """
    eps = torch.as_tensor(eps, dtype=x.dtype, device=x.device)
    return _rounded(x, -eps, -torch.inf), _rounded(x, eps, torch.inf)


def _rounded(x: torch.Tensor, e: torch.Tensor, towards: float) -> torch.Tensor:
    s = x + e
    with torch.no_grad():
        part = s - x
        off = (x - (s - part)) + (e - part)
        outer = torch.nextafter(s, torch.full_like(s, towards))
        inside = off > 0 if towards > 0 else off < 0
        step = torch.where(inside, outer - s, 0.0)
    return s + step  # exact: the sum is the neighbour of s
