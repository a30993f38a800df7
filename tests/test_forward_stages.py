"""Forward forms over pipeline stages: coefficients go up as hidden states do, rows come down."""

from __future__ import annotations

import functools

import pytest
import stage_models
import torch
from ranks import pool

_SLOW = pytest.mark.slow
METHODS = ("forward", "forward+backward")


def _bounds(kind, cuts=(), method="forward", options=None):
    """(lower, upper) on every rank, [B, S] numpy."""
    from lirpa_megatron import BoundedModule

    torch.set_default_dtype(torch.float64)
    _, stages = stage_models.place()
    if kind == "mlp":
        view = stage_models.mlp(cuts if stages > 1 else (), "tanh")
        x = stage_models.hidden()[:, 0, :5]
    else:
        module = stage_models.transformer(kind)
        view, x = stage_models.view_of(kind, module), stage_models.hidden()
    bounded = BoundedModule(view, (x,), options)
    with torch.no_grad():
        found = bounded.compute_bounds((stage_models.perturbed(x, 0.01),), method=method)
    return [b.numpy() for b in found]


@functools.lru_cache(maxsize=16)
def _whole(kind, method, options):
    return pool(1).run(_bounds, kind, (), method, dict(options))[0]


def check(kind, tp, pp, cuts, method, **options):
    lower, upper = _whole(kind, method, tuple(options.items()))
    width = (upper - lower).max()
    assert width > 0
    for of_rank in pool(tp * pp, tp, pp).run(_bounds, kind, cuts, method, options):
        assert abs(of_rank[0] - lower).max() <= 1e-10 * width
        assert abs(of_rank[1] - upper).max() <= 1e-10 * width


@pytest.mark.parametrize(("tp", "pp", "cuts"), [
    (1, 2, (4,)), (2, 2, (2,)), pytest.param(1, 4, (2, 4, 8), marks=_SLOW),
])
@pytest.mark.parametrize("method", METHODS)
def test_networks(tp, pp, cuts, method):
    check("mlp", tp, pp, cuts, method)


def test_errors_that_became_symbols_go_on_as_symbols():
    check("mlp", 1, 2, (4,), "forward", form_symbols=40)
    check("mlp", 1, 2, (4,), "forward", form_symbols=0, adjoint_rows=0)


@pytest.mark.parametrize(("kind", "tp", "pp"), [
    ("gpt", 1, 2), pytest.param("gpt", 2, 2, marks=_SLOW), pytest.param("llama", 1, 4, marks=_SLOW),
    pytest.param("bert", 1, 2, marks=_SLOW),
])
@pytest.mark.parametrize("method", METHODS)
def test_transformers(kind, tp, pp, method):
    check(kind, tp, pp, (), method)


@pytest.mark.parametrize(("kind", "tp", "pp"), [
    ("gpt", 1, 2), pytest.param("llama", 1, 4, marks=_SLOW),
    pytest.param("bert", 2, 2, marks=_SLOW),
])
def test_errors_of_transformers_go_on_as_symbols(kind, tp, pp):
    check(kind, tp, pp, (), "forward", kept_errors=50)


def _gradients():
    from lirpa_megatron import BoundedModule

    torch.set_default_dtype(torch.float64)
    _, stages = stage_models.place()
    model = stage_models.mlp((4,) if stages > 1 else (), "tanh")
    x = stage_models.hidden()[:, 0, :5]
    bounded = BoundedModule(model, (x,), {"adjoint_rows": 2})
    bounded.train()
    lower, upper = bounded.compute_bounds((stage_models.perturbed(x, 0.01),), method="forward")
    (lower.tanh() + 0.3 * upper.sin()).sum().backward()
    module = model.module if stages > 1 else model
    return {n: p.grad.numpy() for n, p in module.named_parameters()}


def test_gradients_reach_all_stages():
    (want,) = pool(1).run(_gradients)
    found = {}
    for of_stage in pool(2, 1, 2).run(_gradients):
        found |= of_stage
    assert found.keys() == want.keys()
    for name, gradient in want.items():
        assert abs(found[name] - gradient).max() <= 1e-10 * abs(gradient).max(), name
