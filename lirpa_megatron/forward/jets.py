"""Taylor coefficients of activation functions, and the largest values that these take.

Over an interval a coefficient is bounded from a table: with step h between the points of a grid,

    sup |g_k| <= max over the points near |g_k| + h/2 (k + 1) sup |g_(k+1)|,   g_k = g^(k) / k!,

and the last factor is twice its largest value at the points. (All these functions are analytic in a
strip of half-width at least 1 around the reals, where they are bounded by what they are at nearby
reals times a constant; between points 2^-9 apart no derivative doubles.) Beyond the grid, at
+-_FAR, the derivatives fall, so the value there bounds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, lru_cache

import torch

from lirpa_megatron.operators.elementwise.curves import Curve
from lirpa_megatron.operators.elementwise.functions import FUNCTIONS

_FAR, _STEP = 14.0, 2.0**-9

Coefficients = list[torch.Tensor]


class Jets:
    """A function's Taylor coefficients.

    Args:
        jet: (x, order) -> g^(k)(x) / k! for k = 0 ... order.
    """

    def __init__(self, jet: Callable[[torch.Tensor, int], Coefficients]) -> None:
        self.jet = jet
        self._tables: dict[tuple, torch.Tensor] = {}

    def _table(self, k: int, like: torch.Tensor) -> torch.Tensor:
        """Largest values over 1, 2, 4, ... points from each point on: [levels, points]."""
        key = k, like.dtype, like.device
        if key not in self._tables:
            grid = torch.arange(-_FAR, _FAR + _STEP / 2, _STEP, dtype=torch.float64)
            jets = self.jet(grid, k + 1)
            between = 2 * (k + 1) * jets[k + 1].abs().max() * _STEP / 2
            levels = [(jets[k].abs() + between) * (1 + 1e-6)]
            while 2 ** len(levels) <= len(grid):
                last, half = levels[-1], 2 ** (len(levels) - 1)
                ahead = torch.cat((last[half:], last[-1:].expand(half)))
                levels.append(torch.maximum(last, ahead))
            self._tables[key] = torch.stack(levels).to(like)
        return self._tables[key]

    @torch.no_grad()
    def largest(self, k: int, centre: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
        """A bound of |g^(k)| / k! within `reach` of `centre`; without a gradient."""
        table = self._table(k, centre)
        n = table.shape[1]
        reach = torch.nan_to_num(reach, nan=1e6, posinf=1e6).clamp(max=1e6)
        low = ((centre - reach + _FAR) / _STEP).floor().clamp(0, n - 1).long()
        high = ((centre + reach + _FAR) / _STEP).ceil().clamp(0, n - 1).long()
        level = (high - low + 1).to(torch.float64).log2().floor().long()
        flat = table.flatten()
        return torch.maximum(flat[level * n + low], flat[level * n + high - (1 << level) + 1])


def _erf_gelu(x: torch.Tensor, order: int) -> Coefficients:
    """x Phi(x): g' = Phi + x phi, g^(k) = P_k phi, P_2 = 2 - x^2, P_(k+1) = P_k' - x P_k."""
    gate = 0.5 * torch.erfc(-x * math.sqrt(0.5))
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    out, P = [x * gate, gate + x * density], [2.0, 0.0, -1.0]
    for k in range(2, order + 1):
        value = torch.zeros_like(x)
        for c in reversed(P):
            value = value * x + c
        out.append(value * density / math.factorial(k))
        derivative = [i * P[i] for i in range(1, len(P))] + [0.0, 0.0]
        P = [derivative[i] - (P[i - 1] if i else 0.0) for i in range(len(P) + 1)]
    return out[: order + 1]


def _tanh_of(w: Coefficients, order: int) -> Coefficients:
    """Of tanh(w(x)) from those of w: y' = (1 - y^2) w'."""
    y = [torch.tanh(w[0])]
    rest = [torch.cosh(w[0].clamp(-40, 40)).square().reciprocal()]  # 1 - y^2
    for k in range(1, order + 1):
        terms = [j * w[j] * rest[k - j] for j in range(1, min(k, len(w) - 1) + 1)]
        y.append(sum(terms[1:], terms[0]) / k)
        squares = [y[i] * y[k - i] for i in range(k + 1)]
        rest.append(-sum(squares[1:], squares[0]))
    return y


def _tanh(x: torch.Tensor, order: int) -> Coefficients:
    return _tanh_of([x, torch.ones_like(x)], order)


def _sigmoid(x: torch.Tensor, order: int) -> Coefficients:
    """(1 + tanh(x/2)) / 2; its value by torch's function, which does not cancel."""
    y = _tanh_of([x / 2, torch.full_like(x, 0.5)], order)
    return [torch.sigmoid(x), *(t / 2 for t in y[1:])]


def _gate(a: float, b: float) -> Callable[[torch.Tensor, int], Coefficients]:
    """x s(a x + b x^3), s the logistic function."""

    def jet(x: torch.Tensor, order: int) -> Coefficients:
        w = [a * x + b * x**3, a + 3 * b * x * x, 3 * b * x, torch.full_like(x, b)]
        half = _tanh_of([t / 2 for t in w], order)
        gate = [torch.sigmoid(w[0]), *(t / 2 for t in half[1:])]
        return [x * gate[k] + (gate[k - 1] if k else 0.0) for k in range(order + 1)]

    return jet


def _erf_gate(k: float) -> Callable[[torch.Tensor, int], Coefficients]:
    """x Phi(k x) = g(k x) / k, g the function of `_erf_gelu`."""

    def jet(x: torch.Tensor, order: int) -> Coefficients:
        return [k ** (j - 1) * c for j, c in enumerate(_erf_gelu(k * x, order))]

    return jet


@cache
def _known() -> dict[int, Jets]:
    """Identity of a curve of the table -> its coefficients."""
    made = {"Tanh": _tanh, "Sigmoid": _sigmoid}
    return {id(FUNCTIONS[name].curve()): Jets(jet) for name, jet in made.items()}


@lru_cache(maxsize=32)
def _of_family(name: str, numbers: tuple[float, ...]) -> Jets:
    return Jets({"erf": _erf_gate, "logistic": _gate}[name](*numbers))


def of(curve: Curve) -> Jets | None:
    """The coefficients of a curve; None where only lines are known."""
    return _known().get(id(curve)) if curve.family is None else _of_family(*curve.family)
