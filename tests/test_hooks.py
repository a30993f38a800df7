"""Hooks, replaced methods, wrappers, parametrizations: unwrapped where exact, refused by name."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import transformers
from ranks import pool
from torch import nn
from torch.nn.utils import prune

from lirpa_megatron import (
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    embed,
    next_token_margins,
    parallelize,
    perturb_tokens,
)


def _net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()


def _x():
    return torch.linspace(-1, 1, 12).view(2, 6)


def _ball(eps=0.1):
    return BoundedTensor(_x(), PerturbationLpNorm(norm=math.inf, eps=eps))


def _holds(bounded, model):
    """Sampled points of the ball lie within the bounds of every method."""
    for method in ("IBP", "CROWN"):
        with torch.no_grad():
            lower, upper = bounded.compute_bounds(x=(_ball(),), method=method)
            for _ in range(50):
                y = model(_x() + 0.1 * (2 * torch.rand(2, 6) - 1))
                assert (lower - 1e-5 <= y).all() and (y <= upper + 1e-5).all()
    return lower, upper


# ------------------------------------------------------------------------ plain modules


def _doubling(module, *args):
    return args[-1] * 2


def _old_norm(name, net):
    getattr(torch.nn.utils, name)(net[2])


PLAIN = {
    "forward hook": (lambda net: net[2].register_forward_hook(_doubling), "2:", "_doubling"),
    "pre-hook": (
        lambda net: net[0].register_forward_pre_hook(lambda m, x: (x[0] * 2,)), "0:", "pre-hook"
    ),
    "hook with keywords": (
        lambda net: net[1].register_forward_hook(lambda *a: None, with_kwargs=True), "1:", "hook"
    ),
    "hook on the whole": (lambda net: net.register_forward_hook(_doubling), "Sequential", "hook"),
    "forward of one instance": (
        lambda net: setattr(net[4], "forward", lambda x: x[..., :3] * 2), "4:", "forward"
    ),
    "what a call comes to": (
        lambda net: setattr(net[4], "_call_impl", lambda x: x[..., :3]), "4:", "_call_impl"
    ),
    "old weight norm": (functools.partial(_old_norm, "weight_norm"), "2:", "remove_weight_norm"),
    "old spectral norm": (
        functools.partial(_old_norm, "spectral_norm"), "2:", "remove_spectral_norm"
    ),
    "pruning": (
        lambda net: prune.random_unstructured(net[2], "weight", 0.5), "2:", "hook"
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("case", PLAIN)
def test_what_changes_a_module_of_a_plain_network_is_refused_with_its_name(case):
    change, name, what = PLAIN[case]
    net = _net()
    change(net)
    with pytest.raises(NotImplementedError) as caught:
        BoundedModule(net, _x())
    assert str(caught.value).startswith(name) and what in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["forward hook", "pre-hook", "forward of one instance"])
def test_what_changes_it_after_building_is_refused_by_the_next_call(case):
    change, name, what = PLAIN[case]
    net = _net()
    bounded = BoundedModule(net, _x())
    for _ in range(2):  # what was not changed is known quickly from then on
        bounded.compute_bounds(x=(_ball(),), method="IBP")
    change(net)
    for _ in range(2):
        with pytest.raises(NotImplementedError) as caught:
            bounded.compute_bounds(x=(_ball(),), method="IBP")
        assert str(caught.value).startswith(name) and what in str(caught.value)


@pytest.mark.parametrize("method", ["forward", "_call_impl"])
def test_a_method_of_torchs_classes_that_was_replaced_is_refused(method, monkeypatch):
    """What is cut here is beyond the clean input: values there do not show it."""
    cls = nn.Linear if method == "forward" else nn.Module
    original = getattr(cls, method)
    monkeypatch.setattr(
        cls, method, lambda self, *args, **kwargs: original(self, *args, **kwargs).clamp(-9, 9)
    )
    with pytest.raises(NotImplementedError, match=f"the method {method} of {cls.__name__} was"):
        BoundedModule(_net(), _x())


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_a_hook_around_every_module_is_refused(kind):
    handle = getattr(nn.modules.module, f"register_module_{kind}")(lambda *args: None)
    try:
        with pytest.raises(NotImplementedError, match="every module has the global forward"):
            BoundedModule(_net(), _x())
    finally:
        handle.remove()


def test_hooks_of_gradients_and_of_state_dicts_leave_the_function_as_it_is():
    net = _net()
    net[0].register_full_backward_hook(lambda *args: None)
    net[2].register_full_backward_pre_hook(lambda *args: None)
    net[2].register_state_dict_post_hook(lambda *args: None)
    net[4].register_load_state_dict_post_hook(lambda *args: None)
    expected = BoundedModule(_net(), _x()).compute_bounds(x=(_ball(),), method="CROWN")
    found = BoundedModule(net, _x()).compute_bounds(x=(_ball(),), method="CROWN")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


PARAMETRIZED = {
    "weight norm": torch.nn.utils.parametrizations.weight_norm,
    "spectral norm": torch.nn.utils.parametrizations.spectral_norm,
    "orthogonal": torch.nn.utils.parametrizations.orthogonal,
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_a_parametrized_layer_is_bounded_with_its_computed_weight(kind):
    net = _net()
    PARAMETRIZED[kind](net[2])
    with torch.no_grad():
        next(net[2].parametrizations.weight.parameters()).mul_(1.5)
    net.eval()
    lower, upper = _holds(BoundedModule(net, _x()), net)
    plain = _net()
    plain[2].weight.data = net[2].weight.detach().clone()
    expected = BoundedModule(plain, _x()).compute_bounds(x=(_ball(),), method="CROWN")
    torch.testing.assert_close((lower, upper), expected)


def test_a_parametrization_whose_weights_change_later_ends_in_an_error():
    net = _net()
    torch.nn.utils.parametrizations.weight_norm(net[2])
    bounded = BoundedModule(net.eval(), _x())
    with torch.no_grad():
        net[2].parametrizations.weight.original0.mul_(2)
    with pytest.raises(ArithmeticError, match=r"2: the model itself computes .* graph of bounds"):
        bounded.compute_bounds(x=(_ball(),), method="IBP")


def test_a_parametrization_in_training_mode_is_refused_because_gradients_would_be_lost():
    net = _net()
    torch.nn.utils.parametrizations.weight_norm(net[2])
    with pytest.raises(NotImplementedError, match=r"^2: it is parametrized"):
        BoundedModule(net.train(), _x())


def test_a_compiled_module_is_the_module_inside():
    net = _net()
    for compiled in (torch.compile(net), nn.Sequential(torch.compile(net[0]), *net[1:])):
        found = BoundedModule(compiled, _x()).compute_bounds(x=(_ball(),), method="CROWN")
        expected = BoundedModule(net, _x()).compute_bounds(x=(_ball(),), method="CROWN")
        torch.testing.assert_close(found, expected)
    net[2].register_forward_hook(_doubling)
    with pytest.raises(NotImplementedError, match="_doubling"):
        BoundedModule(torch.compile(net), _x())


def test_a_hook_on_a_wrapper_is_refused_too():
    wrapped = torch.compile(_net())
    wrapped.register_forward_hook(_doubling)
    with pytest.raises(NotImplementedError, match="_doubling"):
        BoundedModule(wrapped, _x())


# --------------------------------------------------------------------- Megatron's modules


def _margins(model):
    ids = transformers.tokens()[0]
    view = next_token_margins(model)
    inputs = (*perturb_tokens(view, ids, eps=0.01), ids[:, 0])
    return BoundedModule(view, inputs).compute_bounds(inputs, method="IBP")[0]


def _scaling(model):
    cls = type(model.embedding)
    scaling = type("Scaling", (cls,), {
        "forward": lambda self, *a, **k: cls.forward(self, *a, **k) * 2
    })
    model.embedding.__class__ = scaling


def _overriding(module, method):
    cls = type(module)
    module.__class__ = type("Other", (cls,), {
        method: lambda self, *a, **k: getattr(cls, method)(self, *a, **k)
    })


MEGATRON = {
    "hook on an MLP": lambda m: m.decoder.layers[0].mlp.register_forward_hook(
        lambda mod, x, y: (y[0] * 2, y[1])
    ),
    "pre-hook on a layer": lambda m: m.decoder.layers[1].register_forward_pre_hook(
        lambda mod, x, kw: (x, {**kw, "hidden_states": kw["hidden_states"] * 2}), with_kwargs=True
    ),
    "hook on a dropout": lambda m: m.decoder.layers[0].self_attention.core_attention
        .attention_dropout.register_forward_hook(lambda mod, x, y: y * 2),
    "hook on a norm": lambda m: m.decoder.final_layernorm.register_forward_hook(_doubling),
    "forward of an instance": lambda m: setattr(
        m.embedding.word_embeddings, "forward", lambda ids: 0
    ),
    "scaling embedding": _scaling,
    "method of an attention": lambda m: setattr(
        m.decoder.layers[0].self_attention, "get_query_key_value_tensors", lambda *a, **k: None
    ),
    "class of the core attention": lambda m: _overriding(
        m.decoder.layers[0].self_attention.core_attention, "forward"
    ),
    "class of a softmax": lambda m: _overriding(
        m.decoder.layers[0].self_attention.core_attention.scale_mask_softmax,
        "forward_torch_softmax",
    ),
    "mask function": lambda m: setattr(
        m.decoder.layers[0].self_attention.core_attention.scale_mask_softmax, "mask_func",
        lambda scores, mask: scores,
    ),
    "class of the model": lambda m: _overriding(m, "shared_embedding_or_output_weight"),
    "class of the output layer": lambda m: _overriding(m.output_layer, "forward"),
    "class of the vocabulary": lambda m: _overriding(m.embedding.word_embeddings, "forward"),
    "table of positions": lambda m: setattr(m.embedding.position_embeddings, "max_norm", 0.1),
}
NAMES = {
    "hook on an MLP": "decoder.layers.0.mlp: it has the forward hook",
    "pre-hook on a layer": "decoder.layers.1: it has the forward pre-hook",
    "hook on a dropout": "core_attention.attention_dropout: it has the forward hook",
    "hook on a norm": "decoder.final_layernorm: it has the forward hook _doubling",
    "forward of an instance": "embedding.word_embeddings: its method forward is replaced",
    "scaling embedding": "embedding: Scaling overrides LanguageModelEmbedding.forward",
    "method of an attention": "self_attention: its method get_query_key_value_tensors is replaced",
    "class of the core attention": "Other overrides DotProductAttention.forward",
    "class of a softmax": "overrides FusedScaleMaskSoftmax.forward_torch_softmax",
    "mask function": "scale_mask_softmax: its mask_func is not Megatron's own",
    "class of the model": "Other overrides GPTModel.shared_embedding_or_output_weight",
    "class of the output layer": "output_layer: Other overrides ColumnParallelLinear.forward",
    "class of the vocabulary": "word_embeddings: Other overrides VocabParallelEmbedding.forward",
    "table of positions": "embedding.position_embeddings: max_norm=0.1",
}


def _refused():
    found = {}
    for case, change in MEGATRON.items():
        model = transformers.gpt(torch.float32)
        change(model)
        try:
            _margins(model)
            found[case] = "bounds"
        except NotImplementedError as error:
            found[case] = str(error)
    return found


def test_what_changes_a_module_of_a_megatron_model_is_refused_with_its_name():
    found = pool(1).run(_refused)[0]
    for case, message in found.items():
        assert NAMES[case] in message, case
        assert "\n" not in message


def _wrapped():
    import torch.distributed as dist
    from megatron.core.distributed import DistributedDataParallel as MegatronDDP
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    model = transformers.gpt(torch.float32)
    ids = transformers.tokens()[0]
    expected, hidden = _margins(model), embed(model, ids)
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    half = transformers.gpt(torch.float32, bf16=True, params_dtype=torch.bfloat16)
    wrappers = {
        "torch's DDP": nn.parallel.DistributedDataParallel(model, process_group=group),
        "Megatron's DDP": MegatronDDP(model.config, DistributedDataParallelConfig(), model),
        "compiled": torch.compile(model),
    }
    differences = {
        name: (_margins(wrapped) - expected).abs().max().item()
        for name, wrapped in wrappers.items()
    }
    assert all(torch.equal(embed(wrapped, ids), hidden) for wrapped in wrappers.values())
    rounded = Float16Module(half.config, half)
    differences["Float16Module"] = (_margins(rounded) - _margins(half)).abs().max().item()
    return differences


def test_wrappers_of_megatron_models_are_the_models_inside():
    differences = pool(1).run(_wrapped)[0]
    assert set(differences.values()) == {0.0}, differences


# ------------------------------------------------------------------------- on one rank alone


def _hook_on_one_rank(when):
    from lirpa_megatron.parallel import runtime

    model = transformers.gpt(torch.float32)
    ids = transformers.tokens()[0]
    view = next_token_margins(model)
    inputs = (*perturb_tokens(view, ids, eps=0.01), ids[:, 0])
    bounded = BoundedModule(view, inputs) if when == "later" else None
    if runtime.tp_rank() == 1:
        mlp = model.decoder.layers[0].mlp
        mlp.register_forward_hook(lambda mod, x, y: (y[0] * 2, y[1]))
    if bounded is None:
        bounded = BoundedModule(view, inputs)
    bounded.compute_bounds(inputs, method="IBP")


@pytest.mark.parametrize("when", ["before", "later"])
def test_a_hook_on_one_rank_alone_ends_all_ranks_with_its_name(when):
    first, second = pool(2).outcomes(_hook_on_one_rank, when, timeout=60)
    assert second.error == "NotImplementedError" and first.error == "RemoteRankError"
    for outcome in (first, second):
        assert "decoder.layers.0.mlp: it has the forward hook" in outcome.message


def _hook_on_a_shard():
    from lirpa_megatron.parallel import runtime

    net = parallelize(_net())
    if runtime.tp_rank() == 1:
        net[0].register_forward_hook(_doubling)
    BoundedModule(net, _x())


def test_a_hook_on_one_rank_of_a_parallelized_network_ends_all_ranks():
    for outcome in pool(2).outcomes(_hook_on_a_shard, timeout=60):
        assert "0: it has the forward hook _doubling" in outcome.message
