"""Functions of one variable: what relaxations need from them, and what is derived from that.

`breaks` split a function into pieces, each convex, concave or straight. Everything else is derived
from the pieces, in float64, on first use: the derivative is monotone within a piece and has at most
one zero there (an extremum), and one-sided derivatives tell whether a break is an inflection point,
a kink or a jump.

A lower line can touch f inside a convex piece, or at a kink or jump where f rises above the line on
both sides; an upper line can touch f where -f has such a place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

_FAR = 1e3
"""Unbounded pieces are examined up to this distance."""
_SMALL = 1e-12
"""Distance from a break at which one-sided values are taken; also the tolerance for kinks."""

Both = tuple[torch.Tensor, torch.Tensor]


class Corner(NamedTuple):
    """A kink or jump of a function."""

    x: float
    below: float
    """The smaller of the two one-sided values."""
    above: float
    left: float
    """One-sided derivatives."""
    right: float
    jump: bool

    def value(self, sign: int) -> float:
        """The value that lower (sign 1) or upper (sign -1) lines must not cross."""
        return self.below if sign > 0 else self.above


@dataclass(frozen=True)
class Curve:
    """A function f: its value, its derivative and where it bends."""

    value: Callable[[torch.Tensor], torch.Tensor]
    """f, accurate to a few units in the last place; usually torch's function."""
    slope: Callable[[torch.Tensor], torch.Tensor]
    """f'. At a break, the derivative of the curved piece (of either, if both are curved)."""
    bends: str = "+"
    """For each piece, from left to right: '+' convex, '-' concave, '0' straight."""
    breaks: tuple[float, ...] = ()
    """Boundaries between pieces: inflection points, kinks, jumps; one fewer than pieces."""
    left: tuple[float, float] = (-math.inf, math.nan)
    """(k, b): f(x) - k x -> b for x -> -infinity. Infinite k: f grows faster than any line;
    infinite b: f has no asymptote."""
    right: tuple[float, float] = (math.inf, math.nan)
    domain: tuple[float, float] = (-math.inf, math.inf)
    """Where f has a value (including +-infinity); elsewhere it is NaN."""
    pole: float | None = None
    """A break at which f is infinite."""
    grain: float = 1.0
    """f is nearly straight on intervals much shorter than this (or than their distance from 0)."""
    steep: bool = False
    """f' is infinite at an end of the domain."""
    reach: float = math.inf
    """Without alpha, lower lines touch at most this far right of lo (left of hi, if negative), even
    if touching nearer to the middle were best: farther out they fall below all values of f."""
    unit: float = 10.0
    """f is accurate to units in the last place of f(x) or of min(|x|, unit), whichever is more."""
    forward: Callable[[torch.Tensor], torch.Tensor] | None = None
    """What a model computes, if `value` is a more accurate formula."""
    together: Callable[[torch.Tensor], Both] | None = None
    """(f, f') computed together, if they share work."""
    family: tuple[str, tuple[float, ...]] | None = None
    """A family of curves and the numbers of this one, for `forward.jets`."""

    def __post_init__(self) -> None:
        if len(self.bends) != len(self.breaks) + 1 or set(self.bends) - set("+-0"):
            raise ValueError(
                f"bends {self.bends!r} must have one of '+', '-', '0' for each of the "
                f"{len(self.breaks) + 1} pieces that the breaks {self.breaks} make"
            )

    def both(self, x: torch.Tensor) -> Both:
        """(f(x), f'(x))."""
        return (self.value(x), self.slope(x)) if self.together is None else self.together(x)

    def bend(self, x: torch.Tensor) -> torch.Tensor:
        """f''(x), without a gradient."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            slope = self.both(x)[1]
            if not slope.requires_grad:  # of straight pieces
                return torch.zeros_like(slope)
            return torch.autograd.grad(slope.sum(), x)[0]

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """f as the model computes it."""
        return (self.forward or self.value)(x)

    # ------------------------------------------------------------ what follows from the pieces

    def _at(self, x: float) -> tuple[float, float]:
        value, slope = self.both(torch.tensor(x, dtype=torch.float64))
        return float(value), float(slope)

    @cached_property
    def _ends(self) -> tuple[float, ...]:
        """The ends of the pieces, with infinite ends truncated."""
        first, last = self.domain
        low = max(first + _SMALL, -_FAR) if math.isfinite(first) else -_FAR
        high = min(last - _SMALL, _FAR) if math.isfinite(last) else _FAR
        inner = [b for b in self.breaks if low < b < high]
        return (min([low, *(b - _FAR for b in inner)]), *self.breaks,
                max([high, *(b + _FAR for b in inner)]))

    @cached_property
    def corners(self) -> tuple[Corner, ...]:
        """The breaks that are kinks or jumps."""
        found = []
        for b in self.breaks:
            if b == self.pole or not math.isfinite(b):
                continue
            step = _SMALL * max(1.0, abs(b))
            (y0, k0), (y1, k1), (here, _) = self._at(b - step), self._at(b + step), self._at(b)
            y0, y1 = y0 + k0 * step, y1 - k1 * step
            rounding = 1e-14 * (abs(y0) + abs(y1) + abs(b) * (abs(k0) + abs(k1)))
            jump = abs(y1 - y0) > rounding + step * step * 1e3
            if not jump:
                y0 = y1 = here
            if jump or abs(k1 - k0) > 1e-9 * (1 + abs(k0) + abs(k1)):
                values = (y0, y1, here)
                found.append(Corner(b, min(values), max(values), k0, k1, jump))
        return tuple(found)

    def _zeros(self, k: float) -> list[float]:
        """Where f' equals k inside pieces."""
        found = []
        for a, b in zip(self._ends, self._ends[1:], strict=False):
            step = 2 * _SMALL * max(1.0, abs(a), abs(b))
            a, b = a + step, b - step
            ends = self._at(a)[1] - k, self._at(b)[1] - k
            if not a < b or not ends[0] * ends[1] < 0:
                continue
            for _ in range(200):
                middle = (a + b) / 2
                beyond = (self._at(middle)[1] - k > 0) == (ends[1] > 0)
                a, b = (a, middle) if beyond else (middle, b)
            root = (a + b) / 2
            near = round(root, 9) + 0.0
            found.append(near if self._at(near)[1] == k else root)
        return found

    @cached_property
    def extrema(self) -> tuple[tuple[float, float], ...]:
        """(x, f(x)) of the local extrema, and both one-sided values where f jumps."""
        smooth = [(x, self._at(x)[0]) for x in self._zeros(0.0)]
        turns = [c for c in self.corners if c.jump or c.left * c.right < 0]
        return tuple(smooth + [(c.x, y) for c in turns for y in {c.below, c.above}])

    @cached_property
    def minimum(self) -> tuple[float, float] | None:
        """The lowest extremum (x, f(x)); None if there is none."""
        return min(self.extrema, key=lambda point: point[1], default=None)

    def stretches(self, sign: int) -> tuple[tuple[float, float], ...]:
        """Where lower (sign 1) or upper (-1) lines can be tangent: the convex or concave pieces.

        They end where f' equals the asymptote's slope in float64.
        """
        return self._stretches[0 if sign > 0 else 1]

    @cached_property
    def _stretches(self) -> tuple[tuple, tuple]:
        ends = [-self._tail(-1), *self.breaks, self._tail(1)]
        corners = {c.x for c in self.corners}
        sides = []
        for wanted in "+-":
            found: list[tuple[float, float]] = []
            for bend, a, b in zip(self.bends, ends, ends[1:], strict=False):
                if bend != wanted:
                    continue
                if found and found[-1][1] == a and a != self.pole and a not in corners:
                    found[-1] = found[-1][0], b
                else:
                    found.append((a, b))
            sides.append(tuple(found))
        return sides[0], sides[1]

    def _tail(self, way: int) -> float:
        """The distance from 0 at which f' reaches its limit in float64; infinite if it is far."""
        limit, x = (self.right if way > 0 else self.left)[0], 1.0
        furthest = max((abs(b) for b in self.breaks), default=0.0)
        if not math.isfinite(limit) or math.isfinite(self.domain[0 if way < 0 else 1]):
            return math.inf
        while x <= furthest or abs(self._at(way * x)[1] - limit) > 1e-17:
            x *= 1.25
            if x > max(_FAR, 4 * furthest):
                return math.inf
        return x

    @cached_property
    def turning(self) -> tuple[float, float]:
        """For lower and for upper lines: the slope that separates a left stretch from a right one.

        Between the two stretches f bends the other way. If f' is larger on the left stretch than on
        the right one (for upper lines: smaller), no line on its side of f touches both, and the
        chord's slope decides which stretch a tangent can touch.
        """
        return self._turning(1), self._turning(-1)

    def _turning(self, sign: int) -> float:
        found = self.stretches(sign)
        if len(found) < 2 or self.pole is not None:
            return 0.0
        if len(found) > 2:
            raise ValueError("a curve may bend one way on two stretches, not on more")
        slopes = []
        for a, b in found:
            at = [self._at(max(min(x, _FAR), -_FAR))[1] for x in (a, b)]
            slopes.append((min(at), max(at)))
        (low0, high0), (low1, high1) = slopes
        first, second = (low0, high1) if sign > 0 else (high0, low1)
        if sign * (first - second) < 0:
            raise ValueError(
                "a curve with two stretches that one line can touch both has no lines here"
            )
        return (first + second) / 2

    def flattest(self, sign: int) -> float | None:
        """Where sign f is smallest, possibly at infinity; None if it has no minimum."""
        return self._flattest[0 if sign > 0 else 1]

    @cached_property
    def _flattest(self) -> tuple[float | None, float | None]:
        found: list[float | None] = []
        for sign in (1, -1):
            points = [(sign * y, x) for x, y in self.extrema]
            for way, (k, b) in ((-1, self.left), (1, self.right)):
                bound = self.domain[0 if way < 0 else 1]
                if math.isfinite(bound) or self.pole is not None:
                    points.append((-math.inf, bound))
                elif k:
                    points.append((math.copysign(math.inf, sign * way * k), bound))
                else:
                    points.append((sign * b, bound))
            value, x = min(points)
            found.append(x if math.isfinite(value) else None)
        return found[0], found[1]

    # --------------------------------------------------------------------------- on intervals

    def lower_touch(self, lo: torch.Tensor, hi: torch.Tensor) -> Both:
        """(p, q), tensors like lo: a lower line of [lo, hi] may touch f in [p, q], if p < q."""
        return self.touch(lo, hi, 1)

    def upper_touch(self, lo: torch.Tensor, hi: torch.Tensor) -> Both:
        """The same for upper lines."""
        return self.touch(lo, hi, -1)

    def touch(self, lo: torch.Tensor, hi: torch.Tensor, sign: int) -> Both:
        """The relevant stretch for each interval; p > q if there is none."""
        found = self.stretches(sign)
        if not found:
            return torch.full_like(lo, math.inf), torch.full_like(lo, -math.inf)
        p, q = (torch.full_like(lo, x) for x in found[0])
        if len(found) == 1:
            return p, q
        if self.pole is not None:
            right = lo > self.pole
        else:
            wide = hi > lo
            chord = (self.value(hi) - self.value(lo)) / torch.where(wide, hi - lo, 1.0)
            chord = torch.where(wide, chord, self.slope(lo))
            right = chord <= self.turning[0] if sign > 0 else chord >= self.turning[1]
        return tuple(
            torch.where(right, torch.full_like(lo, there), here)
            for here, there in zip((p, q), found[1], strict=True)
        )

    def image(self, lo: torch.Tensor, hi: torch.Tensor) -> Both:
        """The exact range of f on [lo, hi], rounded outwards by 4 last places unless lo = hi.

        -infinity to infinity if the interval leaves the domain or contains a pole.
        """
        outside = self.outside(lo, hi)
        a, b = (torch.where(outside, self.safe, x) for x in (lo, hi))
        a, b = self.gentle(a), self.gentle(b)
        at_lo, at_hi = self.value(a), self.value(b)
        low, high = torch.minimum(at_lo, at_hi), torch.maximum(at_lo, at_hi)
        for x, y in self.extrema:
            reach = 4 * torch.finfo(lo.dtype).eps * abs(x)
            inside = (a <= x + reach) & (b >= x - reach) & (b > a)
            y = torch.full_like(low, y)
            low = torch.where(inside & (y < low), y, low)
            high = torch.where(inside & (y > high), y, high)
        with torch.no_grad():
            eps, wide = 4 * torch.finfo(lo.dtype).eps, b > a
            down, up = (torch.where(wide & x.isfinite(), eps * x.abs(), 0.0) for x in (low, high))
        largest = torch.finfo(lo.dtype).max  # overflow: some larger number
        low, high = (low - down).clamp(max=largest), (high + up).clamp(min=-largest)
        inf = torch.full_like(low, math.inf)
        wrong = outside | low.isnan() | high.isnan()
        return torch.where(wrong, -inf, low), torch.where(wrong, inf, high)

    @property
    def limited(self) -> bool:
        """Whether f is undefined for some numbers."""
        return self.pole is not None or any(math.isfinite(x) for x in self.domain)

    @cached_property
    def safe(self) -> float:
        """A point of the domain."""
        return 0.0 if self.domain[0] < 0 < self.domain[1] and self.pole != 0 else 1.0

    def gentle(self, x: torch.Tensor) -> torch.Tensor:
        """x, without a gradient where f's derivative is infinite."""
        if not (self.steep and x.requires_grad):
            return x
        near = (x - self.domain[0]).abs() < torch.finfo(x.dtype).tiny ** 0.25
        return torch.where(near, x.detach(), x)

    def outside(self, lo: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
        """Where f is undefined somewhere in [lo, hi]."""
        found = ~((lo >= self.domain[0]) & (hi <= self.domain[1]))
        if self.pole is not None:
            found = found | ((lo <= self.pole) & (hi >= self.pole))
        return found

    def beyond(self, lo: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
        """Where no lines through lo and hi exist: an end, or f there, is infinite or overflows, or
        f is undefined somewhere in between.
        """
        limit = torch.finfo(lo.dtype).max / 16
        with torch.no_grad():
            a, b = (torch.where(self.outside(lo, hi), self.safe, x) for x in (lo, hi))
            low, high = self.value(a), self.value(b)
            fine = (lo >= -limit) & (hi <= limit) & (low.abs() <= limit) & (high.abs() <= limit)
        return ~fine | self.outside(lo, hi)

    def level(
        self, lo: torch.Tensor, hi: torch.Tensor, sign: int
    ) -> tuple[torch.Tensor, float] | None:
        """Where the best line is a constant, and the constant; None if tangents cover this case."""
        return None

    def lowest(
        self, found: torch.Tensor, sign: torch.Tensor, k: torch.Tensor, lo: torch.Tensor,
        hi: torch.Tensor,
    ) -> torch.Tensor:
        """The minimum of sign (f(x) - k x) on [lo, hi].

        Args:
            found: its minimum at lo, hi and the point of tangency.
            sign, k: [R, B, *shape] or [B, *shape].
            lo, hi: [B, *shape].
        """
        return found

    def asymptotic(self, k: float, sign: int) -> float:
        """The minimum of sign (f(x) - k x) over stationary points and corners, for one slope."""
        points = [self._at(x)[0] - k * x for x in self._zeros(k)]
        points += [c.value(sign) - k * c.x for c in self.corners]
        return min((sign * y for y in points), default=math.inf)
