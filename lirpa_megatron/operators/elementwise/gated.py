"""Gated curves: x s(x) with s increasing from 0 to 1 (all GELUs, SiLU, Mish).

The derivative of such a curve falls, rises and falls again: the curve is concave up to one point,
convex up to another, then concave, and has one minimum in between. f' is below 0 on the left
concave piece and above 1 on the right one, so no upper line touches both (`Curve.turning`): an
upper line across the middle is a chord.

The points are found by bisection in float64 when this module is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lirpa_megatron.operators.elementwise.curves import Curve

_FAR = 1e3
"""Beyond +-this, every s(x) is 0 or 1 in float64. Arguments are clamped to it to avoid overflow."""


def _root(function: Callable[[float], float], a: float, b: float) -> float:
    """The zero of an increasing function in [a, b]."""
    for _ in range(200):
        middle = (a + b) / 2
        a, b = (a, middle) if function(middle) > 0 else (middle, b)
    return (a + b) / 2


def _gated(both: Callable, forward: Callable, first: float, second: float) -> Curve:
    return Curve(
        lambda x: both(x)[0], lambda x: both(x)[1], "-+-", (first, second), left=(0, 0),
        right=(1, 0), forward=forward, together=both,
    )


def _erf_gelu() -> Curve:
    """x Phi(x), Phi the normal distribution: f' = Phi + x phi, f'' = (2 - x^2) phi, c = sqrt 2."""

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        near = x.clamp(-_FAR, _FAR)
        gate = 0.5 * torch.erfc(near * -math.sqrt(0.5))
        density = torch.exp(-0.5 * near.square()) / math.sqrt(2 * math.pi)
        return x.clamp(min=-_FAR) * gate, gate + near * density

    return _gated(both, F.gelu, -math.sqrt(2), math.sqrt(2))


def _sigmoid_gated(a: float, b: float, forward: Callable) -> Curve:
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

    def bending(x: float) -> float:
        z, dz, ddz = a * x + b * x**3, a + 3 * b * x * x, 6 * b * x
        gate = 1 / (1 + math.exp(-z))
        return 2 * dz + x * ((1 - 2 * gate) * dz * dz + ddz)

    bend = _root(lambda x: -bending(x), 0.5, 4.0)
    return _gated(both, forward, -bend, bend)


def _mish() -> Curve:
    """x tanh(softplus(x)); with s the logistic function and t the tanh, t' = (1 - t^2) s:

    f' = t + x t',  f'' = 2 t' + x t'',  t'' = t' (1 - s - 2 t s).

    With u = e^x, t = (u^2 + 2 u) / (u^2 + 2 u + 2), without cancellation for small u.
    """

    def parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        small = torch.exp(-x.abs())
        # u^2 + 2 u and u^2 + 2 u + 2, divided by u^2 where u > 1
        top = torch.where(x > 0, 1 + 2 * small, small * (small + 2))
        rest = torch.where(x > 0, 2 * small * small, 2.0)
        gate = top / (top + rest)
        away = rest / (top + rest)  # 1 - t
        return gate, away * (1 + gate) * torch.sigmoid(x), torch.sigmoid(x)

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        near = x.clamp(-_FAR, _FAR)
        gate, change, _ = parts(near)
        return x.clamp(min=-_FAR) * gate, gate + near * change

    def bending(x: float) -> float:
        at = torch.tensor(x, dtype=torch.float64)
        gate, change, s = parts(at)
        return float(2 * change + at * change * (1 - s - 2 * gate * s))

    return _gated(both, F.mish, _root(bending, -4.0, 0.0), _root(lambda x: -bending(x), 0.0, 4.0))


GELU_ERF = _erf_gelu()
GELU_TANH = _sigmoid_gated(
    2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715,
    lambda x: F.gelu(x, approximate="tanh"),
)
SILU = _sigmoid_gated(1.0, 0.0, F.silu)
QUICK_GELU = _sigmoid_gated(1.702, 0.0, lambda x: x * torch.sigmoid(1.702 * x))
MISH = _mish()
