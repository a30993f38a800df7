"""No point of the perturbation set violates a bound: operators and whole models under attack.

Bounds come from two ranks, in float32 and float64; the values they are held against are those of
the unsharded network with the same weights, in float64, at random points, corners and the points
that gradient ascent finds. Bounds are sums of at most 16 terms through at most 8 layers, each
rounded to 6e-8 (float32) or 1e-16 (float64) of its size: the slack is 1e-5 or 1e-13 of the largest.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from layers import FEATURES, OPERATORS, Layers, linears, megatron_layer
from models import ACTIVATIONS, Net, Region, attack, build, region
from ranks import pool
from torch import nn

from lirpa_megatron import METHODS, BoundedModule, bounded_module, parallelize
from lirpa_megatron.compat import auto_lirpa

SLACK = {torch.float64: 1e-13, torch.float32: 1e-5}
DTYPES = list(SLACK)
_SLOW = pytest.mark.slow
# float64, with the smaller slack, where the planes are made; float32 for whole models.
OF_OPERATORS = [pytest.param(torch.float32, marks=_SLOW), torch.float64]
OF_MODELS = [torch.float32, pytest.param(torch.float64, marks=_SLOW)]
WHERE = {
    "around zero": ("linf", 0.3),
    "partly of zero width": ("box", 0.5),
    "a point": ("linf", 0.0),
    "huge": ("linf", 1e6),
    "an L2 ball": ("l2", 0.8),
    "an L1 ball": ("l1", 1.5),
}


def bounds_of(module: BoundedModule, cases: list, net: Net, dtype: torch.dtype) -> list:
    results = []
    for method, where in cases:
        x = region(net, *WHERE[where], batch=2, dtype=dtype)
        bounds = module.compute_bounds(x=(x.bounded(),), method=method)
        results.append([b.detach().numpy() for b in bounds])
    return results


def operator_bounds(
    name: str, act: str, cases: list, dtype: torch.dtype, first: bool = False, boxes: bool = True
) -> list:
    """Bounds on each rank; without `boxes` a ball that an activation reads has no box around it."""
    torch.set_default_dtype(dtype)
    kinds = OPERATORS[name]
    layers = [megatron_layer(kind, border, full)
              for (kind, _, border), full in zip(kinds, linears(kinds, dtype), strict=True)]
    model = Layers(layers, ACTIVATIONS[act], first).eval()
    x = region(FEATURES, batch=2, dtype=dtype).center
    module = BoundedModule(model, x, {"optimize_bound_args": {"iteration": 2}})
    if boxes:
        return bounds_of(module, cases, FEATURES, dtype)
    with mock.patch.object(bounded_module, "enclose_balls", lambda *_, **__: None):
        return bounds_of(module, cases, FEATURES, dtype)


def model_bounds(net: Net, cases: list, dtype: torch.dtype) -> list:
    torch.set_default_dtype(dtype)
    model = parallelize(build(net, dtype).eval())
    x = region(net, batch=2, dtype=dtype).center
    module = BoundedModule(model, x, {"optimize_bound_args": {"iteration": 2}})
    return bounds_of(module, cases, net, dtype)


def violation(function: nn.Module, where: Region, bounds: Any) -> float:
    """The largest violation that an attack finds, relative to the largest bound."""
    lower, upper = (torch.from_numpy(b).double() for b in bounds)
    assert lower.isfinite().all() and upper.isfinite().all()
    torch.manual_seed(3)
    scale = max(1.0, lower.abs().max().item(), upper.abs().max().item())
    return attack(function.double(), where.to(torch.float64), lower, upper) / scale


def cases_of(ball_for_ibp: bool) -> list:
    """Methods on sets; IBP refuses a ball that something other than a linear layer reads."""
    cases = [(method, where) for method in METHODS[:3] for where in WHERE
             if ball_for_ibp or "ball" not in where or method == "CROWN"]
    return [*cases, *(("CROWN-Optimized", where) for where in ("around zero", "an L2 ball"))]


def check(function: nn.Module, net: Net, cases: list, results: list, dtype: torch.dtype) -> None:
    for rank, of_rank in enumerate(results):
        for (method, where), bounds in zip(cases, of_rank, strict=True):
            if rank > 0:  # replicated: the attack on rank 0's bounds counts for all
                first = results[0][cases.index((method, where))]
                assert all((b == f).all() for b, f in zip(bounds, first, strict=True))
                continue
            x = region(net, *WHERE[where], batch=2, dtype=dtype)
            assert violation(function, x, bounds) <= SLACK[dtype], (method, where)


@pytest.mark.parametrize("dtype", OF_OPERATORS, ids=str)
@pytest.mark.parametrize(
    ("name", "act"),
    [(name, act) for name in OPERATORS for act in ACTIVATIONS
     if act == "relu" or len(OPERATORS[name]) > 1],  # a single layer has no activation
)
def test_no_point_violates_the_bounds_of_an_operator(name, act, dtype):
    kinds = OPERATORS[name]
    cases = cases_of(ball_for_ibp=kinds[0][0] == "column")
    if len(kinds) == 1:  # no alpha
        cases = [case for case in cases if case[0] != "CROWN-Optimized"]
    results = pool(2).run(operator_bounds, name, act, cases, dtype)
    check(Layers(linears(kinds, dtype), ACTIVATIONS[act]), FEATURES, cases, results, dtype)


@pytest.mark.parametrize("name", ["gathering column", "scattering row"])
def test_the_attack_reaches_the_bounds_of_a_linear_operator(name):
    cases = [(method, where) for method in METHODS[:3] for where in ("around zero", "huge")]
    cases += [("CROWN", "an L2 ball"), ("CROWN", "an L1 ball")]
    bounds, _ = pool(2).run(operator_bounds, name, "relu", cases, torch.float64)
    function = Layers(linears(OPERATORS[name], torch.float64), torch.relu)
    for (_, where), of_case in zip(cases, bounds, strict=True):
        x = region(FEATURES, *WHERE[where], batch=2)
        # Ascent goes to the extreme point of a linear function in its first step.
        assert abs(violation(function, x, of_case)) <= SLACK[torch.float64]


MODELS = {
    "deep": Net(hidden=(12, 16, 8), acts=("relu", "tanh", "sigmoid", "relu")),
    "residual": Net(inputs=8, hidden=(12, 16), residual=True, acts=("relu", "tanh", "relu")),
    "skips": Net(hidden=(12, 12), long_skip=True, skip_hidden=True, acts=("sigmoid", "relu")),
    "an activation reads the input": Net(act_first=True, acts=("tanh", "relu")),
    "constants": Net(constants=True, bias=False, acts=("tanh", "sigmoid", "relu")),
}
BALLS_FOR_IBP = ("deep", "skips", "constants")


@pytest.mark.parametrize("dtype", OF_MODELS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_no_point_violates_the_bounds_of_a_model(name, dtype):
    cases = cases_of(ball_for_ibp=name in BALLS_FOR_IBP)
    results = pool(2).run(model_bounds, MODELS[name], cases, dtype)
    check(build(MODELS[name], dtype), MODELS[name], cases, results, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_point_violates_the_bounds_of_a_model_of_tokens(dtype):
    net = Net(inputs=6, tokens=2, acts=("relu", "tanh"))
    methods = METHODS[:3] if auto_lirpa.IS_03 else METHODS  # 0.3 has no alpha for tokens
    cases = [(m, where) for m in methods for where in ("around zero", "huge", "a point")]
    results = pool(2).run(model_bounds, net, cases, dtype)
    check(build(net, dtype), net, cases, results, dtype)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_an_activation_that_reads_a_ball_is_sound_and_would_not_be_without_its_box(act):
    name, double = "gathering column", torch.float64
    cases = [("CROWN", where) for where in ("an L2 ball", "an L1 ball")]
    function = Layers(linears(OPERATORS[name], double), ACTIVATIONS[act], first=True)
    results = pool(2).run(operator_bounds, name, act, cases, double, first=True)
    check(function, FEATURES, cases, results, double)
    # As auto_LiRPA does it: the activation is relaxed at the center of the ball only.
    bare, _ = pool(2).run(operator_bounds, name, act, cases, double, first=True, boxes=False)
    for (_, where), bounds in zip(cases, bare, strict=True):
        assert violation(function, region(FEATURES, *WHERE[where], batch=2), bounds) > 1e-3
