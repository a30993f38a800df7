"""Elementwise activations: lines and images are sound and as tight as they can be.

The curves are held against torch's own functions in float64. Lines are rounded outwards, so that
in float32 too no sampled point may violate one by more than the rounding of the test's own
arithmetic in float64: 1e-15 of the terms.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from elementwise import bounded, bounds_of, inputs, intervals, mlp, moves, sharded_bounds
from models import attack, drawn, plain, plain_compute, relative_error
from ranks import pool
from torch import nn
from visits import options, visit

from lirpa_megatron import METHODS
from lirpa_megatron.adapters.traced_ops import ACTIVATIONS
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators import CUSTOM_OPS
from lirpa_megatron.operators.coefficients import LowerUpper
from lirpa_megatron.operators.elementwise import gated
from lirpa_megatron.operators.elementwise.functions import FUNCTIONS
from lirpa_megatron.operators.elementwise.tangent_lines import Relaxation

KINDS = list(ACTIVATIONS)
DTYPES = (torch.float32, torch.float64)
SLACK = 1e-15
POINTS = (-9.0, -5, -3, -2.4, -1.6, -(2**0.5), -1, -0.75, -0.3, 0, 0.3, 0.75, 1.28, 1.6, 2.4, 5, 20)
INF = math.inf


def operator(kind: str) -> type:
    return CUSTOM_OPS[f"lirpa_megatron::{ACTIVATIONS[kind][0]}"]


def curve(kind: str) -> Any:
    return operator(kind).curve


@cache
def relaxation(kind: str, dtype: torch.dtype, count: int = 150) -> Relaxation:
    return Relaxation(curve(kind), *intervals(count, dtype))


def samples(lower: torch.Tensor, upper: torch.Tensor, count: int = 101) -> torch.Tensor:
    """Points of each interval in float64, [n, ...]: even, both ends, and where curves bend."""
    low, high = lower.double(), upper.double()
    even = torch.linspace(0, 1, count, dtype=torch.float64).view(-1, *[1] * low.ndim)
    bends = torch.tensor(POINTS, dtype=torch.float64).view(-1, *[1] * low.ndim)
    points = torch.cat([low + (high - low) * even, (0 * low + bends)])
    return torch.minimum(torch.maximum(points, low), high)


def excess(kind: str, x: torch.Tensor, k: torch.Tensor, b: torch.Tensor, sign: int
           ) -> torch.Tensor:
    """How far the lines cross the curve at the worst point, relative to the terms.

    torch's own GELU is off by a unit in the last place of x where it is nearly 0.
    """
    k, b = k.double(), b.double()
    y = ACTIVATIONS[kind][1](x)
    size = y.abs() + (k * x).abs() + b.abs() + x.abs().clamp(max=10)
    return (sign * (k * x + b - y) / size.clamp(min=1e-300)).amax(0)


@pytest.mark.parametrize("kind", KINDS)
def test_curves_are_torchs_functions_and_bend_where_they_are_said_to(kind):
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64, requires_grad=True)
    value, slope = curve(kind).both(x)
    torch.testing.assert_close(value, ACTIVATIONS[kind][1](x), atol=1e-15, rtol=1e-13)
    torch.testing.assert_close(
        slope, torch.autograd.grad(value.sum(), x, retain_graph=True)[0], atol=1e-14, rtol=1e-12
    )
    (bend,) = torch.autograd.grad(slope.sum(), x)
    p, q = curve(kind).lower_touch(x, x)
    assert (bend[(x > p) & (x < q)] >= -1e-15).all()
    assert (bend[(x < p.clamp(min=-8)) | (x > q)] <= 1e-15).all() or kind == "squared_relu"
    for part in (x[x >= 0], x[x < 0]):
        p, q = curve(kind).upper_touch(part, part)
        inside = bend[torch.isin(x, part)][(part > p) & (part < q)]
        assert (inside <= 1e-15).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_point_violates_a_line(kind, dtype):
    lines = relaxation(kind, dtype)
    x = samples(lines.lo, lines.hi)
    for side, sign in ((lines.lower, 1), (lines.upper, -1)):
        for move in moves(lines.lo):
            k, b = lines.line(side, move)
            assert k.isfinite().all() and b.isfinite().all()
            assert excess(kind, x, k, b, sign).max() <= SLACK


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_moved_by_a_millionth_is_caught(kind):
    lower, upper = intervals(100, torch.float64)
    usual = (upper - lower > 1e-3) & (upper - lower < 4) & (upper.abs() < 4)
    lines = Relaxation(curve(kind), lower[usual], upper[usual])
    x = samples(lines.lo, lines.hi, count=1001)
    for side, sign in ((lines.lower, 1), (lines.upper, -1)):
        k, b = lines.line(side)
        caught = excess(kind, x, k, b + sign * 1e-6, sign) > SLACK
        assert caught.float().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_image_is_that_of_the_samples(kind, dtype):
    lower, upper = intervals(150, dtype)
    low, high = curve(kind).image(lower, upper)
    y = ACTIVATIONS[kind][1](samples(lower, upper, 401))
    eps = 8 * torch.finfo(dtype).eps
    size = eps * (torch.maximum(low.abs(), high.abs()) + torch.maximum(lower.abs(), upper.abs())
                  .clamp(max=10)).double()
    assert (y.amin(0) >= low - size).all() and (y.amax(0) <= high + size).all()
    width = (upper - lower).double()
    reach = size + 1e-3 * width.clamp(max=10) * (1 + high.abs() * (kind == "squared_relu"))
    near = width < 10
    assert (y.amin(0) - low <= reach)[near].all() and (high - y.amax(0) <= reach)[near].all()
    low, high = curve(kind).image(lower, lower)
    assert (low == high).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_huge_and_infinite_intervals_have_sound_lines_without_nan(kind, dtype):
    big = 1e37 if dtype == torch.float32 else 1e300
    pairs = [(-INF, INF), (-INF, -3), (-INF, 3), (-3, INF), (3, INF), (0, INF), (-big, big),
             (-big, 3), (-1e30, 1e30), (-1e30, 2), (5, 1e30), (-1e30, -1e29), (-INF, -INF)]
    lower, upper = torch.tensor(pairs, dtype=dtype).t().contiguous()
    lower, upper = lower.requires_grad_(), upper.requires_grad_()
    lines = Relaxation(curve(kind), lower, upper)
    low, high = (x.detach().double().clamp(-1e30, 1e30) for x in (lower, upper))
    reach = torch.logspace(-3, 30, 200, dtype=torch.float64)
    x = torch.cat([-reach, torch.zeros(1), reach]).unsqueeze(1)
    x = torch.minimum(torch.maximum(x, low), high)
    for side, sign in ((lines.lower, 1), (lines.upper, -1)):
        for move in moves(low.to(dtype)):
            k, b = lines.line(side, move)
            assert k.isfinite().all() and not b.isnan().any()
            crossing = excess(kind, x, k.detach(), b.detach(), sign)
            assert crossing[b.isfinite()].max() <= SLACK
            assert (sign * b[b.isinf()] < 0).all()
            gradients = torch.autograd.grad(
                k.sum() + b[b.isfinite()].sum(), (lower, upper), retain_graph=True,
                allow_unused=True,
            )
            assert all(g is None or g.isfinite().all() for g in gradients)
    # Where there is a line, it is found: only (-inf, inf) has no upper line for a gated curve.
    k, b = lines.line(lines.upper)
    if kind not in ("squared_relu", "tanh"):
        assert b.isinf().tolist() == [True] + [False] * (len(pairs) - 1)
        assert k[3] == 1 and k[2] == 0


def test_an_infinite_intercept_adds_nothing_where_A_is_zero():
    node = operator("gelu")({}, [], 0, options())
    x = type("X", (), {"lower": torch.tensor([[-INF, -1.0]]), "upper": torch.tensor([[INF, 1.0]])})
    A = torch.tensor([[[0.0, 1.0]], [[-1.0, 1.0]]], requires_grad=True)
    found = node.bound_backward(LowerUpper(A, A), visit(x))
    [(lA, uA)], (lower, upper) = found.A, found.bias
    assert lA.isfinite().all() and uA.isfinite().all()
    assert lower[0].isfinite() and upper[0].isfinite() and lower[1] == -INF
    (gradient,) = torch.autograd.grad(lower[0].sum() + lA.sum(), A)
    assert gradient.isfinite().all()


def test_limits_of_tangents_have_the_derivative_of_the_implicit_function():
    """f(t) + f'(t) (u - t) = f(u), so dt/du = (f'(u) - f'(t)) / (f''(t) (u - t)): to more digits
    than a secant across the last bracket of the bisection has."""
    f = FUNCTIONS["Tanh"].curve()
    lower = torch.linspace(-2.0, -1.2, 9, dtype=torch.float64)
    upper = torch.linspace(0.5, 1.1, 9, dtype=torch.float64).requires_grad_()
    side = Relaxation(f, lower, upper).lower
    t = side.touch + side.right
    (gradient,) = torch.autograd.grad(t.sum(), upper)
    t, u = t.detach(), upper.detach()
    expected = (f.slope(u) - f.slope(t)) / (f.bend(t) * (u - t))
    assert ((gradient / expected - 1).abs() < 1e-11).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_derivatives_of_lines_are_those_of_differences(kind):
    """Except at the corners, which few intervals meet: the lines are piecewise smooth."""
    generator = torch.Generator().manual_seed(3)
    ends = torch.sort(3 * torch.randn(200, 2, generator=generator, dtype=torch.float64)).values
    move = (2 * torch.rand(200, generator=generator, dtype=torch.float64) - 1).requires_grad_()
    lower, upper = (x.clone().requires_grad_() for x in ends.unbind(1))
    step = 1e-5

    def heights(lower: torch.Tensor, upper: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
        lines = Relaxation(curve(kind), lower, upper)
        sides = [lines.line(side, move) for side in (lines.lower, lines.upper)]
        return sum((1 + i) * (0.7 * k + b) for i, (k, b) in enumerate(sides))

    variables = (lower, upper, move)
    gradients = torch.autograd.grad(heights(*variables).sum(), variables)
    for i, gradient in enumerate(gradients):
        with torch.no_grad():
            ahead, behind = (
                heights(*(v + s * step * (i == j) for j, v in enumerate(variables)))
                for s in (1, -1)
            )
        error = (gradient - (ahead - behind) / (2 * step)).abs()
        assert gradient.isfinite().all()
        assert (error < 1e-5).float().mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_no_point_violates_the_bounds_of_a_network_and_alpha_helps(kind):
    model = mlp(kind, False, torch.float32)
    for eps in (0.1, 1.0):
        where = inputs(eps, torch.float32)
        module = bounded(model, where, iteration=8, optimizer="adam")
        widths = {}
        for method in METHODS:
            lower, upper = module.compute_bounds(x=(where.bounded(),), method=method)
            widths[method] = (upper - lower).mean().item()
            torch.manual_seed(0)
            assert attack(model, where, lower, upper) <= 1e-5 * max(1, widths[method])
        assert widths["CROWN-Optimized"] < 0.99 * widths["CROWN"] < widths["IBP"]


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_of_a_sharded_network_are_those_of_the_whole_one(kind):
    whole = bounds_of(mlp(kind, False, torch.float64), METHODS, 0.4)
    for result in pool(2).run(sharded_bounds, kind, False, METHODS, 0.4):
        for method, got, want in zip(METHODS, result, whole, strict=True):
            got = [torch.from_numpy(b) for b in got]
            # Where alpha's range ends, the curve may hardly bend: one unit in the last place of an
            # interval moves that end by up to 1e-7 (the next test), and the lines in between.
            tolerance = 1e-8 if method == "CROWN-Optimized" else 1e-10
            assert relative_error(got, want, want[1] - want[0]) <= tolerance


@pytest.mark.parametrize("curve", [
    gated.QUICK_GELU, gated.GELU_ERF, gated.SILU, FUNCTIONS["Tanh"].curve(),
])
def test_rounding_of_an_interval_moves_its_best_line_by_rounding_alone(curve):
    lo, hi = drawn(5000, seed=11, scale=2.0), drawn(5000, seed=12).abs() * 3
    hi = lo + hi
    lines = [Relaxation(curve, x, hi) for x in (lo, torch.nextafter(lo, hi))]
    for side in ("lower", "upper"):
        one, other = (getattr(line, side) for line in lines)
        for a, b in zip(lines[0].line(one), lines[1].line(other), strict=True):
            assert (a - b).abs().max() < 1e-11
        for end in ("left", "right"):
            assert (getattr(one, end) - getattr(other, end)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_points_and_gradients_of_weights(kind):
    model = mlp(kind, False, torch.float64).train()
    for eps in (0.0, 0.5):
        where = inputs(eps, tokens=3)
        module = bounded(model, where)
        for method in METHODS[:3]:
            lower, upper = module.compute_bounds(x=(where.bounded(),), method=method)
            if eps == 0:
                torch.testing.assert_close(lower, model(where.center), atol=1e-12, rtol=1e-12)
            model.zero_grad()
            (upper - lower).sum().backward()
            assert all(p.grad.isfinite().all() for p in model.parameters())


def test_forward_mode_is_refused_by_name():
    node = operator("silu")({}, [], 0, options())
    with pytest.raises(NotImplementedError, match="BoundSilu does not offer forward mode"):
        node.bound_forward(3)


class _Own(nn.Module):
    """The same network as auto_LiRPA builds it itself."""

    def __init__(self, model: nn.Module, function: Any) -> None:
        super().__init__()
        self.layers, self.function = model.layers, function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in (self.layers[:2], self.layers[2:]):
            x = down(self.function(up(x)))
        return x


@pytest.mark.skipif(auto_lirpa.IS_03, reason="0.3 has no GELU and crosses zero with looser lines")
@pytest.mark.parametrize("eps", [0.1, 0.5])
@pytest.mark.parametrize("kind", ["gelu_tanh", "silu", "quick_gelu", "tanh"])
def test_bounds_are_tighter_than_those_of_the_composed_graph(kind, eps):
    model = mlp(kind, False, torch.float32)
    where = inputs(eps, torch.float32)
    function = ACTIVATIONS[kind][1]
    if kind == "silu":  # auto_LiRPA does not know F.silu
        def function(x: torch.Tensor) -> torch.Tensor:
            return x * torch.sigmoid(x)
    own = plain(_Own(model, function), where.center)
    theirs = plain_compute(own, where.bounded(), None, "CROWN")
    ours = bounded(model, where).compute_bounds(x=(where.bounded(),), method="CROWN")
    ratio = (ours[1] - ours[0]).mean() / (theirs[1] - theirs[0]).mean()
    assert ratio <= 1.01
