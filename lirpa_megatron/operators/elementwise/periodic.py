"""Sine and cosine: curves with infinitely many convex stretches.

For lower lines let s = 1, for upper lines s = -1. Let a be the last minimum of s f left of the
middle of [lo, hi], and b the first one right of it. s f is convex for a quarter of a period around
each.

- a and b in [lo, hi]: the constant -1 (nothing is higher at the middle).
- only one of them: its convex part is the stretch. If there is another minimum farther out, no line
  touching there is higher at the middle, and tangents on that side of the nearer minimum pass below
  the farther one: the stretch then ends at the nearer minimum.
- none: [lo, hi] lies between two minima and has at most two convex parts, a rising one left of the
  maximum and a falling one right of it. The slopes of an envelope increase, so it has tangents to
  only one of them: the left one, with positive slopes, if s f(hi) >= s f(lo); else the right one.

Soundness does not depend on this choice. The minimum of s f(x) - K x is at lo, at hi, or where
s f' = K and s f is convex: at x = a + arcsin K + 2 pi n its value is -sqrt(1 - K^2) - K x, which is
smallest for the largest or the smallest such x in [lo, hi].

Positions are computed in float64. Beyond 1e8 the lines are the constants -1 and 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lirpa_megatron.operators.elementwise.curves import Both, Curve

_TURN = 2 * math.pi
_LARGEST = 1e8


@dataclass(frozen=True)
class Sine(Curve):
    """sin(x + shift)."""

    shift: float = 0.0
    bends: str = "0"
    left: tuple[float, float] = (math.inf, math.nan)
    right: tuple[float, float] = (math.inf, math.nan)
    unit: float = 1.0
    corners = ()
    extrema = ()

    def _first(self, sign: int) -> float:
        """A minimum of sign f."""
        return -sign * math.pi / 2 - self.shift

    def _minima(
        self, lo: torch.Tensor, hi: torch.Tensor, sign: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(lo, hi, a, b) in float64."""
        lo, hi = lo.detach().double(), hi.detach().double()
        middle = lo / 2 + hi / 2
        a = self._first(sign) + _TURN * torch.floor((middle - self._first(sign)) / _TURN)
        return lo, hi, a, a + _TURN

    @staticmethod
    def _near(x: torch.Tensor) -> torch.Tensor:
        return 1e-9 + 1e-15 * x.abs()

    def beyond(self, lo: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
        return ~((lo >= -_LARGEST) & (hi <= _LARGEST))

    def touch(self, lo: torch.Tensor, hi: torch.Tensor, sign: int) -> Both:
        at_lo, at_hi = sign * self.value(lo), sign * self.value(hi)
        low, high, a, b = self._minima(lo, hi, sign)
        has_a, has_b = a >= low, b <= high
        quarter = math.pi / 2
        at_a = (torch.where(a - _TURN >= low, a, a - quarter), a + quarter)
        at_b = (b - quarter, torch.where(b + _TURN <= high, b, b + quarter))
        rising = (at_hi >= at_lo) | has_a
        take_a = torch.where(has_a == has_b, rising, has_a)
        p, q = (torch.where(take_a, x, y) for x, y in zip(at_a, at_b, strict=True))
        return p.to(lo.dtype), q.to(lo.dtype)

    def level(
        self, lo: torch.Tensor, hi: torch.Tensor, sign: int
    ) -> tuple[torch.Tensor, float] | None:
        low, high, a, b = self._minima(lo, hi, sign)
        mask = (a >= low) & (b <= high)
        return (mask, -float(sign)) if mask.any() else None

    def lowest(
        self, found: torch.Tensor, sign: torch.Tensor, k: torch.Tensor, lo: torch.Tensor,
        hi: torch.Tensor,
    ) -> torch.Tensor:
        K = sign * k
        with torch.no_grad():
            exact = K.double().clamp(-1, 1)
            start = -sign.double() * math.pi / 2 - self.shift + torch.arcsin(exact)
            low, high = lo.double(), hi.double()
            last = start + _TURN * torch.floor((high - start) / _TURN)
            first = start + _TURN * torch.ceil((low - start) / _TURN)
            root = (1 - exact.square()).clamp(min=0).sqrt()
        for x in (first, last):
            with torch.no_grad():
                inside = (x >= low) & (x <= high) & (K.abs() <= 1)
                value = (-root - exact * x).to(K.dtype)
            least = value - x.to(K.dtype) * (K - K.detach())  # the derivative of a minimum
            found = torch.where(inside, torch.minimum(found, least), found)
        return found

    def image(self, lo: torch.Tensor, hi: torch.Tensor) -> Both:
        """The exact range, rounded outwards by 4 last places of 1 unless lo = hi."""
        wild = self.beyond(lo, hi)
        a, b = (torch.where(wild, 0.0, x) for x in (lo, hi))
        ends = self.value(a), self.value(b)
        bounds = []
        for sign in (1, -1):
            low, high = a.detach().double(), b.detach().double()
            first = self._first(sign)
            turns = torch.ceil((low - self._near(low) - first) / _TURN)
            inside = (first + _TURN * turns <= high + self._near(high)) & (b > a)
            side = torch.minimum(*(sign * y for y in ends))
            eps = torch.where(b > a, 4 * torch.finfo(lo.dtype).eps, 0.0)
            side = torch.where(inside | wild, -1.0, (side - eps).clamp(min=-1))
            bounds.append(sign * side)
        return bounds[0], bounds[1]
