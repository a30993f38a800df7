"""Outward rounding of elementwise operators, compared with 200 bits (mpmath)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import mpmath as mp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import drawn
from torch import nn

from lirpa_megatron import METHODS, BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_megatron.adapters import traced_ops
from lirpa_megatron.arithmetic.floating import UNIT
from lirpa_megatron.rounding.curves import accuracy_of

mp.mp.prec = 200
INF = float("inf")


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def logistic(x: mp.mpf) -> mp.mpf:
    return 1 / (1 + mp.exp(-x))


def gelu_tanh(x: mp.mpf) -> mp.mpf:
    inner = mp.sqrt(2 / mp.pi) * (x + mp.mpf("0.044715") * x**3)
    return x * logistic(2 * inner)


CURVES: dict[str, tuple[str, Callable]] = {
    "gelu": ("GeluErf", lambda x: x * mp.erfc(-x / mp.sqrt(2)) / 2),
    "gelu_tanh": ("GeluTanh", gelu_tanh),
    "silu": ("Silu", lambda x: x * logistic(x)),
    "quick_gelu": ("QuickGelu", lambda x: x * logistic(mp.mpf(1.702) * x)),
    "squared_relu": ("SquaredRelu", lambda x: max(x, mp.mpf(0)) ** 2),
    "tanh": ("Tanh", mp.tanh),
}
"""Kind of `traced_ops.activation` -> operator, function."""
OTHERS: dict[str, tuple[str, Callable, Callable]] = {
    "sigmoid": ("Sigmoid", torch.sigmoid, logistic),
    "erf": ("Erf", torch.erf, mp.erf),
    "atan": ("Arctan", torch.atan, mp.atan),
    "softsign": ("Softsign", F.softsign, lambda x: x / (1 + abs(x))),
    "abs": ("Abs", torch.abs, abs),
    "leaky_relu": (
        "LeakyRelu", lambda x: F.leaky_relu(x, 0.1), lambda x: x if x > 0 else mp.mpf(0.1) * x
    ),
    "clamp": (
        "Clamp", lambda x: x.clamp(-0.7, 1.1), lambda x: min(max(x, mp.mpf(-0.7)), mp.mpf(1.1))
    ),
    "hardsigmoid": (
        "HardSigmoid", F.hardsigmoid, lambda x: min(max(x / 6 + 0.5, mp.mpf(0)), mp.mpf(1))
    ),
}
"""Kind -> operator, torch's function, function."""
CURVES |= {kind: (name, f) for kind, (name, _, f) in OTHERS.items()}


def applied(kind: str, x: torch.Tensor) -> torch.Tensor:
    return OTHERS[kind][1](x) if kind in OTHERS else traced_ops.activation(x, kind)


class Curved(nn.Module):
    """x -> W2 f(W1 x + b1) + b2."""

    def __init__(self, kind: str, seed: int, scale: float = 1.0) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = drawn(*parameter.shape, seed=seed + 13 * i, scale=scale)
            parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(applied(self.kind, self.first(x)))

    def exact(self, x: list[mp.mpf]) -> list[mp.mpf]:
        y = x
        for layer in (self.first, self.second):
            if layer is self.second:
                y = [CURVES[self.kind][1](v) for v in y]
            y = [
                sum((mp.mpf(c) * v for c, v in zip(row, y, strict=True)), mp.mpf(b))
                for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
            ]
        return y


def operator_of(kind: str, options: dict | None = None) -> tuple[BoundedModule, object]:
    """A module that is the curve alone, and its operator."""

    class Alone(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return applied(kind, x)

    module = BoundedModule(Alone(), torch.zeros(1, 8), options)
    return module, next(n for n in module.named_nodes().values() if hasattr(n, "curve"))


@pytest.mark.parametrize("kind", CURVES)
def test_values_and_slopes_are_as_exact_as_is_said(kind):
    _, f = CURVES[kind]
    node = operator_of(kind)[1]
    accuracy, curve = accuracy_of(node), node.curve
    x = torch.cat([torch.linspace(-12, 12, 193), drawn(100, seed=1, scale=0.01),
                   drawn(40, seed=2, scale=100.0)])
    value, slope = curve.both(x)
    size = accuracy.size(x.abs())
    steepest = accuracy.steepest(x.abs()) + 0 * x
    for at, y, k, most, steep in zip(
        *(t.tolist() for t in (x, value, slope, size, steepest)), strict=True
    ):
        true = f(mp.mpf(at))
        assert abs(y - true) <= UNIT * (accuracy.relative * abs(true) + accuracy.absolute)
        assert abs(true) <= most * (1 + 4 * UNIT)
        if at in (0.0, *accuracy.breaks):
            continue
        derivative = mp.diff(f, mp.mpf(at))
        assert abs(k - derivative) <= UNIT * accuracy.slope
        assert abs(derivative) <= steep * (1 + 1e-9)


@pytest.mark.parametrize("kind", CURVES)
def test_a_curve_bends_as_is_said(kind):
    f = CURVES[kind][1]
    accuracy = accuracy_of(operator_of(kind)[1])
    ends = [-8.0, *accuracy.breaks, 8.0]
    for bend, (a, b) in zip(accuracy.bends, itertools.pairwise(ends), strict=True):
        for x in np.linspace(a, b, 23)[1:-1]:
            if kind == "squared_relu":
                second = mp.mpf(2 if x > 0 else 0)
            else:
                second = mp.diff(f, mp.mpf(x), 2)
            if bend == "0":
                assert abs(second) <= 1e-30
                continue
            assert second >= 0 if bend == "+" else second <= 0
            assert abs(second) <= accuracy.curvature + 1e-12
    smooth = "0" not in accuracy.bends and kind != "softsign"  # whose f'' jumps at 0, from 2 to -2
    for x in accuracy.breaks if smooth else ():
        assert abs(mp.diff(f, mp.mpf(x), 2)) <= 1e-14


@pytest.mark.parametrize("function, exact, ends", [
    (torch.exp, mp.exp, (-700, 30)), (torch.tanh, mp.tanh, (-30, 30)),
    (torch.cosh, mp.cosh, (-40, 40)), (torch.sigmoid, logistic, (-700, 40)),
    (torch.special.erfc, mp.erfc, (-20, 26)), (torch.erf, mp.erf, (-9, 9)),
    (torch.atan, mp.atan, (-1e6, 1e6)),
])
def test_torchs_functions_are_within_4_units_in_the_last_place(function, exact, ends):
    low, high = ends
    x = torch.cat([torch.linspace(low, high, 400), drawn(400, seed=5), drawn(99, scale=1e-5)])
    for at, y in zip(x.tolist(), function(x).tolist(), strict=True):
        true = exact(mp.mpf(at))
        assert abs(y - true) <= 4 * math.ulp(float(true)), (at, y)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(sorted(CURVES)), st.integers(0, 10**6),
    st.sampled_from([0.0, 1e-13, 1e-9, 1e-4, 0.3, 5.0]), st.sampled_from(METHODS),
    st.sampled_from([0.3, 1.0, 5.0]),
)
def test_no_exact_value_of_a_curved_network_is_outside(kind, seed, eps, method, scale):
    check(kind, seed, eps, method, scale, 12)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(CURVES)), st.integers(0, 10**6),
    st.sampled_from([0.0, 1e-15, 1e-13, 1e-9, 1e-6, 1e-4, 0.03, 0.3, 5.0, 300.0]),
    st.sampled_from(METHODS), st.sampled_from([0.3, 1.0, 5.0]),
)
def test_no_exact_value_of_many_curved_networks_is_outside(kind, seed, eps, method, scale):
    check(kind, seed, eps, method, scale, 60)


def check(kind: str, seed: int, eps: float, method: str, scale: float, points: int) -> None:
    net, x = Curved(kind, seed, scale).eval(), drawn(2, seed=seed + 5)
    module = BoundedModule(net, x[None], {"rounding": "outward"})
    where = BoundedTensor(x[None], PerturbationLpNorm(norm=INF, eps=eps))
    lower, upper = (b[0].tolist() for b in module.compute_bounds(x=(where,), method=method))
    for share in torch.cat([torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1], [0, 0]]),
                            torch.rand(points, 2) * 2 - 1]).tolist():
        point = [mp.mpf(v) + mp.mpf(eps) * mp.mpf(s) for v, s in zip(x.tolist(), share,
                                                                   strict=True)]
        for y, l, u in zip(net.exact(point), lower, upper, strict=True):
            assert l <= y <= u, (float(l - y), float(y - u))


@pytest.mark.parametrize("kind", CURVES)
def test_a_line_with_its_error_is_below_and_above_the_exact_curve(kind):
    """At the ends, at breaks, and where the line is closest."""
    lo = torch.tensor([[-3.0, -1e-9, 0.7, -6.0, 1.5, -2.5, -40.0, 3.0]])
    hi = torch.tensor([[2.0, 2e-9, 0.9, 5.0, 1.5, -2.4, 60.0, 3.0 + 1e-15]])
    module, node = operator_of(kind, {"rounding": "outward"})
    box = PerturbationLpNorm(norm=INF, x_L=lo, x_U=hi)
    module.compute_bounds(x=(BoundedTensor((lo + hi) / 2, box),), method="CROWN")
    known = module.rounding.known
    error, _, _ = module.rounding.rule_of(node)._found(node, known)
    lines, f = node.relaxation(known.inputs(node)), CURVES[kind][1]
    for i in range(lo.shape[1]):
        for sign, (slope, intercept) in ((1, lines.lower), (-1, lines.upper)):
            k, b = mp.mpf(slope[0, i].item()), mp.mpf(intercept[0, i].item())
            points = np.linspace(lo[0, i].item(), hi[0, i].item(), 301).tolist()
            inside = [x for x in accuracy_of(node).breaks if points[0] < x < points[-1]]
            gaps = [sign * (f(mp.mpf(x)) - k * mp.mpf(x) - b) for x in [*points, *inside]]
            assert min(gaps) >= -error[0, i].item()
