"""Gradients of bounds of GPT, LLaMA-like and BERT models: one device's at every size."""

from __future__ import annotations

import pytest
import torch
import transformers
from ranks import pool
from transformer_cases import build_case

from lirpa_megatron import BoundedModule, perturb_tokens

_SLOW = pytest.mark.slow


def _gradients(name, method, options=None):
    """Gradients of a function of the bounds, by parameter name, whole."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model, view, further = build_case(name, torch.float64)
    view.train()
    # Intervals soon meet the constants of the norms.
    eps = {"CROWN": 0.003, "CROWN-IBP": 1e-7, "IBP": 1e-8}.get(method, 0.001)
    ids = transformers.tokens()[0]
    bounded = BoundedModule(view, perturb_tokens(view, ids, eps=eps, **further), options)
    # Made after the conversion, which writes to the parameters that these depend on.
    inputs = perturb_tokens(view, ids, eps=eps, **further)
    lower, upper = bounded.compute_bounds(inputs, method=method)
    weights = torch.linspace(-1, 1, lower.numel(), dtype=lower.dtype).view_as(lower)
    (lower * weights.cos() + upper * weights).sum().backward()
    tp = bounded.context.collectives
    whole = {}
    for parameter, value in model.named_parameters():
        if value.grad is None:
            continue
        whole[parameter] = transformers.whole_gradient(parameter, value, value.grad, model, tp)
    return whole


@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param("llama", "CROWN", marks=_SLOW),  # test_training has one with its loss
     ("llama", "CROWN-IBP"), ("llama", "forward"), pytest.param("gpt", "forward", marks=_SLOW),
     pytest.param("bert", "forward", marks=_SLOW), pytest.param("gpt", "CROWN", marks=_SLOW),
     pytest.param("one key group, norms of queries and keys", "IBP", marks=_SLOW),
     pytest.param("one key group, norms of queries and keys", "CROWN", marks=_SLOW)],
)
def test_gradients_are_those_of_one_device(name, method):
    one = pool(1).run(_gradients, name, method)[0]
    two = pool(2).run(_gradients, name, method)[0]
    assert one.keys() == two.keys() and len(one) > 8
    moved = 0
    for parameter, gradient in one.items():
        assert torch.isfinite(gradient).all(), parameter
        size = gradient.abs().max()
        moved += bool(size > 0)
        assert (gradient - two[parameter]).abs().max() <= 1e-8 * size + 1e-12, parameter
    assert moved > 8


@pytest.mark.parametrize(
    ("rows", "at_once"),
    # In chunks a rank's own rows are bounded by others too.
    [("own", None), ("own", 7), ("whole", None)],
)
@_SLOW
def test_gradients_through_rows_that_are_bounded_on_the_way_are_those_of_one_device(rows, at_once):
    # Two rows of BERT's: the norms have s bounded for them.
    options = {"final_rows": rows, "max_spec_rows": at_once}
    one = pool(1).run(_gradients, "bert", "CROWN")[0]
    two = pool(2).run(_gradients, "bert", "CROWN", options)[0]
    for parameter, gradient in one.items():
        size = gradient.abs().max()
        assert (gradient - two[parameter]).abs().max() <= 1e-8 * size + 1e-12, parameter
