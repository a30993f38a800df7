"""Branch and bound: verdicts of small networks are those of all activation patterns, one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exact_minima import least_of_larger, minimum
from torch import nn

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_megatron.complete import SearchOptions, branch_and_bound
from lirpa_megatron.complete.bounding import Bounder
from lirpa_megatron.complete.domain_pass import passes
from lirpa_megatron.complete.problem import Problem
from lirpa_megatron.complete.roots import bound_roots
from lirpa_megatron.complete.strategy import decide as decide_problem

SHAPES = ((4,), (8,), (12,), (4, 4), (6, 6), (3, 9), (4, 4, 4), (2, 5, 5))


def layers_of(seed, dtype=torch.float64):
    """A network of two inputs and at most 12 ReLUs, a box and rows, drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    widths = [2, *SHAPES[seed % len(SHAPES)], 3]
    layers = [(drawn(n, m) * 1.5 / m**0.5, drawn(n) / 2)
              for m, n in zip(widths, widths[1:], strict=False)]
    center, radius = drawn(2) / 2, 0.3 + torch.rand(2, generator=generator, dtype=torch.float64)
    rows = drawn(2, 3)
    return layers, (center - radius).to(dtype), (center + radius).to(dtype), rows


def module_of(layers):
    parts = []
    for weight, bias in layers:
        linear = nn.Linear(*weight.t().shape, dtype=weight.dtype)
        linear.weight.data, linear.bias.data = weight.clone(), bias.clone()
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1]).requires_grad_(False)


def boxed(low, high):
    box = PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high)
    return BoundedTensor((low + high) / 2, box)


def exact(layers, low, high, rows):
    arrays = [(w.double().numpy(), b.double().numpy()) for w, b in layers]
    return minimum(arrays, low.double().numpy(), high.double().numpy(), rows.double().numpy())


def decide(seed, branching):
    """A problem whose thresholds lie close to the true minima, and what is found out of it."""
    layers, low, high, rows = layers_of(seed)
    least = exact(layers, low, high, rows)
    size = np.abs(least).max() + 1
    # above or below the minimum by 0.1% to 10%
    gap = size * 10.0 ** -(1 + seed % 3) * (1 if seed % 2 else -1)
    thresholds = torch.from_numpy(least - gap)
    found = branch_and_bound(
        module_of(layers), boxed(low[None], high[None]), rows[None], thresholds[None],
        options=SearchOptions(timeout=60, branching=branching),
    )
    return found, layers, thresholds, gap, (low, high, rows)


def check_verdict(seed, branching="relu"):
    found, layers, thresholds, gap, (low, high, rows) = decide(seed, branching)
    assert found.status == ("proved" if gap > 0 else "refuted"), (seed, found)
    if gap > 0:
        # no bound is above the truth; 1e-9: rounding of the enumeration and of the bound
        assert max(m - gap for m in found.margins) <= 1e-9 * (1 + abs(gap)), seed
        assert found.bound > 0 and found.open == 0
    else:
        x = found.point
        assert bool((low <= x).all() and (x <= high).all())
        assert module_of(layers)(x) @ rows[found.goal] <= thresholds[found.goal]


@pytest.mark.parametrize("first", [
    0, 10, *(pytest.param(first, marks=pytest.mark.slow) for first in (20, 30)),
])
def test_verdicts_are_those_of_all_activation_patterns(first, one_thread):
    for seed in range(first, first + 10):
        check_verdict(seed)


@pytest.mark.slow
def test_verdicts_of_many_more_are_those_of_all_activation_patterns(one_thread):
    for seed in range(40, 540):
        check_verdict(seed)


def check_two_rows(seed, branching="relu"):
    """A goal of two rows is decided; returns whether neither row exceeds its threshold everywhere,
    so that a weighted sum of both decides."""
    layers, low, high, rows = layers_of(seed)
    model, generator = module_of(layers), torch.Generator().manual_seed(seed)
    if seed % 4 == 1:  # an output between two values, or outside
        rows[1] = -rows[0]
    at = low + (high - low) * torch.rand(2, generator=generator, dtype=torch.float64)
    ends = model(at) @ rows.t()
    arrays = [(w.numpy(), b.numpy()) for w, b in layers]
    least = least_of_larger(arrays, low.numpy(), high.numpy(), rows.numpy(), ends.numpy())
    gap = (abs(least) + 1) * 10.0 ** -(1 + seed % 3) * (1 if seed % 2 else -1)
    ends = ends + least - gap

    def confirm(goal, points):
        most = (model(points) @ rows.t() - ends).amax(1)
        return points[most.argmin()] if most.min() <= 0 else None

    problem = Problem(low[None], high[None], (0,), rows[None], ends[None])
    graph = BoundedModule(model, low[None])
    options = SearchOptions(timeout=60, branching=branching)
    found = decide_problem(graph, problem, options, confirm)
    assert found.status == ("proved" if gap > 0 else "refuted"), (seed, found)
    # 1e-9: rounding of the enumeration and of the bound
    assert gap < 0 or 0 < found.bound <= gap + 1e-9
    return bool((exact(layers, low, high, rows) < ends.numpy()).all())


def test_two_rows_of_which_one_has_to_hold_are_decided(one_thread):
    assert sum(check_two_rows(seed) for seed in range(16)) > 8


@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize("end", [-9.0, 9.0])
def test_a_margin_of_rows_together_is_not_above_the_truth(one_thread, rows, end):
    """The same row several times, of a linear network: each margin is exact, and so is the mean's.
    Weights of 1/3 and 1/6 are rounded to what sums to 4095 / 4096 and 4098 / 4096."""
    model = module_of([(torch.eye(2).double(), torch.full((2,), 3.0).double()),
                       (torch.tensor([[1.0, 2.0]]).double(), torch.zeros(1).double())])
    low, high = -torch.ones(1, 2).double(), torch.ones(1, 2).double()
    problem = Problem(low, high, (0,), torch.ones(1, rows, 1).double(),
                      torch.full((1, rows), end).double())
    graph = BoundedModule(model, low)
    roots = bound_roots(graph, problem)
    with passes(graph, roots.active_columns), torch.no_grad():
        bounder = Bounder(graph, problem, roots, SearchOptions())
        (margin,) = bounder.ascend(bounder.whole([0]), 0).margins
    assert margin == pytest.approx(6.0 - end, abs=1e-12)  # of x = (-1, -1); rounding of 15


@pytest.mark.slow
def test_many_more_goals_of_two_rows_are_decided(one_thread):
    for seed in range(16, 200):
        check_two_rows(seed)
