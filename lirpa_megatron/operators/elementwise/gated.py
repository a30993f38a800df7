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
from typing import Any

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


def _gated(
    both: Callable, forward: Callable, first: float, second: float, family: Any = None
) -> Curve:
    return Curve(
        lambda x: both(x)[0], lambda x: both(x)[1], "-+-", (first, second), left=(0, 0),
        right=(1, 0), forward=forward, together=both, family=family,
    )


def half_erf(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """x / 2 (1 + erf(x / divisor))."""
    return x * (1 + torch.erf(x / divisor)) * 0.5


def half_tanh(x: torch.Tensor, factor: float, cubic: float) -> torch.Tensor:
    """x / 2 (1 + tanh(factor (x + cubic x^3)))."""
    return x * (1 + torch.tanh((x + x.pow(3) * cubic) * factor)) * 0.5


def erf_gate(divisor: float, forward: Callable) -> Curve:
    """x Phi(k x), Phi the normal distribution and k = sqrt 2 / divisor:

    f' = Phi + k x phi,  f'' = k (2 - (k x)^2) phi, which is 0 at +-divisor.
    """
    k = math.sqrt(2) / divisor if divisor != math.sqrt(2) else 1.0

    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        near = x.clamp(-_FAR, _FAR)
        scaled = near if k == 1.0 else near * k
        gate = 0.5 * torch.erfc(scaled * -math.sqrt(0.5))
        density = torch.exp(-0.5 * scaled.square()) / math.sqrt(2 * math.pi)
        return x.clamp(min=-_FAR) * gate, gate + scaled * density

    return _gated(both, forward, -divisor, divisor, ("erf", (k,)))


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
    return _gated(both, forward, -bend, bend, ("logistic", (a, b)))


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


GELU_ERF = erf_gate(math.sqrt(2), F.gelu)
GELU_TANH = _sigmoid_gated(
    2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715,
    lambda x: F.gelu(x, approximate="tanh"),
)
SILU = _sigmoid_gated(1.0, 0.0, F.silu)
QUICK_GELU = _sigmoid_gated(1.702, 0.0, lambda x: x * torch.sigmoid(1.702 * x))
MISH = _mish()


def tanh_gate(factor: float, cubic: float, forward: Callable) -> Curve:
    """x / 2 (1 + tanh(factor (x + cubic x^3)))."""
    return _sigmoid_gated(2 * factor, 2 * factor * cubic, forward)
