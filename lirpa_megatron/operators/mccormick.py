"""McCormick's planes of a product, mixed by alpha: what gates and attention scores share.

For |da| <= ra and |db| <= rb the products (ra + da)(rb + db) and (ra - da)(rb - db) are at least 0,
and so is every mixture of the two (McCormick, 1976): for all d in [-1, 1]

    da db >= -ra rb - d (rb da + ra db),      da db <= ra rb + d (rb da - ra db).

Both stand below A da db in one formula: -|A| ra rb - d (|A| rb da + A ra db). For an upper bound
|A| becomes -|A|.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lirpa_megatron.arithmetic.near import exact, numbers


def turned(
    A: torch.Tensor, size: torch.Tensor, d: torch.Tensor, a0: torch.Tensor, b0: torch.Tensor,
    times_rb: Callable, times_ra: Callable,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What d takes from the plane through the centers a0 and b0.

    Args:
        A: at the product, [R, B, ...].
        size: |A| for a lower bound, -|A| for an upper one.
        d: in [-1, 1]; a number for each entry of A, or one for all.
        a0, b0: the centers; da = a - a0, db = b - b0.
        times_rb: [R, B, ...] at the product, times rb and summed as A times b is -> at a.
        times_ra: the same with ra -> at b.

    Returns:
        coefficients to subtract at a and at b, and a bias [R, B] to add.
    """
    at_a, at_b = times_rb(d * size), times_ra(d * A)
    # Each by itself: there may be fewer queries than keys.
    bias = (at_a * a0).flatten(2).sum(-1) + (at_b * b0).flatten(2).sum(-1)
    return at_a, at_b, bias


def mixed(
    d: torch.Tensor, low: torch.Tensor, high: torch.Tensor, gap: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Range of what is left of da db, where [low, high] is its range.

    By the share |d| the planes above take its place, which leave -+ gap (ra rb, or its sum).
    """
    kept = 1 - exact(numbers(d).abs())
    given = 1 - kept  # the two add up to 1 exactly
    return kept * low - given * gap, kept * high + given * gap
