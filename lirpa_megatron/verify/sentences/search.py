"""Searches for radii: all decisions are made from numbers that all ranks share."""

from __future__ import annotations

import math
from collections.abc import Callable

_MOST = 60
"""Bounds computed in one search."""


def largest_certified(
    margin_at: Callable[[float], float], clean: float, linear: float, tolerance: float
) -> float:
    """The largest radius found at which the margin's lower bound is above 0.

    A certificate at one radius holds at all smaller ones, so only what was itself proved is
    returned: the bound was above 0 at the result, and not so at a radius within a factor
    1 + tolerance above it. In between the next radius is where a parabola through what is known of
    the bound (its value and slope at 0, and the largest radius certified) meets 0, or the middle
    if that did not help; twice the radius if it is certified beyond that.

    Args:
        margin_at: lower bound at a radius; the same on every rank.
        clean: the margin at radius 0, above 0.
        linear: where the margin's tangent at radius 0 meets 0, above 0.
        tolerance: relative.

    Returns:
        0 if nothing was certified.
    """
    low, value, high = 0.0, clean, math.inf
    radius = linear / 8
    for step in range(_MOST):
        margin = margin_at(radius)
        if margin > 0:
            low, value = radius, margin
        else:
            high = radius
        if low > 0 and high <= low * (1 + tolerance) * (1 + 1e-12):
            break
        if low == 0:
            radius = high / 4
            continue
        aim = _root(clean, linear, low, value) * (1 - tolerance / 2)
        radius = max(aim, low * (1 + tolerance))
        if high < math.inf and (radius >= high or step % 3 == 2):
            radius = (low + high) / 2
            if high - low <= 2 * tolerance * low:
                radius = min(low * (1 + tolerance), high - tolerance * low / 2)
        elif high == math.inf:
            radius = 2 * low if aim <= low else min(radius, 4 * low)
    return low


def _root(clean: float, linear: float, radius: float, value: float) -> float:
    """Where clean (1 - r/linear) - b r^2 is 0; b such that it has the value at the radius."""
    bend = (clean * (1 - radius / linear) - value) / radius**2
    slope = clean / linear
    if bend <= 0:
        return linear
    return (-slope + math.sqrt(slope**2 + 4 * bend * clean)) / (2 * bend)


def smallest_attacked(attack: Callable[[float], float | None], start: float) -> float | None:
    """The size of the smallest perturbation found that succeeds: an upper bound of the radius.

    Args:
        attack: radius -> the size of the smallest perturbation within it that succeeded, or None.
        start: the first radius, above 0; it is doubled until an attack succeeds.

    Returns:
        None if no attack succeeded up to 2^10 times the start.
    """
    for doubling in range(11):
        found = attack(start * 2**doubling)
        if found is not None:
            return found
    return None
