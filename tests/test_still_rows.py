"""CROWN leaves out rows of positions that a causal mask keeps from the words that move."""

from __future__ import annotations

import pytest
import torch
import transformer_cases
import transformers
from ranks import pool

from lirpa_megatron import BoundedModule, at_position, bert_head, perturb_tokens
from lirpa_megatron.forward import windows

PLACE = 5
BALLS = {"a box": {"eps": 0.01}, "an L2 ball": {"eps": 0.02, "norm": 2},
         "a hull": {"substitutes": {PLACE: [7, 9]}, "shape": "hull"}}


def bounds(name, ball, leaves_out=True):
    """(lower, upper, rows of each intermediate pass) of a case whose word at `PLACE` moves."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    _, view, further = transformer_cases.build_case(name, torch.float64)
    given = BALLS[ball] if "substitutes" in BALLS[ball] else BALLS[ball] | {"positions": [PLACE]}
    inputs = perturb_tokens(view.eval(), transformers.tokens()[0], **given, **further)
    kept = windows.window
    windows.window = kept if leaves_out else lambda *_: None
    try:
        bounded = BoundedModule(view, inputs)
        with torch.no_grad():
            lower, upper = bounded.compute_bounds(inputs, method="CROWN")
    finally:
        windows.window = kept
    return lower.numpy(), upper.numpy(), dict(bounded.schedule._rows_run)


@pytest.mark.parametrize(("name", "ball"), [
    ("gpt", "a box"), ("llama", "an L2 ball"), ("gpt", "a hull"),
])
def test_bounds_are_those_of_all_rows(name, ball, session, double):
    lower, upper, rows = bounds(name, ball)
    all_lower, all_upper, every = bounds(name, ball, leaves_out=False)
    width = (all_upper - all_lower).max()
    # float64, sums in another order; eigenvalues where balls have norms
    assert abs(lower - all_lower).max() <= 1e-11 * width
    assert abs(upper - all_upper).max() <= 1e-11 * width
    T, saved = transformers.LENGTH, 0
    for node, number in every.items():
        if rows[node] != number:
            saved += 1
            assert rows[node] <= number * (T - PLACE) / T or "s" in node
    assert saved >= 4 and rows.keys() == every.keys()


def test_words_that_see_each_other_have_all_rows(session, double):
    assert bounds("bert", "a box")[2] == bounds("bert", "a box", leaves_out=False)[2]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bounds_are_those_of_one_device(size):
    lower, upper, _ = pool(1).run(bounds, "gpt", "a box")[0]
    width = (upper - lower).max()
    for of_rank in pool(size).run(bounds, "gpt", "a box"):
        assert abs(of_rank[0] - lower).max() <= 1e-10 * width
        assert abs(of_rank[1] - upper).max() <= 1e-10 * width


def test_queries_that_see_no_key_have_no_rows(session, one_thread, double):
    """A padded word of a BERT model, as of all samples: its scores have no rows at all."""
    view = at_position(bert_head(transformers.bert(torch.float64), "lm"), -1).eval()
    ids, _, padding, types = transformers.tokens(batch=1)
    inputs = perturb_tokens(view, ids, eps=0.01, attention_mask=padding, tokentype_ids=types)
    bounded = BoundedModule(view, inputs)
    with torch.no_grad():
        lower, upper = bounded.compute_bounds(inputs, method="CROWN")
        x, *rest = (each.detach().as_subclass(torch.Tensor) for each in inputs)
        y = bounded(x + 0.01 * torch.randn(x.shape).sign(), *rest)
    assert ((lower < y) & (y < upper)).all()
