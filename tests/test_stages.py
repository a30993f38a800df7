"""Bounds of a model whose layers lie on several pipeline stages are those of the whole model.

Relative to the widest bound: 1e-10 in float64 and 1e-5 in float32 (measured: 3e-13 with alpha, else
below 3e-15).
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import stage_models
import torch
from ranks import pool

from lirpa_megatron import METHODS
from lirpa_megatron.crown.chunks import in_turns
from lirpa_megatron.operators.tuning import Tuning

_SLOW = pytest.mark.slow
_ALPHA = {"optimize_bound_args": {"iteration": 4}}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def error(found, want):
    """The largest difference, relative to the widest of the bounds."""
    assert found.keys() == want.keys()
    worst = 0.0
    for key, (lower, upper) in want.items():
        assert np.isfinite(lower).all() and np.isfinite(upper).all()
        width = (upper - lower).max()
        assert width > 0
        differences = [abs(a - b).max() for a, b in zip(found[key], (lower, upper), strict=True)]
        worst = max(worst, max(differences) / width)
    return worst


@functools.lru_cache(maxsize=16)
def _whole_mlp(activation, methods, dtype, options, norm):
    return pool(1).run(stage_models.mlp_bounds, (), activation, methods, dtype, options and _ALPHA,
                       norm=norm)[0]


def check_mlp(tp, pp, cuts, activation, methods=METHODS[:3], dtype=torch.float64, alpha=False,
              norm=None):
    want = _whole_mlp(activation, methods, dtype, alpha, norm)
    found = pool(tp * pp, tp, pp).run(
        stage_models.mlp_bounds, cuts, activation, methods, dtype, _ALPHA if alpha else None,
        norm=norm,
    )
    for of_rank in found:
        assert error(of_rank, want) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("tp", "pp", "cuts"), [
    (1, 2, (4,)), (2, 2, (4,)), pytest.param(1, 4, (2, 4, 8), marks=_SLOW),
    pytest.param(2, 2, (8,), marks=_SLOW), pytest.param(2, 4, (2, 4, 8), marks=_SLOW),
])
@pytest.mark.parametrize("activation", ["relu", "tanh", pytest.param("gelu", marks=_SLOW)])
def test_bounds_of_stages_are_those_of_the_whole_network(tp, pp, cuts, activation):
    check_mlp(tp, pp, cuts, activation)


@pytest.mark.parametrize(("pp", "cuts"), [
    (2, (4,)), pytest.param(4, (2, 4, 8), marks=_SLOW),
])
def test_many_chunks_follow_each_other_down_the_stages(pp, cuts):
    want = _whole_mlp("tanh", ("CROWN",), torch.float64, False, None)
    ranks = pool(pp, 1, pp).run(_in_chunks, cuts)
    for stage, (of_rank, chunks) in enumerate(ranks):
        assert error(of_rank, want) <= 1e-10
        assert (chunks > 20) == (stage > 0), chunks


def _in_chunks(cuts):
    """Bounds where passes of 16 rows have up to 16 chunks, and how many this rank sent down."""
    from megatron.core import parallel_state

    from lirpa_megatron.parallel.pipeline import Pipeline

    traffic = Pipeline.of(parallel_state.get_pipeline_model_parallel_group()).traffic
    before = traffic.calls["rows"]
    options = {"tuning": Tuning(numbers_for_stages=1)}
    with torch.no_grad():  # with gradients passes are not cut
        bounds = stage_models.mlp_bounds(cuts, "tanh", ("CROWN",), torch.float64, options)
    return bounds, traffic.calls["rows"] - before


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("chunks", [1, 2, 3, 9])
def test_a_chunk_is_not_waited_for_before_those_that_the_stage_below_may_keep_it_for(
    stages, chunks
):
    # As in `StageService._until_end`: a stage keeps `hold` chunks until it has the next one.
    hold, kept, answered = max(stages - 2, 0), [], set()

    def chunk(i):
        kept.append(i)
        while len(kept) > (0 if i == chunks - 1 else hold):
            answered.add(kept.pop(0))
        yield
        assert i in answered, f"chunk {i} would be waited for with {kept} kept"
        return i

    assert in_turns((chunk(i) for i in range(chunks)), stages) == list(range(chunks))


@pytest.mark.parametrize("activation", ["relu", pytest.param("tanh", marks=_SLOW)])
def test_a_stage_may_begin_with_an_activation_or_end_before_one(activation):
    # Linear layers in front of a border are read by the activation behind it, of which not all
    # neurons get rows; what stands for the first layer's output is exact by intervals.
    check_mlp(1, 2, (3,), activation)
    check_mlp(1, 2, (1,), activation)


@pytest.mark.parametrize(("tp", "pp", "cuts"), [
    (2, 2, (2,)),  # here the first stage has one layer, which is not sharded
    *(pytest.param(*case, marks=_SLOW)
      for case in [(1, 2, (4,)), (2, 2, (4,)), (1, 4, (2, 4, 8)), (2, 4, (2, 4, 8))]),
])
@pytest.mark.parametrize("activation", ["relu", pytest.param("tanh", marks=_SLOW)])
def test_alpha_of_all_stages_is_optimized_together(tp, pp, cuts, activation):
    check_mlp(tp, pp, cuts, activation, ("CROWN", "CROWN-Optimized"), alpha=True)


@_SLOW
def test_alpha_of_tangents_that_touch_an_end_takes_the_same_steps_on_four_ranks():
    """A tangent at its limit meets the curve at the interval's end, too: which of the two the
    gradient is of must not be left to rounding (bounds were off by 2e-6 of the width)."""
    check_mlp(4, 1, (), "tanh", ("CROWN-Optimized",), alpha=True)


@pytest.mark.parametrize("norm", [2.0, pytest.param(1.0, marks=_SLOW)])
def test_balls_are_concretized_on_the_first_stage(norm):
    check_mlp(1, 2, (4,), "relu", ("CROWN",), norm=norm)


def test_float32_too():
    check_mlp(1, 2, (4,), "relu", dtype=torch.float32)


@functools.lru_cache(maxsize=16)
def _whole(kind, methods):
    return pool(1).run(stage_models.transformer_bounds, kind, methods)[0]


@pytest.mark.parametrize(("kind", "tp", "pp"), [
    ("gpt", 1, 2),
    pytest.param("bert", 1, 2, marks=_SLOW),
    pytest.param("llama", 1, 2, marks=_SLOW),
    *(pytest.param(kind, tp, pp, marks=_SLOW)
      for kind in ("gpt", "llama", "bert") for tp, pp in ((2, 2), (1, 4), (2, 4))),
])
def test_bounds_of_transformers_cut_into_stages(kind, tp, pp):
    methods = METHODS[:3]
    found = pool(tp * pp, tp, pp).run(stage_models.transformer_bounds, kind, methods)
    for of_rank in found:
        assert error(of_rank, _whole(kind, methods)) <= 1e-10


def _few_logits():
    """Of a model so wide that 32 logits are few: operators ask for rows on the way."""
    torch.set_default_dtype(torch.float64)
    from lirpa_megatron import BoundedModule

    model = stage_models.transformer("gpt", num_layers=2, hidden_size=128, ffn_hidden_size=32)
    x = torch.randn(1, 2, 128, generator=torch.Generator().manual_seed(3))
    bounded = BoundedModule(stage_models.view_of("gpt", model), (x,))
    with torch.no_grad():
        found = bounded.compute_bounds((stage_models.perturbed(x, 0.01),), method="CROWN")
    return {"CROWN": tuple(bound.numpy() for bound in found)}


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), pytest.param(2, 2, marks=_SLOW)])
def test_rows_that_operators_ask_for_are_the_same_on_stages(tp, pp):
    (want,) = pool(1).run(_few_logits)
    for of_rank in pool(tp * pp, tp, pp).run(_few_logits):
        assert error(of_rank, want) <= 1e-10


@functools.lru_cache(maxsize=16)
def _whole_with_alpha(kind):
    return pool(1).run(*_optimized(kind))[0]


def _optimized(kind):
    methods = ("CROWN-Optimized",)
    return stage_models.transformer_bounds, kind, methods, torch.float64, 0.01, _ALPHA


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (2, 2), (1, 4), (2, 4)])
@pytest.mark.parametrize("kind", ["gpt", "llama", "bert"])
def test_alpha_of_transformers_cut_into_stages(kind, tp, pp):
    for of_rank in pool(tp * pp, tp, pp).run(*_optimized(kind)):
        assert error(of_rank, _whole_with_alpha(kind)) <= 1e-10


def _auto():
    from lirpa_megatron import BoundedModule

    torch.set_default_dtype(torch.float64)
    stage, stages = stage_models.place()
    model = stage_models.mlp((4,) if stages > 1 else ())
    x = stage_models.hidden()[:, 0, :5]
    bounded = BoundedModule(model, x)
    C = torch.eye(4).expand(2, 4, 4)
    with torch.no_grad():
        return [b.numpy() for b in bounded.compute_bounds(
            (stage_models.perturbed(x, 0.1),), C=C, method="auto", bound_upper=False
        )[:1]]


def test_the_cheapest_method_that_proves_it_is_the_same_on_all_stages():
    (want,) = pool(1).run(_auto)
    for of_rank in pool(2, 1, 2).run(_auto):
        assert abs(of_rank[0] - want[0]).max() <= 1e-10


def _gradients(kind, method, twice, cuts=(4,)):
    """Parameter's name in the whole model -> its gradient."""
    from lirpa_megatron import BoundedModule

    torch.set_default_dtype(torch.float64)
    stage, stages = stage_models.place()
    if kind == "mlp":
        model = stage_models.mlp(cuts if stages > 1 else (), "tanh")
        module = model.module if stages > 1 else model
        x = stage_models.hidden()[:, 0, :5]
        names = {n: n for n, _ in module.named_parameters()}  # slices keep their layers' names
        view = model
    else:
        module = stage_models.transformer(kind, num_layers=2)
        names = {n: n.replace("layers.0", f"layers.{stage}") if stages > 1 else n
                 for n, _ in module.named_parameters()}
        view, x = stage_models.view_of(kind, module), stage_models.hidden()
    bounded = BoundedModule(view, (x,))
    bounded.train()

    def loss(eps):
        lower, upper = bounded.compute_bounds((stage_models.perturbed(x, eps),), method=method)
        return (lower.tanh() + 0.3 * upper.sin()).sum()

    if twice:  # two calls in one backward pass, and one more whose gradients come later
        first, second, third = loss(0.01), loss(0.02), loss(0.015)
        (first + 2 * second).backward()
        third.backward()
    else:
        loss(0.01).backward()
    return {names[n]: p.grad.numpy() for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "method", "twice"), [
    ("mlp", "IBP", False), ("mlp", "CROWN", True), ("gpt", "CROWN", False),
    pytest.param("bert", "CROWN-IBP", True, marks=_SLOW),
    pytest.param("gpt", "CROWN", True, marks=_SLOW),
])
def test_gradients_are_those_of_the_whole_model(kind, method, twice):
    (want,) = pool(1).run(_gradients, kind, method, twice)
    found = {}
    for of_stage in pool(2, 1, 2).run(_gradients, kind, method, twice):
        for name, gradient in of_stage.items():
            if name == "output_layer.weight" and name not in want:
                name = "embedding.word_embeddings.weight"
            found[name] = found.get(name, 0) + gradient
    assert found.keys() == want.keys()
    for name, gradient in want.items():
        scale = abs(gradient).max()
        assert abs(found[name] - gradient).max() <= 1e-10 * scale, name


def test_gradients_of_a_stage_without_parallel_layers_are_of_all_its_ranks_rows():
    (want,) = pool(1).run(_gradients, "mlp", "CROWN", False)
    for rank, of_rank in enumerate(pool(4, 2, 2).run(_gradients, "mlp", "CROWN", False, (2,))):
        if rank < 2:
            assert of_rank.keys() == {"0.weight", "0.bias"}
            for name, gradient in of_rank.items():
                assert abs(gradient - want[name]).max() <= 1e-10 * abs(want[name]).max(), name


def _trained(kind, crown_share, layers=2):
    """(loss, margins, gradients by name in the whole model) of a certified loss; over stages, of
    one layer each."""
    from lirpa_megatron import perturb_tokens
    from lirpa_megatron.training import CertifiedLoss

    torch.set_default_dtype(torch.float64)
    stage, stages = stage_models.place()
    model = stage_models.transformer(kind, num_layers=layers)
    model.requires_grad_(True)
    ids, _, padding, types = stage_models.transformers.tokens()
    further = {"attention_mask": padding, "tokentype_ids": types} if kind == "bert" else {}
    view = stage_models.view_of(kind, model) if kind == "bert" else model
    model.train()
    inputs = perturb_tokens(model, ids, eps=0.001, **further)
    loss_of = CertifiedLoss(view, inputs, num_classes=2 if kind == "bert" else None,
                            method="CROWN-IBP")
    inputs = perturb_tokens(model, ids, eps=0.001, **further)
    found = loss_of(inputs, torch.tensor([1, 0]), crown_share=crown_share)
    found.loss.mean().backward()
    names = {n: n.replace("layers.0", f"layers.{stage}") if stages > 1 else n
             for n, _ in model.named_parameters()}
    gradients = {
        names[n]: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None
    }
    return found.loss.detach().numpy(), found.margin.numpy(), gradients


@pytest.mark.parametrize(("kind", "share", "tp", "pp"), [
    ("gpt", 0.5, 1, 2),
    *(pytest.param(*case, marks=_SLOW) for case in [
        ("bert", 1.0, 1, 2), ("llama", 0.5, 1, 2), ("gpt", 0.5, 2, 2), ("gpt", 0.5, 1, 4),
        ("gpt", 0.5, 2, 4), ("llama", 1.0, 2, 2), ("bert", 0.5, 2, 2),
    ]),
])
def test_a_certified_loss_trains_all_stages(kind, share, tp, pp):
    """Tied embeddings are one weight: the gradients of both stages' copies are added. Parameters
    that are sharded over ranks have the gradients of the same rank without stages."""
    run = _trained, kind, share, pp
    ranks = pool(tp * pp, tp, pp).run(*run)
    for tp_rank, (loss, margin, want) in enumerate(pool(tp).run(*run)):
        found = {}
        for of_loss, of_margin, gradients in ranks[tp_rank::tp]:
            assert abs(of_loss - loss).max() <= 1e-10 * abs(loss).max()
            assert abs(of_margin - margin).max() <= 1e-10 * abs(margin).max()
            for name, gradient in gradients.items():
                if name == "output_layer.weight" and name not in want:  # tied
                    name = "embedding.word_embeddings.weight"
                found[name] = found.get(name, 0) + gradient
        assert found.keys() == want.keys()
        for name, gradient in want.items():
            assert abs(found[name] - gradient).max() <= 1e-10 * abs(gradient).max(), name


def _with_given(name, cuts, alpha=False):
    """Bounds with those of inner nodes given: looser ones (fixed), or tighter ones (intersected)
    than CROWN's. Not of the first layer, at whose reference bounds 0.3 does not look, nor of what
    passes from one stage to the next."""
    from lirpa_megatron import BoundedModule
    from lirpa_megatron.compat import auto_lirpa

    torch.set_default_dtype(torch.float64)
    bounded = BoundedModule(
        stage_models.mlp(cuts, "tanh"), stage_models.hidden()[:, 0, :5], alpha and _ALPHA
    )
    x = (stage_models.perturbed(stage_models.hidden()[:, 0, :5], 0.1),)
    with torch.no_grad():
        bounded.compute_bounds(x, method="CROWN")
        readers = [n for n in bounded.named_nodes().values() if auto_lirpa.reads_bounds(n)]
        change = -0.1 if name == "interm_bounds" else 0.1
        given = {
            node.name: (node.lower + change * (node.upper - node.lower),
                        node.upper - change * (node.upper - node.lower))
            for node in (reader.inputs[0] for reader in readers)
            if type(node.inputs[0]).__name__ != "BoundInput" or stage_models.place()[0]
        }
        methods = ("CROWN-Optimized",) if alpha else ("CROWN-IBP", "CROWN")
        found = {m: bounded.compute_bounds(x, method=m, **{name: given}) for m in methods}
    return {m: [b.detach().numpy() for b in bounds] for m, bounds in found.items()}, len(given)


@pytest.mark.parametrize(("tp", "pp", "cuts", "alpha"), [
    (1, 2, (4,), False), pytest.param(2, 2, (4,), False, marks=_SLOW),
    pytest.param(1, 4, (2, 4, 8), False, marks=_SLOW), pytest.param(1, 2, (4,), True, marks=_SLOW),
])
@pytest.mark.parametrize("name", ["interm_bounds", "reference_bounds"])
def test_bounds_that_the_caller_gives_are_of_each_stages_own_nodes(name, tp, pp, cuts, alpha):
    ((want, count),) = pool(1).run(_with_given, name, (), alpha)
    ranks = pool(tp * pp, tp, pp).run(_with_given, name, cuts, alpha)
    assert sum(given for _, given in ranks[::tp]) == count == 4
    for of_rank, _ in ranks:
        assert error(of_rank, want) <= 1e-10
    if not alpha:
        (own,) = pool(1).run(stage_models.mlp_bounds, (), "tanh", ("CROWN",))
        assert abs(own["CROWN", True][0] - want["CROWN"][0]).max() > 1e-3  # else nothing was tested
