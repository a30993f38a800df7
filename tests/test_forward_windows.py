"""Forward passes from the first word that moves on."""

from __future__ import annotations

import pytest
import torch
import transformer_cases
import transformers

from lirpa_megatron import BoundedModule, BoundedTensor, at_position, perturb_tokens
from lirpa_megatron.forward import error_symbols, propagation
from lirpa_megatron.forward.method import forward_run
from lirpa_megatron.problem.perturbations import PerturbationSegments

pytestmark = pytest.mark.usefixtures("session", "one_thread", "double")

ROUNDING = 1e-11
"""Relative to the widths; float64."""


def moving(name, place, radius=0.02, count=2):
    """(view, inputs) of a case whose word at `place` moves along `count` directions."""
    _, view, further = transformer_cases.build_case(name, torch.float64)
    x, *rest = perturb_tokens(view, transformers.tokens()[0], eps=0.0, **further)
    x = x.detach().as_subclass(torch.Tensor)
    D = torch.zeros(len(x), count, *x.shape[1:])
    D[:, :, place] = torch.randn(len(x), count, x.shape[-1])
    return view.eval(), (BoundedTensor(x, PerturbationSegments(x, radius * D)), *rest)


def bounds(view, inputs, **options):
    bounded = BoundedModule(view, inputs, bound_opts=options)
    with torch.no_grad():
        lower, upper = bounded.compute_bounds(inputs, method="forward")
    return torch.stack((lower, upper))


def first_of(view, inputs):
    """The first position of the window, 0 without one."""
    bounded = BoundedModule(view, inputs)
    with torch.no_grad():
        bounded.compute_bounds(inputs, method="forward")
        run = forward_run(bounded)
        run.to(bounded[bounded.final_name])
    return run.window.first if run.window else 0


@pytest.mark.parametrize("name, order, refined", [("gpt", 1, None), ("llama", 3, 0)])
def test_bounds_are_those_of_all_positions(name, order, refined, monkeypatch):
    view, inputs = moving(name, 3)
    options = {"order": order, "refined_rows": refined}
    found = bounds(view, inputs, **options)
    assert first_of(view, inputs) == 3
    monkeypatch.setattr(propagation, "window", lambda *_: None)
    whole = bounds(view, inputs, **options)
    assert ((found - whole).abs() <= ROUNDING * (whole[1] - whole[0])).all()


@pytest.mark.parametrize("place, kept", [(5, True), (3, False)])
def test_errors_are_kept_by_default_where_few_positions_move(place, kept, monkeypatch):
    view, inputs = moving("gpt", place)
    hidden = inputs[0].shape[-1]
    monkeypatch.setattr(error_symbols, "_MANY", 1)
    monkeypatch.setattr(error_symbols, "_NUMBERS", 3 * hidden)
    bounded = BoundedModule(view, inputs)
    with torch.no_grad():
        bounded.compute_bounds(inputs, method="forward")
        run = forward_run(bounded)
        run.to(bounded[bounded.final_name])
    assert (run.kept > 0) == kept


def test_bounds_with_kept_errors_are_those_of_all_positions(monkeypatch):
    view, inputs = moving("gpt", 3)
    found = bounds(view, inputs, kept_errors=5)
    monkeypatch.setattr(propagation, "window", lambda *_: None)
    whole = bounds(view, inputs, kept_errors=5)
    assert ((found - whole).abs() <= ROUNDING * (whole[1] - whole[0])).all()


def test_the_window_begins_where_the_first_sample_moves():
    view, (x,) = moving("gpt", 5)
    D = x.ptb.directions.clone()
    D[1, :, 2] = D[1, :, 5]
    x = x.detach().as_subclass(torch.Tensor)
    assert first_of(view, (BoundedTensor(x, PerturbationSegments(x, D)),)) == 2


def test_there_is_no_window_where_other_positions_move_or_are_asked_for():
    assert first_of(*moving("bert", 3)) == 0  # all words see each other
    model, view, _ = transformer_cases.build_case("gpt", torch.float64)
    _, inputs = moving("gpt", 3)
    assert first_of(view.eval(), inputs) == 3
    assert first_of(model.eval(), inputs) == 0  # all positions are outputs
    assert first_of(at_position(model, 1).eval(), inputs) == 0  # of a word before


@pytest.mark.parametrize("order", [1, 3])
def test_bounds_do_not_depend_on_the_batch_that_the_graph_was_built_with(order):
    """A residual's ball once was lost where the batch was of another size."""
    view, (x,) = moving("gpt", 3)
    both = bounds(view, (x,), order=order)
    D, x = x.ptb.directions, x.detach().as_subclass(torch.Tensor)
    one = (BoundedTensor(x[:1], PerturbationSegments(x[:1], D[:1])),)
    bounded = BoundedModule(view, one, bound_opts={"order": order})
    with torch.no_grad():
        two = BoundedTensor(x, PerturbationSegments(x, D))
        found = torch.stack(bounded.compute_bounds((two,), method="forward"))
    assert ((found - both).abs() <= ROUNDING * (both[1] - both[0])).all()


@pytest.mark.parametrize("norm, method", [
    (None, "forward"), (2, "forward"), (2, "forward+backward"),
])
def test_gradients_are_those_of_all_positions(norm, method, monkeypatch):
    """Those of the embeddings, too, which reach words that stand still; and where scores that a
    mask hides have no bounds."""
    found = []
    for replaced in (False, True):
        if replaced:
            monkeypatch.setattr(propagation, "window", lambda *_: None)
        model, view, _ = transformer_cases.build_case("llama", torch.float64)
        view.train()
        ball = {"eps": 0.02, "positions": [3], "norm": 2} if norm else {"eps": 0.0}
        (x,) = perturb_tokens(view, transformers.tokens()[0], **ball)
        if norm is None:
            x = x.as_subclass(torch.Tensor)
            D = torch.zeros(len(x), 1, *x.shape[1:])
            D[:, :, 3] = 0.02
            x = BoundedTensor(x, PerturbationSegments(x, D))
        lower, upper = BoundedModule(view, x).compute_bounds(x, method=method)
        (lower.tanh() + 0.3 * upper.sin()).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    window, whole = found
    for name, gradient in whole.items():
        assert gradient.any()
        assert (window[name] - gradient).abs().max() <= 1e-11 * gradient.abs().max(), name


def test_gradients_are_finite_where_errors_on_the_way_are_not():
    """Weights four times as large, and queries that see later keys alone: what attention leaves out
    is unbounded, and the norm behind it bounds it again."""
    model, view, _ = transformer_cases.build_case("llama", torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0)
    view = at_position(model, 0).train()
    ids = transformers.tokens()[0]
    mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril(-1)
    mask = mask.expand(len(ids), 1, -1, -1)
    x = perturb_tokens(view, ids, eps=0.02, positions=[3], norm=2, attention_mask=mask)
    lower, upper = BoundedModule(view, x).compute_bounds(x, method="forward")
    (lower.tanh() + 0.3 * upper.sin()).sum().backward()
    assert lower.isfinite().all() and upper.isfinite().all()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name
