"""Outward rounding: bounds that hold for the network in real arithmetic.

What is compared with is exact: rational numbers (`fractions`) for networks of ReLUs.
Weights and inputs are floating-point numbers, and so exact themselves.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from exact_networks import Pairs, breaks, corners, random_net
from hypothesis import given, settings
from hypothesis import strategies as st
from models import AS_PLAIN, REGIONS, Net, build, drawn, region, specification
from ranks import pool
from torch import nn

from lirpa_megatron import METHODS, BoundedModule, BoundedTensor, PerturbationLpNorm, parallelize
from lirpa_megatron.arithmetic.floating import UNIT, box_around
from lirpa_megatron.errors import UserError

OUTWARD = {**AS_PLAIN, "rounding": "outward"}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def excess(
    net: Pairs, x: list[float], eps: float, points: Any, options: Any, method: str,
    model: nn.Module | None = None,
) -> float:
    """By how much bounds (of `model`, which is `net` on ranks) exclude the exact output of a point;
    negative: they do not."""
    where = torch.tensor([x])
    module = BoundedModule((model or net).eval(), where, options)
    assert model is None or any(module.sharded.values())
    given = BoundedTensor(where, PerturbationLpNorm(norm=float("inf"), eps=eps))
    lower, upper = module.compute_bounds(x=(given,), method=method)
    worst = Fraction(-(10**30))
    for point in points:
        for y, l, u in zip(net.exact(list(point)), lower[0].tolist(), upper[0].tolist(),
                           strict=True):
            worst = max(worst, Fraction(l) - y, y - Fraction(u))
    return float(worst)


def test_without_widening_a_bound_is_wrong_and_with_it_none_is():
    """Neurons in pairs with weights 1e8 and -1e8: what is left is rounding.

    IBP does not see that they cancel, so it is tried at one point.
    """
    wrong = {method: 0 for method in METHODS[:3]}
    for seed in range(3):
        net, x = random_net(seed, (2, 4, 2), cancel=True), drawn(2, seed=seed + 99).tolist()
        for method in wrong:
            eps = 0.0 if method == "IBP" else 0.1
            points = [[Fraction(v) for v in x], *breaks(net, x, eps)]
            wrong[method] += excess(net, x, eps, points, AS_PLAIN, method) > 0
            assert excess(net, x, eps, points, OUTWARD, method) <= 0, (seed, method)
    assert min(wrong.values()) > 0, wrong  # else nothing was tested


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([(2, 3, 2), (2, 4, 3), (2, 4, 4, 2)]), st.booleans(),
    st.sampled_from([0.0, 1e-9, 0.1, 3.0]), st.sampled_from(METHODS),
)
def test_no_exact_value_is_outside_of_outward_bounds(seed, widths, cancel, eps, method):
    net, x = random_net(seed, widths, cancel), drawn(2, seed=seed + 1).tolist()
    points = breaks(net, x, eps) if len(widths) == 3 else corners(x, eps)
    assert excess(net, x, eps, list(points), OUTWARD, method) <= 0


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from([(2, 3, 2), (2, 6, 3), (2, 4, 4, 2), (2, 5, 5, 5, 2)]),
    st.booleans(), st.sampled_from([0.0, 1e-12, 1e-6, 0.1, 3.0, 1e5]), st.sampled_from(METHODS),
    st.booleans(),
)
def test_no_exact_value_of_many_networks_is_outside(seed, widths, cancel, eps, method, skip):
    net, x = random_net(seed, widths, cancel), drawn(2, seed=seed + 1).tolist()
    net.skip = skip and widths[-1] == 2
    exact = len(widths) == 3 and not net.skip
    points = breaks(net, x, eps) if exact else corners(x, eps)
    assert excess(net, x, eps, list(points), OUTWARD, method) <= 0


# ------------------------------------------------------------------ how much is added

NETS = {
    "relu": Net(hidden=(16, 12, 8)),
    "residual": Net(inputs=8, hidden=(12, 16, 12), residual=True),
    "skips": Net(skip_hidden=True, long_skip=True, hidden=(12, 12)),
    "constants": Net(constants=True, bias=False),
    "an activation reads the input": Net(act_first=True),
    "mixed": Net(acts=("relu", "tanh", "sigmoid"), hidden=(12, 16)),
    "tanh over skips": Net(skip_hidden=True, acts=("relu", "tanh")),
    "stable neurons": Net(hidden=(16, 12, 16), bias_scale=2.0),
}
MOST = 1e-9
"""Of the width of a bound: far below the 1e-6 that is asked for, and above what was measured
(below 1e-12)."""


def bounds(net: Net, options: dict[str, Any], calls: list[tuple]) -> list:
    """(lower, upper) of each call (method, region, with C or not), on each rank."""
    torch.set_default_dtype(torch.float64)
    model = parallelize(build(net).eval())
    module = BoundedModule(model, region(net).center, {
        **AS_PLAIN, **options,
        "optimize_bound_args": {"iteration": 2, "optimizer": "sgd"},
    })
    found = []
    for method, kind, with_C in calls:
        C = specification(3, 5, net.outputs) if with_C else None
        where = region(net, kind).bounded()
        lower, upper = module.compute_bounds(x=(where,), C=C, method=method)
        found.append((lower.detach().numpy(), upper.detach().numpy()))
    return found


def check_widening(net: Net, options: dict[str, Any], tp: int, calls: list[tuple]) -> None:
    """Outward bounds on each rank lie just outside of one device's ordinary ones."""
    ordinary = bounds(net, options, calls)
    for result in pool(tp).run(bounds, net, {**options, "rounding": "outward"}, calls):
        for (lower, upper), (low, high), call in zip(ordinary, result, calls, strict=True):
            width = upper - lower
            added = np.stack([lower - low, high - upper]) / width
            assert added.max() <= MOST, (call, added.max())
            # With alpha a step may differ by rounding, whatever is added afterwards.
            assert added.min() > 0 or call[0] == "CROWN-Optimized", (call, added.min())


@pytest.mark.parametrize("name, tp", [
    pytest.param(name, tp, marks=[] if (name, tp) == ("residual", 2) else pytest.mark.slow)
    for name in NETS for tp in (1, 2, 4)
])
def test_bounds_are_widened_by_a_tiny_part_of_their_width_on_any_number_of_ranks(name, tp):
    net = NETS[name]
    calls = [(m, "linf", C) for m in METHODS for C in (False, True)]
    calls += [("CROWN", kind, True) for kind in REGIONS[1:]]
    if not net.bias:  # auto_LiRPA 0.3 cannot merge C into a last layer without a bias
        calls = [call for call in calls if call[0] not in METHODS[:2]]
    check_widening(net, {}, tp, calls)


@pytest.mark.parametrize("options", [
    {"final_rows": "own", "max_spec_rows": 1},
    pytest.param({"sparse_intermediate_bounds": False}, marks=pytest.mark.slow),
    pytest.param({"max_spec_rows": 3}, marks=pytest.mark.slow),
])
def test_rows_of_each_rank_are_widened_too(options):
    calls = [(m, "linf", C) for m in METHODS[1:3] for C in (False, True)]
    check_widening(NETS["residual"], options, 2, calls)


# ---------------------------------------------------------------------- the rest


def test_a_box_around_a_ball_holds_it_in_real_arithmetic():
    x, eps = drawn(200, seed=3), drawn(200, seed=4).abs() * 1e-3
    low, high = box_around(x, eps)
    for v, e, l, h in zip(*(t.tolist() for t in (x, eps, low, high)), strict=True):
        assert Fraction(l) <= Fraction(v) - Fraction(e)
        assert Fraction(v) + Fraction(e) <= Fraction(h)
    assert ((high - low) / 2 - eps).abs().max() <= 2 * UNIT * (x.abs() + eps).max()
    low, high = box_around(torch.tensor([1.0]), 0.25)  # exact: nothing is added
    assert low.item() == 0.75 and high.item() == 1.25


def test_a_call_does_not_use_what_an_earlier_one_knew_of_other_inputs():
    net = NETS["relu"]
    module = BoundedModule(build(net).eval(), region(net).center, OUTWARD)
    far = dataclasses.replace(region(net), center=1e6 * region(net).center)
    for method in METHODS[:3]:
        module.compute_bounds(x=(region(net).bounded(),), method=method)
        got = module.compute_bounds(x=(far.bounded(),), method=method)
        fresh = BoundedModule(build(net).eval(), region(net).center, OUTWARD)
        want = fresh.compute_bounds(x=(far.bounded(),), method=method)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("method", ["CROWN-IBP", pytest.param("CROWN", marks=pytest.mark.slow)])
def test_gradients_are_those_of_ordinary_bounds(method):
    net, found = NETS["residual"], []
    for rounding in ("nearest", "outward"):
        model = build(net).train()
        module = BoundedModule(model, region(net).center, {"rounding": rounding})
        lower, upper = module.compute_bounds(x=(region(net).bounded(),), method=method)
        (lower.sum() - upper.square().sum()).backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        # The loss is of bounds that differ, and those of intermediate nodes do.
        assert (a - b).abs().max() <= 1e-9 * a.abs().max()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.first(x)) + self.second(y)


def test_what_has_no_limit_on_its_error_is_refused_by_name():
    x = drawn(1, 3)
    with pytest.raises(UserError, match=r"parameter '0.weight' is float32.*model.double"):
        BoundedModule(nn.Sequential(nn.Linear(3, 2).float()), x.float(), OUTWARD)
    with pytest.raises(UserError, match='BoundLogSoftmax.*no limit.*rounding="nearest"'):
        BoundedModule(nn.Sequential(nn.Linear(3, 2), nn.LogSoftmax(-1)), x, OUTWARD)
    two = BoundedModule(TwoInputs(), (x, x), OUTWARD)
    for method in METHODS[:3]:
        with pytest.raises(UserError, match="BoundLinear.*inputs that are not perturbed.*rounded"):
            two.compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(eps=0.1)), x), method=method)
    with pytest.raises(ValueError, match="choose nearest or outward"):
        BoundedModule(nn.Linear(3, 2), x, {"rounding": "up"})
    module = BoundedModule(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), x, OUTWARD)
    with pytest.raises(UserError, match="input 0 is float32"):
        module.compute_bounds(x=(BoundedTensor(x.float(), PerturbationLpNorm(eps=0.1)),))
    with pytest.raises(UserError, match="L3"):
        module.compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(eps=0.1, norm=3)),))
    with pytest.raises(ValueError, match="build another one"):
        module.set_bound_opts({"rounding": "nearest"})


def wrong_on_ranks(seeds: range, methods: tuple[str, ...]) -> list[tuple]:
    """On each rank: the cases of which exact values lie outside of outward bounds."""
    torch.set_default_dtype(torch.float64)
    found = []
    for seed in seeds:
        net, x = random_net(seed, (2, 4, 2), cancel=True), drawn(2, seed=seed + 99).tolist()
        points = list(breaks(net, x, 0.1))
        whole = Pairs([(layer.weight.data, layer.bias.data) for layer in net.layers])
        for method in methods:
            if excess(whole, x, 0.1, points, OUTWARD, method, parallelize(net.eval())) > 0:
                found.append((seed, method))
    return found


def test_no_exact_value_is_outside_of_the_bounds_of_two_ranks():
    for found in pool(2).run(wrong_on_ranks, range(4), tuple(METHODS[:3])):
        assert not found
