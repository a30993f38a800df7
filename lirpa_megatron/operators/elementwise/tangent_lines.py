"""Lines below and above a curve on an interval, as tight as lines can be, with one free number.

Written for lower lines; upper lines are lower lines of -f (`sign` -1). The lines that no other line
beats are those that support f's convex envelope on [lo, hi]. Each is of one of three kinds:

- a **tangent** at t of a convex stretch [p, q] of f: t in [t1, t2], where t1 is the first point of
  the stretch whose tangent does not pass above f at lo, and t2 the last one whose tangent does not
  at hi. (If t1 > t2 there is none.)
- a line about a **corner** c (a kink or a jump of f): through f's lower value there, with a slope
  in [s1, s2]: s1 the largest slope from lo, or from a corner left of c, up to c, and s2 the least
  one from c to hi or to a corner right of c; where f is convex beside c, its one-sided derivative
  bounds the slope too. (If s1 > s2 there is none.)
- the **chord**, where there are neither.

Their mean distance to f is smallest where they are highest at the middle of the interval: that is
the line without alpha (t = middle, clamped to [t1, t2]; s1 or s2), but for two kinds of interval. A
line that lies far below f at an end makes bounds of few neurons wide. So where the flattest of the
lines costs little at the middle (`_LITTLE`) it is taken (wide intervals: the constant 0 below x^2
or abs, 1 above tanh), and the exponential's touches at most 1 from its flat end (`Curve.reach`).
Alpha moves t, or turns the slope between s1 and s2.

**Soundness does not rest on t.** For a slope k the largest sound intercept is the minimum of
f(x) - k x over [lo, hi]. Where f is concave or straight, that is at an end of the interval or at a
corner; where it is convex, at the point with f' = k, or at an end of the stretch. So with
k = f'(t), *whatever* t in the stretch is,

    intercept = min(f(lo) - k lo, f(hi) - k hi, f(t) - k t, f(c) - k c for all corners c) - margin.

A chord or a line about a corner has no point with f' = k in a convex stretch but the one it passes
through; nor has a tangent in another stretch than its own (`Curve.turning`). Curves without an end
of stretches (sine) give the minimum themselves (`Curve.lowest`).

Rounding: f'(t) is off by some units in the last place, so that the true minimum is at a point near
t, and of second order below (at worst the error of k times the length of the stretch); `margin` is
4 units in the last place of the terms. The chord is handled alike, with t in the middle of t1 and
t2, which is where a chord that wins by rounding alone would touch.

Degenerate intervals: of zero or tiny width (the chord's slope would be rounding noise) k = f'(t) at
the middle. Infinite ends, or ends whose f overflows: a constant, or the slope of an asymptote where
that alone gives a line; an intercept is infinite only where no line is found. An interval that
leaves the domain or holds a pole has none: the bounds are infinite. Slopes are always finite, and
intercepts no NaN.

Lines are differentiable in lo, hi and alpha; t1 and t2 by the implicit function theorem.

Shapes: lo, hi [B, *shape]; lines for all rows alike, or for each row [R, B, *shape].
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from lirpa_megatron.operators.elementwise.curves import Corner, Curve

_HALVINGS = 20
_LITTLE = 0.1
"""Share of the distance to the chord, at the middle, that the flattest line may lie below the best.
In 8-16-8 networks with intervals of width 100 CROWN's bounds are 2 (x^2) to 25% (abs) narrower."""
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class TangentFamily:
    """The lower (sign 1) or upper (sign -1) lines: tangents at t, turned by `turn`."""

    sign: torch.Tensor
    touch: torch.Tensor
    """t of the best line without alpha."""
    left: torch.Tensor
    right: torch.Tensor
    """How far t may move from there: to touch - left, to touch + right; 0 but for tangents."""
    turn: torch.Tensor
    """Slope of the best line minus f'(touch); 0 for tangents."""
    down: torch.Tensor
    up: torch.Tensor
    """How far the slope may turn from there, about a corner; 0 elsewhere."""
    corners: tuple[torch.Tensor, ...]
    """For each corner of the curve its lower value, for upper lines its upper one."""
    far: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    """Where the line is (slope, intercept) instead, and these; None if nowhere."""

    def where(self, mask: torch.Tensor, other: TangentFamily) -> TangentFamily:
        """This side where `mask` [R, B, *shape], else the other."""

        def choose(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.where(mask, a, b)

        names = ("sign", "touch", "left", "right", "turn", "down", "up")
        far = None
        if self.far is not None or other.far is not None:
            far = tuple(choose(a, b) for a, b in zip(self._far(), other._far(), strict=True))
        return TangentFamily(
            *(choose(getattr(self, name), getattr(other, name)) for name in names),
            tuple(choose(a, b) for a, b in zip(self.corners, other.corners, strict=True)), far,
        )

    def _far(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        zero = torch.zeros_like(self.sign)
        return (zero.bool(), zero, zero) if self.far is None else self.far


def _moved(move: torch.Tensor, below: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """From -below to above for move in [-1, 1]; where one is next to nothing, both halves go
    to the other (a half with nothing to gain would have no gradient to leave it by).
    """
    little = 1e-3 * (below + above)  # what is 0 but for rounding is 0 on every rank
    up = torch.where(above > little, above, -below)
    down = torch.where(below > little, below, -above)
    return torch.where(move > 0, move * up, move * down)


def _finer(move: torch.Tensor) -> torch.Tensor:
    """From [-1, 1] to itself, in smaller steps near 0: the best place is seldom far away, and of a
    wide interval most is where f' hardly changes (20 steps of Adam then find no better line)."""
    size = move.abs()
    return move / (size + 3 * (1 - size))


class Relaxation:
    """All lines of a curve on [lo, hi].

    Args:
        curve: f.
        lo, hi: [B, *shape], lo <= hi, maybe infinite.
    """

    def __init__(self, curve: Curve, lo: torch.Tensor, hi: torch.Tensor) -> None:
        self.curve, self._given = curve, (lo, hi)
        infinite = curve.beyond(lo, hi)
        if curve.limited:  # at the very end of the domain f' may be infinite
            with torch.no_grad():
                middle = torch.where(infinite, curve.safe, lo / 2 + hi / 2)
                infinite = infinite | ~curve.slope(middle).isfinite()
        far: list = [None, None]
        if infinite.any():
            far = [(infinite, *self._far_lines(sign)) for sign in (1, -1)]
            lo, hi = (torch.where(infinite, curve.safe, x) for x in (lo, hi))
        self.lo, self.hi = curve.gentle(lo), curve.gentle(hi)
        self.at_lo, self.at_hi = curve.value(self.lo), curve.value(self.hi)
        with torch.no_grad():
            eps = torch.finfo(lo.dtype).eps
            largest = torch.maximum(lo.abs(), hi.abs())
            values = torch.maximum(self.at_lo.abs(), self.at_hi.abs())
            self._noise = 4 * eps * (values + largest.clamp(max=curve.unit)), 4 * eps * largest
            self._tiny = hi - lo <= math.sqrt(eps) * largest.clamp(min=curve.grain)
            for i, sign in enumerate((1, -1)):
                level = curve.level(lo, hi, sign)
                if level is not None:
                    far[i] = self._with_level(far[i], level, sign)
        self.lower, self.upper = self._side(1, far[0]), self._side(-1, far[1])

    def line(self, side: TangentFamily, move: torch.Tensor | None = None) -> Pair:
        """(slope, intercept) of the best lines, or of those that alpha asks for.

        Args:
            side: `lower`, `upper` or a mixture of them.
            move: in [-1, 1]: t from its leftmost to its rightmost place, or the slope from its
                least to its largest; 0 is the best.
        """
        t, turn = side.touch, side.turn
        if move is not None:
            t = t + _moved(_finer(move), side.left, side.right)
            with torch.no_grad():  # alpha has a gradient at an end, whatever rounding does there
                outside = torch.minimum(torch.maximum(t, self.lo), self.hi) - t
            t = t + outside
            turn = turn + _moved(move, side.down, side.up)
        value, slope = self.curve.both(t)
        slope = slope + turn
        lowest = side.sign * (value - slope * t)
        for x, y in ((self.lo, self.at_lo), (self.hi, self.at_hi)):
            lowest = torch.minimum(lowest, side.sign * (y - slope * x))
        lowest = self.curve.lowest(lowest, side.sign, slope, self.lo, self.hi)
        for corner, y in zip(self.curve.corners, side.corners, strict=True):
            there = side.sign * (y - slope * corner.x)
            lowest = torch.where(self._inside(corner), torch.minimum(lowest, there), lowest)
        fixed, per_slope = self._noise
        intercept = side.sign * (lowest - fixed - per_slope * slope.detach().abs())
        wild = ~(slope.isfinite() & intercept.isfinite())
        if wild.any():  # where arithmetic overflowed
            least, most = (x.detach() for x in self.curve.image(*self._given))
            slope = torch.where(wild, 0.0, slope)
            intercept = torch.where(wild, torch.where(side.sign > 0, least, most), intercept)
        if side.far is not None:
            slope, intercept = (
                torch.where(side.far[0], *pair)
                for pair in zip(side.far[1:], (slope, intercept), strict=True)
            )
        return slope, intercept

    def _inside(self, corner: Corner) -> torch.Tensor:
        """Whether a corner lies in the interval, or so near that rounding may put a jump there."""
        if not corner.jump:
            return (self.lo < corner.x) & (self.hi > corner.x)
        reach = 4 * torch.finfo(self.lo.dtype).eps * abs(corner.x)
        inside = (self.lo <= corner.x + reach) & (self.hi >= corner.x - reach)
        return inside & (self.hi > self.lo)

    # -------------------------------------------------------------------- one side's lines

    @torch.no_grad()
    def _costs_little(
        self, sign: int, best: torch.Tensor, flat: torch.Tensor, middle: torch.Tensor
    ) -> torch.Tensor:
        """Whether the tangent at `flat` lies hardly lower at the middle than that at `best`."""
        heights = []
        for t in (best, flat):
            value, slope = self.curve.both(t)
            heights.append(sign * (value + slope * (middle - t)))
        gap = sign * (self.at_lo / 2 + self.at_hi / 2) - heights[0]
        return heights[0] - heights[1] <= _LITTLE * gap

    def _side(self, sign: int, far: tuple | None) -> TangentFamily:
        lo, hi, curve = self.lo, self.hi, self.curve
        zero, middle = torch.zeros_like(lo), lo / 2 + hi / 2
        first, last, found = self._tangents(sign)
        wanted = middle
        if sign > 0 and math.isfinite(curve.reach):
            rises = curve.reach > 0
            nearer = torch.minimum if rises else torch.maximum
            wanted = nearer(middle, (lo if rises else hi) + curve.reach)
        best = torch.minimum(torch.maximum(wanted, first), last)
        best = torch.where(found, best, (first + last) / 2)
        flattest = curve.flattest(sign)
        if flattest is not None:
            flat = first.clamp(min=flattest) if flattest < math.inf else last
            flat = torch.minimum(flat, last)
            best = torch.where(found & self._costs_little(sign, best, flat, middle), flat, best)
        best = torch.where(self._tiny, middle, best)
        first, last, best = (torch.minimum(torch.maximum(x, lo), hi) for x in (first, last, best))
        moves = found & ~self._tiny
        value, slope = curve.both(best)
        chord = (self.at_hi - self.at_lo) / torch.where(self._tiny, 1.0, hi - lo)
        side = TangentFamily(
            torch.full_like(lo, sign), best, torch.where(moves, best - first, 0.0),
            torch.where(moves, last - best, 0.0),
            torch.where(found | self._tiny, 0.0, chord - slope), zero, zero,
            tuple(torch.full_like(lo, c.value(sign)) for c in curve.corners), far,
        )
        if not curve.corners:
            return side
        with torch.no_grad():  # of the line at the middle
            height = torch.where(moves, sign * (value + slope * (middle - best)), -math.inf)
        for corner in curve.corners:
            if corner.jump or sign * (corner.right - corner.left) > 0:
                side, height = self._about(corner, sign, side, height)
        return side

    def _tangents(self, sign: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(t1, t2) and where there are tangents."""
        lo, hi, curve = self.lo, self.hi, self.curve
        if curve.bends == ("+" if sign > 0 else "-") and not curve.steep:
            return lo, hi, torch.ones_like(lo, dtype=torch.bool)
        p, q = curve.touch(lo, hi, sign)
        p, q = torch.maximum(lo, p), torch.minimum(hi, q)
        if curve.steep:  # the tangent at the very end may stand upright
            p = torch.maximum(p, lo + (hi - lo) / 1024)
            q = torch.minimum(q, hi - (hi - lo) / 1024)
        found = p < q
        if not found.any():
            return lo, hi, found
        p, q = torch.where(found, p, lo), torch.where(found, q, hi)
        (first, last), passed = self._limits(
            sign, torch.stack((lo, hi)), torch.stack((p, q)), torch.stack((q, p))
        )
        return first, last, found & passed[0] & passed[1] & (first <= last)

    def _limits(
        self, sign: int, anchor: torch.Tensor, near: torch.Tensor, away: torch.Tensor
    ) -> Pair:
        """The point between `near` and `away`, closest to `near`, whose tangent passes the test at
        `anchor`, and whether there is one (else it is `away`).

        The excess e(t) = sign (f(t) + f'(t)(anchor - t) - f(anchor)) falls from near to away (its
        derivative is f''(t)(anchor - t)), and the test is e <= 0. Bisection, then one secant step
        with the gradient of the implicit function: dt = - de / e'.
        """
        curve = self.curve
        at_anchor = torch.stack((self.at_lo, self.at_hi))

        def excess(t: torch.Tensor) -> torch.Tensor:
            value, slope = curve.both(t)
            return sign * (value + slope * (anchor - t) - at_anchor)

        with torch.no_grad():
            # A tangent at the anchor passes there, whatever rounding makes of its excess: f in one
            # vector of numbers and in another may differ by a unit in the last place.
            at_once = (excess(near) <= 0) | (near == anchor)
            passed = at_once | (excess(away) <= 0) | (away == anchor)
            if at_once.all():
                return near, passed
            bad, good = near, away
            for _ in range(_HALVINGS):
                t = (bad + good) / 2
                passes = excess(t) <= 0
                bad, good = torch.where(passes, bad, t), torch.where(passes, t, good)
            at_good, at_bad = excess(good), excess(bad)
            drop = at_bad - at_good
            usable = (drop > 0) & passed & ~at_once
            rate = torch.where(usable, (good - bad) / torch.where(usable, drop, 1.0), 0.0)
            rate = torch.where(rate.isfinite(), rate, 0.0)
        found = good + excess(good) * rate
        return torch.where(at_once, near, torch.where(passed, found, away)), passed

    def _about(
        self, corner: Corner, sign: int, side: TangentFamily, height: torch.Tensor
    ) -> tuple[TangentFamily, torch.Tensor]:
        """The side with lines about a corner where they are higher at the middle, and how high."""
        curve, y, c = self.curve, corner.value(sign), corner.x
        inside = (self.lo < c) & (self.hi > c) & ~self._tiny

        def ascent(x: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
            return sign * (there - y) / torch.where(inside, x - c, 1.0)

        least, most = ascent(self.lo, self.at_lo), ascent(self.hi, self.at_hi)
        piece, bend = curve.breaks.index(c), "+" if sign > 0 else "-"
        if curve.bends[piece] == bend:
            least = least.clamp(min=sign * corner.left)
        if curve.bends[piece + 1] == bend:
            most = most.clamp(max=sign * corner.right)
        for other in curve.corners:
            slope = sign * (other.value(sign) - y) / ((other.x - c) or 1.0)
            if other.x < c:
                least = torch.where(self.lo < other.x, least.clamp(min=slope), least)
            elif other.x > c:
                most = torch.where(self.hi > other.x, most.clamp(max=slope), most)
        with torch.no_grad():
            middle = self.lo / 2 + self.hi / 2
            right = middle > c
            own = sign * y + torch.where(right, most, least) * (middle - c)
            take = inside & (least <= most) & (own > height)
        here, zero = torch.full_like(self.lo, c), torch.zeros_like(height)
        steep = torch.where(right, most, least)
        if curve.flattest(sign) is not None:
            level = torch.minimum(least.clamp(min=0), most)
            with torch.no_grad():
                gap = sign * (self.at_lo / 2 + self.at_hi / 2 - y) - steep * (middle - c)
                little = (steep - level) * (middle - c) <= _LITTLE * gap
            steep = torch.where(little, level, steep)
        best = sign * steep
        lowest, highest = (least, most) if sign > 0 else (-most, -least)
        changed = {
            "touch": here, "left": zero, "right": zero, "turn": best - curve.slope(here),
            "down": best - lowest, "up": highest - best,
        }
        side = replace(side, **{
            name: torch.where(take, value, getattr(side, name)) for name, value in changed.items()
        })
        return side, torch.where(take, own, height)

    # ---------------------------------------------------------------- infinite intervals
    @torch.no_grad()
    def _far_lines(self, sign: int) -> Pair:
        """(slope, intercept) where an end is infinite or f overflows: a constant, or the slope k of
        an asymptote where f has no bound but f(x) - k x has.

        Constants: the derivative of an infinite bound is no number.
        """
        curve, (lo, hi) = self.curve, self._given
        outside = curve.outside(lo, hi)
        limit = torch.finfo(lo.dtype).max / 16
        opened = ~(lo >= -limit), ~(hi <= limit)
        height = sign * curve.image(lo, hi)[0 if sign > 0 else 1]
        slope = torch.zeros_like(height)
        limits, ends = (curve.left, curve.right), (lo, hi)
        for i in (0, 1):
            (k, b), (k_other, b_other) = limits[i], limits[1 - i]
            if not math.isfinite(k):
                continue
            # Towards the other end, if that is infinite too, sign (f - k x) must not fall.
            rises = sign * (k_other - k) * (1 if i == 0 else -1) > 0
            lowest = min(sign * b, curve.asymptotic(k, sign))
            both = min(lowest, sign * b_other) if k_other == k else lowest if rises else -math.inf
            other = torch.where(opened[1 - i], curve.safe, ends[1 - i])
            other = torch.where(outside, curve.safe, other)
            value = curve.value(other)
            rounding = 4 * torch.finfo(lo.dtype).eps * (value.abs() + (k * other).abs())
            alone = (sign * (value - k * other) - rounding).clamp(max=lowest)
            found = torch.where(opened[1 - i], both, alone)
            take = opened[i] & ~outside & (height == -math.inf) & found.isfinite()
            height, slope = torch.where(take, found, height), torch.where(take, k, slope)
        height = torch.where(height.isnan(), -math.inf, height)
        noise = 4 * torch.finfo(lo.dtype).eps * height.abs().clamp(max=limit)
        return slope, sign * (height - noise)

    def _with_level(
        self, far: tuple | None, level: tuple[torch.Tensor, float], sign: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`far` with a constant where the curve has one."""
        mask, value = level
        noise = 4 * torch.finfo(self.lo.dtype).eps * abs(value)
        flat = torch.zeros_like(self.lo), torch.full_like(self.lo, value - sign * noise)
        if far is None:
            return (mask, *flat)
        return (mask | far[0], *(
            torch.where(far[0], a, b) for a, b in zip(far[1:], flat, strict=True)
        ))
