"""Searches for radii: all decisions are made from numbers that all ranks share."""

from __future__ import annotations

import math
from collections.abc import Callable

_DOUBLINGS = 40


def largest_certified(
    holds: Callable[[float], bool], guess: float, tolerance: float, limit: float = math.inf
) -> float:
    """The largest radius found at which `holds`, by doubling or halving and then bisection.

    A certificate at one radius holds at all smaller ones, so only what was itself proved is
    returned: `holds` was True at the result, and False at one within a factor 1 + tolerance above
    it (or the limit was reached).

    Args:
        holds: whether a radius is certified.
        guess: where to begin, above 0.
        tolerance: relative.
        limit: no larger radius is tried.

    Returns:
        0 if nothing was certified down to 2^-40 of the guess.
    """
    guess = min(guess, limit)
    low, high = 0.0, math.inf
    radius = guess
    for _ in range(_DOUBLINGS):
        if holds(radius):
            low = radius
            if low >= limit or high < math.inf:
                break
            radius = min(2 * radius, limit)
        else:
            high = radius
            if low > 0:
                break
            radius /= 2
    while low > 0 and high < math.inf and high - low > tolerance * low:
        middle = (low + high) / 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def smallest_attacked(
    attack: Callable[[float], float | None], low: float, guess: float, tolerance: float
) -> float | None:
    """The smallest radius found at which an attack succeeds.

    Args:
        attack: radius -> the size of the perturbation that succeeded, at most the radius; or None.
        low: a radius below which none can succeed (it is certified), or 0.
        guess: where to begin, above 0.
        tolerance: relative; an attack that fails proves nothing, so the result is an upper bound.

    Returns:
        None if no attack succeeded up to 2^20 times the guess.
    """
    radius, failed = max(guess, low * (1 + tolerance)), low
    found = None
    for _ in range(20):
        found = attack(radius)
        if found is not None:
            break
        failed, radius = radius, 2 * radius
    if found is None:
        return None
    while found - failed > tolerance * found:
        middle = (failed + found) / 2
        better = attack(middle)
        if better is None:
            failed = middle
        else:
            found = min(found, better)
    return found
