"""Affine forms whose symbols are shared out among the ranks: one device's bounds and gradients."""

from __future__ import annotations

import functools

import models
import pytest
import torch
import transformers
from ranks import pool
from releases import needs_query_groups
from transformer_cases import GROUPS, build_case

_SLOW = pytest.mark.slow

SETS = {
    "a word's box": {"eps": 2e-3, "positions": [3]},
    "a word's L2 ball": {"eps": 0.01, "norm": 2, "positions": [3]},
    "L2 balls of all words": {"eps": torch.arange(8) * 1e-3, "norm": 2},
    "an L1 ball of two words": {"eps": 0.02, "norm": 1, "positions": [1, 4]},
    "a hull": {"substitutes": {3: [5, 7, 8], 4: [9, 6]}, "shape": "hull"},
    "five directions": 5,
    "three directions": 3,
}
"""Of 16, 16, 112, 32, 6 (3 for each word), 5 and 3 symbols."""
WIDTH = 1e-10
"""Relative to the bounds' width: float64, sums in another order. The hull's and the L2 balls' norms
come from eigenvalues of matrices, which are as exact as that."""


def _inputs(view, kind, further):
    from lirpa_megatron import BoundedTensor, perturb_tokens
    from lirpa_megatron.problem.perturbations import PerturbationHull, PerturbationSegments

    ids, given = transformers.tokens()[0], SETS[kind]
    if not isinstance(given, int):
        x, *rest = perturb_tokens(view, ids, **given, **further)
        if "shape" in given:  # some of the way to the other words
            v = x.ptb.vertices
            near = PerturbationHull(v[:, :, :1] + 0.03 * (v - v[:, :, :1]))
            x = BoundedTensor(x.as_subclass(torch.Tensor), near)
        return x, *rest
    x, *rest = perturb_tokens(view, ids, eps=0.0, **further)
    x = x.as_subclass(torch.Tensor)
    directions = torch.zeros(len(x), given, *x.shape[1:])
    directions[:, :, 2] = 0.01 * models.drawn(len(x), given, x.shape[-1])
    return BoundedTensor(x, PerturbationSegments(x, directions)), *rest


def _start(name):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    return build_case(name, torch.float64)


def _numbers(form):
    return form.c.shape[0], form.shared


def _bounds(name, kind, room=None):
    """(lower, upper, {(sharded, coefficients, shared out)} of all nodes' forms) on a rank."""
    from lirpa_megatron import BoundedModule
    from lirpa_megatron.forward import linear_rules, shares
    from lirpa_megatron.forward.method import forward_run

    kept = shares.ROOM
    shares.ROOM = linear_rules.ROOM = kept if room is None else room
    try:
        _, view, further = _start(name)
        inputs = _inputs(view.eval(), kind, further)
        bounded, seen = BoundedModule(view, inputs), set()
        with torch.no_grad():
            lower, upper = bounded.compute_bounds(inputs, method="forward")
            final = bounded[bounded.final_name]
            forward_run(bounded).to(final, lambda node, form: seen.add(
                (bounded.sharded[node.name], *_numbers(form))
            ))
    finally:
        shares.ROOM = linear_rules.ROOM = kept
    return lower.numpy(), upper.numpy(), seen


@functools.lru_cache(maxsize=32)
def _one(name, kind):
    return pool(1).run(_bounds, name, kind)[0]


def check(name, kind, size, **how):
    needs_query_groups(GROUPS.get(name, 4), size)
    lower, upper, _ = _one(name, kind)
    width = (upper - lower).max()
    assert width > 0
    seen = set()
    for of_rank in pool(size).run(_bounds, name, kind, **how):
        assert abs(of_rank[0] - lower).max() <= WIDTH * width
        assert abs(of_rank[1] - upper).max() <= WIDTH * width
        seen |= of_rank[2]
    return seen


@pytest.mark.parametrize(("name", "kind", "size"), [
    ("llama", "L2 balls of all words", 2),
    *(pytest.param(name, kind, size, marks=_SLOW) for name in ("gpt", "llama", "bert")
      for kind in SETS for size in (2, 4)),
])
def test_bounds_are_those_of_one_device(name, kind, size):
    check(name, kind, size)


def test_replicated_nodes_have_the_ranks_own_symbols_and_sharded_nodes_all():
    seen = check("gpt", "a word's box", 2)
    assert {x[1:] for x in seen if not x[0]} == {(1 + 16 // 2, True)}
    assert {x[1:] for x in seen if x[0]} == {(1 + 16, False)}


def test_few_symbols_stay_whole_on_all_ranks():
    seen = check("bert", "three directions", 2)
    assert {x[1:] for x in seen} == {(1 + 3, False)}


def test_symbols_pass_linear_operators_in_chunks():
    """Of one symbol for each rank, and of one token for each rank."""
    check("bert", "five directions", 2, room=1)


# ------------------------------------------------------------------------------- networks


def _network(eps, options):
    from lirpa_megatron import parallelize
    from lirpa_megatron.training import CertifiedLoss

    torch.set_default_dtype(torch.float64)
    net = models.Net(inputs=9, hidden=(16, 12), width=7)
    model, among = models.build(net), models.region(net, eps=eps)
    model = parallelize(model)
    labels = torch.tensor([0, 1, 2])
    loss = CertifiedLoss(model, (among.center,), num_classes=3, method="forward",
                         bound_opts=options)
    batch = loss((among.bounded(),), labels)
    batch.loss.sum().backward()
    return batch.margin.detach().numpy(), {
        name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=_SLOW)])
@pytest.mark.parametrize("symbols", [0, 23, 1024])
def test_a_loss_and_its_gradients_are_those_of_one_device(size, symbols):
    """Errors of 16, 7 and 12 neurons become symbols behind the 9 of the set."""
    options = {"form_symbols": symbols, "adjoint_rows": 2}
    margin, gradients = pool(1).run(_network, 0.05, options)[0]
    for rank, of_rank in enumerate(pool(size).run(_network, 0.05, options)):
        assert abs(of_rank[0] - margin).max() <= 1e-12
        for name, got in of_rank[1].items():
            want = gradients[name]
            for dim in range(want.ndim):
                if got.shape[dim] != want.shape[dim]:
                    part = got.shape[dim]
                    want = want.take(range(rank * part, (rank + 1) * part), dim)
            assert abs(got - want).max() <= 1e-10 * abs(want).max() + 1e-13, name


def _gradients(name, kind):
    from lirpa_megatron import BoundedModule

    model, view, further = _start(name)
    view.train()
    bounded = BoundedModule(view, _inputs(view, kind, further), {"adjoint_rows": 2})
    inputs = _inputs(view, kind, further)
    lower, upper = bounded.compute_bounds(inputs, method="forward")
    (lower.tanh() + 0.3 * upper.sin()).sum().backward()
    tp = bounded.context.collectives
    return {
        parameter: transformers.whole_gradient(parameter, value, value.grad, model, tp).numpy()
        for parameter, value in model.named_parameters() if value.grad is not None
    }


@pytest.mark.parametrize(("name", "kind", "size"), [
    ("bert", "a hull", 2),
    *(pytest.param(name, kind, size, marks=_SLOW) for name, kind, size in (
        ("gpt", "a word's L2 ball", 2), ("llama", "L2 balls of all words", 2),
        ("gpt", "an L1 ball of two words", 2), ("bert", "a word's box", 4),
        ("llama", "five directions", 2),
    )),
])
def test_gradients_are_those_of_one_device(name, kind, size):
    needs_query_groups(GROUPS.get(name, 4), size)
    want = pool(1).run(_gradients, name, kind)[0]
    for of_rank in pool(size).run(_gradients, name, kind):
        assert of_rank.keys() == want.keys() and len(want) > 8
        for parameter, gradient in want.items():
            difference = abs(of_rank[parameter] - gradient).max()
            assert difference <= 1e-10 * abs(gradient).max() + 1e-14, parameter


# ----------------------------------------------------------------------------------- errors


def _one_rank_raises():
    from lirpa_megatron import BoundedModule
    from lirpa_megatron.forward import norm_rule, propagation, rules
    from lirpa_megatron.parallel import runtime

    _, view, further = _start("gpt")
    inputs = _inputs(view.eval(), "a word's box", further)
    bounded, found = BoundedModule(view, inputs), propagation.rule_of

    @rules.reading_shares
    def rule(run, node, given):
        raise MemoryError("rank 1 is out of memory")

    def rule_of(node):
        return rule if isinstance(node, norm_rule.BoundNorm) else found(node)

    if runtime.tp_rank() == 1:
        propagation.rule_of = rule_of
    try:
        bounded.compute_bounds(inputs, method="forward")
    finally:
        propagation.rule_of = found


def test_a_rank_that_fails_in_a_norm_ends_all():
    first, second = pool(2).outcomes(_one_rank_raises, timeout=60)
    assert second.error == "MemoryError", second.trace
    assert first.error == "RemoteRankError" and "rank 1 is out of memory" in first.message


def _sets_of_other_sizes():
    from lirpa_megatron import BoundedModule, perturb_tokens
    from lirpa_megatron.parallel import runtime

    _, view, further = _start("gpt")
    bounded = BoundedModule(view, _inputs(view.eval(), "a word's box", further))
    where = [3, 5] if runtime.tp_rank() else [3]
    inputs = perturb_tokens(view, transformers.tokens()[0], eps=1e-3, positions=where)
    bounded.compute_bounds(inputs, method="forward")


def test_ranks_with_sets_of_other_sizes_all_raise():
    for outcome in pool(2).outcomes(_sets_of_other_sizes, timeout=60):
        assert outcome.error is not None
