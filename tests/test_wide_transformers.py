"""Models so wide that few outputs make operators ask for more rows: one device's bounds at any TP.

Sizes decide what a pass does on its way (how many rows count as few, which forms fit); models of
width 16 never come to these decisions.
"""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from ranks import pool

from lirpa_megatron import (
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    at_position,
    bert_head,
)

WIDTH, LENGTH, EPS = 128, 2, 0.01
METHODS = ("IBP", "CROWN-IBP", "CROWN", "CROWN-Optimized", "forward", "forward+backward")


def bounds(kind, vocabulary, method):
    """(lower, upper) of the last position's logits, or of BERT's binary head."""
    flags = {"hidden_size": WIDTH, "ffn_hidden_size": 2 * WIDTH, "num_layers": 1}
    model = getattr(transformers, kind)(torch.float64, {"vocab_size": vocabulary}, **flags)
    view = bert_head(model, "binary") if kind == "bert" else at_position(model, -1)
    x = torch.randn(
        1, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    options = {"optimize_bound_args": {"iteration": 3, "optimizer": "sgd", "lr_alpha": 1.0}}
    bounded = BoundedModule(view, (x,), options)
    ball = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=EPS))
    with torch.no_grad():
        return [b.numpy() for b in bounded.compute_bounds((ball,), method=method)]


@functools.cache
def of_one(kind, vocabulary, method):
    return pool(1).run(bounds, kind, vocabulary, method)[0]


@pytest.mark.parametrize(("kind", "vocabulary", "size"), [
    ("gpt", 64, 2),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("gpt", 64, 4), ("gpt", 32, 2), ("gpt", 32, 4), ("llama", 64, 2), ("bert", 64, 2),
        ("bert", 64, 4),
    )),
])
@pytest.mark.parametrize("method", METHODS)
def test_wide_models_have_the_bounds_of_one_device(kind, vocabulary, size, method):
    lower, upper = of_one(kind, vocabulary, method)
    width = (upper - lower).max()
    assert 0 < width < float("inf")
    for found in pool(size).run(bounds, kind, vocabulary, method):
        assert abs(found[0] - lower).max() <= 1e-10 * width
        assert abs(found[1] - upper).max() <= 1e-10 * width
