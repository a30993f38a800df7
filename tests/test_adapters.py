"""Facades of Megatron's transformer modules: the same function, the same parameters, batch first.

Every comparison is with Megatron's own forward, on the same ranks.
"""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from ranks import pool
from releases import built, config_has
from torch import nn

TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Rounding of sums of at most 32 terms, relative to outputs of order 1 (see `_error`)."""


def _gpt_cases():
    """Name -> (builder, its arguments)."""
    from megatron.core.activations import quick_gelu, squared_relu
    from megatron.core.transformer.utils import openai_gelu

    gpt, llama = transformers.gpt, transformers.llama
    tanh = functools.partial(F.gelu, approximate="tanh")
    return {
        "gpt": (gpt, {}),
        "gpt, untied": (gpt, {"model": {"share_embeddings_and_output_weights": False}}),
        "gpt, sharded logits": (gpt, {"model": {"parallel_output": True}}),
        "tanh GELU": (gpt, {"activation_func": tanh}),
        "OpenAI's GELU": (gpt, {"activation_func": openai_gelu}),
        "squared ReLU": (gpt, {"activation_func": squared_relu}),
        "quick GELU": (gpt, {"activation_func": quick_gelu}),
        "ReLU": (gpt, {"activation_func": F.relu}),
        "no biases": (gpt, {"add_bias_linear": False}),
        "bias of qkv only": (gpt, {"add_bias_linear": False, "add_qkv_bias": True}),
        "RMSNorm": (gpt, {"normalization": "RMSNorm"}),
        "norms of q and k": (gpt, {"qk_layernorm": True, "spec": {"qk_layernorm": True}}),
        "scaled by layer": (gpt, {"apply_query_key_layer_scaling": True}),
        "softmax scale": (gpt, {"softmax_scale": 0.3}),
        "groups": (gpt, {"num_query_groups": 2}),
        "llama": (llama, {}),
        "one group": (llama, {"num_query_groups": 1}),
        "llama with biases": (llama, {"add_bias_linear": True}),
        "norms of q and k, rotary": (
            llama, {"qk_layernorm": True, "spec": {"qk_layernorm": True}},
        ),
        "rotary, interleaved": (llama, {"rotary_interleaved": True}),
        "rotary, part of a head": (llama, {"kv_channels": 8, "model": {"rotary_percent": 0.5}}),
        "rotary, interleaved part": (
            llama, {"kv_channels": 8, "rotary_interleaved": True, "model": {"rotary_percent": 0.5}},
        ),
        "rotary, interpolated": (llama, {"model": {"seq_len_interpolation_factor": 4.0}}),
        "rotary, scaled": (llama, {"model": {"rope_scaling": True}}),
        "rotary on one layer": (llama, {"no_rope_freq": [0, 1]}),
        "GEGLU": (llama, {"activation_func": F.gelu}),
        "GLU with an offset": (
            llama, {"activation_func": quick_gelu, "glu_linear_offset": 1.0},
        ),
        "fused SwiGLU": (llama, {"bias_activation_fusion": True}),
        "transformer engine": (
            lambda dtype: transformers.with_transformer_engine(gpt(dtype)), {},
        ),
        "transformer engine, RMSNorm": (
            lambda dtype: transformers.with_transformer_engine(llama(dtype)), {},
        ),
    }


def _error(got, expected):
    """Largest difference, over the largest value or 1."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def _forward_errors(dtype):
    """Case -> error of its facade's output; and what is wrong with its parameters, if anything."""
    from lirpa_megatron.adapters.embeddings import embed
    from lirpa_megatron.adapters.traceable import traceable

    ids, positions, _, _ = transformers.tokens()
    errors, parameters = {}, {}
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        for name, (build, arguments) in _gpt_cases().items():
            if not config_has(*arguments.keys() - {"model", "spec"}):
                continue
            model = built(build, dtype, **arguments)
            if model is None:
                continue
            facade = traceable(model)
            errors[name] = _error(facade(embed(model, ids)), model(ids, positions, None))
            theirs, ours = dict(model.named_parameters()), dict(facade.named_parameters())
            parameters[name] = theirs.keys() ^ ours.keys() or [
                n for n, p in ours.items() if theirs[n] is not p
            ]
    return errors, parameters


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_gpt_facades_compute_what_megatron_computes(size, dtype):
    for errors, parameters in pool(size).run(_forward_errors, dtype):
        assert {n: e for n, e in errors.items() if not e < TOLERANCES[dtype]} == {}
        assert {n: p for n, p in parameters.items() if p} == {}


def _rounded_gelus(dtype):
    from megatron.core.activations import fast_gelu

    from lirpa_megatron.adapters.embeddings import embed
    from lirpa_megatron.adapters.traceable import traceable

    ids, positions, _, _ = transformers.tokens()
    fused = {"bias_activation_fusion": True, "activation_func": F.gelu}
    errors = []
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        for model in (
            transformers.gpt(dtype, **fused), transformers.llama(dtype, **fused),
            transformers.gpt(dtype, activation_func=fast_gelu),
        ):
            errors.append(_error(traceable(model)(embed(model, ids)), model(ids, positions, None)))
    return errors


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_megatrons_fused_gelus_are_the_tanh_approximation_up_to_their_rounded_constants(dtype):
    for errors in pool(2).run(_rounded_gelus, dtype):
        assert max(errors) < max(1e-9, TOLERANCES[dtype])


def _sequence_parallel():
    """Megatron on sequence shards, the facades on whole sequences."""
    from megatron.core.models.common.embeddings.language_model_embedding import (
        LanguageModelEmbedding,
    )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.mappings import (
        gather_from_sequence_parallel_region,
        scatter_to_sequence_parallel_region,
    )
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import build_module

    from lirpa_megatron.adapters.embeddings import embed
    from lirpa_megatron.adapters.traceable import traceable

    model = nn.Module()
    model.config = transformers.config(sequence_parallel=True)
    specs = get_gpt_layer_local_spec().submodules
    model.attention = build_module(specs.self_attention, config=model.config, layer_number=1)
    # A ModuleSpec; from 0.18 on a functools.partial.
    model.mlp = MLP(model.config, getattr(specs.mlp, "keywords", vars(specs.mlp))["submodules"])
    model.embedding = LanguageModelEmbedding(model.config, 32, 8)
    transformers.filled(model)
    ids, positions, _, _ = transformers.tokens()
    with torch.no_grad():
        shard = model.embedding(ids, positions)
        hidden = embed(model, ids)
        whole = gather_from_sequence_parallel_region(shard).transpose(0, 1)
        errors = [_error(hidden, whole)]
        shard = scatter_to_sequence_parallel_region(hidden.transpose(0, 1).contiguous())
        for module, inputs in ((model.attention, (shard, None)), (model.mlp, (shard,))):
            y, bias = module(*inputs)
            whole = gather_from_sequence_parallel_region((y + bias).contiguous()).transpose(0, 1)
            errors.append(_error(traceable(module)(hidden), whole))
    return errors


def test_sequence_parallel_modules_are_the_function_of_the_whole_sequence():
    for errors in pool(2).run(_sequence_parallel):
        assert max(errors) < 1e-12


def _views(dtype):
    """GPT and BERT from a layer on, at a position, with either head, and modules alone."""
    from lirpa_megatron.adapters.embeddings import embed
    from lirpa_megatron.adapters.traceable import traceable
    from lirpa_megatron.adapters.views import at_position, bert_head, from_layer

    ids, positions, padding, types = transformers.tokens()
    errors = {}

    def compare(name, got, expected):
        errors[name] = _error(got, expected)

    def swap(x):
        return x.transpose(0, 1)

    with torch.no_grad():
        model = transformers.gpt(dtype)
        hidden = embed(model, ids)
        compare("embed", hidden, swap(model.embedding(ids, positions)))
        logits = model(ids, positions, None)
        first = swap(model.decoder.layers[0](swap(hidden), None)[0])
        compare("layer", traceable(model.decoder.layers[0])(hidden), first)
        compare("from_layer", from_layer(model, 1)(first), logits)
        compare("at_position", at_position(model, -2)(hidden), logits[:, -2])
        both = at_position(from_layer(model, 1), 3)
        compare("both", both(first), logits[:, 3])
        compare("both, the other way", from_layer(at_position(model, 3), 1)(first), logits[:, 3])
        names = {f"model.{n}" for n, _ in model.named_parameters()}
        assert {n for n, _ in both.named_parameters()} == names
        assert {n for n, _ in traceable(both).named_parameters()} == names
        block = model.decoder
        compare("block", traceable(block)(hidden), swap(block(swap(hidden), None)))
        compare("block from layer", from_layer(block, 1)(first), traceable(block)(hidden))
        attention, mlp = block.layers[0].self_attention, block.layers[0].mlp
        y, bias = attention(swap(hidden), None)
        compare("attention", traceable(attention)(hidden), swap(y + bias))
        y, bias = mlp(swap(hidden))
        compare("mlp", traceable(mlp)(hidden), swap(y + bias))
        mask = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5
        mask[1, :, 4] = True  # a row where everything is masked
        compare("given mask", traceable(model)(hidden, mask), model(ids, positions, mask.clone()))
        compare("mask of numbers", traceable(model)(hidden, mask.to(dtype)),
                model(ids, positions, mask.clone()))

        for name, arguments in {
            "bert": {}, "bert, sharded logits": {"parallel_output": True},
            "bert, untied": {"share_embeddings_and_output_weights": False},
        }.items():
            model = transformers.bert(dtype, arguments)
            hidden = embed(model, ids, tokentype_ids=types)
            compare(f"{name}, embed", hidden, swap(model.embedding(ids, positions, types)))
            lm, binary = model(ids, padding, types)
            mask = model.bert_extended_attention_mask(padding)
            compare(name, traceable(model)(hidden, mask), binary)
            compare(f"{name}, binary", bert_head(model, "binary")(hidden, mask), binary)
            compare(f"{name}, lm", bert_head(model, "lm")(hidden, mask), lm)
            at = at_position(bert_head(model, "lm"), 2)
            compare(f"{name}, lm at a position", at(hidden, mask), lm[:, 2])
            lm, binary = model(ids, torch.ones_like(padding), types)
            compare(f"{name}, no mask", traceable(model)(hidden), binary)
            first = swap(model.encoder.layers[0](swap(hidden), mask)[0])
            compare(f"{name}, from layer", from_layer(model, 1)(first, mask),
                    traceable(model)(hidden, mask))
        model = transformers.bert(dtype, {"add_binary_head": False})
        hidden = embed(model, ids, tokentype_ids=types)
        compare("bert, no binary head", traceable(model)(hidden, mask),
                model(ids, padding, types)[0])
    return errors


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_views_and_modules_alone_compute_what_megatron_computes(size, dtype):
    for errors in pool(size).run(_views, dtype):
        assert {n: e for n, e in errors.items() if not e < TOLERANCES[dtype]} == {}


def _gradient_errors():
    from lirpa_megatron.adapters.embeddings import embed
    from lirpa_megatron.adapters.traceable import traceable

    ids, positions, padding, types = transformers.tokens()
    errors = {}

    def gradients(model, output):
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        names, parameters = zip(*model.named_parameters(), strict=True)
        loss = (output * weights).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return dict(zip(names, found, strict=True))

    def compare(name, model, theirs, ours):
        theirs, ours = gradients(model, theirs), gradients(model, ours)
        for parameter, expected in theirs.items():
            got = ours[parameter]
            if expected is None:
                assert got is None, f"{name}: {parameter}"
            else:
                errors[name, parameter] = _error(got, expected)

    for name in ("gpt", "gpt, sharded logits", "llama", "one group", "norms of q and k, rotary"):
        build, arguments = _gpt_cases()[name]
        model = built(build, torch.float64, **arguments)
        if model is None:
            continue
        compare(name, model, model(ids, positions, None), traceable(model)(embed(model, ids)))
    model = transformers.bert()
    hidden, mask = embed(model, ids, None, types), model.bert_extended_attention_mask(padding)
    compare("bert", model, model(ids, padding, types)[1], traceable(model)(hidden, mask))
    return errors


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_of_all_parameters_are_megatrons(size):
    for errors in pool(size).run(_gradient_errors):
        assert {n: e for n, e in errors.items() if not e < 1e-12} == {}


def _traced():
    """The facades under torch.jit.trace, and the operators of the host's graph."""
    from megatron.core.activations import squared_relu
    from torch.onnx.utils import _optimize_graph

    from lirpa_megatron.adapters.plain.exported import own_operators
    from lirpa_megatron.adapters.traceable import traceable
    from lirpa_megatron.adapters.views import at_position, bert_head, from_layer
    from lirpa_megatron.compat import auto_lirpa

    torch.set_default_dtype(torch.float64)
    x = torch.randn(2, transformers.LENGTH, transformers.HIDDEN)
    other, mask = torch.randn_like(x), torch.randint(0, 2, (2, 1, 8, 8)).double()
    bert = transformers.bert()
    cases = {
        "gpt": (at_position(from_layer(transformers.gpt(), 1), -1), (x,)),
        "squared ReLU": (transformers.gpt(activation_func=squared_relu), (x, mask)),
        "llama": (transformers.llama(qk_layernorm=True, spec={"qk_layernorm": True}), (x,)),
        "bert": (bert, (x, mask)),
        "bert lm": (bert_head(bert, "lm"), (x, mask)),
        "engine": (transformers.with_transformer_engine(transformers.gpt()), (x,)),
        "plain": (nn.Sequential(nn.LayerNorm(16), nn.GELU(), nn.RMSNorm(16), nn.SiLU()), (x,)),
    }
    errors, operators = {}, {}
    for name, (model, inputs) in cases.items():
        facade = traceable(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(facade, inputs, check_trace=False)
            errors[name] = _error(traced(other, *inputs[1:]), facade(other, *inputs[1:]))
        with own_operators(), auto_lirpa.conversion(inputs), auto_lirpa.running():
            graph, _ = torch.jit._get_trace_graph(facade, inputs)
            export = torch.onnx.OperatorExportTypes.ONNX_ATEN_FALLBACK
            graph = _optimize_graph(graph, export, params_dict={})
        operators[name] = {node.kind() for node in graph.nodes()}
    return errors, operators


def test_traced_facades_compute_the_same_and_consist_of_known_operators():
    errors, operators = pool(1).run(_traced)[0]
    assert {n: e for n, e in errors.items() if not e < 1e-12} == {}
    linear, plain = {"ColumnParallelLinear", "RowParallelLinear"}, {"onnx::Add", "onnx::Constant"}
    layers, gather = {*linear, "Norm", "Scores", "Attend"}, "GatherFromRegion"
    expected = {
        "gpt": {*layers, gather, "GeluErf", "SelectPosition"},
        "squared ReLU": {*layers, gather, "SquaredRelu"},
        "llama": {*layers, gather, "Silu", "Product", "Rotary"},
        "bert": {*layers, "GeluErf", "SelectPosition", "Tanh"},
        "bert lm": {*layers, gather, "GeluErf", "ReplicatedLinear"},
        "engine": {*layers, gather, "GeluErf"},
        "plain": {"Norm", "GeluErf", "Silu"},
    }
    for name, found in operators.items():
        ours = {kind.split("::")[1] for kind in found if kind.startswith("lirpa_megatron::")}
        assert ours == expected[name]
        others = found - plain - {f"lirpa_megatron::{kind}" for kind in ours}
        # A replicated nn.Linear with a bias is the host's.
        assert others <= ({"onnx::Gemm", "onnx::MatMul", "onnx::Transpose"}
                          if name.startswith("bert") else set())


def _plain_norms():
    from megatron.core.transformer.torch_norm import L2Norm

    from lirpa_megatron.adapters.traceable import traceable

    torch.set_default_dtype(torch.float64)
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    weight, bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
    modules = [
        nn.LayerNorm(8), nn.LayerNorm(8, eps=0.1, bias=False),
        nn.LayerNorm(8, elementwise_affine=False), nn.RMSNorm(8), nn.RMSNorm(8, eps=0.1),
        nn.RMSNorm(8, elementwise_affine=False),
        transformers.FusedLayerNorm(weight, bias, 1e-3),
        transformers.FusedLayerNorm(weight, bias, 1e-3, zero_centered_gamma=True),
        transformers.RMSNorm(weight, 1e-3), transformers.RMSNorm(weight, 1e-3, True),
    ]
    torch.manual_seed(0)
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, 1.0)
    facades = [traceable(nn.Sequential(module))[0] for module in modules]
    assert not any(type(a) is type(b) for a, b in zip(modules, facades, strict=True))
    single, l2 = x.float(), L2Norm(8)  # it computes in float32
    with torch.compiler.set_stance("force_eager"):
        assert _error(traceable(nn.Sequential(l2))(single), l2(single)) < 1e-6
    kept = nn.Sequential(nn.Tanh(), nn.ReLU(), nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"), nn.SiLU())
    copied = traceable(kept)
    assert [type(m) for m in copied] == [type(m) for m in kept]
    assert copied[4].approximate == "tanh"
    return [_error(facade(x), module(x)) for facade, module in zip(facades, modules, strict=True)]


def test_norms_and_activations_anywhere_in_a_model():
    assert max(pool(1).run(_plain_norms)[0]) < 1e-12
