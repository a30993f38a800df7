"""What values and lines of curves may be off (`elementwise.curves`, `tangent_lines`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lirpa_megatron.arithmetic.floating import TINY, UNIT, dot, gamma
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.elementwise.curves import Curve
from lirpa_megatron.rounding.rules import Known, Rule, Visit

Tensor = torch.Tensor
_HALVINGS = 40


@dataclass(frozen=True)
class Accuracy:
    """What is known of a curve f, and how exactly float64 computes it.

    Rests on torch's exp, tanh, cosh, sigmoid and erfc being within 4 units in the last place, 8 u
    of themselves. Their documentation does not say so; a test compares with 200 bits.
    """

    bends: str
    """For each piece, from left to right: '+' convex, '-' concave, '0' straight."""
    breaks: tuple[float, ...]
    """Where the pieces meet: where f'' is 0 (to 1e-15: f' is off by less than u^2 between), or, for
    straight pieces, exactly."""
    relative: float
    absolute: float
    """Error of f(x): relative |f(x)| + absolute, in units of u."""
    slope: float
    """Error of f'(x), in units of u."""
    steepest: Callable[[Tensor], Tensor | float]
    """Most that |f'| is on [-m, m], of m."""
    curvature: float
    """Most that |f''| is."""
    size: Callable[[Tensor], Tensor]
    """Most that |f| is on [-m, m], of m."""


def _gated(bend: float, slope: float, absolute: float = 1.0) -> Accuracy:
    """x s(z(x)): |f| <= |x|, |f'| <= 1.13, |f''| <= 0.86."""
    return Accuracy(
        "-+-", (-bend, bend), 10.0, absolute, slope, lambda m: 1.13, 0.86, lambda m: m
    )


def _rising(size: float, steepest: float, slope: float, curvature: float) -> Accuracy:
    """Convex left of 0, concave right of it, |f| <= size and f' <= steepest."""
    return Accuracy(
        "+-", (0.0,), 8.0, 1.0, slope, lambda m: steepest, curvature,
        lambda m: torch.full_like(m, size),
    )


def _straight(curve: Curve) -> Accuracy:
    """Straight pieces without jumps: |f(x)| <= |f(0)| + steepest |x|, of two operations at most."""
    steepest = max([abs(k) for k in (curve.left[0], curve.right[0])] + [
        abs(k) for corner in curve.corners for k in (corner.left, corner.right)
    ])
    at_0 = abs(float(curve.value(torch.zeros((), dtype=torch.float64))))
    return Accuracy(
        curve.bends, curve.breaks, 2.0, 2.0, 1.0, lambda m: 1.01 * steepest, 0.0,
        lambda m: at_0 + 1.01 * steepest * m,
    )


ACCURACY: dict[str, Accuracy] = {
    "GeluErf": _gated(math.sqrt(2.0), 14.0),
    "GeluTanh": _gated(1.4185040087908284, 64.0, 3.0),
    "Silu": _gated(2.3993572805154677, 32.0),
    "QuickGelu": _gated(1.4097281319127307, 40.0),
    "Tanh": _rising(1.0, 1.0, 20.0, 0.8),
    "Sigmoid": _rising(1.0, 0.25, 8.0, 0.1),
    "Erf": _rising(1.0, 1.13, 16.0, 1.0),
    "Arctan": _rising(1.58, 1.0, 6.0, 0.66),
    "Softsign": _rising(1.0, 1.0, 6.0, 2.0),
    "SquaredRelu": Accuracy(
        "+", (), 2.0, 0.0, 1.0, lambda m: 2 * m, 2.0, torch.square
    ),
}
"""Name of the operator, Bound...: where each is derived, with 8 u for each of torch's functions:

GELU (erf): the argument z = -x sqrt(1/2) is off by 2.1 u |z|, so the gate erfc(z)/2 by 8 u gate +
2.1 u |z| exp(-z^2) / sqrt(pi); times |x| the last is at most 0.7 u; the product adds u |f|.
Derivative: the gate is off by 8.7 u at most, the density by (11 + x^2/2) u of itself, times |x| at
most 3.3 u; the sum adds 1.2 u.

x s(z): z is off by k u |z| (k = 0 for SiLU, 1 for quick GELU, 7 for GELU (tanh): its constants, the
cube, the sum of terms of one sign); s by 8 u s + k u |z| s(1 - s), and |x| times the last is at
most 0.5 k u / z'(0). Derivative s (1 + x s(-z) z'): with w = |x s(-z) z'|, s (1 + w) <= 1.9 and
s (1 + w) |z| <= 1.9 left of 0, s w <= 1, it is off by 1.9 (8 + k) u + (18 + 2 k) u at most.

tanh: 8 u |f|; derivative 1 / cosh^2: 18 u of itself. Logistic function: 8 u |f|; derivative
s(x) s(-x) <= 1/4: 17 u of itself. erf: 8 u |f|; derivative (2/sqrt(pi)) exp(-x^2): 12 u + x^2 u of
itself. atan: 8 u |f|; derivative 1 / (1 + x^2): 3 u of itself. x / (1 + |x|): 2 u; its derivative
5 u of itself. Squared ReLU: one product; 2 x is exact.
"""

STRAIGHT = ("Abs", "Clamp", "HardSigmoid", "LeakyRelu")
"""Operators of straight pieces: their breaks and slopes are the curve's, exact."""


class CurveRule(Rule):
    """y = f(x), elementwise, with the lines of `operators.elementwise.tangent_lines`.

    IBP: the ends are values of f, off by E = (relative |f| + absolute) u. (Between ends on both
    sides of a minimum the least value is a constant that is off by less.)

    Pass: A k is off by u |A| |k| in each entry, the sum of intercepts by gamma_n |A| |b|. The lines
    themselves:

    *A line (k, b) below f on [l, u], whatever made it.* Its defect is what b exceeds the least
    value of f(x) - k x by. Where f is concave or straight that is at an end of [l, u] or of the
    piece. Where it is convex f' rises: bisection for f'(c) = k with the computed derivative, off by
    D, ends with [c_a, c_b]. Left of c_a, f' <= k + D, so f(x) - k x >= f(c_a) - k c_a - D L with L
    the length of the piece in [l, u]; right of c_b likewise; between them the tangent at c_a falls
    by (k - f'(c_a) + D)(c_b - c_a), if at all. Each value is computed with an error of
    E + 4 u (|k| m + |f|), m = max(|l|, |u|). Upper lines are lower ones of -f.

    *Lines that alpha moves* are tangents, k = f'(t) as computed, where f is convex, but for the
    rounding of t (4 u m); b is no more than f(x) - k x, as computed, at l, u and t. In the piece of
    t, |f'(t) - k| <= D gives f(x) - k x >= f(t) - k t - D (u - l); on another convex piece f' is
    never k (`Curve` of a gated function: below 0 on the left one of two, above 1 on the right one),
    so that the least value is nowhere else. The defect is at most E + 8 u (|k| m + |f|) +
    D (u - l), and (2 max |f'| + max |f''| (u - l)) 4 u m for the place of t. Entries that alpha
    does not move have the line that was looked at above.

    Infinite ends, and ends where f overflows, make the bound vacuous.
    """

    moves = False

    def magnitude(self, node: auto_lirpa.Bound, known: Known) -> Tensor:
        return accuracy_of(node).size(known.magnitude(node.inputs[0]))

    def of_interval(
        self, node: auto_lirpa.Bound, v: tuple, ends: tuple, C: Any, known: Known
    ) -> Tensor:
        return _error(accuracy_of(node), torch.maximum(*(end.detach().abs() for end in ends)))

    def of_visit(self, node: auto_lirpa.Bound, visit: Visit, known: Known) -> Tensor:
        of_lines, per_term, spill = self._of_lines(node, known)
        v = of_lines + gamma(visit.terms + 4) * per_term
        return dot(visit.A, v) + visit.terms * TINY * spill

    def _of_lines(self, node: auto_lirpa.Bound, known: Known) -> tuple[Tensor, Tensor, Tensor]:
        """(error for each unit of |A|, that for each u of it, both [B, *shape]; for each TINY)."""
        x, key = node.inputs[0], ("lines", node.name)
        made = known.kept.get(key)
        if made is None or made[0] is not x.lower or made[1] is not x.upper:
            made = known.kept[key] = x.lower, x.upper, self._found(node, known)
        return made[2]

    def _found(self, node: auto_lirpa.Bound, known: Known) -> tuple[Tensor, Tensor, Tensor]:
        x, f = node.inputs[0], accuracy_of(node)
        l, u = x.lower.detach(), x.upper.detach()
        m = torch.maximum(l.abs(), u.abs())
        steep, size = f.steepest(m) + 0 * m, f.size(m)
        error = _error(f, size)
        defect = error + 8 * UNIT * (steep * m + size) + f.slope * UNIT * (u - l)
        defect = defect + 4 * UNIT * m * (2 * steep + f.curvature * (u - l))
        # With alpha intercepts are no larger than |f| + |f'| m.
        slope, intercept = 1.01 * steep, size + steep * m
        shared = node.shared_relaxation(known.inputs(node))
        for sign, line in ((1, shared.lower), (-1, shared.upper)):
            k, b = (part.detach() for part in line)
            least, off = _least(f, node.curve.both, sign, k, l, u)
            off = off + error + 4 * UNIT * (k.abs() * m + size)
            defect = torch.maximum(defect, (sign * b - least).clamp(min=0) + off)
            slope, intercept = torch.maximum(slope, k.abs()), torch.maximum(intercept, b.abs())
        defect = torch.where(node.curve.beyond(l, u), torch.inf, defect)
        return defect + 2 * UNIT * slope * m, intercept, m.sum() + 1


def _least(
    f: Accuracy, both: Callable, sign: int, k: Tensor, l: Tensor, u: Tensor
) -> tuple[Tensor, Tensor]:
    """The least sign (f(x) - k x) on [l, u] but for the rounding of values, and by how much it may
    be less: see `CurveRule`."""

    def value(x: Tensor) -> Tensor:
        return sign * (both(x)[0] - k * x)

    def rise(x: Tensor) -> Tensor:
        return sign * (both(x)[1] - k)

    least, off = torch.minimum(value(l), value(u)), torch.zeros_like(l)
    ends = [torch.minimum(torch.maximum(torch.full_like(l, b), l), u) for b in f.breaks]
    for end in ends:
        least = torch.minimum(least, value(end))
    pieces = itertools.pairwise((l, *ends, u))
    for bend, (p, q) in zip(f.bends, pieces, strict=True):
        if bend != ("+" if sign > 0 else "-"):
            continue
        a, b = p, q
        for _ in range(_HALVINGS):
            middle = a + (b - a) / 2
            falls = rise(middle) <= 0
            a, b = torch.where(falls, middle, a), torch.where(falls, b, middle)
        least = torch.minimum(least, torch.minimum(value(a), value(b)))
        fall = torch.where(rise(b) > 0, -rise(a), 0.0).clamp(min=0) * (b - a)
        off = torch.maximum(off, f.slope * UNIT * (q - p) + fall)
    return least, off


def rule_of_curve(node: auto_lirpa.Bound) -> Rule | None:
    """The rule of an elementwise operator of stated accuracy; None for others."""
    return _RULE if _name(node) in (*ACCURACY, *STRAIGHT) else None


_RULE = CurveRule()


def _name(node: Any) -> str:
    return type(node).__name__.removeprefix("Bound")


def accuracy_of(node: Any) -> Accuracy:
    """What is known of an operator's curve."""
    name = _name(node)
    return ACCURACY[name] if name in ACCURACY else _straight(node.curve)


def _error(f: Accuracy, size: Tensor) -> Tensor:
    """Of a computed f(x), |f(x)| at most `size`."""
    return UNIT * (f.relative * size + f.absolute) + TINY
