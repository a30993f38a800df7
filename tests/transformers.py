"""Small Megatron models for tests, the same function at every tensor-parallel size."""

from __future__ import annotations

import types
import zlib

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, FFN, HEADS, LAYERS, VOCABULARY, LENGTH = 16, 32, 4, 2, 32, 8


LLAMA = dict(
    num_query_groups=2, add_bias_linear=False, activation_func=F.silu, gated_linear_unit=True,
    normalization="RMSNorm", layernorm_epsilon=1e-5,
)


def config(dtype=torch.float64, **flags):
    """A TransformerConfig for a CPU; `flags` replace its settings."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from lirpa_megatron.parallel import runtime

    settings = dict(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, ffn_hidden_size=FFN,
        tensor_model_parallel_size=runtime.tp_size(), params_dtype=dtype,
        use_cpu_initialization=True, gradient_accumulation_fusion=False,
        hidden_dropout=0.0, attention_dropout=0.0, masked_softmax_fusion=False,
        bias_activation_fusion=False, bias_dropout_fusion=False, persist_layer_norm=False,
        apply_rope_fusion=False, attention_softmax_in_fp32=True, activation_func=F.gelu,
    )
    return TransformerConfig(**{**settings, **flags})


def gpt(dtype=torch.float64, model=None, spec=None, **flags):
    """LayerNorm, erf GELU, learned positions, tied output layer.

    Args:
        dtype: of the parameters.
        model: replaces arguments of GPTModel.
        spec: arguments of get_gpt_layer_local_spec.
        **flags: replace settings of the TransformerConfig.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    settings = dict(
        vocab_size=VOCABULARY, max_sequence_length=LENGTH, parallel_output=False,
        position_embedding_type="learned_absolute", share_embeddings_and_output_weights=True,
    )
    cfg = config(dtype, **flags)
    layer = get_gpt_layer_local_spec(normalization=cfg.normalization, **(spec or {}))
    built = GPTModel(config=cfg, transformer_layer_spec=layer, **{**settings, **(model or {})})
    return filled(built, dtype)


def llama(dtype=torch.float64, model=None, spec=None, **flags):
    """RMSNorm, SwiGLU, rotary positions, two query groups, no biases, untied output layer."""
    flags = {**LLAMA, **flags}
    model = {
        "position_embedding_type": "rope", "share_embeddings_and_output_weights": False,
        **(model or {}),
    }
    return gpt(dtype, model, spec, **flags)


def bert(dtype=torch.float64, model=None, **flags):
    """Two token types, both heads, tied output layer."""
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    settings = dict(
        num_tokentypes=2, vocab_size=VOCABULARY, max_sequence_length=LENGTH, parallel_output=False,
        share_embeddings_and_output_weights=True, add_binary_head=True,
    )
    built = BertModel(config=config(dtype, **flags), transformer_layer_spec=bert_layer_local_spec,
                      **{**settings, **(model or {})})
    return filled(built, dtype)


def hybrid(dtype=torch.float64, model=None, spec=None, pattern="*-*-", **flags):
    """A HybridModel (MambaModel up to 0.17) of layers of attention `*` and MLP `-`.

    megatron-core's own specification of the stack asks for TransformerEngine, as does its last
    norm; here they are those of the local specification.

    Args:
        dtype, spec, **flags: as for `gpt`.
        model: replaces arguments of HybridModel.
        pattern: a letter for each layer; letters of other layers get an MLP in their place.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    from lirpa_megatron.compat import megatron_hybrid as names

    settings = dict(
        vocab_size=VOCABULARY, max_sequence_length=LENGTH, parallel_output=False,
        position_embedding_type="learned_absolute", share_embeddings_and_output_weights=True,
    )
    cfg = config(dtype, num_layers=len(pattern), **flags)
    parts = get_gpt_layer_local_spec(normalization=cfg.normalization, **(spec or {})).submodules
    attention = ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(
        input_layernorm=parts.input_layernorm, self_attention=parts.self_attention,
        self_attn_bda=parts.self_attn_bda,
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    ))
    mlp = ModuleSpec(module=MLPLayer, submodules=TransformerLayerSubmodules(
        pre_mlp_layernorm=parts.pre_mlp_layernorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    ))
    known = names.HybridStackSubmodules.__dataclass_fields__
    layers = {name: mlp for name in known if name.endswith("_layer")} | {
        "attention_layer": attention}
    stack = ModuleSpec(
        module=names.HybridStack, submodules=names.HybridStackSubmodules(**layers),
        params={"post_layer_norm": False},
    )
    built = names.HybridModel(
        config=cfg, **{names.STACK_SPEC: stack, names.PATTERN: pattern},
        **{**settings, **(model or {})},
    )
    built.decoder.post_layer_norm = True
    built.decoder.final_norm = WrappedTorchNorm(cfg, cfg.hidden_size, eps=cfg.layernorm_epsilon)
    return filled(built, dtype)


def hybrid_llama(dtype=torch.float64, model=None, spec=None, pattern="*-*-", **flags):
    """As `llama`, with a layer for each letter of a pattern."""
    flags = {**LLAMA, **flags}
    model = {
        "position_embedding_type": "rope", "share_embeddings_and_output_weights": False,
        **(model or {}),
    }
    return hybrid(dtype, model, spec, pattern, **flags)


def filled(model, dtype=torch.float64):
    """The model in eval mode with weights that depend on their names alone.

    Each parameter is this rank's part of a full one: biases and norms are not trivial, and the same
    full model results at every tensor-parallel size.
    """
    from lirpa_megatron.parallel import runtime

    size, rank = runtime.tp_size(), runtime.tp_rank()
    model.to(dtype).eval()
    for name, parameter in model.named_parameters():
        shape = list(parameter.shape)
        sharded = getattr(parameter, "tensor_model_parallel", False)
        if sharded:
            shape[parameter.partition_dim] *= size
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        full = 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight"):
            full += 1
        if "embeddings" in name:
            full *= 3
        if sharded:
            gated = "linear_fc1" in name and model.config.gated_linear_unit
            halves = full.chunk(2) if gated else (full,)  # [gate; up], each rank has part of both
            parts = [half.chunk(size, parameter.partition_dim)[rank] for half in halves]
            full = torch.cat(parts)
        with torch.no_grad():
            parameter.copy_(full)
    return model


def whole_gradient(name, parameter, gradient, model, tp):
    """A gradient of the rank's part of a parameter -> that of the whole one; collective."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return gradient.clone()
    dim = parameter.partition_dim
    parts = tp.gather_results(gradient.movedim(dim, 0).contiguous())
    if "linear_fc1" in name and model.config.gated_linear_unit:  # [gate; up] on every rank
        halves = [part.chunk(2) for part in parts.chunk(tp.size)]
        parts = torch.cat([h[0] for h in halves] + [h[1] for h in halves])
    return parts.movedim(0, dim).clone()


def tokens(batch=2):
    """ids [B, S], position ids [B, S], padding mask [B, S] (1 keeps), token types [B, S]."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCABULARY, (batch, LENGTH), generator=generator)
    positions = torch.arange(LENGTH).expand(batch, LENGTH)
    padding = torch.ones(batch, LENGTH)
    padding[-1, LENGTH - 2 :] = 0
    types = (torch.arange(LENGTH) >= LENGTH // 2).long().expand(batch, LENGTH)
    return ids, positions, padding, types


# ------------------------------------------- what apex and TransformerEngine would put in a model


def _stand_in(module, **attributes):
    """Gives a class, and the code of its methods, the package that they stand for."""
    def decorate(cls):
        cls.__module__ = module
        for name, f in list(vars(cls).items()):
            if isinstance(f, types.FunctionType):
                there = {**f.__globals__, "__name__": module}
                moved = types.FunctionType(
                    f.__code__, there, name, f.__defaults__, f.__closure__
                )
                moved.__kwdefaults__ = f.__kwdefaults__
                setattr(cls, name, moved)
        for name, value in attributes.items():
            setattr(cls, name, value)
        return cls
    return decorate


_TE = "megatron.core.extensions.transformer_engine"


@_stand_in("apex.normalization.fused_layer_norm")
class FusedLayerNorm(nn.Module):
    """Zero-centred when told so, as in Megatron's wrapper of apex."""

    def __init__(self, weight, bias, eps, zero_centered_gamma=False):
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps
        self.zero_centered_gamma = zero_centered_gamma

    def forward(self, x):
        weight = self.weight + 1 if self.zero_centered_gamma else self.weight
        return F.layer_norm(x, weight.shape, weight, self.bias, self.eps)


@_stand_in("transformer_engine.pytorch.module.rmsnorm")
class RMSNorm(nn.Module):
    def __init__(self, weight, eps, zero_centered_gamma=False):
        super().__init__()
        self.weight, self.eps, self.zero_centered_gamma = weight, eps, zero_centered_gamma

    def forward(self, x):
        weight = self.weight + 1 if self.zero_centered_gamma else self.weight
        return F.rms_norm(x, weight.shape, weight, self.eps)


class _TELinear(nn.Module):
    """Without most of the attributes of Megatron's layers; no bias is an empty tensor."""

    def __init__(self, layer):
        super().__init__()
        self.weight = layer.weight
        self.bias = torch.empty(0) if layer.bias is None else layer.bias
        self.te_return_bias = layer.skip_bias_add and layer.bias is not None
        self.inner = [layer]

    def forward(self, x):
        return self.inner[0](x)


@_stand_in(_TE)
class TEColumnParallelLinear(_TELinear):
    pass


@_stand_in(_TE)
class TERowParallelLinear(_TELinear):
    pass


@_stand_in(_TE)
class TELayerNormColumnParallelLinear(_TELinear):
    def __init__(self, norm, layer):
        super().__init__(layer)
        self.layer_norm_weight = norm.weight
        self.layer_norm_bias = getattr(norm, "bias", None)
        self.eps, self.zero_centered_gamma = norm.eps, False
        self.normalization = "LayerNorm" if self.layer_norm_bias is not None else "RMSNorm"

    def forward(self, x):
        w, b = self.layer_norm_weight, self.layer_norm_bias
        if b is None:
            return super().forward(F.rms_norm(x, w.shape, w, self.eps))
        return super().forward(F.layer_norm(x, w.shape, w, b, self.eps))


@_stand_in(_TE)
class TEDotProductAttention(nn.Module):
    def __init__(self, core):
        super().__init__()
        self.inner = [core]

    def forward(self, *args, **kwargs):
        return self.inner[0](*args, **kwargs)


def with_transformer_engine(model):
    """The model with stand-ins for TransformerEngine's layers, sharing its parameters."""
    from megatron.core.transformer.identity_op import IdentityOp

    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        attention.linear_qkv = TELayerNormColumnParallelLinear(
            layer.input_layernorm, attention.linear_qkv
        )
        mlp.linear_fc1 = TELayerNormColumnParallelLinear(layer.pre_mlp_layernorm, mlp.linear_fc1)
        layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp()
        attention.linear_proj = TERowParallelLinear(attention.linear_proj)
        mlp.linear_fc2 = TERowParallelLinear(mlp.linear_fc2)
        attention.core_attention = TEDotProductAttention(attention.core_attention)
    norm = model.decoder.final_layernorm
    if isinstance(norm, nn.LayerNorm):
        norm = FusedLayerNorm(norm.weight, norm.bias, norm.eps)
    else:
        norm = RMSNorm(norm.weight, norm.eps)
    model.decoder.final_layernorm = norm
    return model
