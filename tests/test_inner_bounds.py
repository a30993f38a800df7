"""Bounds of inner neurons that are raised by splits: they hold, are close, and have leaves that
cover the box."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from exact_minima import minimum
from torch import nn

from lirpa_megatron import BoundedModule
from lirpa_megatron.complete.domain_pass import passes
from lirpa_megatron.complete.inner_rows import inner_starts
from lirpa_megatron.complete.inner_values import least_attained
from lirpa_megatron.complete.problem import Problem, SearchOptions
from lirpa_megatron.complete.refinement import Refinement
from lirpa_megatron.complete.replay import unproved_leaves
from lirpa_megatron.complete.roots import bound_roots
from lirpa_megatron.complete.search import search
from lirpa_megatron.complete.tree import Node, tree_of

WIDTHS = (2, 9, 8, 7, 2)


@pytest.fixture(scope="module")
def refined():
    """A network of three ReLU layers and two boxes, and what was found out in all rounds."""
    torch.manual_seed(5)
    parts = []
    for m, n in zip(WIDTHS, WIDTHS[1:], strict=False):
        parts += [nn.Linear(m, n), nn.ReLU()]
    model = nn.Sequential(*parts[:-1]).double().requires_grad_(False)
    for linear in model[::2]:
        linear.weight *= 2
    low = torch.tensor([[-1.0, -1.0], [-0.5, 0.0]]).double()
    high = low + torch.tensor([[1.5], [1.0]]).double()
    C = torch.eye(2, dtype=torch.float64)[:, None]
    problem = Problem(low, high, (0, 1), C, torch.zeros(2, 1, dtype=torch.float64))
    graph = BoundedModule(model, low)
    roots = bound_roots(graph, problem)
    with passes(graph, roots.active_columns):
        inner = Refinement(
            graph, problem, roots, SearchOptions(refinement_domains=8, keep_tree=True),
            lambda: False,
        )
        rounds = 0
        while not inner.is_done:
            inner.round()
            rounds += 1
    assert 2 < rounds < 8
    return model, graph, problem, roots, inner


def layers_up_to(model, layer):
    return [(m.weight.numpy(), m.bias.numpy()) for m in model[::2]][:layer]


def exact_least(model, low, high, number, sign):
    """The true minimum of `sign z` over the box; numbers go from the last ReLU to the first."""
    layer = len(WIDTHS) - 2
    while number >= WIDTHS[layer]:
        number -= WIDTHS[layer]
        layer -= 1
    row = sign * torch.eye(WIDTHS[layer], dtype=torch.float64)[number]
    layers = layers_up_to(model, layer)
    (least,) = minimum(layers, low.numpy(), high.numpy(), row[None].numpy())
    return least


def test_claims_hold_are_close_to_the_truth_and_are_covered(refined, one_thread):
    model, _, problem, roots, inner = refined
    assert len(inner.claims) > 10 and max(len(c.leaves) for c in inner.claims.values()) > 4
    least = {
        (box, *key): exact_least(model, problem.low[box], problem.high[box], *key)
        for box, *key in inner.claims
    }
    for (box, number, sign), claim in inner.claims.items():
        true = least[box, number, sign]
        assert claim.bound <= true + 1e-12  # sums of some products in float64
        tree_of(claim.leaves, sum(WIDTHS[1:-1]))  # raises where leaves do not cover the box
        place = int(roots.place_of[number])
        other = least.get((box, number, -sign))
        if other is not None and inner.roots.lower[box, place] < 0 < inner.roots.upper[box, place]:
            # a search ends within 5% of the interval's width, and 0.1% less is claimed
            assert claim.bound >= min(0.0, true - 0.051 * (-other - true)) - 1e-9
        known = (inner.roots.lower if sign > 0 else inner.roots.upper)[box, place]
        assert sign * known == claim.bound


def test_bounds_hold_at_points_and_are_not_wider(refined):
    model, _, problem, roots, inner = refined
    generator = torch.Generator().manual_seed(0)
    for box in range(2):
        share = torch.rand(20000, 2, generator=generator).double()
        x = problem.low[box] + share * (problem.high - problem.low)[box]
        z = []
        for i, part in enumerate(model[:-1]):
            x = part(x)
            if i % 2 == 0:
                z.insert(0, x)
        z = torch.cat(z, 1)[:, roots.number_of]
        assert (z >= inner.roots.lower[box] - 1e-12).all()
        assert (z <= inner.roots.upper[box] + 1e-12).all()
    assert (inner.roots.lower >= roots.lower).all() and (inner.roots.upper <= roots.upper).all()


def test_aims_are_values_that_neurons_attain(refined):
    model, graph, problem, roots, _ = refined
    with passes(graph, roots.active_columns):
        start = list(inner_starts(graph, roots))[-1]  # the last ReLU's
        rows = start.unstable()
        low, high = problem.low[rows.box], problem.high[rows.box]
        found = least_attained(graph, start.below.plan, rows.C, low, high, (low + high) / 2)
        middle = (model[:5]((low + high) / 2) * rows.C).sum(1)
    assert (found < middle).all()
    for i, (box, number, sign) in enumerate(rows.keys()):
        least = exact_least(model, problem.low[box], problem.high[box], number, sign)
        assert found[i] >= least - 1e-9


def test_rounds_end_where_splits_raise_bounds_too_little(one_thread):
    """Or a search without a time limit would go on for ever."""
    torch.manual_seed(11)
    widths, parts = (2, 6, 6, 6, 2), []
    for m, n in zip(widths, widths[1:], strict=False):
        parts += [nn.Linear(m, n), nn.ReLU()]
    model = nn.Sequential(*parts[:-1]).double().requires_grad_(False)
    for linear in model[::2]:
        linear.weight *= 3
    low = -torch.ones(1, 2, dtype=torch.float64)
    C, threshold = torch.eye(2).double()[:1, None], torch.zeros(1, 1, dtype=torch.float64)
    problem = Problem(low, -low, (0,), C, threshold)
    graph = BoundedModule(model, low)
    roots = bound_roots(graph, problem)
    with passes(graph, roots.active_columns):
        inner = Refinement(graph, problem, roots, SearchOptions(), lambda: False)
        for _ in range(8):
            inner.round()
            if inner.is_done:
                break
    assert inner.is_done


def test_nothing_more_is_tried_when_time_is_over(refined, one_thread):
    """Of many boxes, points of each goal and values of each neuron would take many seconds."""
    _, graph, problem, roots, _ = refined
    problem = replace(problem, thresholds=problem.thresholds + 9)
    tried, calls = [], []
    found = search(
        graph, problem, SearchOptions(timeout=0.0), lambda goal, points: tried.append(goal)
    )
    assert found.status == "timeout" and found.open == 2 and len(tried) == 1
    with passes(graph, roots.active_columns):
        start = next(inner_starts(graph, roots))
        rows = start.unstable()
        low, high = problem.low[rows.box], problem.high[rows.box]
        for steps in (0, 3):
            calls.clear()
            least_attained(
                graph, start.below.plan, rows.C, low, high, low,
                lambda steps=steps: calls.append(0) or len(calls) > steps,
            )
            assert len(calls) == steps + 1


def test_what_alpha_crown_proves_is_proved_in_a_check(refined, one_thread):
    """Its inner bounds are optimized for the goals; alpha of a leaf alone may not be enough."""
    _, graph, problem, roots, _ = refined
    problem = replace(problem, thresholds=roots.margins - 1e-4)
    few = SearchOptions(iterations=0, first_iterations=0)
    assert unproved_leaves(graph, problem, [Node(0), Node(0)], few) == []
    problem = replace(problem, thresholds=roots.margins + 9)
    assert len(unproved_leaves(graph, problem, [Node(0), Node(0)], few)) == 2
