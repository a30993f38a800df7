"""Planes of norms, scores and attention: below every point, with remainders as large as needed."""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import replace

import pytest
import torch
from models import drawn
from torch import nn
from transformer_ops import HEAD, B, Norm, attack, bounds, violation

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_megatron.adapters import traced_ops
from lirpa_megatron.crown.auxiliary_rows import Directions
from lirpa_megatron.errors import BoundsError
from lirpa_megatron.operators import BoundNorm, BoundScores, BoundSoftmaxValues
from lirpa_megatron.operators.context import OperatorInputs

pytestmark = pytest.mark.usefixtures("one_thread")


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
        ("scores", "relaxation", lambda x: replace(x, low=0.2 * x.low, high=0.2 * x.high), None),
        ("scores", "relaxation", lambda x: replace(x, box=0.2 * x.box), "ends"),
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
