"""Lines below and above a curve on an interval, as tight as lines can be, with a free touch point.

Written for lower lines; upper lines are lower lines of -f (`sign` -1). Let f be convex on [p, q]
and concave elsewhere on [lo, hi]. The lines that no other line beats are those that support f's
convex envelope: the tangents at t in [t1, t2], where t1 is the first point of [p, q] whose tangent
does not pass above f at lo, and t2 the last one whose tangent does not at hi. (If t1 > t2 only the
chord is left.) Their mean distance to f is smallest where they are highest at the middle of the
interval: t = middle, clamped to [t1, t2]. That is the line without alpha; alpha moves t.

**Soundness does not rest on t.** For a slope k the largest sound intercept is the minimum of
f(x) - k x over [lo, hi]. Where f is concave, that is at an end of the interval or of the stretch;
where it is convex, at the point with f' = k. So with k = f'(t), *whatever* t in the stretch is,

    intercept = min(f(lo) - k lo, f(hi) - k hi, f(t) - k t) - margin.

Rounding: f'(t) is off by some units in the last place, so that the true minimum is at a point near
t, and of second order below (at worst the error of k times the length of the stretch); `margin` is
4 units in the last place of the terms. The chord is handled alike, with t in the middle of t1 and
t2, which is where a chord that wins by rounding alone would touch.

Degenerate intervals: of zero or tiny width (the chord's slope would be rounding noise) k = f'(t) at
the middle. Infinite ends, or ends whose f overflows: a constant, or slope f'(inf) for an upper line
on [lo, inf); an intercept is infinite only where no line exists. Slopes are always finite.

Lines are differentiable in lo, hi and alpha; t1 and t2 by the implicit function theorem.

Shapes: lo, hi [B, *shape]; lines for all rows alike, or for each row [R, B, *shape].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lirpa_megatron.operators.curves import Curve

_HALVINGS = 20


@dataclass(frozen=True)
class Side:
    """The lower (sign 1) or upper (sign -1) lines: tangents at t, turned by `turn`."""

    sign: torch.Tensor
    touch: torch.Tensor
    """t of the best line without alpha."""
    left: torch.Tensor
    right: torch.Tensor
    """How far t may move from there: to touch - left, to touch + right; 0 for a chord."""
    turn: torch.Tensor
    """Slope of the chord minus f'(touch); 0 for tangents."""
    far: tuple[torch.Tensor, torch.Tensor] | None
    """(slope, intercept) where the interval is infinite; None if none is."""

    def where(self, mask: torch.Tensor, other: Side) -> Side:
        """This side where `mask` [R, B, *shape], else the other."""

        def choose(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.where(mask, a, b)

        far = None
        if self.far is not None:
            far = tuple(choose(a, b) for a, b in zip(self.far, other.far, strict=True))
        return Side(
            choose(self.sign, other.sign), choose(self.touch, other.touch),
            choose(self.left, other.left), choose(self.right, other.right),
            choose(self.turn, other.turn), far,
        )


class Relaxation:
    """All lines of a curve on [lo, hi].

    Args:
        curve: f.
        lo, hi: [B, *shape], lo <= hi, maybe infinite.
    """

    def __init__(self, curve: Curve, lo: torch.Tensor, hi: torch.Tensor) -> None:
        self.curve = curve
        self.infinite = curve.beyond(lo, hi)
        far = (None, None)
        if self.infinite.any():
            far = self._far_lines(lo, hi)
            lo, hi = (torch.where(self.infinite, 0.0, x) for x in (lo, hi))
        self.lo, self.hi = lo, hi
        self.at_lo, self.at_hi = curve.value(lo), curve.value(hi)
        with torch.no_grad():
            eps = torch.finfo(lo.dtype).eps
            largest = torch.maximum(lo.abs(), hi.abs())
            values = torch.maximum(self.at_lo.abs(), self.at_hi.abs())
            self._noise = 4 * eps * (values + largest.clamp(max=10.0)), 4 * eps * largest
            self._tiny = hi - lo <= math.sqrt(eps) * largest.clamp(min=1.0)
        self.lower, self.upper = self._sides(far)

    def line(
        self, side: Side, move: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(slope, intercept) of the best lines, or of those with the touch point moved.

        Args:
            side: `lower`, `upper` or a mixture of them.
            move: in [-1, 1]: t from its leftmost to its rightmost place; 0 is the best.
        """
        t = side.touch
        if move is not None:
            t = t + torch.where(move > 0, move * side.right, move * side.left)
        value, slope = self.curve.both(t)
        slope = slope + side.turn
        lowest = side.sign * (value - slope * t)
        for x, y in ((self.lo, self.at_lo), (self.hi, self.at_hi)):
            lowest = torch.minimum(lowest, side.sign * (y - slope * x))
        fixed, per_slope = self._noise
        intercept = side.sign * (lowest - fixed - per_slope * slope.detach().abs())
        if side.far is not None:
            slope = torch.where(self.infinite, side.far[0], slope)
            intercept = torch.where(self.infinite, side.far[1], intercept)
        return slope, intercept

    def _sides(self, far: tuple) -> tuple[Side, Side]:
        """Both sides; their four touch limits are found together."""
        lo, hi, curve = self.lo, self.hi, self.curve
        bounds = []
        for touch in (curve.lower_touch, curve.upper_touch):
            p, q = touch(lo, hi)
            bounds += [torch.minimum(torch.maximum(x, p), q) for x in (lo, hi)]
        lower_l, lower_u, upper_l, upper_u = bounds
        signs = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=lo.dtype, device=lo.device)
        limits, passed = self._limits(
            signs.view(4, *[1] * lo.ndim),
            anchor=torch.stack((lo, hi, lo, hi)),
            near=torch.stack((lower_l, lower_u, upper_l, upper_u)),
            away=torch.stack((lower_u, lower_l, upper_u, upper_l)),
        )
        middle = lo / 2 + hi / 2
        sides = []
        for i in (0, 2):
            first, last = limits[i], limits[i + 1]
            chord = ~(passed[i] & passed[i + 1]) | (first > last)
            best = torch.minimum(torch.maximum(middle, first), last)
            best = torch.where(chord, (first + last) / 2, best)
            best = torch.where(self._tiny, middle, best)
            first, last, best = (
                torch.minimum(torch.maximum(x, lo), hi) for x in (first, last, best)
            )
            fixed = chord | self._tiny
            width = torch.where(self._tiny, 1.0, hi - lo)
            through = (self.at_hi - self.at_lo) / width - curve.both(best)[1]
            sides.append(Side(
                signs[i], best,
                torch.where(fixed, 0.0, best - first),
                torch.where(fixed, 0.0, last - best),
                torch.where(chord & ~self._tiny, through, 0.0),
                far[i // 2],
            ))
        return sides[0], sides[1]

    def _limits(
        self, sign: torch.Tensor, anchor: torch.Tensor, near: torch.Tensor, away: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The point between `near` and `away`, closest to `near`, whose tangent passes the test at
        `anchor`, and whether there is one (else it is `away`).

        The excess e(t) = sign (f(t) + f'(t)(anchor - t) - f(anchor)) falls from near to away (its
        derivative is f''(t)(anchor - t)), and the test is e <= 0. Bisection, then one secant step
        with the gradient of the implicit function: dt = - de / e'.
        """
        curve = self.curve

        def excess(t: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
            value, slope = curve.both(t)
            return sign * (value + slope * (anchor - t) - curve.value(anchor))

        with torch.no_grad():
            at_once = excess(near, anchor) <= 0
            passed = at_once | (excess(away, anchor) <= 0)
            bad, good = near, away
            for _ in range(_HALVINGS):
                t = (bad + good) / 2
                passes = excess(t, anchor) <= 0
                bad, good = torch.where(passes, bad, t), torch.where(passes, t, good)
            at_good, at_bad = excess(good, anchor), excess(bad, anchor)
            drop = at_bad - at_good
            usable = (drop > 0) & passed & ~at_once
            rate = torch.where(usable, (good - bad) / torch.where(usable, drop, 1.0), 0.0)
        found = good + excess(good, anchor) * rate
        return torch.where(at_once, near, torch.where(passed, found, away)), passed

    @torch.no_grad()
    def _far_lines(self, lo: torch.Tensor, hi: torch.Tensor) -> tuple[tuple, tuple]:
        """(slope, intercept) of the lower and of the upper line on an infinite interval.

        f lies above its minimum, and above 0 from the left. An upper line on [lo, inf) needs slope
        f'(inf); f(x) - x has its largest value at lo or, in the limit, 0. Constants: the
        derivative of an infinite bound is no number.
        """
        zero = torch.zeros_like(lo)
        least, most = self.curve.image(lo, hi)
        limit = torch.finfo(lo.dtype).max
        open_left, open_right = lo == -math.inf, hi == math.inf
        rises = self.curve.end_slope == 1.0
        slope = torch.where(open_right & ~open_left, 1.0, 0.0) if rises else zero
        start = torch.where(open_left, 0.0, lo).clamp(-limit, limit)
        above = (self.curve.value(start) - start).clamp(min=0)
        most = torch.where(slope > 0, above, most)
        least_noise, most_noise = (
            4 * torch.finfo(lo.dtype).eps * x.abs().clamp(max=limit) for x in (least, most)
        )
        return (zero, least - least_noise), (slope, most + most_noise)
