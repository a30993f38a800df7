"""Arithmetic shared by several operators: products with infinities, roots, dual norms."""

from __future__ import annotations

import math
from typing import Any

import torch

from lirpa_megatron.arithmetic.near import Near, chosen, maybe_nonzero


def least_product(A: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Smallest A z for z in [low, high], elementwise; 0 where A is 0, even for infinite bounds."""
    if isinstance(A, Near):
        return torch.where(maybe_nonzero(A), torch.minimum(A * low, A * high), 0.0)
    value = torch.where(A > 0, A * low, A * high)
    return torch.where(A == 0, 0.0, value)


def mask_overflow(l: torch.Tensor, u: torch.Tensor, limit: float) -> tuple:
    """Bounds for arithmetic that must not overflow.

    Args:
        l, u: bounds, possibly infinite.
        limit: of their magnitude.

    Returns:
        (l, u, wild): `wild` is set where a bound exceeds the limit or is NaN. There l and u are 0,
        and results computed from them must not be used.
    """
    wild = ~((l.abs() <= limit) & (u.abs() <= limit))
    return torch.where(wild, 0.0, l), torch.where(wild, 0.0, u), wild


def clamp_through(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Clamps x to [low, high] with gradient 1 everywhere, so that an alpha that has reached an end
    can move back."""
    return chosen(x + (x.clamp(low, high) - x).detach())  # the sum is exact


def row_sum(A: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sum A b for each row; 0 times an infinite b is 0. Infinite entries of b get no gradient.

    Args:
        A: [R, B, *shape].
        b: [B, *shape] or [R, B, *shape].

    Returns:
        [R, B].
    """
    pattern = "rb...,rb...->rb" if b.ndim == A.ndim else "rb...,b...->rb"
    finite = b.isfinite()
    if finite.all():
        return torch.einsum(pattern, A, b)
    with torch.no_grad():
        infinite = torch.where(finite | (A == 0), 0.0, A * b).flatten(2).sum(-1)
    return torch.einsum(pattern, A, torch.where(finite, b, 0.0)) + infinite


def dot(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """<v, x>: [R, *lead, d] and [*lead, d] -> [R, *lead]."""
    return (v * x).sum(-1)


def intersect(a: tuple, b: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """The intersection of two ranges (least, most) that overlap."""
    least = torch.maximum(a[0], b[0])
    return least, torch.maximum(least, torch.minimum(a[1], b[1]))


def safe_root(x: torch.Tensor) -> torch.Tensor:
    """Square root of x >= 0, with gradient 0 at 0."""
    if isinstance(x, Near):
        return x.safe_root()
    return torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0)


ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}
"""Relative allowance for the rounding of the sums below."""


def dual_norm(x: torch.Tensor, norm: float) -> torch.Tensor:
    """max <x, u> over the unit ball of `norm`, on the last dimension."""
    if norm == float("inf"):
        return x.abs().sum(-1)
    return torch.linalg.vector_norm(x, dim=-1) if norm == 2 else x.abs().amax(-1)


def without_nan(lower: Any, upper: Any) -> tuple[Any, Any]:
    """Replaces NaN by -inf in lower and by inf in upper bounds (vacuous bounds)."""
    inf = float("inf")
    return (
        None if lower is None else torch.where(lower.isnan(), -inf, lower),
        None if upper is None else torch.where(upper.isnan(), inf, upper),
    )


def touching_first(touching: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """min(touching, other), with the gradient of the first where both are equal up to rounding.

    For the intercept of a line that touches a curve. The tangent at its limit passes through the
    curve at the interval's end as well, and alpha moves it to where only the point of tangency
    counts. Left to rounding, the gradient would be another one on another number of ranks. Up to
    sqrt(eps) counts as equal: the limit itself is known to about 1e-12 (`TangentFamily`).

    Args:
        touching: heights at the points where the lines touch the curve.
        other: heights elsewhere, of the same shape.
    """
    least = torch.minimum(touching, other)
    if not torch.is_grad_enabled():
        return least
    with torch.no_grad():
        near = math.sqrt(torch.finfo(touching.dtype).eps) * (1 + touching.abs())
        lower = other < touching - near
    either = torch.where(lower, other, touching)
    return least.detach() + (either - either.detach())  # the minimum itself, exactly
