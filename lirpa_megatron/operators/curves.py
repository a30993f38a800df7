"""The activation functions: values, derivatives, and where they bend which way.

A gated curve is x s(x) with s increasing from 0 to 1 and s(x) + s(-x) = 1 (all GELUs, SiLU). Its
derivative falls, rises and falls again: it is concave left of -c, convex from -c to c, concave
right of c, and has one minimum x* in between. tanh is convex left of 0 and concave right of it;
squared ReLU is convex.

Constants (c, x*, f(x*)) are found by bisection in float64 when this module is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

_FAR = 1e3
"""Beyond +-this every s(x) is 0 or 1 in float64: its argument is clamped, so that nothing
overflows."""


@dataclass(frozen=True)
class Curve:
    """An activation function f.

    A lower line may touch f where f is convex, an upper line where it is concave. `lower_touch` and
    `upper_touch` give these stretches: (lo, hi) -> (p, q), tensors like lo, such that on [lo, hi]
    the curve bends the other way outside of [p, q], or so little that float64 does not see it.
    Where no line may touch inside, p = q is a point whose tangent crosses the curve before lo or
    hi.
    """

    both: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    """f and its derivative."""
    lower_touch: Callable[[torch.Tensor, torch.Tensor], tuple]
    upper_touch: Callable[[torch.Tensor, torch.Tensor], tuple]
    end_slope: float
    """Of f at +infinity (at -infinity it is 0)."""
    minimum: tuple[float, float] | None = None
    """(x*, f(x*)) in float64; None where f is increasing."""
    degree: int = 1
    """f grows like x ** degree."""

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """f(x), also at infinity."""
        return self.both(x)[0]

    def image(self, lo: torch.Tensor, hi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The exact range of f on [lo, hi]; the minimum is rounded down by 4 last places.

        f falls left of x* and rises right of it, so the largest value is at an end.
        """
        at_lo, at_hi = self.value(lo), self.value(hi)
        if self.minimum is None:
            return at_lo, at_hi
        where, least = self.minimum
        least -= 4 * torch.finfo(lo.dtype).eps * abs(least)
        inside = (lo < where) & (hi > where)
        lower = torch.where(inside, torch.full_like(at_lo, least), torch.minimum(at_lo, at_hi))
        return lower, torch.maximum(at_lo, at_hi)

    def beyond(self, lo: torch.Tensor, hi: torch.Tensor) -> torch.Tensor:
        """Where lines through lo and hi would overflow: infinite, or too large for the number type.
        """
        limit = torch.finfo(lo.dtype).max ** (1 / self.degree) / 16
        return ~((lo >= -limit) & (hi <= limit))


def _root(function: Callable[[float], float], a: float, b: float) -> float:
    """The zero of an increasing function in [a, b]."""
    for _ in range(200):
        middle = (a + b) / 2
        a, b = (a, middle) if function(middle) > 0 else (middle, b)
    return (a + b) / 2


def _constant(lo: torch.Tensor, p: float, q: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full_like(lo, p), torch.full_like(lo, q)


def _gated(both: Callable, bend: float, minimum: tuple[float, float], tail: float) -> Curve:
    """A gated curve.

    Upper lines: on one side of 0 they touch beyond the bend. An interval across 0 has the chord:
    f(x) - x/2 is even, and |x| (s(|x|) - 1/2) falls to 0 and rises again with a derivative of at
    least s - 1/2, so the chord from lo < 0 < hi leaves the curve upwards at both ends, and between
    them the derivative meets the slope of the chord in the convex part only.
    """

    def upper_touch(lo: torch.Tensor, hi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        right, left = lo >= 0, (hi <= 0) & (lo < 0)
        p = torch.where(right, bend, torch.where(left, -tail, 0.0)).to(lo.dtype)
        q = torch.where(right, tail, torch.where(left, -bend, 0.0)).to(lo.dtype)
        return p, q

    return Curve(
        both, lambda lo, hi: _constant(lo, -bend, bend), upper_touch, end_slope=1.0,
        minimum=minimum,
    )


def _erf_gelu() -> Curve:
    """x Phi(x), Phi the normal distribution: f' = Phi + x phi, f'' = (2 - x^2) phi, c = sqrt 2."""

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        near = x.clamp(-_FAR, _FAR)
        gate = 0.5 * torch.erfc(near * -math.sqrt(0.5))
        density = torch.exp(-0.5 * near.square()) / math.sqrt(2 * math.pi)
        return x.clamp(min=-_FAR) * gate, gate + near * density

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x * math.sqrt(0.5))

    least = _root(
        lambda x: phi(x) + x * math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi), -math.sqrt(2), 0
    )
    return _gated(both, math.sqrt(2), (least, least * phi(least)), tail=9.0)


def _sigmoid_gated(a: float, b: float, tail: float) -> Curve:
    """x s(z) with the logistic function s and z = a x + b x^3.

    f' = s + x s(1 - s) z',  f'' = s(1 - s) (2 z' + x ((1 - 2 s) z'^2 + z'')).
    """

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        near = x.clamp(-_FAR, _FAR)
        z, change = near * a, a
        if b:
            square = near.square()
            z, change = z + near * square * b, square * (3 * b) + a
        gate = torch.sigmoid(z)
        return x.clamp(min=-_FAR) * gate, gate * (1 + near * torch.sigmoid(-z) * change)

    def at(x: float) -> tuple[float, float, float]:
        z, dz, ddz = a * x + b * x**3, a + 3 * b * x * x, 6 * b * x
        gate = 1 / (1 + math.exp(-z))
        bend = 2 * dz + x * ((1 - 2 * gate) * dz * dz + ddz)
        return x * gate, 1 + x * (1 - gate) * dz, bend

    bend = _root(lambda x: -at(x)[2], 0.5, 4.0)
    least = _root(lambda x: at(x)[1], -bend, 0)
    return _gated(both, bend, (least, at(least)[0]), tail)


def _tanh() -> Curve:
    tail = 20.0
    return Curve(
        lambda x: (torch.tanh(x), torch.cosh(x.clamp(-40, 40)).square().reciprocal()),
        lambda lo, hi: _constant(lo, -tail, 0.0), lambda lo, hi: _constant(lo, 0.0, tail),
        end_slope=0.0,
    )


def _squared_relu() -> Curve:
    """Convex: every tangent is a lower line, the chord the upper one (no tangent at 0 is one)."""
    return Curve(
        lambda x: (F.relu(x).square(), 2 * F.relu(x)),
        lambda lo, hi: _constant(lo, -math.inf, math.inf), lambda lo, hi: _constant(lo, 0.0, 0.0),
        end_slope=math.inf, degree=2,
    )


GELU_ERF = _erf_gelu()
GELU_TANH = _sigmoid_gated(
    2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715, tail=9.0
)
SILU = _sigmoid_gated(1.0, 0.0, tail=45.0)
QUICK_GELU = _sigmoid_gated(1.702, 0.0, tail=45.0 / 1.702)
SQUARED_RELU = _squared_relu()
TANH = _tanh()
