"""Branch and bound over intervals of functions of one variable: verdicts, bounds and trees."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from complete_cases import check_refused
from models import Net, build, region, specification
from ranks import pool
from small_networks import property_text, save, stack
from test_complete import SHAPES, boxed
from torch import nn

from lirpa_megatron import BoundedModule, parallelize
from lirpa_megatron.cli.commands import main
from lirpa_megatron.complete import SearchOptions, branch_and_bound, strategy
from lirpa_megatron.complete.bounding import Bounder
from lirpa_megatron.complete.curve_cuts import cut_points
from lirpa_megatron.complete.domain_pass import passes
from lirpa_megatron.complete.problem import Problem
from lirpa_megatron.complete.roots import OperatorPlace, bound_roots
from lirpa_megatron.complete.split_curve import CurveLines, SplitCurve, refitted
from lirpa_megatron.complete.state import StateError
from lirpa_megatron.errors import UserError
from lirpa_megatron.operators.coefficients import LowerUpper
from lirpa_megatron.operators.elementwise.functions import FUNCTIONS

pytestmark = pytest.mark.usefixtures("unchanged_environment")

KINDS = (nn.Tanh, nn.Sigmoid, nn.GELU, nn.ReLU, nn.SiLU, nn.LeakyReLU)


def network_of(seed):
    """A network of two inputs and at most 12 neurons of mixed kinds, a box and rows."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    widths, parts = [2, *SHAPES[seed % len(SHAPES)], 3], []
    for i, (m, n) in enumerate(zip(widths, widths[1:], strict=False)):
        linear = nn.Linear(m, n).double()
        linear.weight.data, linear.bias.data = drawn(n, m) * 1.5 / m**0.5, drawn(n) / 2
        parts += [linear, KINDS[(seed + i) % len(KINDS)]()]
    center, radius = drawn(2) / 2, 0.3 + torch.rand(2, generator=generator, dtype=torch.float64)
    model = nn.Sequential(*parts[:-1]).requires_grad_(False)
    return model, center - radius, center + radius, drawn(2, 3)


def least(model, low, high, rows):
    """The rows' minima over a box of two inputs: on a grid, then on finer ones around its best
    points. Three rounds of 1/20: the last grid's step is 3e-5 of the box."""
    share = torch.linspace(0, 1, 81, dtype=torch.float64)
    grid, found = torch.cartesian_prod(share, share), []
    for row in rows:
        ends = [(low, high)]
        for _ in range(3):
            points = torch.cat([a + grid * (b - a) for a, b in ends])
            y = model(points) @ row
            best = points[y.argsort()[:40:10]]
            width = (ends[0][1] - ends[0][0]) / 40
            ends = [(torch.maximum(p - width, low), torch.minimum(p + width, high)) for p in best]
        found.append(y.amin())
    return torch.stack(found)


def check_verdict(seed, seconds=120, must_end=True):
    """The number of domains; None where time ended the search, which it may if not `must_end`."""
    model, low, high, rows = network_of(seed)
    true = least(model, low, high, rows)
    # above or below the minimum by 1% to 10%
    gap = float(true.abs().max() + 1) * (0.1, 0.03, 0.01)[seed % 3] * (1 if seed % 2 else -1)
    found = branch_and_bound(
        model, boxed(low[None], high[None]), rows[None], (true - gap)[None],
        options=SearchOptions(timeout=seconds, branching="nonlinear"),
    )
    if found.status == "timeout" and not must_end:
        return None
    assert found.status == ("proved" if gap > 0 else "refuted"), (seed, found)
    if gap > 0:
        # no bound is above the truth, which is known to a little less than 1e-5
        assert max(m - gap for m in found.margins) <= 1e-5, seed
        assert found.bound > 0 and found.open == 0
    else:
        x = found.point
        assert bool((low <= x).all() and (x <= high).all())
        assert model(x) @ rows[found.goal] <= (true - gap)[found.goal]
    return found.domains


@pytest.mark.parametrize("first", [
    0, *(pytest.param(first, marks=pytest.mark.slow) for first in (10, 20))
])
def test_verdicts_are_those_of_a_dense_search(first, one_thread):
    assert sum(check_verdict(seed) for seed in range(first, first + 10)) > 40


@pytest.mark.slow
def test_verdicts_of_many_more_are_those_of_a_dense_search(one_thread):
    """Where inner bounds stay wide a search may not end: 18 of these did not in 8 s."""
    found = [check_verdict(seed, seconds=8, must_end=False) for seed in range(30, 330)]
    assert found.count(None) <= 30


# ------------------------------------------------------------------------------ one operator

CURVES = ("Tanh", "Sigmoid", "GeluErf", "Silu", "Abs", "LeakyRelu", "Elu", "Sin", "Sqrt")


_LINES = 1e-3
"""Of lines whose alphas are 1/512 apart the best one is taken; bounds are 1 to 10."""


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lines_on(name, lower, upper):
    curve = FUNCTIONS[name].curve()
    return CurveLines.of(OperatorPlace("f", 0, lower.shape[1], False, curve), lower, upper)


@pytest.mark.parametrize("name", [n for n in CURVES if n in FUNCTIONS])
def test_lines_and_ends_hold_on_the_interval_with_any_multipliers(name):
    R, D, n = 3, 4, 6
    ends = torch.stack([drawn(D, n), drawn(D, n, seed=1)]) * 3
    ends = ends.abs() if name == "Sqrt" else ends
    lower, upper = ends.amin(0), ends.amax(0)
    upper[0, 0] = lower[0, 0]
    lines = lines_on(name, lower, upper)
    A, gamma = drawn(R, D, n, seed=2), drawn(R, D, n, seed=3)
    alpha = drawn(R, D, n, seed=4).sigmoid()
    split = SplitCurve(lines, alpha, torch.zeros_like(gamma), gamma)
    found = split.bound_backward(LowerUpper(A, None))
    share = torch.rand(400, D, n, generator=torch.Generator().manual_seed(0)).double()
    share[:50] = share[:50].round()
    z = lower + share * (upper - lower)
    y = torch.einsum("rdn,pdn->prd", A, lines.place.curve.value(z))
    below = torch.einsum("rdn,pdn->prd", found.A[0].lower, z) + found.bias.lower
    # 1e-12: sums of six products in float64
    assert (below <= y + 1e-12).all()
    assert found.A[0].upper is None


@pytest.mark.parametrize("name", ["Tanh", "GeluErf", "Abs"])
def test_narrower_intervals_leave_coefficients_and_raise_constants(name):
    R, D, n = 2, 5, 7
    ends = torch.stack([drawn(D, n), drawn(D, n, seed=1)]) * 3
    lower, upper = ends.amin(0), ends.amax(0)
    cut = lower + (upper - lower) * drawn(D, n, seed=5).sigmoid()
    before = lines_on(name, lower, upper)
    after = lines_on(name, lower, cut)
    A, gamma = drawn(R, D, n, seed=2), drawn(R, D, n, seed=3)
    alpha = drawn(R, D, n, seed=4).sigmoid()
    own = refitted(before, after, A, alpha, gamma)
    # of one neuron at a time, so that gains and losses do not cancel
    for j in range(n):
        only = torch.zeros_like(A)
        only[..., j] = A[..., j]
        values = [
            SplitCurve(lines, a, torch.zeros_like(g), g * (only != 0)).bound_backward(
                LowerUpper(only, None))
            for lines, (a, g) in ((before, (alpha, gamma)), (after, own))
        ]
        torch.testing.assert_close(
            values[1].A[0].lower, values[0].A[0].lower, rtol=0, atol=1e-12
        )
        assert (values[1].bias.lower >= values[0].bias.lower - _LINES).all()


def test_points_are_numbers_that_float32_has_and_make_both_parts_tighter():
    low = -0.1 - drawn(50, 4).abs()
    high = 0.1 + drawn(50, 4, seed=1).abs() * 5
    for name in ("Tanh", "GeluErf", "Abs"):
        curve = FUNCTIONS[name].curve()
        points = cut_points(curve, low, high, drawn(50, 4, seed=2))
        assert torch.equal(points.float().double(), points)
        assert bool(((points > low) & (points < high)).all())
        # the last bits of an interval's ends change nothing
        again = cut_points(curve, low * (1 + 1e-15), high * (1 - 1e-15), drawn(50, 4, seed=2))
        assert torch.equal(points, again)
    assert bool((cut_points(FUNCTIONS["Abs"].curve(), low, high, -torch.ones(50, 4)) == 0).all())


# ---------------------------------------------------------------------------------- domains


def pre_activations(model, x):
    """Of all operators, from the last to the first: [P, neurons]."""
    found = []
    for layer in model:
        if isinstance(layer, nn.Linear):
            x = layer(x)
            found.append(x)
        else:
            x = layer(x)
    return torch.cat(found[-2::-1], 1)


@pytest.mark.parametrize("seed", [3, 6, 13])
def test_bounds_of_a_domain_hold_in_it_and_do_not_fall_at_a_split(seed, one_thread):
    model, low, high, rows = network_of(seed)
    problem = Problem(low[None], high[None], (0, 0), rows[:, None],
                      torch.full((2, 1), 100.0).double())
    graph = BoundedModule(model, low[None])
    roots = bound_roots(graph, problem)
    x = torch.rand(60000, 2, generator=torch.Generator().manual_seed(0)).double()
    x = low + x * (high - low)
    z, y = pre_activations(model, x), model(x) @ rows.t()
    bounder = Bounder(graph, problem, roots, SearchOptions())
    checked, inside = 0, torch.ones(2, len(x), dtype=torch.bool)
    with passes(graph, roots.active_columns):
        parents = bounder.ascend(bounder.whole([0, 1]), 20).batch
        for depth in range(6):
            old = bounder.quickly(parents)[0]
            parents = bounder.narrowed(parents)
            before, A, _ = bounder.quickly(parents)
            mixed = len({r.curve is None for r in roots.operators}) > 1
            # where a ReLU's interval is narrower, alpha and gamma do not fit it
            assert mixed or (before >= old - _LINES).all()
            lower, upper = parents.ends
            for d in range(2):  # intervals hold
                some = z[inside[d]][:, roots.number_of]
                assert not len(some) or bool(((some >= lower[d] - 1e-9)
                                              & (some <= upper[d] + 1e-9)).all())
            curves = (roots.of_curve[roots.number_of]).nonzero().flatten()
            at = curves[(5 * depth) % len(curves)]
            number = roots.number_of[at].repeat(2)
            middle = (lower[:, at] / 2 + upper[:, at] / 2).float().double()
            signs = torch.tensor([1, -1]) if depth % 2 else torch.tensor([-1, 1])
            batch = parents.split(roots, number, signs, middle, bounder.units, A)
            begin = bounder.quickly(batch)[0]
            assert (begin >= before - _LINES).all()
            found = bounder.ascend(batch, 20)
            assert (found.margins >= begin - 1e-9).all()
            inside &= (z[:, number[0]] - middle[:, None]) * signs[:, None] >= 0
            for d in range(2):
                true = y[inside[d], d] - 100.0
                if len(true):
                    checked += 1
                    assert found.margins[d] <= true.amin() + 1e-9  # rounding of sums of size 100
            parents = found.batch
    assert checked >= 6


def test_a_search_goes_on_from_where_it_was_ended(one_thread):
    model, low, high, rows = network_of(5)
    ends = least(model, low, high, rows)[None] - 0.05

    def search(**options):
        return branch_and_bound(
            model, boxed(low[None], high[None]), rows[None], ends,
            options=SearchOptions(branching="nonlinear", keep_tree=True, **options),
        )

    ended = search(most_domains=30)
    nodes = [node for tree in ended.state.trees.values() for node in tree]
    assert ended.status == "unknown" and any(isinstance(node, tuple) for node in nodes)
    found = search(start=ended.state)
    assert found.status == "proved" and found.leaves and found.domains > ended.domains
    goal = next(iter(ended.state.trees))
    moved = replace(ended.state, trees={**ended.state.trees, goal: ((0, 0.1), -2, -2)})
    with pytest.raises(StateError, match="neuron 0 is split at 0.1, which no number of float32"):
        search(start=moved)


# ---------------------------------------------------------------------------- what is chosen


def test_intervals_are_cut_where_boxes_cannot_be(one_thread):
    def choice(inputs, activation, asked="auto"):
        model = nn.Sequential(nn.Linear(inputs, 8), activation, nn.Linear(8, 2))
        x = torch.zeros(1, inputs)
        return strategy.chosen(BoundedModule(model, x), x - 1, x + 1, asked)

    assert choice(17, nn.Tanh()) == "nonlinear" and choice(12, nn.Tanh()) == "input"
    assert choice(12, nn.Tanh(), "nonlinear") == "nonlinear"
    assert choice(17, nn.ReLU()) == "relu" and choice(3, nn.ReLU(), "nonlinear") == "nonlinear"
    with pytest.raises(UserError, match="no such function, but a Softmax; and.*here 17 do"):
        choice(17, nn.Softmax(-1))
    with pytest.raises(UserError, match="has no such function, but a Softmax$"):
        choice(3, nn.Softmax(-1), "nonlinear")


# ------------------------------------------------------------------------ tensor parallelism

NET = Net(inputs=4, hidden=(4, 4), width=4, outputs=3, acts=("tanh", "sigmoid"))


def decided(net, offset, most):
    """Of one rank: what is found out of a network whose thresholds lie below CROWN's bounds by
    `offset` of the gap to a sampled minimum."""
    torch.set_default_dtype(torch.float64)
    where = region(net, eps=0.6, batch=1)
    model = parallelize(build(net).requires_grad_(False).eval())
    C = specification(1, 2, net.outputs)
    graph = BoundedModule(model, where.center)
    lower, _ = graph.compute_bounds(x=(where.bounded(),), C=C, method="CROWN")
    torch.manual_seed(0)
    points = where.random(2000)
    with torch.no_grad():
        y = model(points.flatten(0, 1)).view(2000, 1, -1)
    true = torch.einsum("pbo,bso->pbs", y, C).amin(0)
    options = SearchOptions(
        branching="nonlinear", most_domains=most, keep_tree=True, batch=8, iterations=6,
        first_iterations=10, tried_nonlinear=2,
    )
    found = branch_and_bound(
        graph, where.bounded(), C, lower + offset * (true - lower), options=options
    )
    leaves = [(leaf.goal, leaf.splits, leaf.margin) for leaf in found.leaves]
    point = None if found.point is None else found.point.tolist()
    return found.status, found.margins, found.domains, found.open, leaves, point


@pytest.mark.parametrize("offset, most, status", [
    pytest.param(*case, marks=pytest.mark.slow)  # one is in test_attention_domains
    for case in ((0.7, None, "proved"), (0.95, 60, "unknown"), (1.05, None, "refuted"))
])
def test_verdicts_bounds_and_trees_of_two_ranks_are_those_of_one(offset, most, status):
    want = decided(NET, offset, most)
    torch.set_default_dtype(torch.float32)
    assert want[0] == status and (status == "refuted" or want[2] > 20)
    for got in pool(2).run(decided, NET, offset, most):
        # Sums over ranks are rounded in another order: 1e-9 of bounds of size 1 in float64.
        assert got[1] == pytest.approx(want[1], abs=1e-9)
        assert (got[0], *got[2:4]) == (want[0], *want[2:4])
        assert [leaf[:2] for leaf in got[4]] == [leaf[:2] for leaf in want[4]]
        assert got[5] is None or got[5] == pytest.approx(want[5], abs=1e-9)


# ---------------------------------------------------------------------------------- records


@pytest.fixture(scope="module")
def record(tmp_path_factory, session):
    """Of a property of a tanh network; its first output is above -0.482 in the box."""
    folder = tmp_path_factory.mktemp("nonlinear")
    net, prop, path = (folder / name for name in ("net.onnx", "prop.vnnlib", "proof.json"))
    save(stack([2, 8, 6, 3], seed=3, activation="Tanh"), net)
    prop.write_text(property_text(
        [-1.0, -1.0], [1.0, 1.0], 3, "(or (and (<= Y_0 -0.51)) (and (<= Y_1 -100.0)))"
    ))
    assert main([
        "verify", "--onnx", str(net), "--vnnlib", str(prop), "--method", "IBP",
        "--attack-steps", "0", "--complete", "--branching", "nonlinear", "--record", str(path),
    ]) == 0
    return path


def leaves(content):
    return next(tree["leaves"] for tree in content["trees"] if tree["disjunct"] == 0)


def test_a_record_is_proved_again_leaf_by_leaf(record, capsys):
    content = json.loads(record.read_text())
    splits = [split for leaf in leaves(content) for split in leaf["splits"]]
    assert len(leaves(content)) > 3 and not content["cuts"] and content["neurons"] == 14
    assert any(point for _, _, point in splits)
    assert main(["check", str(record)]) == 0
    said = capsys.readouterr().out
    assert f"{len(leaves(content)) + 1} leaves of 2 trees bounded in float64" in said


def _moved(content):
    leaves(content)[0]["splits"][-1][2] += 0.5


def _moved_everywhere(content):
    first = leaves(content)[0]["splits"][0]
    for leaf in leaves(content):
        leaf["splits"][0] = [first[0], leaf["splits"][0][1], 0.1]


def _dropped(content):
    leaves(content).pop()


def _alone(content):
    leaves(content)[:] = [{"splits": [], "bound": 1.0}]


def _whole(content):
    leaves(content)[0]["splits"][-1][2] = 1


@pytest.mark.parametrize("change, message", [
    (_moved, r"is split at 2 points of neuron \d"),
    (_moved_everywhere, r"neuron \d is split at 0.1, which no number of float32 is"),
    (_dropped, "no leaf covers the domain"),
    (_alone, "disjunct 0: leaf 0 is not proved, its bound is -"),
    (_whole, "is damaged"),
])
def test_a_changed_record_is_refused(tmp_path, record, change, message, capsys):
    check_refused(tmp_path, record, change, message, capsys)
