"""Megatron's live models are what is compared with, on every rank and each rank's positions."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
import transformers
from live_models import ball, clean, network, patched
from ranks import pool
from releases import config_has
from torch import nn

from lirpa_megatron import (
    BoundedModule,
    at_position,
    embed,
    from_layer,
    next_token_margins,
    parallelize,
    perturb_tokens,
)
from lirpa_megatron.errors import LiveModelError


def _margins(model, **options):
    ids = transformers.tokens()[0]
    view = next_token_margins(model)
    inputs = (*perturb_tokens(view, ids, eps=0.01), ids[:, 0])
    bounded = BoundedModule(view, inputs, options)
    return bounded, inputs


def _gained(factor, *which):
    """Multiplies what a module of Megatron returns."""

    def change(self, y):
        if which and self not in which:
            return y
        return (y[0] * factor, *y[1:]) if isinstance(y, tuple) else y * factor

    return change


def _patched_classes():
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, VocabParallelEmbedding
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.mlp import MLP

    model, found = transformers.gpt(torch.float32), {}
    layers = model.decoder.layers
    cases = {
        "mlp": (MLP, layers[1].mlp), "attention": (SelfAttention, layers[0].self_attention),
        "linear": (ColumnParallelLinear, layers[1].mlp.linear_fc1),
        "norm": (nn.LayerNorm, layers[1].pre_mlp_layernorm),
        "output": (ColumnParallelLinear, model.output_layer),
        "words": (VocabParallelEmbedding, model.embedding.word_embeddings),
    }
    for name, (cls, module) in cases.items():
        with patched(cls, _gained(1.001, module)):
            try:
                found[name] = str(_margins(model)[0].live.difference)
            except LiveModelError as error:
                found[name] = str(error)
    return found


def test_a_patched_class_of_megatron_is_found_in_the_first_module_that_differs():
    found = pool(1).run(_patched_classes)[0]
    names = {
        "mlp": "model.decoder.layers.1.mlp:", "attention": "model.decoder.layers.0.self_attention:",
        "linear": "model.decoder.layers.1.mlp.linear_fc1:",
        "norm": "model.decoder.layers.1.pre_mlp_layernorm:",
        "output": "TokenMargins: the model itself", "words": "embedding:",
    }
    for case, name in names.items():
        assert name in found[case] and "the model itself computes" in found[case], found[case]


def _changed_later():
    model = transformers.llama(torch.float32)
    attention, mlp = model.decoder.layers[1].self_attention, model.decoder.layers[0].mlp
    changes = {
        "model.decoder.final_layernorm: eps changed from 1e-05 to 1e-06": (
            model.decoder.final_layernorm, "eps", 1e-6
        ),
        "model.decoder.layers.1.self_attention: scale changed": (
            attention.core_attention, "softmax_scale", 0.3
        ),
        "model.decoder.layers.0.mlp: kind changed from 'silu' to 'gelu'": (
            model.config, "activation_func", F.gelu
        ),
        "model.decoder.layers.0.mlp.linear_fc2: weight was replaced": (
            mlp.linear_fc2, "weight", nn.Parameter(mlp.linear_fc2.weight.detach().clone())
        ),
        "model.decoder.layers.0.self_attention: rotary_interleaved changed": (
            model.config, "rotary_interleaved", True
        ),
        "model.rotary_pos_emb: the model itself": (
            model.rotary_pos_emb, "inv_freq", model.rotary_pos_emb.inv_freq * 0.9
        ),
    }
    if config_has("softmax_type"):
        changes["softmax_type='learnable'"] = (model.config, "softmax_type", "learnable")
    bounded, inputs = _margins(model)
    found = {}
    for expected, (owner, name, value) in changes.items():
        kept = getattr(owner, name)
        setattr(owner, name, value)
        try:
            found[expected] = str(bounded.compute_bounds(inputs, method="IBP"))
        except (LiveModelError, NotImplementedError) as error:
            found[expected] = str(error)
        setattr(owner, name, kept)
    bounded.compute_bounds(inputs, method="IBP")
    return found


def test_what_is_changed_in_a_model_after_building_is_named_or_found_by_its_values():
    for expected, message in pool(1).run(_changed_later)[0].items():
        assert expected in message


def _half():
    model = transformers.gpt(torch.float32, bf16=True, params_dtype=torch.bfloat16)
    model.to(torch.bfloat16)
    kept = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    bounded, inputs = _margins(model)
    bounded.compute_bounds(inputs, method="IBP")
    for name, (parameter, address) in kept.items():
        assert parameter.dtype == torch.bfloat16 and parameter.data_ptr() == address, name
    softmax = model.decoder.layers[0].self_attention.core_attention.scale_mask_softmax
    assert softmax.input_in_bf16 and softmax.input_in_float16
    from megatron.core.transformer.mlp import MLP

    with patched(MLP, _gained(1.001)):  # less than bfloat16 rounds
        try:
            return bounded.live.difference, str(bounded.compute_bounds(inputs, method="IBP"))
        except LiveModelError as error:
            return bounded.live.difference, str(error)


def test_half_precision_hides_nothing_and_the_parameters_are_back_afterwards():
    difference, message = pool(1).run(_half)[0]
    assert difference < 1e-5 and "model.decoder.layers.0.mlp: the model itself" in message


def _partial():
    from lirpa_megatron.adapters.traceable import traceable

    found = []
    for function in (
        functools.partial(F.gelu, approximate="tanh"), functools.partial(F.leaky_relu),
        lambda x: F.gelu(x) * 2,
    ):
        try:
            traceable(transformers.gpt(torch.float32, activation_func=function))
            found.append("traced")
        except NotImplementedError as error:
            found.append(str(error))
    return found


def test_activations_of_unknown_functions_are_refused():
    tanh, other, scaled = pool(1).run(_partial)[0]
    assert tanh == "traced" and "activation function" in other and "activation function" in scaled


def _entered_later(changed):
    from megatron.core.transformer.mlp import MLP

    model = transformers.gpt(torch.float32)
    view = at_position(from_layer(model, 1), -1)
    block = contextlib.nullcontext()
    if changed:
        block = patched(MLP, _gained(1.01, model.decoder.layers[0].mlp))
    with block:
        inputs = perturb_tokens(view, transformers.tokens()[0], eps=0.01)
    return BoundedModule(view, inputs).compute_bounds(inputs, method="IBP")[0]


def test_hidden_states_that_enter_a_later_layer_are_compared_with_the_live_models():
    right, wrong = (pool(1).outcomes(_entered_later, changed)[0] for changed in (False, True))
    assert right.error is None
    assert wrong.error == "LiveModelError" and "layer 1" in wrong.message


# ----------------------------------------------------------------------------- several ranks


def _sequence_parallel(model):
    """What `sequence_parallel` makes of the modules when they are built (without apex)."""
    model.config.sequence_parallel = True
    for module in model.modules():
        if hasattr(module, "sequence_parallel"):
            module.sequence_parallel = True


def _in_sequence():
    model, found = transformers.gpt(torch.float32), []
    for sequence in (False, True):
        if sequence:
            _sequence_parallel(model)
        bounded, inputs = _margins(model)
        found.append(bounded.compute_bounds(inputs, method="IBP")[0])
    block = model.decoder
    hidden = embed(model, transformers.tokens()[0]).detach()
    for part in (block, block.layers[0], block.layers[0].self_attention, block.layers[0].mlp):
        BoundedModule(part, hidden).compute_bounds((ball(x=hidden),), method="IBP")
    return (found[0] - found[1]).abs().max().item()


def test_sequence_parallel_models_are_compared_on_each_ranks_positions():
    assert max(pool(2).run(_in_sequence)) == 0


def _wrong_on_one_rank(what):
    import torch.distributed as dist
    from megatron.core.transformer.mlp import MLP

    from lirpa_megatron.parallel import runtime

    model = transformers.gpt(torch.float32, model={"parallel_output": True})
    if what == "sequence":  # torch's norms refuse to be built so, and Megatron's modules share it
        _sequence_parallel(model)
    bounded, inputs = _margins(model)
    bounded.compute_bounds(inputs, method="IBP")

    def change(self, y):
        if runtime.tp_rank() == 1 and self is model.decoder.layers[1].mlp:
            if what == "raises":
                raise MemoryError("rank 1 is out of memory")
            if what == "communicates":
                dist.all_reduce(torch.ones(1), group=runtime.tp_group())
            return (y[0] * 2, y[1])
        return y

    with patched(MLP, change):
        bounded.compute_bounds(inputs, method="IBP")


@pytest.mark.parametrize("what", ["differs", "sequence", "raises", "communicates"])
def test_a_live_model_that_is_wrong_on_one_rank_alone_ends_all_ranks_with_the_error(what):
    outcomes = pool(2).outcomes(_wrong_on_one_rank, what, timeout=60)
    messages = [outcome.message for outcome in outcomes]
    if what == "raises":
        assert all("MemoryError" in message for message in messages), messages
    elif what == "communicates":
        assert [o.error for o in outcomes] == ["SPMDError"] * 2
        assert all("allreduce" in message for message in messages), messages
    else:
        assert [o.error for o in outcomes] == ["LiveModelError"] * 2, messages
        assert all("model.decoder.layers.1.mlp: the model itself" in m for m in messages), messages


def _parallelized():
    from lirpa_megatron.adapters.parallelize import ColumnLinear

    net = parallelize(network().eval())
    bounded = BoundedModule(net, clean())
    bounded.compute_bounds(x=(ball(),), method="CROWN")
    with patched(ColumnLinear, _gained(1.001)):
        bounded.compute_bounds(x=(ball(),), method="CROWN")


def test_a_parallelized_network_is_compared_too():
    for outcome in pool(2).outcomes(_parallelized, timeout=60):
        assert outcome.error == "LiveModelError" and "0: the model itself" in outcome.message


def _embedding_on_one_rank():
    from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

    from lirpa_megatron.parallel import runtime

    model, ids = transformers.gpt(torch.float32), transformers.tokens()[0]
    embed(model, ids)
    with patched(VocabParallelEmbedding, _gained(2.0 if runtime.tp_rank() else 1.0)):
        embed(model, ids)


def test_an_embedding_that_is_wrong_on_one_rank_ends_all_ranks():
    for outcome in pool(2).outcomes(_embedding_on_one_rank, timeout=60):
        assert outcome.error == "LiveModelError" and "embedding: the model" in outcome.message
