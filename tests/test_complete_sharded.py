"""Branch and bound on shards: verdicts, bounds and trees are those of one device."""

from __future__ import annotations

import pytest
import torch
from complete_cases import NET, branched
from models import build, region, specification
from ranks import pool

from lirpa_megatron import BoundedModule, parallelize
from lirpa_megatron.complete import SearchOptions
from lirpa_megatron.complete.bounding import Bounder
from lirpa_megatron.complete.domain_pass import passes
from lirpa_megatron.complete.problem import Problem
from lirpa_megatron.complete.refinement import Refinement
from lirpa_megatron.complete.roots import bound_roots


def decided(net, offset, most):
    """Of one rank: what is found out of a network whose thresholds lie below CROWN's bounds by
    `offset` of the gap to a sampled minimum."""
    found = branched("relu", offset, net, most_domains=most)
    leaves = [(leaf.goal, leaf.splits, leaf.margin) for leaf in found.leaves]
    point = None if found.point is None else found.point.tolist()
    inner = {(c.box, c.number, c.sign): (c.bound, c.leaves) for c in found.claims}
    return found.status, found.margins, found.domains, found.open, leaves, point, inner


def raised(net):
    """Of one rank: bounds of inner neurons after two rounds that split, and their leaves."""
    torch.set_default_dtype(torch.float64)
    where = region(net, eps=0.9, batch=1)
    model = parallelize(build(net).requires_grad_(False).eval())
    graph = BoundedModule(model, where.center)
    box = where.bounded().ptb
    low, high = (box.x_L, box.x_U) if box.x_L is not None else (
        where.center - box.eps, where.center + box.eps)
    C = torch.eye(net.outputs)[:1, None]
    problem = Problem(low, high, (0,), C, torch.zeros(1, 1))
    options = SearchOptions(refinement_domains=2, inner_batch=16, keep_tree=True)
    roots = bound_roots(graph, problem)
    with passes(graph, roots.active_columns):
        inner = Refinement(graph, problem, roots, options, lambda: False)
        for _ in range(3):
            inner.round()
    return {key: (c.bound, sorted(c.leaves)) for key, c in inner.claims.items()}, inner.domains


def test_bounds_of_inner_neurons_and_their_trees_are_those_of_one_device():
    want, domains = raised(NET)
    torch.set_default_dtype(torch.float32)
    assert max(len(leaves) for _, leaves in want.values()) > 4  # else nothing was split
    for got, count in pool(2).run(raised, NET):
        assert count == domains and got.keys() == want.keys()
        for key, (bound, leaves) in got.items():
            # Sums over ranks are rounded in another order: 1e-10 of bounds of size 1 in float64.
            assert bound == pytest.approx(want[key][0], abs=1e-10) and leaves == want[key][1]


CASES = {"proved": (0.7, None), "refuted": (1.05, None), "unknown": (0.95, 40)}


@pytest.mark.parametrize("tp, status", [
    (2, "proved"),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in ((2, "unknown"), (2, "refuted"), (4, "proved"), (4, "refuted"), (4, "unknown"))),
])
def test_verdicts_bounds_and_trees_are_those_of_one_device(tp, status):
    offset, most = CASES[status]
    want = decided(NET, offset, most)
    torch.set_default_dtype(torch.float32)
    assert want[0] == status
    for got in pool(tp).run(decided, NET, offset, most):
        assert got[0] == status
        # Sums over ranks are rounded in another order: 1e-10 of bounds of size 1 in float64.
        assert got[1] == pytest.approx(want[1], abs=1e-10)
        assert got[2:4] == want[2:4]
        assert [leaf[:2] for leaf in got[4]] == [leaf[:2] for leaf in want[4]]
        assert [leaf[2] for leaf in got[4]] == pytest.approx([leaf[2] for leaf in want[4]],
                                                             abs=1e-10)
        assert got[6].keys() == want[6].keys()
        for key, (bound, where) in got[6].items():
            assert bound == pytest.approx(want[6][key][0], abs=1e-10) and where == want[6][key][1]
        if got[5] is not None:
            assert got[5] == pytest.approx(want[5], abs=1e-10)


def both_rows(net):
    """Of one rank: the bound of a goal of two rows after some steps, and the rows' weights."""
    torch.set_default_dtype(torch.float64)
    where = region(net, eps=0.9, batch=1)
    model = parallelize(build(net).requires_grad_(False).eval())
    graph = BoundedModule(model, where.center)
    C = specification(1, 2, net.outputs)
    C[:, 1] = C[:, 1] / 4 - 2 * C[:, 0]
    ends = model(where.center) @ C[0].t() + 0.1
    box = where.bounded().ptb
    problem = Problem(where.center - box.eps, where.center + box.eps, (0,), C, ends)
    roots = bound_roots(graph, problem)
    with passes(graph, roots.active_columns):
        bounder = Bounder(graph, problem, roots, SearchOptions())
        found = bounder.ascend(bounder.whole([0]), 20)
    return found.margins, found.batch.weights, found.row


def test_weights_of_rows_are_those_of_one_device():
    margins, weights, row = both_rows(NET)
    torch.set_default_dtype(torch.float32)
    assert row.tolist() == [2] and 0.01 < float(weights.min()) < 0.49  # neither row alone
    for got in pool(2).run(both_rows, NET):
        # Sums over ranks are rounded in another order: 1e-10 of bounds of size 1 in float64.
        torch.testing.assert_close(got[0], margins, rtol=0, atol=1e-10)
        torch.testing.assert_close(got[1], weights, rtol=0, atol=1e-10)
        assert got[2].tolist() == [2]
