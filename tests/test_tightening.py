"""Domains that become smaller: nothing of where the goal may fail is lost, and fewer are needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from complete_cases import branched
from models import Net
from scipy.optimize import linprog

from lirpa_megatron import BoundedModule
from lirpa_megatron.complete import SearchOptions, strategy, tightening
from lirpa_megatron.complete.bounding import Bounder
from lirpa_megatron.complete.domain_pass import passes
from lirpa_megatron.complete.problem import Problem
from lirpa_megatron.complete.roots import bound_roots
from lirpa_megatron.complete.violations import Halfspaces, least, shrunk

WIDE = Net(inputs=10, hidden=(16, 8), width=6, outputs=3)


def drawn(seed, dtype, M=2, D=3, n=5):
    """Halfspaces that cut boxes, some of whose inputs have no width or no coefficient."""
    torch.manual_seed(seed)
    low = torch.randn(D, n).to(dtype)
    high = low + torch.rand(D, n).to(dtype) * 2
    high[:, 0] = low[:, 0]
    A = torch.randn(M, D, n).to(dtype)
    A[0, :, 1] = 0
    inside = low + torch.rand(D, n).to(dtype) * (high - low)
    d = -(A.double() * inside.double()).sum(2) - 0.02  # some point is left
    return Halfspaces.of(A, d), low, high


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_boxes_keep_all_points_of_halfspaces(seed, dtype):
    halfspaces, low, high = drawn(seed, dtype, M=1)
    l, u = shrunk(halfspaces, low, high)
    assert bool((l >= low).all() and (u <= high).all()) and bool((u - l < 0.9 * (high - low)).any())
    for d in range(len(low)):
        A, end = halfspaces.A[0, d].double().numpy(), -float(halfspaces.d[0, d])
        box = list(zip(low[d].tolist(), high[d].tolist(), strict=True))
        for i in range(low.shape[1]):
            for sign, side in ((1, l), (-1, u)):
                c = np.zeros(low.shape[1])
                c[i] = sign
                want = sign * linprog(c, A[None], [end], bounds=box).fun
                # outward, and by no more than a few units in the last place; 1e-8: of the solver
                assert 0 <= sign * (want - float(side[d, i])) + 1e-8 <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_bounds_over_a_halfspace_are_those_of_a_linear_program(seed, dtype):
    halfspaces, low, high = drawn(seed, dtype)
    a, b = torch.randn(7, len(low), low.shape[1]).to(dtype), torch.randn(7, len(low)).to(dtype)
    found = least(a, b, halfspaces, low, high)
    plain = torch.minimum(a * low, a * high).sum(2) + b
    assert bool((found > plain + 0.01).any())  # else the halfspaces change nothing
    for s in range(len(a)):
        for d in range(len(low)):
            box = list(zip(low[d].tolist(), high[d].tolist(), strict=True))
            want = max(
                linprog(
                    a[s, d].double().numpy(), A[d].double().numpy()[None], [-float(e[d])],
                    bounds=box,
                ).fun for A, e in zip(halfspaces.A, halfspaces.d, strict=True)
            ) + float(b[s, d])
            # not above the truth; float32 chooses the multiplier
            assert -1e-5 <= float(found[s, d]) - want <= 1e-8


def test_forms_that_are_not_finite_say_nothing():
    halfspaces, low, high = drawn(0, torch.float64)
    A, d = halfspaces.A.clone(), halfspaces.d.clone()
    A[0, 0, 2], A[1, :, 0], d[0, 1:] = torch.nan, torch.inf, -torch.inf
    l, u = shrunk(Halfspaces.of(A, d), low, high)
    assert torch.equal(l, low) and torch.equal(u, high)
    a, b = torch.randn(4, 3, 5).double(), torch.zeros(4, 3).double()
    found = least(a, b, Halfspaces.of(A, d), low, high)
    assert torch.allclose(found, torch.minimum(a * low, a * high).sum(2), atol=1e-12)


@pytest.mark.parametrize("share", [0.02, 0.05])
def test_no_point_at_which_a_goal_fails_is_cut_off(share, one_thread):
    """After an ascent, all sampled points at which the goal's margin is at most the slack lie in
    the smaller box, with pre-activations in their intervals."""
    torch.manual_seed(1)
    layers = [torch.nn.Linear(n, m).double() for n, m in ((3, 8), (8, 6), (6, 1))]
    layers[0].bias.data += 0.6  # most are active
    model = torch.nn.Sequential(
        layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2]
    ).requires_grad_(False)
    low, high = -torch.ones(1, 3).double(), torch.ones(1, 3).double()
    points = low + torch.rand(20000, 3).double() * (high - low)
    y = model(points)
    graph = BoundedModule(model, low)
    threshold = y.min() + share * (y.max() - y.min())
    problem = Problem(low, high, (0,), torch.ones(1, 1, 1).double(), threshold.view(1, 1))
    roots = bound_roots(graph, problem)
    with passes(graph, roots.active_columns):
        bounder = Bounder(graph, problem, roots, SearchOptions())
        bounder.measure(bounder.quickly(bounder.whole([0]))[1][0], torch.tensor([0]))
        found = bounder.ascend(bounder.whole([0]), 20)
    (slack,) = found.slack.tolist()
    fails = points[(y[:, 0] - threshold) <= slack]
    assert 0 < slack < torch.inf and len(fails) > 3
    batch = found.batch
    narrower = batch.ends[1] - batch.ends[0] < 0.95 * (roots.upper - roots.lower)
    assert bool(((batch.high - batch.low) < 0.9 * (high - low)).any()) and bool(narrower.any())
    assert bool((batch.low <= fails).all() and (fails <= batch.high).all())
    z = layers[0](fails)
    z = torch.cat([layers[1](z.clamp(min=0)), z], 1)  # the last ReLU's come first
    kept = roots.number_of
    assert bool((batch.ends[0] <= z[:, kept] + 1e-12).all())
    assert bool((z[:, kept] <= batch.ends[1] + 1e-12).all())


def test_smaller_domains_are_fewer(monkeypatch, one_thread):
    with_them = branched("relu", 0.75, WIDE, refinement_domains=0)
    monkeypatch.setattr(tightening, "_INPUTS", 0)
    without = branched("relu", 0.75, WIDE, refinement_domains=0)
    torch.set_default_dtype(torch.float32)
    assert with_them.status == without.status == "proved"
    assert with_them.domains < 0.7 * without.domains
    # a margin beyond a domain's box is no better than what cut the rest off
    assert 0 < with_them.bound


def test_boxes_of_a_dozen_inputs_are_tried_first(monkeypatch, one_thread):
    """What is decided there has a tree of cuts; what is not goes on with splits of ReLUs."""
    easy = branched("auto", 0.3, WIDE)
    monkeypatch.setattr(strategy, "_PARTS", 40)
    hard = branched("auto", 0.75, WIDE)
    torch.set_default_dtype(torch.float32)
    assert easy.status == "proved" and easy.branching == "input" and easy.cuts
    assert hard.status == "proved" and hard.branching == "relu" and hard.leaves
    assert hard.domains >= 40 + len(hard.leaves)  # those of the trial count, too
