"""The tightest lines below and above a curve on an interval, as a family with one parameter.

Written for lower lines; upper lines are lower lines of -f (`sign` -1). The tightest lines are those
that support f's convex envelope on [lo, hi]. There are three kinds:

- a **tangent** at a point t of a convex stretch [p, q] of f, for t in [t1, t2]: t1 is the first
  point of the stretch whose tangent does not pass above f at lo, and t2 the last one whose tangent
  does not pass above f at hi. (If t1 > t2 there is no tangent.)
- a line about a **corner** c (a kink or a jump of f): it passes through f's lower value at c, with
  a slope in [s1, s2]. s1 is the largest slope from lo, or from a corner left of c, to c; s2 is the
  smallest slope from c to hi, or to a corner right of c. If f is convex next to c, its one-sided
  derivative bounds the slope too. (If s1 > s2 there is no such line.)
- the **chord**, if there is neither of these.

A line's mean distance to f is smallest if the line is highest at the middle of the interval. This
is the line without alpha (t = middle, clamped to [t1, t2]; s1 or s2), with two exceptions, because
a line that lies far below f at an end makes bounds of few neurons wide. The flattest line is taken
if it costs little at the middle (`_LITTLE`; on wide intervals the constant 0 below x^2 or abs, 1
above tanh), and the exponential's line touches at most 1 from its flat end (`Curve.reach`). Alpha
moves t, or turns the slope between s1 and s2.

**Soundness does not depend on t.** For a slope k the largest sound intercept is the minimum of
f(x) - k x over [lo, hi]. Where f is concave or straight, the minimum is at an end of the interval
or at a corner; where it is convex, at the point with f' = k or at an end of the stretch. So with
k = f'(t), for *any* t in the stretch,

    intercept = min(f(lo) - k lo, f(hi) - k hi, f(t) - k t, f(c) - k c for all corners c) - margin.

For a chord or a line about a corner, the only point of a convex stretch with f' = k is the one it
passes through; for a tangent, no other stretch has such a point (`Curve.turning`). Curves with
infinitely many stretches (sine) compute the minimum themselves (`Curve.lowest`).

Rounding: f'(t) is off by a few units in the last place, so the true minimum is near t and lower by
a second-order term (at worst the error of k times the length of the stretch). `margin` is 4 units
in the last place of the terms. The chord is treated in the same way, with t midway between t1 and
t2, where a chord that is chosen only because of rounding would touch.

Degenerate intervals: for zero or tiny width (where the chord's slope would be rounding noise), k =
f'(t) at the middle. For infinite ends, or ends where f overflows: a constant, or the slope of an
asymptote if only that gives a line. An intercept is infinite only if no line is found. An interval
that leaves the domain or contains a pole has no line: the bounds are infinite. Slopes are always
finite, and intercepts are never NaN.

Lines are differentiable in lo, hi and alpha; t1 and t2 by the implicit function theorem.
Shapes: lo, hi [B, *shape]; lines [B, *shape] for all rows, or [R, B, *shape] for each row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from lirpa_megatron.operators.elementwise.curves import Corner, Curve
from lirpa_megatron.operators.numerics import touching_first

_HALVINGS = 20
_LITTLE = 0.1
"""How far the flattest line may lie below the best at the middle, as a share of the chord's
distance. In 8-16-8 networks with intervals of width 100 this narrows CROWN's bounds by 2% (x^2) to
25% (abs)."""
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class TangentFamily:
    """The lower (sign 1) or upper (sign -1) lines: tangents at t, turned by `turn`."""

    sign: torch.Tensor
    touch: torch.Tensor
    """Point of tangency t without alpha."""
    left: torch.Tensor
    right: torch.Tensor
    """How far alpha can move t: from touch - left to touch + right; 0 unless a tangent."""
    turn: torch.Tensor
    """Slope of the best line minus f'(touch); 0 for tangents."""
    down: torch.Tensor
    up: torch.Tensor
    """How far alpha can turn the slope about a corner; 0 elsewhere."""
    corners: tuple[torch.Tensor, ...]
    """The lower value at each corner of the curve; for upper lines the upper value."""
    far: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    """A mask, and (slope, intercept) that replace the line where it is set; None if unused."""

    def where(self, mask: torch.Tensor, other: TangentFamily) -> TangentFamily:
        """This side where `mask` [R, B, *shape] is set, otherwise the other side."""

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
    """Maps [-1, 1] to [-below, above]. If one of the two is negligible, both halves map to the
    other (alpha could not leave a half in which it has no gradient).
    """
    little = 1e-3 * (below + above)  # 0 up to rounding is treated as 0, so that all ranks agree
    up = torch.where(above > little, above, -below)
    down = torch.where(below > little, below, -above)
    return torch.where(move > 0, move * up, move * down)


def _finer(move: torch.Tensor) -> torch.Tensor:
    """Maps [-1, 1] to itself with smaller steps near 0. The best point is rarely far away, and in
    most of a wide interval f' hardly changes (20 steps of Adam would find no better line)."""
    size = move.abs()
    return move / (size + 3 * (1 - size))


class Relaxation:
    """All lines of a curve on [lo, hi].

    Args:
        curve: f.
        lo, hi: [B, *shape], lo <= hi, possibly infinite.
    """

    def __init__(self, curve: Curve, lo: torch.Tensor, hi: torch.Tensor) -> None:
        self.curve, self._given = curve, (lo, hi)
        infinite = curve.beyond(lo, hi)
        if curve.limited:  # at the end of the domain f' may be infinite
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
        """(slope, intercept) of the lines without alpha, or of those that alpha selects.

        Args:
            side: `lower`, `upper` or a mixture of them.
            move: in [-1, 1]: moves t from its leftmost to its rightmost position, or the slope from
                its smallest to its largest value; 0 is the line without alpha.
        """
        t, turn = side.touch, side.turn
        if move is not None:
            t = t + _moved(_finer(move), side.left, side.right)
            with torch.no_grad():  # alpha keeps its gradient at an end despite rounding
                outside = torch.minimum(torch.maximum(t, self.lo), self.hi) - t
            t = t + outside
            turn = turn + _moved(move, side.down, side.up)
        value, slope = self.curve.both(t)
        slope = slope + turn
        lowest = side.sign * (value - slope * t)
        for x, y in ((self.lo, self.at_lo), (self.hi, self.at_hi)):
            lowest = touching_first(lowest, side.sign * (y - slope * x))
        lowest = self.curve.lowest(lowest, side.sign, slope, self.lo, self.hi)
        for corner, y in zip(self.curve.corners, side.corners, strict=True):
            there = side.sign * (y - slope * corner.x)
            lowest = torch.where(self._inside(corner), touching_first(lowest, there), lowest)
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
        """Whether a corner lies in the interval, or so close that rounding may move it inside."""
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
        """Whether the tangent at `flat` is hardly lower at the middle than that at `best`."""
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
        if curve.steep:  # the tangent at the end of the domain may be vertical
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
            # A tangent at the anchor passes through it, whatever the rounded excess is: f in
            # different vectors may differ by a unit in the last place.
            at_once = (excess(near) <= 0) | (near == anchor)
            passed = at_once | (excess(away) <= 0) | (away == anchor)
            if at_once.all():
                return near, passed
            bad, good = near, away
            for _ in range(_HALVINGS):
                passes = excess(t := (bad + good) / 2) <= 0
                bad, good = torch.where(passes, bad, t), torch.where(passes, t, good)
            at_good, drop = excess(good), excess(bad) - excess(good)
            usable = (drop > 0) & passed & ~at_once
            rate = torch.where(usable, (good - bad) / drop, 0.0).nan_to_num(0.0, 0.0, 0.0)
            found = good + at_good * rate
        if torch.is_grad_enabled() and anchor.requires_grad:
            exact = -sign / (curve.bend(found) * (anchor.detach() - found))
            rate = torch.where(usable & exact.isfinite(), exact, rate)
            found = found + (excess(found) - excess(found).detach()) * rate
        return torch.where(at_once, near, torch.where(passed, found, away)), passed

    def _about(
        self, corner: Corner, sign: int, side: TangentFamily, height: torch.Tensor
    ) -> tuple[TangentFamily, torch.Tensor]:
        """The side with lines about a corner where they are higher at the middle; the height."""
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
        """(slope, intercept) if an end is infinite or f overflows: a constant, or the slope k of an
        asymptote if f is unbounded but f(x) - k x is bounded. No gradients: those of infinite
        bounds are undefined.
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
            # Towards the other end, if it is infinite too, sign (f - k x) must not decrease.
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
        """`far`, with the curve's best constant where it has one."""
        mask, value = level
        noise = 4 * torch.finfo(self.lo.dtype).eps * abs(value)
        flat = torch.zeros_like(self.lo), torch.full_like(self.lo, value - sign * noise)
        if far is None:
            return (mask, *flat)
        return (mask | far[0], *(
            torch.where(far[0], a, b) for a, b in zip(far[1:], flat, strict=True)
        ))
