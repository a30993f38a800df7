"""Method 'auto': the cheapest method that proves it, the same on every rank."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import transformers
from ranks import pool
from torch import nn
from transformer_cases import build_case

from lirpa_megatron import (
    METHODS,
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    parallelize,
    perturb_tokens,
)


def _net():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)]
    return parallelize(nn.Sequential(*layers).double())


def _called(eps, shift=0.0, norm=math.inf, grad=False, **kwargs):
    """(methods that were run, 'auto's bounds, each method's own) of two margins."""
    torch.set_default_dtype(torch.float64)
    x = torch.linspace(-1, 1, 12).view(2, 6)
    bounded = BoundedModule(_net(), x, {"optimize_bound_args": {"iteration": 5}})
    clean = bounded(x)
    best = clean.argmax(1)
    C = torch.stack([torch.eye(3)[b] - torch.eye(3)[[k for k in range(3) if k != b]] for b in best])
    ball = BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=eps))
    each = {}
    for method in METHODS:
        try:
            bounds = bounded.compute_bounds((ball,), C=C, method=method)
            each[method] = [b.detach() for b in bounds]
        except NotImplementedError:
            each[method] = None
    tried = []
    compute = bounded.compute_bounds

    def counted(*args, **given):
        if given.get("method") in METHODS:
            tried.append(given["method"])
        return compute(*args, **given)

    object.__setattr__(bounded, "compute_bounds", counted)
    with torch.set_grad_enabled(grad):
        found = compute((ball,), C=C, method="auto", **kwargs)
    return tried, [b.detach() for b in found], each


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("eps, expected", [(1e-4, 1), (0.3, 4)])
def test_it_stops_where_all_is_proved(ranks, eps, expected):
    for tried, (lower, upper), each in pool(ranks).run(_called, eps):
        assert tried == list(METHODS[:expected])
        assert (expected == 4) == bool((lower <= 0).any())
        for method in tried:  # the best of what was tried
            below, above = each[method]
            assert (lower >= below - 1e-12).all() and (upper <= above + 1e-12).all()


def test_it_goes_on_until_a_threshold_is_passed():
    _, _, each = pool(1).run(_called, 1e-4)[0]
    between = (each["IBP"][0] + each["CROWN"][0]) / 2
    assert (each["CROWN"][0] > each["IBP"][0]).all()
    tried, _, _ = pool(1).run(functools.partial(_called, 1e-4, decision_thresh=between))[0]
    assert len(tried) > 1
    assert tried == list(METHODS[: len(tried)])


def _of_a_transformer():
    """(methods that were run, lower bounds) for a GPT and a threshold that forward bounds pass."""
    torch.set_default_dtype(torch.float64)
    _, view, further = build_case("gpt", torch.float64)
    inputs = perturb_tokens(view.eval(), transformers.tokens()[0], eps=1e-3, **further)
    bounded = BoundedModule(view, inputs)
    tried, compute = [], bounded.compute_bounds
    with torch.no_grad():
        cheap, wanted = (compute(inputs, method=m)[0] for m in ("CROWN-IBP", "forward"))
        assert cheap.min() < wanted.min()

        def counted(*args, **given):
            tried.append(given["method"])
            return compute(*args, **given)

        object.__setattr__(bounded, "compute_bounds", counted)
        threshold = float(wanted.min()) - 1e-9  # of the sums' rounding, and more
        return tried, compute(inputs, method="auto", decision_thresh=threshold)[0], threshold


def test_of_transformers_the_forward_method_comes_before_crown():
    for tried, lower, threshold in pool(2).run(_of_a_transformer):
        assert tried == ["IBP", "CROWN-IBP", "forward"]
        assert bool((lower > threshold).all())


def test_what_is_one_methods_is_refused():
    x = torch.zeros(1, 6)
    bounded = BoundedModule(nn.Linear(6, 2), x)
    ball = BoundedTensor(x, PerturbationLpNorm(norm=math.inf, eps=0.1))
    for given in ({"bound_lower": False}, {"return_A": True}):
        with pytest.raises(ValueError, match="'auto' asks whether lower bounds are positive"):
            bounded.compute_bounds((ball,), method="auto", **given)


def _optimized(threshold):
    """(final passes, lower bounds) of alpha-CROWN with a threshold."""
    torch.set_default_dtype(torch.float64)
    x = torch.linspace(-1, 1, 12).view(2, 6)
    bounded = BoundedModule(_net(), x, {"optimize_bound_args": {"iteration": 9}})
    passes, run = [], bounded.schedule.run

    def counted(start, *args, **kwargs):
        if start.name == bounded.final_name:
            passes.append(start.name)
        return run(start, *args, **kwargs)

    bounded.schedule.run = counted
    ball = BoundedTensor(x, PerturbationLpNorm(norm=math.inf, eps=0.3))
    lower, _ = bounded.compute_bounds(
        (ball,), method="CROWN-Optimized", bound_upper=False, decision_thresh=threshold
    )
    return len(passes), lower.detach()


@pytest.mark.parametrize("ranks", [1, 2])
def test_alpha_is_optimized_until_the_bounds_exceed_a_threshold(ranks):
    longest, best = pool(ranks).run(_optimized, None)[0]
    for none, lower in pool(ranks).run(_optimized, math.inf):
        assert none == longest and torch.equal(lower, best)
    for few, lower in pool(ranks).run(_optimized, -1e6):  # CROWN's bounds are enough
        assert few < longest
        assert (lower <= best + 1e-12).all()
    near = best - 1e-3 * best.abs()
    for some, lower in pool(ranks).run(_optimized, near):
        assert few < some <= longest and (lower > near).all()


def test_a_threshold_is_for_alpha():
    x = torch.zeros(1, 6)
    bounded = BoundedModule(nn.Linear(6, 2), x)
    ball = BoundedTensor(x, PerturbationLpNorm(norm=math.inf, eps=0.1))
    with pytest.raises(NotImplementedError, match="decision_thresh=...\\) with method 'CROWN': it"):
        bounded.compute_bounds((ball,), method="CROWN", decision_thresh=0.0)
    with pytest.raises(ValueError, match="is for lower bounds"):
        bounded.compute_bounds(
            (ball,), method="CROWN-Optimized", decision_thresh=0.0, bound_lower=False
        )
