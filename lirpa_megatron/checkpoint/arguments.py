"""Megatron-LM's arguments, as a checkpoint holds them, checked: what model they describe.

The names are those of Megatron's command line (the attributes of its Namespace). They are read as
Megatron's own `core_transformer_config_from_args` and its GPT and BERT builders read them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lirpa_megatron.checkpoint.hybrid import OLD_PATTERN, PATTERN, with_pattern
from lirpa_megatron.errors import UserError

_DEFAULTS: dict[str, Any] = {
    "num_layers": 0, "hidden_size": 0, "ffn_hidden_size": None, "num_attention_heads": 0,
    "group_query_attention": False, "num_query_groups": 1, "kv_channels": None,
    "max_position_embeddings": 0, "position_embedding_type": "learned_absolute",
    "use_rotary_position_embeddings": False, "rotary_percent": 1.0, "rotary_base": 10000,
    "rotary_interleaved": False, "use_rope_scaling": False, "rope_scaling_factor": 8.0,
    "rotary_seq_len_interpolation_factor": None, "normalization": "LayerNorm",
    "layernorm_epsilon": 1e-5, "layernorm_zero_centered_gamma": False, "add_bias_linear": True,
    "add_qkv_bias": False, "qk_layernorm": False, "softmax_scale": None, "swiglu": False,
    "quick_geglu": False, "squared_relu": False, "bias_gelu_fusion": True,
    "glu_linear_offset": 0.0, "activation_func_clamp_value": None,
    "untie_embeddings_and_output_weights": False, "vocab_size": None, "padded_vocab_size": None,
    "seq_length": None, "tensor_model_parallel_size": None, "pipeline_model_parallel_size": None,
    "softmax_type": "vanilla", "window_size": None, PATTERN: None,
}
"""What is read, with the default of Megatron's parser, for releases that do not know the name."""

_RENAMED = {
    "norm_epsilon": ("layernorm_epsilon", lambda value: value),
    "apply_layernorm_1p": ("layernorm_zero_centered_gamma", lambda value: value),
    "disable_bias_linear": ("add_bias_linear", lambda value: not value),
}
"""Names of other releases -> today's name, and how the value becomes today's."""

_DECISIVE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
    "max_position_embeddings", "position_embedding_type", "normalization", "layernorm_epsilon",
    "add_bias_linear", "swiglu", "bias_gelu_fusion", "untie_embeddings_and_output_weights",
)
"""What a model configuration must say where the checkpoint has no arguments: never guessed."""

_DECISIVE_TOO = (
    ("softmax_type", "vanilla", lambda given: True),
    ("softmax_scale", "null: 1 / sqrt(kv_channels)", lambda given: True),
    ("window_size", "null: none", lambda given: True),
    ("layernorm_zero_centered_gamma", "false", lambda given: True),
    ("rotary_base", "10000; Llama 3 has 500000", lambda given: _is_rotary(given)),
    ("rotary_percent", "1.0", lambda given: _is_rotary(given)),
    ("rotary_interleaved", "false", lambda given: _is_rotary(given)),
    ("use_rope_scaling", "false; Llama 3.1 has true", lambda given: _is_rotary(given)),
    ("rope_scaling_factor", "8.0",
     lambda given: _is_rotary(given) and given.get("use_rope_scaling")),
    ("rotary_seq_len_interpolation_factor", "null", lambda given: _is_rotary(given)),
    ("no_rope_freq", "null", lambda given: _is_rotary(given)),
    ("qk_l2_norm", "false", lambda given: True),
    ("use_mup", "false", lambda given: True),
    ("glu_linear_offset", "0.0", lambda given: given["swiglu"] or given.get("quick_geglu")),
    ("activation_func_clamp_value", "null",
     lambda given: given["swiglu"] or given.get("quick_geglu")),
    ("quick_geglu", "false", lambda given: not given["swiglu"]),
    ("squared_relu", "false", lambda given: not given["swiglu"]),
)
"""What decides the function too and leaves no trace in the tensors -> its usual value, and whether
a configuration with all of `_DECISIVE` must say it."""

_REFUSED: dict[str, str] = {
    "num_experts": "MoE (expert) layers are not supported, their tokens are routed by values",
    "multi_latent_attention": "multi-latent attention is not supported",
    "mtp_num_layers": "multi-token prediction is not supported",
    "fp8": "fp8 weights and activations are not supported",
    "fp8_param_gather": "fp8 weights are not supported",
    "fp4": "fp4 weights and activations are not supported",
    "fp4_param": "fp4 weights are not supported",
    "fp4_param_gather": "fp4 weights are not supported",
    "te_precision_config_file": "quantised layers are not supported",
    "kitchen_config_file": "quantised layers are not supported",
    "kitchen_recipe_number": "quantised layers are not supported",
    "use_kitchen_attention": "quantised layers are not supported",
    "is_hybrid_model": "Mamba and other hybrid models without a pattern of layers are not "
        "supported",
    "experimental_attention_variant": "attention variants are not supported",
    "linear_attention_freq": "linear attention is not supported",
    "heterogeneous_layers_config_path": "layers that differ from each other are not supported",
    "heterogeneous_layers_config_encoded_json":
        "layers that differ from each other are not supported",
    "attention_output_gate": "output gates of attention are not supported",
    "enable_hyper_connections": "hyper connections are not supported",
    "enable_mhc_connections": "hyper connections are not supported",
    "use_mup": "muP's multipliers are not supported",
    "use_te_activation_func": "TransformerEngine's activation functions are not supported",
    "apply_residual_connection_post_layernorm": "post-layernorm residuals are not supported",
    "qk_l2_norm": "L2 norms of queries and keys are not supported",
    "no_rope_freq": "layers without rotary positions among others are not supported",
    "activation_func_clamp_value": "clamped activation functions are not supported",
    "use_legacy_models": "Megatron-LM's legacy (not core) models are not supported",
    "retro_add_retriever": "Retro models are not supported",
    "vision_pretraining": "vision models are not supported",
    "yaml_cfg": "models described by Megatron's --yaml-cfg are not supported",
}
"""Arguments that make another function, where they are set -> why they are refused."""

_POSITIONS = ("learned_absolute", "rope", "none")
_NORMS = ("LayerNorm", "RMSNorm")
_COUNTS = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")


def read_model_config(path: Path) -> dict[str, Any]:
    """The overrides that a YAML file gives: Megatron's argument names with plain values.

    Raises:
        UserError: unreadable, not YAML, or names that are not known.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"model config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise UserError(f"model config {path} is not valid YAML") from None
    if not isinstance(content, dict):
        raise UserError(f"model config {path} must map names of Megatron's arguments to values")
    plain = {str(key).replace("-", "_"): value for key, value in content.items()}
    check_overrides(plain, f"model config {path}")
    return plain


def check_overrides(overrides: Mapping[str, Any], where: str = "overrides") -> None:
    """Raises UserError for names that no model is built from."""
    known = {*_DEFAULTS, *_RENAMED, *_REFUSED}
    for name in overrides:
        if name not in known:
            raise UserError(
                f"{where}: unknown model argument {name!r}; known are "
                f"{', '.join(sorted({*_DEFAULTS, *_RENAMED}))}"
            )


def ignored_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of Megatron-LM that no model is built from: of training, data, logs."""
    looked_at = {*_DEFAULTS, *_RENAMED, *_REFUSED, OLD_PATTERN, "spec"}
    return {name: value for name, value in stored.items() if name not in looked_at}


def merged(
    stored: Mapping[str, Any] | None, overrides: Mapping[str, Any], where: str,
    of_parser: bool = True,
) -> dict[str, Any]:
    """The arguments under today's names, all of them, checked.

    Args:
        stored: what the checkpoint holds; None if it holds none.
        overrides: win over `stored`.
        where: the checkpoint's name for messages.
        of_parser: whether `stored` is what Megatron's parser made. It lacks what came with later
            releases, and some of it was not obeyed; other writers say all, and mean it.

    Raises:
        UserError: missing or malformed arguments, or a model that is not supported (by name).
    """
    check_overrides(overrides)
    given = _renamed(dict(stored or {})) | _renamed(dict(overrides))
    given = with_pattern(given, f"checkpoint {where}")
    _check_decided(given, stored is not None, of_parser, where)
    _check_supported(given, where)
    values = {name: given.get(name, default) for name, default in _DEFAULTS.items()}
    if values["use_rotary_position_embeddings"]:
        values["position_embedding_type"] = "rope"
    _check_types(values, where)
    if of_parser:
        _check_obeyed(values, _renamed(dict(overrides)), where)
    _fill_in(values)
    return values


def _check_obeyed(values: Mapping[str, Any], explicit: Mapping[str, Any], where: str) -> None:
    """Refuses scales of rotary positions that some releases read and others do not."""
    if values["use_rope_scaling"] and values["rope_scaling_factor"] != _DEFAULTS[
        "rope_scaling_factor"
    ] and "rope_scaling_factor" not in explicit:
        raise UserError(
            f"checkpoint {where}: Megatron's releases differ in whether they obey "
            f"rope_scaling_factor={values['rope_scaling_factor']}: set it in the model config to "
            "what the model was trained with (8.0 if it was not obeyed)"
        )
    name = "rotary_seq_len_interpolation_factor"
    if values[name] is not None and name not in explicit:
        raise UserError(
            f"checkpoint {where}: Megatron's releases differ in whether they obey "
            f"{name}={values[name]}: set it in the model config to what the model was trained with"
        )


def _check_decided(
    given: Mapping[str, Any], is_stored: bool, of_parser: bool, where: str
) -> None:
    """Refuses to guess what decides the function.

    Arguments that a checkpoint holds may lack what came with later releases than the one that wrote
    them, and have its default then. Nothing tells the base of rotary positions in the same way:
    releases before the argument had 10000, and programs that are not Megatron leave it out.
    """
    missing = [name for name in _DECISIVE if name not in given] or [
        f"{name} (usually {usual})" for name, usual, is_needed in _DECISIVE_TOO
        if name not in given and is_needed(given)
        and (not (is_stored and of_parser) or name == "rotary_base")
    ]
    if missing:
        what = "lacks some of" if is_stored else "does not hold"
        raise UserError(
            f"checkpoint {where} {what} Megatron's arguments: give them with --model-config "
            f"FILE.yaml; still missing are {', '.join(missing)}"
        )


def _is_rotary(given: Mapping[str, Any]) -> bool:
    return given["position_embedding_type"] == "rope" or bool(
        given.get("use_rotary_position_embeddings")
    )


def _renamed(given: dict[str, Any]) -> dict[str, Any]:
    for old, (new, convert) in _RENAMED.items():
        if old in given:
            value = convert(given.pop(old))
            given.setdefault(new, value)
    return given


def _check_supported(given: Mapping[str, Any], where: str) -> None:
    for name, why in _REFUSED.items():
        if given.get(name):
            raise UserError(f"checkpoint {where} ({name}={given[name]!r}): {why}")
    spec = given.get("spec")
    if spec and list(spec) != ["local"]:
        raise UserError(f"checkpoint {where} (spec={spec!r}): layer specs of users are unknown")
    if given.get("softmax_type", "vanilla") != "vanilla":
        raise UserError(
            f"checkpoint {where} (softmax_type={given['softmax_type']!r}): only the vanilla "
            "softmax is supported"
        )


def _check_types(values: Mapping[str, Any], where: str) -> None:
    for name, default in _DEFAULTS.items():
        value = values[name]
        optional = default is None
        if optional and value is None or name == "ffn_hidden_size" and value is None:
            continue
        if isinstance(default, bool):
            good = isinstance(value, bool)
        elif name == "window_size":
            good = (
                isinstance(value, (list, tuple)) and len(value) == 2
                and type(value[0]) is int and value[0] >= 0 and value[1] == 0
            )
        elif isinstance(default, str) or name == PATTERN:
            good = isinstance(value, str)
        elif isinstance(default, float) or name in ("rotary_base", "softmax_scale",
                                                    "rotary_seq_len_interpolation_factor",
                                                    "activation_func_clamp_value"):
            good = type(value) in (int, float) and math.isfinite(value)
        else:
            good = type(value) is int and (value > 0 or name not in _COUNTS) and value < 2**40
        if not good:
            raise UserError(f"checkpoint {where}: the model argument {name}={value!r} is malformed")
    if values["position_embedding_type"] not in _POSITIONS:
        raise UserError(
            f"checkpoint {where} (position_embedding_type={values['position_embedding_type']!r}) "
            f"is not supported: supported are {', '.join(_POSITIONS)}"
        )
    if values["normalization"] not in _NORMS:
        raise UserError(
            f"checkpoint {where} (normalization={values['normalization']!r}) is not supported: "
            f"supported are {', '.join(_NORMS)}"
        )
    if values["num_layers"] > 100_000:
        raise UserError(f"checkpoint {where}: num_layers={values['num_layers']} is not believable")


def _fill_in(values: dict[str, Any]) -> None:
    """What Megatron's validation would have derived."""
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if values["ffn_hidden_size"] is None:
        # As in Megatron's validate_args.
        values["ffn_hidden_size"] = (
            int(4 * hidden * 2 / 3 / 64) * 64 if values["swiglu"] else 4 * hidden
        )
    if values["kv_channels"] is None:
        if hidden % heads:
            raise UserError(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}")
        values["kv_channels"] = hidden // heads
    if not values["group_query_attention"]:
        values["num_query_groups"] = heads
    if not values["num_query_groups"] or heads % values["num_query_groups"]:
        raise UserError(
            f"num_attention_heads {heads} is not divisible by num_query_groups "
            f"{values['num_query_groups']}"
        )
    if not values["add_bias_linear"]:
        values["bias_gelu_fusion"] = False


def activation(values: Mapping[str, Any], where: str) -> tuple[str, bool]:
    """(name of the activation function, whether the MLP is gated), as Megatron decides it."""
    chosen = [name for name in ("swiglu", "quick_geglu", "squared_relu") if values[name]]
    if len(chosen) > 1:
        raise UserError(f"checkpoint {where}: {' and '.join(chosen)} exclude each other")
    if values["swiglu"]:
        return "silu", True
    if values["quick_geglu"]:
        return "quick_gelu", True
    if values["squared_relu"]:
        return "squared_relu", False
    # Megatron's fused kernel is the tanh approximation.
    return ("gelu_tanh" if values["bias_gelu_fusion"] else "gelu"), False
