"""Every entry of the table of elementwise functions: lines and images hold, and are tight.

Values are compared in float64 with the curve's own formula, which `test_values_are_torchs` holds
against torch's function: so the rounding of a float32 function is not taken for a violation. Lines
and images are rounded outwards; no point may lie beyond one by more than the rounding of the test's
own arithmetic in float64, 2e-15 of the terms.
"""

from __future__ import annotations

import math

import pytest
import torch
from elementwise import intervals, moves
from elementwise_cases import CASES, Case, inside_domain
from hypothesis import given, settings
from hypothesis import strategies as st

from lirpa_megatron.operators.elementwise.curves import Curve
from lirpa_megatron.operators.elementwise.tangent_lines import _LITTLE, Relaxation

DTYPES = (torch.float32, torch.float64)
SLACK = 2e-15
INF = math.inf
BY_NAME = pytest.mark.parametrize("case", CASES, ids=str)


def points(curve: Curve, lower: torch.Tensor, upper: torch.Tensor, count: int) -> torch.Tensor:
    """Points of each interval in float64: even, random, and on both sides of every break."""
    low, high = lower.double(), upper.double()
    generator = torch.Generator().manual_seed(4)
    shares = torch.cat([
        torch.linspace(0, 1, count, dtype=torch.float64),
        torch.rand(count // 2, generator=generator, dtype=torch.float64),
    ])
    x = [low + (high - low) * shares.view(-1, 1)]
    special = [*curve.breaks, *(x for x, _ in curve.extrema), 0.0]
    for at in special:
        for step in (0.0, 1e-15, -1e-15, 1e-9, -1e-9, 1e-3, -1e-3):
            x.append((0 * low + at + step).unsqueeze(0))
    return torch.minimum(torch.maximum(torch.cat(x), low), high)


def climbed(curve: Curve, x: torch.Tensor, k: torch.Tensor, sign: int, steps: int
            ) -> torch.Tensor:
    """The points after steps of the sign of the gradient of sign (k x - f(x)), ever shorter."""
    low, high = x.amin(0), x.amax(0)
    step = (high - low) / 4
    for _ in range(steps):
        x = x + step * (sign * (k - curve.slope(x))).sign().nan_to_num()
        x, step = torch.minimum(torch.maximum(x, low), high), step / 2
    return x


def excess(curve: Curve, x: torch.Tensor, k: torch.Tensor, b: torch.Tensor, sign: int
           ) -> torch.Tensor:
    """How far lines cross the curve at the worst point, relative to the terms; -1 for none."""
    k, b, y = k.double(), b.double(), curve.value(x)
    size = y.abs() + (k * x).abs() + b.abs() + x.abs().clamp(max=curve.unit)
    found = sign * (k * x + b - y) / size.clamp(min=1e-300)
    return torch.where(b.isfinite() & y.isfinite(), found, -1.0).amax(0)


def check(curve: Curve, lower: torch.Tensor, upper: torch.Tensor, count: int, steps: int) -> None:
    """No point of the intervals beyond a line, with or without alpha, or the image."""
    lines, x = Relaxation(curve, lower, upper), points(curve, lower, upper, count)
    for side, sign in ((lines.lower, 1), (lines.upper, -1)):
        for move in moves(lower):
            k, b = lines.line(side, move)
            assert k.isfinite().all() and not b.isnan().any()
            assert (sign * b[b.isinf()] < 0).all()
            assert excess(curve, x, k, b, sign).max() <= SLACK
            if steps:
                more = climbed(curve, x, k.double(), sign, steps)
                assert excess(curve, more, k, b, sign).max() <= SLACK
    low, high = (end.double() for end in curve.image(lower, upper))
    y = curve.value(x)
    own = [(curve.value(end).double() - curve.value(end.double())).abs() for end in (lower, upper)]
    size = SLACK * (y.abs() + x.abs().clamp(max=curve.unit)) + torch.maximum(*own).nan_to_num(0.0)
    beyond = torch.maximum(low - y, y - high)
    assert (beyond <= size)[y.isfinite() & beyond.isfinite()].all()


@BY_NAME
def test_values_are_torchs_and_slopes_are_their_derivatives(case: Case):
    curve = case.curve
    x = torch.linspace(-7.013, 7.021, 801, dtype=torch.float64)
    first, last = curve.domain
    x = x[(x > first) & (x < last)].requires_grad_()
    y = curve.run(x)
    torch.testing.assert_close(curve.value(x), y, atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(
        curve.slope(x), torch.autograd.grad(y.sum(), x)[0], atol=1e-12, rtol=1e-6
    )  # some of torch's kernels hold 1/6 or 1/alpha as float32 numbers


@BY_NAME
def test_pieces_bend_as_the_table_says(case: Case):
    curve = case.curve
    ends = [max(curve.domain[0], -6.0), *curve.breaks, min(curve.domain[1], 6.0)]
    for bend, a, b in zip(curve.bends, ends, ends[1:], strict=False):
        if not a < b or type(curve) is not Curve:
            continue
        x = torch.linspace(a, b, 203, dtype=torch.float64)[1:-1]
        k = curve.slope(x)
        rise, size = k[1:] - k[:-1], 1e-13 * (1 + k.abs().max())
        assert bend != "+" or (rise >= -size).all()
        assert bend != "-" or (rise <= size).all()
        assert bend != "0" or (rise.abs() <= size).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BY_NAME
def test_no_point_lies_beyond_a_line_or_the_image(case: Case, dtype: torch.dtype):
    torch.manual_seed(0)
    check(case.curve, *inside_domain(case.curve, *intervals(3, dtype)), count=20, steps=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BY_NAME
def test_a_hundred_thousand_points_and_climbs_lie_beyond_no_line(case: Case, dtype: torch.dtype):
    """Intervals of 0 to 1e6, at bends and elsewhere; each point also climbs 30 steps."""
    torch.manual_seed(1)
    lower, upper = inside_domain(case.curve, *intervals(40, dtype))
    assert lower.numel() * 90 > 1e5
    check(case.curve, lower, upper, count=60, steps=30)


@BY_NAME
def test_a_line_moved_by_a_millionth_is_caught(case: Case):
    generator = torch.Generator().manual_seed(6)
    ends = torch.sort(3 * torch.randn(80, 2, generator=generator, dtype=torch.float64)).values
    curve = case.curve
    lower, upper = inside_domain(curve, ends[:, 0], ends[:, 1])
    lines = Relaxation(curve, lower, upper)
    for side, sign in ((lines.lower, 1), (lines.upper, -1)):
        k, b = lines.line(side)
        x = climbed(curve, points(curve, lower, upper, 200), k, sign, 30)
        scale = 1 + curve.value(x).abs().amax(0).clamp(max=1e3)
        caught = excess(curve, x, k, b + sign * 1e-6 * scale, sign) > 1e-9
        # An interval that holds a pole has no lines.
        assert caught[b.isfinite()].double().mean() > 0.8


@BY_NAME
def test_no_line_is_nearer_to_the_curve_on_average(case: Case):
    """The best value at the middle is that of the convex envelope, the least of all chords; where
    the flattest line has been taken, it is a tenth of the distance to the chord below it."""
    curve = case.curve
    generator = torch.Generator().manual_seed(2)
    ends = torch.sort(3 * torch.randn(16, 2, generator=generator, dtype=torch.float64)).values
    lower, upper = inside_domain(curve, ends[:, 0], ends[:, 1])
    keep = ~curve.beyond(lower, upper) & (upper > lower + 0.05)
    keep = keep & (upper - lower <= 2 * abs(curve.reach))  # of wider ones see `Curve.reach`
    lower, upper = lower[keep], upper[keep]
    lines = Relaxation(curve, lower, upper)
    share = torch.linspace(0, 1, 301, dtype=torch.float64).unsqueeze(1)
    x = lower + (upper - lower) * share
    left, right = slice(0, 150), slice(151, 301)  # the middle is x[150]
    weight = (share[right].unsqueeze(0) - 0.5) / (share[right].unsqueeze(0) - share[left, None])
    for side, sign in ((lines.lower, 1), (lines.upper, -1)):
        y = curve.value(x)
        for corner in curve.corners:  # the envelope is that of the closed graph
            near = (x - corner.x).abs() <= (upper - lower) / 300
            if corner.jump:
                y = torch.where(near, sign * torch.minimum(
                    sign * y, torch.tensor(sign * corner.value(sign), dtype=y.dtype)), y)
        k, b = lines.line(side)
        chords = y[left, None] * weight + y[None, right] * (1 - weight)
        envelope = torch.minimum((sign * chords).amin((0, 1)), sign * y[150])
        gap = distance = envelope - sign * (k * x[150] + b)
        size = 1 + (y.amax(0) - y.amin(0)) + curve.slope(x).abs().amax(0) * (upper - lower)
        if curve.flattest(sign) is not None:
            gap = gap - (_LITTLE * (sign * (y[0] + y[-1]) / 2 - envelope)).clamp(min=0)
        # Of the grid of chords, and of the place of a jump on it.
        jumps = any(corner.jump for corner in curve.corners)
        assert (distance >= -(0.02 if jumps else 1e-12) * size).all()
        assert (gap <= (0.02 if jumps else 1e-3) * size).all()


@BY_NAME
def test_degenerate_intervals_have_the_value_alone(case: Case):
    curve = case.curve
    x = torch.tensor([-3.0, -2.0, -0.7, 0.1, 1.0, 2.5, 30.0], dtype=torch.float64)
    x = inside_domain(curve, x, x)[0]
    lines, y = Relaxation(curve, x, x), curve.value(x)
    finite = y.abs() < 1e300
    for side in (lines.lower, lines.upper):
        k, b = lines.line(side)
        error = (k * x + b - y).abs() / (1 + y.abs() + (k * x).abs())
        assert (error[finite] < 1e-14).all()
    low, high = curve.image(x, x)
    assert (low == high)[finite].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@BY_NAME
def test_huge_infinite_and_one_sided_intervals(case: Case, dtype: torch.dtype):
    curve, big = case.curve, 1e30
    pairs = [(-INF, INF), (-INF, -3), (-INF, 3), (-3, INF), (3, INF), (0, INF), (-big, big),
             (-big, 2), (5, big), (-big, -1e29), (0.0, 0.0), (0.0, 1e-30)]
    lower, upper = (x.requires_grad_() for x in torch.tensor(pairs, dtype=dtype).t().contiguous())
    lines = Relaxation(curve, lower, upper)
    low, high = (x.detach().double().clamp(-big, big) for x in (lower, upper))
    reach = torch.logspace(-3, 30, 120, dtype=torch.float64)
    x = torch.cat([-reach, torch.zeros(1), reach]).unsqueeze(1)
    x = torch.minimum(torch.maximum(x, low), high)
    # A slope of 0.01 is another one in float32, as it is in a model of that type.
    slack = SLACK if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    for side, sign in ((lines.lower, 1), (lines.upper, -1)):
        for move in moves(lower.detach()):
            k, b = lines.line(side, move)
            assert k.isfinite().all() and not b.isnan().any()
            assert (sign * b[b.isinf()] < 0).all()
            assert excess(curve, x, k.detach(), b.detach(), sign).max() <= slack
            gradients = torch.autograd.grad(
                k.sum() + b[b.isfinite()].sum(), (lower, upper), retain_graph=True,
                allow_unused=True,
            )
            assert all(g is None or not g.isnan().any() for g in gradients)


def test_infinite_intervals_have_a_line_where_there_is_one():
    def lines(name: str, pairs: list, **numbers: float) -> list:
        ends = torch.tensor(pairs, dtype=torch.float64).t()
        found = Relaxation(Case(name, numbers).curve, *ends)
        return [[x.tolist() for x in found.line(side)] for side in (found.lower, found.upper)]

    (k0, b0), (k1, b1) = lines("LeakyRelu", [(-INF, 2), (-1, INF), (-INF, INF)],
                               negative_slope=0.5)
    assert k0 == [0.5, 0.0, 0.5] and all(b > -INF for b in b0)
    assert k1[:2] == [0.0, 1.0] and b1[:2] == pytest.approx([2.0, 0.5]) and b1[2] == INF
    (k0, b0), (k1, b1) = lines("Softplus", [(-INF, 1), (-1, INF)])
    assert k0 == [0, 0] and k1 == [0, 1] and all(math.isfinite(b) for b in (*b0, *b1))
    (k0, b0), (k1, b1) = lines("Abs", [(-INF, 1), (-INF, INF)])
    assert b0 == pytest.approx([0, 0]) and k1[0] == -1 and b1[0] == pytest.approx(2)
    (k0, b0), (k1, b1) = lines("Exp", [(-INF, 1), (-1, INF)])
    assert math.isfinite(b1[0]) and b1[1] == INF and all(math.isfinite(b) for b in b0)


@pytest.mark.parametrize("name, numbers, ends", [
    ("Sqrt", {}, (-0.1, 2)), ("Log", {}, (-1, 2)), ("Rsqrt", {}, (-1e-9, 1)),
    ("Power", {"exponent": -1.0}, (-1, 1)), ("Power", {"exponent": -2.0}, (0.0, 1)),
    ("Power", {"exponent": 0.5}, (-2, -1)), ("Power", {"exponent": 1.5}, (-0.1, 1)),
    ("Log1p", {}, (-2, 0)), ("Power", {"exponent": -1.0}, (-1, 0.0)),
])
def test_an_interval_that_leaves_the_domain_is_unbounded(name, numbers, ends):
    lower, upper = (torch.tensor([x], dtype=torch.float64) for x in ends)
    curve = Case(name, numbers).curve
    lines = Relaxation(curve, lower, upper)
    assert lines.line(lines.lower)[1].item() == -INF and lines.line(lines.upper)[1].item() == INF
    assert [x.item() for x in curve.image(lower, upper)] == [-INF, INF]


@BY_NAME
def test_derivatives_of_lines_are_those_of_differences(case: Case):
    """Except at the corners, which few intervals meet: the lines are piecewise smooth."""
    curve = case.curve
    generator = torch.Generator().manual_seed(3)
    ends = torch.sort(2 * torch.randn(40, 2, generator=generator, dtype=torch.float64)).values
    lower, upper = inside_domain(curve, ends[:, 0], ends[:, 1])
    keep = (upper - lower > 0.1) & ~curve.beyond(lower, upper)
    if curve.steep or curve.pole is not None:
        keep = keep & (torch.minimum(lower.abs(), upper.abs()) > 0.2)
    lower, upper = (x[keep].clone().requires_grad_() for x in (lower, upper))
    move = (2 * torch.rand(len(lower), generator=generator, dtype=torch.float64) - 1)
    variables, step = (lower, upper, move.requires_grad_()), 1e-6

    def heights(lower: torch.Tensor, upper: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
        lines = Relaxation(curve, lower, upper)
        sides = [lines.line(side, move) for side in (lines.lower, lines.upper)]
        return sum((1 + i) * (0.7 * k + b) for i, (k, b) in enumerate(sides))

    found = heights(*variables)
    gradients = torch.autograd.grad(found.sum(), variables, allow_unused=True)
    for i, gradient in enumerate(gradients):
        if gradient is None:
            continue
        assert gradient.isfinite().all()
        with torch.no_grad():
            ahead, behind = (
                heights(*(v + s * step * (i == j) for j, v in enumerate(variables)))
                for s in (1, -1)
            )
        error = (gradient - (ahead - behind) / (2 * step)).abs()
        scale = 1 + found.detach().abs() + gradient.abs()
        assert (error < 1e-4 * scale).double().mean() > 0.9


@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(
    case=st.sampled_from(CASES), dtype=st.sampled_from(DTYPES),
    ends=st.lists(
        st.tuples(st.floats(-1e3, 1e3), st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3])),
        min_size=1, max_size=5,
    ),
)
def test_random_intervals_of_a_random_function(case, dtype, ends):
    lower = torch.tensor([a for a, _ in ends], dtype=dtype)
    upper = lower + torch.tensor([w for _, w in ends], dtype=dtype)
    check(case.curve, *inside_domain(case.curve, lower, upper), count=40, steps=10)
