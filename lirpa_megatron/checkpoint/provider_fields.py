"""The fields of a model provider (Megatron-Bridge, NeMo 2.0), as Megatron-LM's arguments.

A provider is megatron-core's TransformerConfig with the arguments of GPTModel beside it. Its fields
come from a file: classes and functions are names there (`_target_`), which are looked up in the
lists below and never imported. Every field is mapped, known to have no effect on the function, or
refused by name; a field that is on no list is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from lirpa_megatron.adapters import config_fields
from lirpa_megatron.checkpoint.hybrid import OLD_PATTERN, PATTERN, with_pattern
from lirpa_megatron.errors import UserError

_SAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
    "position_embedding_type", "rotary_percent", "rotary_base", "rotary_interleaved",
    "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "add_bias_linear",
    "add_qkv_bias", "qk_layernorm", "softmax_scale", "vocab_size", "rope_scaling_factor",
    "tensor_model_parallel_size", "pipeline_model_parallel_size",
)
"""Fields that are arguments under the same name."""

_LATER = {
    "softmax_type": "vanilla", "glu_linear_offset": 0.0, "activation_func_clamp_value": None,
    "window_size": None, "no_rope_freq": None, "qk_l2_norm": False, "use_mup": False,
}
"""As `_SAME`, in some of the releases only -> what releases without the field compute."""

_RENAMED = {
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
}

_READ = frozenset({
    *_SAME, *_LATER, *_RENAMED, "num_query_groups", "seq_length", "activation_func",
    "gated_linear_unit", "bias_activation_fusion", "share_embeddings_and_output_weights",
    "transformer_layer_spec", "transformer",
})

_NEUTRAL = frozenset("""
    _target_ _builder_ builder hf_model_id hf_model_revision extra_checkpoint_metadata
    generation_config make_vocab_size_divisible_by should_pad_vocab
    virtual_pipeline_model_parallel_size tp_comm_overlap_cfg use_arbitrary_attention_mask
    logit_dtype use_transformer_engine_full_layer_spec context_parallel_size
    hybrid_context_parallel enable_cuda_graph external_cuda_graph cuda_graph_impl transformer_impl
    mtp_hybrid_override_pattern
    bias_dropout_add_fusion forward_step_fn data_step_fn overlap_param_gather_with_optimizer_step
""".split())
"""Of providers: how a run is spread, captured, padded and logged."""

_NEUTRAL_IF_OFF = frozenset("""
    rotary_scaling_factor restore_modelopt_state mtp_enabled dense_grouped_gemm
    keep_mtp_spec_in_bf16 yarn_rotary_scaling_factor yarn_original_max_position_embeddings
    yarn_beta_fast yarn_beta_slow yarn_mscale yarn_mscale_all_dim
    yarn_correction_range_round_to_int quant_recipe peft num_moe_experts
""".split())
"""Of providers: another function where they are set."""

_HYBRID_NEUTRAL = frozenset(("mamba_chunk_size",))
_HYBRID_NEUTRAL_IF_OFF = frozenset((
    "hybrid_attention_ratio", "hybrid_mlp_ratio", "mtp_hybrid_override_pattern",
))
"""Of providers of HybridModel: neutral without Mamba layers; another model where they are set."""
_HYBRID_SPECS = ("hybrid_stack_spec", "mamba_stack_spec", "mtp_mamba_stack_spec")
_HYBRID_READ = frozenset((PATTERN, OLD_PATTERN, *_HYBRID_SPECS))

_SCALE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}

_FUNCTIONS = {
    "torch.nn.functional.gelu": "gelu", "torch._C._nn.gelu": "gelu", "gelu": "gelu",
    "torch.nn.functional.silu": "silu", "torch.nn.modules.activation.silu": "silu", "silu": "silu",
    "megatron.core.activations.squared_relu": "squared_relu", "squared_relu": "squared_relu",
    "relu2": "squared_relu",
    "megatron.core.activations.quick_gelu": "quick_gelu", "quick_gelu": "quick_gelu",
    "megatron.core.fusions.fused_bias_geglu.quick_gelu": "quick_gelu",
    "megatron.core.activations.fast_gelu": "gelu_tanh", "fast_gelu": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "megatron.core.transformer.utils.openai_gelu": "gelu_tanh",
    "nemo.collections.llm.fn.activation.openai_gelu": "gelu_tanh",
    "nemo.collections.llm.fn.activation.quick_gelu": "quick_gelu",
    "nemo.collections.llm.fn.activation.squared_relu": "squared_relu",
}
"""Names of activation functions in the files -> what they compute."""

_SPECS = re.compile(
    r"(megatron\.bridge\.models\.(gpt_provider|gpt\.gpt_builder)"
    r"|nemo\.collections\.llm\.gpt\.model\.base)"
    r"\.(default_layer_spec|transformer_engine_layer_spec|local_layer_spec)"
)
"""Layers of TransformerEngine or Megatron's own, which compute the same."""

_STACKS = re.compile(
    r"megatron\.bridge\.models\.(mamba\.mamba_(provider|builder)|hybrid\.hybrid_(provider|builder))"
    r"\.(get_default|transformer_engine)_(mamba|hybrid)_stack_spec"
)
"""As `_SPECS`, for stacks of hybrid layers."""


def arguments_of(
    fields: Mapping[str, Any], where: str, hybrid: bool = False
) -> dict[str, Any]:
    """Megatron-LM's arguments of a provider.

    Args:
        fields: by name, `_target_` among them, as a file holds them; those of a nested
            `transformer` count as the provider's own.
        where: the file, for messages.
        hybrid: whether the provider's model is a HybridModel.

    Raises:
        UserError: a field that is not known, that makes another function, or malformed.
    """
    fields = _flat(fields, where)
    for name in sorted(fields, key=str):
        if not (hybrid and _is_hybrid_field(name, fields[name], where)):
            _check_field(name, fields[name], where)
    values = {name: fields[name] for name in _SAME if name in fields}
    values |= {name: fields.get(name, default) for name, default in _LATER.items()}
    values |= {new: fields[old] for old, new in _RENAMED.items() if old in fields}
    groups = fields.get("num_query_groups")
    values["group_query_attention"] = groups is not None
    values["num_query_groups"] = 1 if groups is None else groups
    if "seq_length" in fields:
        values["seq_length"] = values["max_position_embeddings"] = fields["seq_length"]
    shared = fields.get("share_embeddings_and_output_weights")
    if type(shared) is bool:
        values["untie_embeddings_and_output_weights"] = not shared
    for name in _HYBRID_SPECS if hybrid else ("transformer_layer_spec",):
        spec = target_of(fields.get(name))
        known = _STACKS if hybrid else _SPECS
        if fields.get(name) is not None and (spec is None or not known.fullmatch(spec)):
            raise UserError(
                f"{where} ({name}={shown(fields[name])}): layers of this kind are not known"
            )
    if hybrid:
        values |= {name: fields[name] for name in (PATTERN, OLD_PATTERN) if fields.get(name)}
        values = with_pattern(values, where)
        if PATTERN not in values:
            raise UserError(f"{where} has no {PATTERN}: models of Mamba layers are not supported")
    values |= _activation(fields, where)
    return values


def ignored_of(fields: Mapping[str, Any], where: str, hybrid: bool = False) -> dict[str, Any]:
    """The fields of a provider that no model is built from, by name; as for `arguments_of`.

    Those are on a list of fields that have no effect on the function, or have none while they are
    off; others would have been refused.
    """
    read = _READ | _HYBRID_READ if hybrid else _READ
    return {name: value for name, value in _flat(fields, where).items() if name not in read}


def _is_hybrid_field(name: Any, value: Any, where: str) -> bool:
    """Whether a field is one of hybrid providers alone; refuses those that are set."""
    if name in _HYBRID_NEUTRAL_IF_OFF and not _is_off(name, value):
        raise UserError(f"{where} ({name}={shown(value)}): it is not supported")
    return name in _HYBRID_READ | _HYBRID_NEUTRAL | _HYBRID_NEUTRAL_IF_OFF


def llama_31_scale(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields with Llama 3.1's scale of rotary positions as Megatron's own.

    Its provider scales the frequencies itself, by four numbers, of which three are constants in
    megatron-core.

    Raises:
        UserError: other constants, a missing factor, or a second scale.
    """
    for name, value in _SCALE.items():
        if fields.get(name) != value:
            raise UserError(f"{where} ({name}={shown(fields.get(name))}): only {value} is "
                            "supported")
    if "scale_factor" not in fields:
        raise UserError(f"{where} has no field scale_factor")
    if fields.get("rope_scaling"):
        raise UserError(f"{where}: rotary positions are scaled twice, which is not supported")
    kept = {n: v for n, v in fields.items() if n not in (*_SCALE, "scale_factor")}
    return kept | {"rope_scaling": True, "rope_scaling_factor": fields["scale_factor"]}


def target_of(value: Any) -> str | None:
    """The name that an entry of the file gives for a class or function; None if it gives none."""
    if isinstance(value, Mapping):
        # A partial or called function is another one.
        known = set(value) <= {"_target_", "_call_"} and value.get("_call_") in (False, None)
        value = value.get("_target_") if known else None
    return value if isinstance(value, str) else None


def _flat(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    flat = dict(fields)
    inner = flat.pop("transformer", None)
    if inner is not None:
        if not isinstance(inner, Mapping):
            raise UserError(f"{where}: transformer={shown(inner)} is malformed")
        target = inner.get("_target_")
        if target not in (
            None, "megatron.core.transformer.transformer_config.TransformerConfig",
            "megatron.bridge.models.transformer_config.TransformerConfig",
        ):
            raise UserError(f"{where}: transformer has the class {shown(target)}, not known")
        twice = sorted((set(flat) & set(inner)) - {"_target_"}, key=str)
        if twice:
            raise UserError(f"{where}: {twice[0]!r} stands there twice")
        flat |= {name: value for name, value in inner.items() if name != "_target_"}
    return flat


def _check_field(name: Any, value: Any, where: str) -> None:
    if name in _READ or name in _NEUTRAL or name in config_fields.NEUTRAL:
        return
    if name in config_fields.MODELLED or name in config_fields.NEUTRAL_ARGUMENTS:
        return  # number types, dropout and the like, which the stored weights or eval mode decide
    if name in config_fields.MODELLED_ARGUMENTS:
        return
    if name in config_fields.REFUSED or name in _NEUTRAL_IF_OFF:
        if not _is_off(name, value):
            why = config_fields.REFUSED.get(name, "it is")
            raise UserError(f"{where} ({name}={shown(value)}): {why} not supported")
        return
    raise UserError(
        f"{where}: the field {name!r} is not known (of a newer release?), and it may change the "
        "function: if it does not, remove it from the file"
    )


def _is_off(name: str, value: Any) -> bool:
    if value in (None, False, 0, "none") or isinstance(value, (list, dict)) and not value:
        return True
    default = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    return type(value) in (int, str, float) and value == default.get(name)


def _activation(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Megatron's flags of the activation function."""
    missing = {"activation_func", "gated_linear_unit", "bias_activation_fusion"} - set(fields)
    if missing:
        raise UserError(f"{where} has no field {min(missing)}")
    gated, fused = fields["gated_linear_unit"], fields["bias_activation_fusion"]
    if type(gated) is not bool or type(fused) is not bool:
        raise UserError(f"{where}: gated_linear_unit or bias_activation_fusion is malformed")
    name = _FUNCTIONS.get(target_of(fields["activation_func"]))
    biased = fields.get("add_bias_linear") is True
    # Megatron's fused kernel of an ungated GELU is the tanh approximation, and needs a bias.
    flags = {
        ("silu", True): {"swiglu": True}, ("quick_gelu", True): {"quick_geglu": True},
        ("squared_relu", False): {"squared_relu": True},
        ("gelu", False): {"bias_gelu_fusion": fused},
    }
    if biased:
        flags["gelu_tanh", False] = {"bias_gelu_fusion": True}
    if (name, gated) not in flags or name == "gelu" and fused and not biased:
        raise UserError(
            f"{where} (activation_func={shown(fields['activation_func'])}, gated_linear_unit="
            f"{gated}, bias_activation_fusion={fused}, add_bias_linear={biased}): this activation "
            "is not supported"
        )
    off = {"swiglu": False, "quick_geglu": False, "squared_relu": False, "bias_gelu_fusion": False}
    return off | flags[name, gated]


def shown(value: Any) -> str:
    """A value in a message: short, whatever the file holds."""
    if isinstance(value, Mapping):
        return str(value.get("_target_", "a mapping"))[:80]
    if isinstance(value, (list, tuple)):
        return "a list"
    return repr(value)[:80]
