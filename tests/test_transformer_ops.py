"""Norms, scores, attention, rotary embedding: no point of a box violates a bound, at any width.

Bounds in float32 and float64 are held against the function in float64 at random points, corners
and the ends of gradient ascent. They are sums of tens of terms: the slack is 2e-5 or 1e-11 of the
largest bound (rounding), which a test shows to be far below what a wrong relaxation gives away.
"""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from models import drawn
from torch import nn

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_megatron.adapters import traced_ops
from lirpa_megatron.crown.auxiliary_rows import Directions
from lirpa_megatron.errors import BoundsError
from lirpa_megatron.operators import BoundNorm, BoundScores, BoundSoftmaxValues
from lirpa_megatron.operators.context import OperatorInputs

SLACK = {torch.float64: 1e-11, torch.float32: 2e-5}
WIDTHS = (0.0, 1e-5, 0.05, 0.4, 3.0, 1e3)
METHODS = ("IBP", "CROWN-IBP", "CROWN")
B, T, HEAD = 2, 4, 4


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Norm(nn.Module):
    """A norm of the input, or of a norm's linear image (where the input's form is known)."""

    def __init__(self, rms=False, groups=1, bias=True, deep=False, eps=1e-5):
        super().__init__()
        width = 8
        self.rms, self.groups, self.eps = rms, groups, eps
        self.weight = nn.Parameter(1 + drawn(width // groups, seed=1, scale=0.5))
        self.bias = nn.Parameter(drawn(width // groups, seed=2)) if bias else None
        self.linear = nn.Linear(width, width).double() if deep else None
        if deep:
            self.linear.weight.data = drawn(width, width, seed=3, scale=0.5)
            self.linear.bias.data = drawn(width, seed=8, scale=0.3)

    def forward(self, x):
        y = traced_ops.norm(x, self.weight, self.bias, self.eps, self.rms, self.groups)
        if self.linear is not None:
            y = self.linear(y)
            y = traced_ops.norm(y, self.weight, self.bias, self.eps, self.rms, self.groups)
        return y


class Attention(nn.Module):
    """Scores and softmax of linear maps of the input; `groups` key/value heads for two heads."""

    def __init__(self, mask=None, fill=-10000.0, groups=2, rotary=False, sharp=1.0):
        super().__init__()
        width = 6
        self.q, self.k, self.v = (
            nn.Linear(width, n * HEAD).double() for n in (2, groups, groups)
        )
        for i, layer in enumerate((self.q, self.k, self.v)):
            layer.weight.data = drawn(*layer.weight.shape, seed=4 + i, scale=0.6 * sharp)
            layer.bias.data = drawn(len(layer.bias), seed=14 + i, scale=0.3)
        self.fill, self.groups, self.rotary = fill, groups, rotary
        self.register_buffer("mask", mask)
        angles = torch.outer(torch.arange(T).double(), torch.tensor([1.0, 0.1]).double())
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x):
        q, k = self.q(x), self.k(x)
        if self.rotary:
            q = traced_ops.rotary(q, self.cos, self.sin, 2)
            k = traced_ops.rotary(k, self.cos, self.sin, self.groups)
        s = traced_ops.scores(q, k, HEAD, HEAD**-0.5)
        return traced_ops.attend(s, self.v(x), self.mask, HEAD, self.fill)


CAUSAL = torch.triu(torch.ones(T, T).double(), diagonal=1)[None, None]
PADDED = torch.zeros(B, 1, T, T).double()
PADDED[1, :, :, 2:] = 1
PADDED[1, :, 2:, :] = 1  # BERT's padded queries see nothing, so everything alike

NETS = {
    "LayerNorm": (lambda: Norm(), 8),
    "RMSNorm without bias": (lambda: Norm(rms=True, bias=False), 8),
    "norms of heads": (lambda: Norm(rms=True, groups=2), 8),
    # Two equal numbers: the slope is eps^-1/2, which a small eps would make of rounding in float32.
    "LayerNorm of two": (lambda: Norm(groups=4, deep=True, eps=1e-2), 8),
    "two LayerNorms": (lambda: Norm(deep=True), 8),
    "two RMSNorms": (lambda: Norm(rms=True, deep=True), 8),
    "attention": (lambda: Attention(), 6),
    "sharp attention": (lambda: Attention(sharp=3.0), 6),
    "causal attention": (lambda: Attention(CAUSAL), 6),
    "causal with -inf": (lambda: Attention(CAUSAL, float("-inf")), 6),
    "padded, shared keys": (lambda: Attention(PADDED, groups=1), 6),
    "rotary": (lambda: Attention(CAUSAL, rotary=True), 6),
}
_FUNCTIONS = {name: (build().eval(), width) for name, (build, width) in NETS.items()}


def bounds(net, x, radius, dtype, methods=METHODS, options=None):
    """method -> (lower, upper) in float64; `radius` a number or a tensor like x."""
    net = net.to(dtype)
    x = x.to(dtype)
    ball = PerturbationLpNorm(norm=math.inf, x_L=x - radius, x_U=x + radius)
    bounded = BoundedModule(net, x, bound_opts=options)
    found = {}
    with torch.no_grad():
        for method in methods:
            pair = bounded.compute_bounds((BoundedTensor(x, ball),), method=method)
            found[method] = tuple(b.double() for b in pair)
    net.double()
    return found, (ball.x_L.double(), ball.x_U.double())


def attack(net, box, steps=8, points=24):
    """Outputs at random points, corners and along gradients to extremes of random directions."""
    low, high = box
    generator = torch.Generator().manual_seed(9)
    middle, half = (low + high) / 2, (high - low) / 2
    found = []
    for kind in ("inside", "corner", "ascent"):
        u = 2 * torch.rand(points, *low.shape, generator=generator, dtype=torch.float64) - 1
        u = u if kind == "inside" else u.sign()
        x = (middle + half * u).flatten(0, 1)
        if kind == "ascent":
            direction = None
            for _ in range(steps):
                x.requires_grad_(True)
                y = _apply(net, x, points)
                if direction is None:
                    direction = torch.randn(y.shape, generator=generator, dtype=torch.float64)
                (gradient,) = torch.autograd.grad((y * direction).sum(), x)
                moved = x.detach() + 0.5 * half.repeat(points, 1, 1) * gradient.sign()
                x = torch.min(torch.max(moved, low.repeat(points, 1, 1)), high.repeat(points, 1, 1))
        with torch.no_grad():
            found.append(_apply(net, x, points).unflatten(0, (points, -1)))
    return torch.cat(found)


def _apply(net, x, points):
    """The net on `points` batches one after the other (masks belong to the samples)."""
    return torch.cat([net(part) for part in x.split(x.shape[0] // points)])


def violation(found, outputs):
    """The largest violation, relative to the largest bound."""
    lower, upper = found
    size = torch.stack((lower, upper)).nan_to_num(posinf=0.0, neginf=0.0).abs().max().clamp(min=1.0)
    return (torch.max((lower - outputs).max(), (outputs - upper).max()) / size).item()


@pytest.mark.parametrize("dtype", list(SLACK))
@pytest.mark.parametrize("name", list(NETS))
def test_no_point_violates_a_bound_at_any_width(name, dtype):
    net, width = _FUNCTIONS[name]
    for seed, radius in enumerate(WIDTHS):
        x = drawn(B, T, width, seed=20 + seed)
        found, box = bounds(net, x, radius, dtype)
        outputs = attack(net, box)
        for method, pair in found.items():
            assert not torch.stack(pair).isnan().any(), (method, radius)
            assert violation(pair, outputs) < SLACK[dtype], (method, radius)


@pytest.mark.parametrize("name", list(NETS))
def test_where_only_some_coordinates_move_bounds_hold_and_a_point_is_exact(name):
    net, width = _FUNCTIONS[name]
    x = drawn(B, T, width, seed=30)
    radius = 0.3 * (torch.arange(width) % 3 == 0).double() * (torch.arange(T) == 1)[:, None]
    found, box = bounds(net, x, radius.expand(B, T, width), torch.float64)
    outputs = attack(net, box)
    for pair in found.values():
        assert violation(pair, outputs) < SLACK[torch.float64]
    at_point, _ = bounds(net, x, 0.0, torch.float64)
    for lower, upper in at_point.values():
        assert (upper - lower).abs().max() < 1e-9 and (lower - net(x)).abs().max() < 1e-9


class TwoInputs(nn.Module):
    """Queries of one input, keys of another, whose deviations have nothing in common."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(6, HEAD).double()
        self.map.weight.data = drawn(HEAD, 6, seed=70)
        self.map.bias.data.zero_()

    def forward(self, x, y):
        return traced_ops.scores(self.map(x), self.map(y), HEAD, 1.0)


def test_forms_of_different_inputs_are_not_taken_for_the_same_input():
    net, radius = TwoInputs(), 0.5
    xs = drawn(1, 2, 6, seed=71), drawn(1, 2, 6, seed=72)
    ball = PerturbationLpNorm(norm=math.inf, eps=radius)
    bounded = BoundedModule(net, xs)
    with torch.no_grad():
        found = bounded.compute_bounds(tuple(BoundedTensor(x, ball) for x in xs), method="CROWN")
        u = drawn(4000, 2, 6, seed=73).sign() * radius
        # The same deviation of both inputs, and opposite ones.
        outputs = torch.cat([net(xs[0] + u, xs[1] + sign * u) for sign in (1, -1)])
    assert violation(found, outputs) < SLACK[torch.float64]


@pytest.mark.parametrize("limit", [0, 2**9])
def test_without_room_for_forms_bounds_hold_and_are_looser(limit):
    net, width = _FUNCTIONS["attention"]
    x = drawn(B, T, width, seed=74)
    wide, box = bounds(net, x, 0.3, torch.float64, ("CROWN",), {"form_limit": limit})
    tight, _ = bounds(net, x, 0.3, torch.float64, ("CROWN",))
    assert violation(wide["CROWN"], attack(net, box)) < SLACK[torch.float64]
    widths = [(upper - lower).mean() for lower, upper in (tight["CROWN"], wide["CROWN"])]
    assert widths[0] < 0.98 * widths[1]


@pytest.mark.parametrize("dtype", list(SLACK))
@pytest.mark.parametrize("radius", [1e8, 1e20, 1e30])
@pytest.mark.parametrize("name", list(NETS))
def test_very_wide_boxes_give_bounds_that_are_wide_or_infinite_but_never_nan(name, radius, dtype):
    net, width = _FUNCTIONS[name]
    x = drawn(B, T, width, seed=40)
    found, box = bounds(net, x, radius, dtype)
    corners = torch.stack([box[0], box[1], torch.where(x > 0, *box)])
    outputs = torch.stack([net(c) for c in corners]).nan_to_num(0.0)
    for method, (lower, upper) in found.items():
        assert not lower.isnan().any() and not upper.isnan().any(), method
        size = outputs.abs().max()
        assert ((lower - outputs).max() <= 1e-4 * size) and ((outputs - upper).max() <= 1e-4 * size)
    if "Norm" in name:
        limit = math.sqrt(8) * net.weight.abs().max() + 4
        assert found["IBP"][1].max() < limit and found["CROWN"][1].max() < 8 * limit


def test_a_vector_that_can_be_constant_has_a_finite_norm():
    """The variance can be 0, and rounding must not make it negative."""
    net = Norm(eps=1e-12)
    x = torch.ones(1, 2, 8).double()
    for radius in (0.0, 1e-9, 1e-3, 1.0):
        found, box = bounds(net, x, radius, torch.float32)
        outputs = attack(net, box)
        for lower, upper in found.values():
            assert torch.isfinite(lower).all() and torch.isfinite(upper).all()
            assert violation((lower, upper), outputs) < SLACK[torch.float32]


def test_one_token_attends_to_itself_exactly():
    net = Attention()
    x = drawn(2, 1, 6, seed=50)
    found, _ = bounds(net, x, 0.5, torch.float64)
    values = net.v.weight.abs().sum(-1) * 0.5
    for method in METHODS:
        lower, upper = found[method]
        assert torch.allclose((upper - lower) / 2, values.expand_as(lower), rtol=1e-9)


def test_a_masked_key_has_no_influence():
    """Whatever the tokens are that nobody sees, the bounds of the others stay the same."""
    x, other = drawn(1, T, 6, seed=51), drawn(1, T, 6, seed=52, scale=4.0)
    other[:, :2] = x[:, :2]
    mask = torch.zeros(1, 1, T, T).double()
    mask[..., 2:] = 1
    for fill in (-10000.0, float("-inf")):
        net = Attention(mask, fill)
        one, _ = bounds(net, x, 0.3, torch.float64)
        two, _ = bounds(net, other, 0.3, torch.float64)
        for method in METHODS:
            for a, b in zip(one[method], two[method], strict=True):
                assert torch.allclose(a[:, :2], b[:, :2], rtol=1e-9, atol=1e-9), method


def test_with_finite_masks_and_scores_below_them_masked_keys_count():
    """Scores near -10000 do not let a key be ignored whose score is -10000."""
    mask = torch.zeros(1, 1, 2, 2).double()
    mask[..., 1] = 1
    net = Attention(mask)
    net.q.bias.data.fill_(150.0)
    net.k.bias.data.fill_(-35.0)  # scores of about -10500
    x = drawn(1, 2, 6, seed=52)
    assert (net.q(x) * net.k(x)).sum() / 4 < -10000
    found, box = bounds(net, x, 1.0, torch.float64)
    outputs = attack(net, box)
    assert (outputs - net.v(x)[:, :1]).abs().max() > 0.1  # the masked key is attended to
    for pair in found.values():
        assert violation(pair, outputs) < SLACK[torch.float64]


def test_a_query_without_keys_is_never_bounded():
    mask = torch.zeros(1, 1, T, T).double()
    mask[:, :, 1] = 1
    x = drawn(1, T, 6, seed=53)
    found, _ = bounds(Attention(mask, float("-inf")), x, 0.1, torch.float64)
    for lower, upper in found.values():
        assert lower[:, 1].max() == -math.inf and upper[:, 1].min() == math.inf
        assert torch.isfinite(lower[:, [0, 2, 3]]).all()


class ScoresOf(nn.Module):
    def forward(self, q, k):
        return traced_ops.scores(q, k, HEAD, HEAD**-0.5)


class AttendTo(nn.Module):
    query = None

    def forward(self, s, v):
        return traced_ops.attend(s, v, None, HEAD, query=self.query)


class AttendToOne(AttendTo):
    query = 1


SINGLE = {
    "norm": (BoundNorm, Norm, [(1, 3, 8)]),
    "scores": (BoundScores, ScoresOf, [(1, 3, 2 * HEAD), (1, 3, HEAD)]),
    "scores of one query": (BoundScores, ScoresOf, [(1, 1, 2 * HEAD), (1, 3, HEAD)]),
    "attend": (BoundSoftmaxValues, AttendTo, [(1, 2, 3, 3), (1, 3, HEAD)]),
    "attend from one query": (BoundSoftmaxValues, AttendToOne, [(1, 2, 1, 3), (1, 3, HEAD)]),
}


def lowest_gap(name, radius, seed, alpha=None):
    """min over the inputs' boxes of <A, y> less the row's plane, by gradient descent.

    `alpha` is "drawn" (numbers in [-1, 1]) or "ends" (-1 and 1).
    """
    operator, build, shapes = SINGLE[name]
    net = build().double()
    xs = [drawn(*shape, seed=seed + i, scale=1.5) for i, shape in enumerate(shapes)]
    boxes = [(x - radius * (1 + i), x + radius * (1 + i)) for i, x in enumerate(xs)]
    bounded = BoundedModule(net, tuple(xs))
    inputs = tuple(
        BoundedTensor(x, PerturbationLpNorm(norm=math.inf, x_L=low, x_U=high))
        for x, (low, high) in zip(xs, boxes, strict=True)
    )
    with torch.no_grad():
        bounded.compute_bounds(inputs, method="CROWN")
        node = next(n for n in bounded.named_nodes().values() if isinstance(n, operator))
        A = drawn(6, 1, *net(*xs).shape[1:], seed=seed + 9)
        shared = node.relaxation(OperatorInputs.of(node, bounded.context, bounded.call))
        move = None
        if alpha is not None:
            move = drawn(6, *node.alpha_shape(), seed=seed + 19).tanh()
            move = move.sign() if alpha == "ends" else move
        planes, bias = node.lower_plane(A, shared, move)

    def gap(points):
        y = net(*points)  # [P, ...]
        value = torch.einsum("r...,p...->rp", A[:, 0], y)
        for plane, x in zip(planes, points, strict=True):
            value = value - torch.einsum("r...,p...->rp", plane[:, 0], x)
        return value - bias

    worst = math.inf
    for start in range(2):
        points = [
            low + (high - low) * (torch.rand(64, *low.shape[1:], dtype=torch.float64)
                                  if start else torch.rand(64, *low.shape[1:]).double().round())
            for low, high in boxes
        ]
        for step in range(60):
            points = [x.detach().requires_grad_(True) for x in points]
            gaps = gap(points)
            worst = min(worst, gaps.min().item())
            # Each point goes down the gap of one row.
            chosen = gaps[torch.arange(64) % 6, torch.arange(64)].sum()
            gradients = torch.autograd.grad(chosen, points)
            points = [
                (x.detach() - (high - low) * 0.3 * 0.95**step * g.sign()).clamp(low, high)
                for x, g, (low, high) in zip(points, gradients, boxes, strict=True)
            ]
    return worst


class TwoRows(nn.Module):
    """Two linear forms of a norm of a norm: few enough for their rows to be bounded on the way."""

    def __init__(self):
        super().__init__()
        self.norms, self.head = Norm(deep=True), nn.Linear(8, 2, bias=False).double()
        self.head.weight.data = drawn(2, 8, seed=33)

    def forward(self, x):
        return self.head(self.norms(x))


@pytest.mark.parametrize("radius", [1e-4, 0.05, 0.5])
def test_ranges_of_rows_bounded_on_the_way_hold_and_are_met_where_the_box_is_small(
    radius, monkeypatch
):
    seen, along = [], Directions.along

    def noted(self, node, vectors, **how):
        found = along(self, node, vectors, **how)
        seen.append((vectors.flatten(2), found))  # one vector a sample
        return found

    monkeypatch.setattr(Directions, "along", noted)
    net, x = TwoRows(), drawn(B, 1, 8, seed=31)
    found, box = bounds(net, x, radius, torch.float64, ("CROWN",))
    assert [len(vectors) for vectors, _ in seen] == [1, 4]  # z0; the rows of both sides

    def between(x):
        norms = net.norms
        return norms.linear(traced_ops.norm(x, norms.weight, norms.bias, norms.eps, False, 1))

    for vectors, known in seen:
        for r, v in enumerate(vectors):
            met = attack(lambda x, v=v: (between(x)[:, 0] * v.repeat(len(x) // B, 1)).sum(-1), box)
            lower, upper, form = known.lower[r, :, 0], known.upper[r, :, 0], known.form
            width = upper - lower
            assert (met >= lower - 1e-12).all() and (met <= upper + 1e-12).all()
            reach = form.reach()[r, :, 0] + form.slack[r, :, 0]
            assert ((met - form.center[r, :, 0]).abs() <= reach + 1e-12).all()
            share = (met.amax(0) - met.amin(0)) / width
            assert share.min() > (0.8 if radius == 1e-4 else 0.05), share
    assert violation(found["CROWN"], attack(net, box)) <= 1e-12


@pytest.mark.parametrize("alpha", [None, "drawn", "ends"])
@pytest.mark.parametrize("name", list(SINGLE))
def test_no_point_of_the_inputs_box_lies_below_a_rows_plane(name, alpha):
    torch.manual_seed(3)
    for seed, radius in enumerate((1e-3, 0.03, 0.2, 0.5, 2.0, 20.0)):
        assert lowest_gap(name, radius, 10 * seed, alpha) > -1e-9, radius


@pytest.mark.parametrize(
    ("name", "part", "wrong", "alpha"),
    [
        ("norm", "_product", lambda *found: (*found[:3], 0.2 * found[3]), None),
        ("norm", "_product", lambda *found: (*found[:2], 4 * found[2], found[3]), "ends"),
        ("norm", "_one_sided", lambda k, t, c, low: (k, t, c + 0.05 * k, low + 0.05 * k), None),
        ("attend", "_tangent_rest", lambda rest: 0.2 * rest, None),
        ("attend", "_flat_rest", lambda rest: 0.2 * rest, None),
        ("scores", "relaxation", lambda *x: (*x[:4], 0.2 * x[4], 0.2 * x[5], x[6]), None),
        ("scores", "relaxation", lambda *x: (*x[:6], 0.2 * x[6]), "ends"),
    ],
)
def test_a_remainder_that_is_too_small_is_caught(name, part, wrong, alpha, monkeypatch):
    operator = SINGLE[name][0]
    right = getattr(operator, part)

    def smaller(*args):
        result = right(*args)
        return wrong(*result) if isinstance(result, tuple) else wrong(result)

    static = isinstance(inspect.getattr_static(operator, part), staticmethod)
    monkeypatch.setattr(operator, part, staticmethod(smaller) if static else smaller)
    cases = itertools.product((0.2, 2.0), (0, 7))
    try:
        worst = min(lowest_gap(name, *case, alpha) for case in cases)
    except BoundsError:  # bounds that exclude the clean output
        return
    assert worst < -1e-3
