"""`config.json` of a Hugging Face folder, as Megatron-LM's arguments.

GPT-2, Llama, Mistral, Qwen2 and Qwen3 compute what Megatron's GPTModel computes with the right
arguments. Every key is mapped, known to have no effect on the function in eval mode, or refused by
name; a key that is on no list is refused. What `config.json` leaves out is what the class of the
model takes for it, but for the base of rotary positions, which is asked for.

GPT-2's gelu_new and the tanh approximation of Megatron differ by the digits of sqrt(2 / pi) that
their sources have: 2e-9 of its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lirpa_megatron.checkpoint.plain_files import read_json
from lirpa_megatron.errors import UserError

CONFIG = "config.json"
KINDS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")

_NEUTRAL = frozenset("""
    architectures model_type transformers_version torch_dtype dtype _name_or_path use_cache
    initializer_range attention_dropout bos_token_id eos_token_id pad_token_id return_dict
    output_attentions output_hidden_states torchscript tie_encoder_decoder is_encoder_decoder
    is_decoder task_specific_params problem_type id2label label2id finetuning_task prefix
    _attn_implementation _attn_implementation_autoset attn_implementation chunk_size_feed_forward
    attn_pdrop embd_pdrop resid_pdrop n_ctx summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj reorder_and_upcast_attn pretraining_tp
    max_window_layers use_bfloat16 hidden_dropout
""".split())
"""No effect on the logits in eval mode (`pretraining_tp` cuts products into pieces)."""

_OFF = {
    "add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False, "mlp_bias": False,
    "attention_bias": False, "cross_attention_hidden_size": None, "auto_map": None,
    "quantization_config": None, "pruned_heads": {}, "no_rope_layers": None,
}
"""Only this value is supported."""

_GPT2 = {
    "n_layer": "num_layers", "n_embd": "hidden_size", "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings", "layer_norm_epsilon": "layernorm_epsilon",
    "vocab_size": "vocab_size",
}
_LLAMA = {
    "num_hidden_layers": "num_layers", "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads", "intermediate_size": "ffn_hidden_size",
    "max_position_embeddings": "max_position_embeddings", "rms_norm_eps": "layernorm_epsilon",
    "vocab_size": "vocab_size",
}
_READ = {
    "gpt2": {*_GPT2, "n_inner", "activation_function", "scale_attn_weights",
             "tie_word_embeddings"},
    "llama": {*_LLAMA, "num_key_value_heads", "head_dim", "hidden_act", "rope_theta",
              "rope_scaling", "rope_parameters", "tie_word_embeddings", "partial_rotary_factor"},
}
_WINDOWS = {"sliding_window", "use_sliding_window", "layer_types"}
_READ |= {kind: _READ["llama"] | _WINDOWS for kind in ("mistral", "qwen2", "qwen3")}
_GELU = {"gelu": False, "gelu_new": True, "gelu_pytorch_tanh": True}
"""Activation -> whether it is the tanh approximation."""


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder looks like one of Hugging Face's, not like a checkpoint of Megatron's."""
    return (folder / CONFIG).is_file() and (
        any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin"))
    )


def read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    """(kind of model, Megatron-LM's arguments of it).

    `window_size` is [positions before a query, 0], as Megatron has it.

    Raises:
        UserError: another model, a key that is not known or not supported, or malformed.
    """
    path = folder / CONFIG
    where = f"config {path}"
    content = read_json(path, where)
    kind = content.get("model_type") if isinstance(content, Mapping) else None
    if kind in ("bert", "roberta", "distilbert", "electra"):
        raise UserError(
            f"{where}: models of the type {kind} normalise after each sublayer, Megatron's BERT "
            "before it: no weights make the two compute the same"
        )
    if kind not in KINDS:
        raise UserError(
            f"{where}: models of the type {str(kind)[:40]!r} are not supported, only "
            f"{', '.join(KINDS)}"
        )
    _check_keys(content, kind, where)
    if kind == "gpt2":
        return kind, _gpt2(content, where)
    return kind, _llama(content, kind, where)


def ignored_of_config(folder: Path) -> dict[str, Any]:
    """The keys that are read and ignored: on the list of neutral ones, or off."""
    content = read_json(folder / CONFIG, f"config {folder / CONFIG}")
    return {key: value for key, value in content.items() if key in _NEUTRAL or key in _OFF}


def _check_keys(content: Mapping[str, Any], kind: str, where: str) -> None:
    for key, value in content.items():
        if key in _NEUTRAL or key in _READ[kind]:
            continue
        if key not in _OFF:
            raise UserError(
                f"{where}: the key {key[:80]!r} is not known, and it may change the function: if "
                "it does not, remove it from the file"
            )
        if value != _OFF[key] and value is not None:
            raise UserError(f"{where}: {key}={str(value)[:80]!r} is not supported")


def _take(content: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    for key in names:
        if content.get(key) is None:
            raise UserError(f"{where} has no {key}")
    return {name: content[key] for key, name in names.items()}


def _common(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What is the same for all of them."""
    values: dict[str, Any] = {
        "layernorm_zero_centered_gamma": False, "softmax_type": "vanilla", "softmax_scale": None,
        "glu_linear_offset": 0.0, "activation_func_clamp_value": None, "no_rope_freq": None,
        "qk_l2_norm": False, "use_mup": False, "quick_geglu": False, "squared_relu": False,
        "qk_layernorm": False, "add_qkv_bias": False, "window_size": None,
    }
    # Left out where it is what the class of the model has.
    tied = content.get("tie_word_embeddings", content["model_type"] == "gpt2")
    if type(tied) is not bool:
        raise UserError(f"{where}: tie_word_embeddings={str(tied)[:40]} is malformed")
    return values | {"untie_embeddings_and_output_weights": not tied}


def _gpt2(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    values = _take(content, _GPT2, where)
    act = content.get("activation_function", "gelu_new")
    if act not in _GELU:
        raise UserError(f"{where}: activation_function={str(act)[:40]!r} is not supported")
    if content.get("scale_attn_weights", True) is not True:
        raise UserError(f"{where}: scale_attn_weights=False is not supported")
    return _common(content, where) | values | {
        "seq_length": values["max_position_embeddings"],
        "ffn_hidden_size": content.get("n_inner"), "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm", "add_bias_linear": True, "swiglu": False,
        "bias_gelu_fusion": _GELU[act], "group_query_attention": False, "num_query_groups": 1,
        "kv_channels": None,
    }


def _llama(content: Mapping[str, Any], kind: str, where: str) -> dict[str, Any]:
    values = _take(content, _LLAMA, where)
    if content.get("hidden_act") != "silu":
        shown = str(content.get("hidden_act"))[:40]
        raise UserError(f"{where}: hidden_act={shown!r} is not supported, only silu")
    groups = content.get("num_key_value_heads")
    return _common(content, where) | values | _rotary(content, where) | {
        "seq_length": values["max_position_embeddings"],
        "position_embedding_type": "rope", "normalization": "RMSNorm", "swiglu": True,
        "bias_gelu_fusion": False, "add_bias_linear": False, "add_qkv_bias": kind == "qwen2",
        "group_query_attention": groups is not None,
        "num_query_groups": 1 if groups is None else groups,
        "kv_channels": content.get("head_dim"), "qk_layernorm": kind == "qwen3",
        "window_size": _window(content, kind, where),
    }


def _rotary(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Base and scale of rotary positions, from `rope_parameters` or the older two keys."""
    said = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(said, Mapping):
        raise UserError(f"{where}: its scale of rotary positions is malformed")
    if content.get("rope_parameters") and content.get("rope_scaling"):
        raise UserError(f"{where} has both rope_parameters and rope_scaling: remove one")
    said = dict(said)
    base = said.pop("rope_theta", content.get("rope_theta"))
    if content.get("rope_theta") not in (None, base):
        raise UserError(f"{where} has two values of rope_theta")
    part = said.pop("partial_rotary_factor", content.get("partial_rotary_factor"))
    if part not in (None, 1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor={str(part)[:40]} is not supported")
    kinds = {said.pop(key) for key in ("rope_type", "type") if isinstance(said.get(key), str)}
    kind = kinds.pop() if len(kinds) == 1 else "default" if not kinds and not said else None
    values: dict[str, Any] = {
        "rotary_percent": 1.0, "rotary_interleaved": False, "use_rope_scaling": False,
        "rope_scaling_factor": 8.0, "rotary_seq_len_interpolation_factor": None,
    }
    if base is not None:
        values["rotary_base"] = base
    if kind == "llama3":
        fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 8192}
        values |= {"use_rope_scaling": True, "rope_scaling_factor": said.pop("factor", None)}
        for key, value in fixed.items():
            if said.get(key) != value:
                raise UserError(
                    f"{where}: {key}={str(said.get(key))[:40]} of a llama3 scale is not supported, "
                    f"only {value:g}"
                )
            said.pop(key)
    elif kind == "linear":
        values["rotary_seq_len_interpolation_factor"] = said.pop("factor", None)
    elif kind != "default":
        raise UserError(f"{where}: this scale of rotary positions is not supported")
    if said or None in (values["rope_scaling_factor"],) or (
        kind == "linear" and values["rotary_seq_len_interpolation_factor"] is None
    ):
        raise UserError(f"{where}: its scale of rotary positions is malformed")
    return values


def _window(content: Mapping[str, Any], kind: str, where: str) -> list[int] | None:
    """Megatron's window_size; None: none. A window of n lets a query see n positions, its own too.

    It counts as one of all layers; inputs no longer than it are not touched by it in any.
    """
    width = content.get("sliding_window")
    layers = content.get("layer_types")
    if layers is not None:
        if not isinstance(layers, list) or not set(map(str, layers)) <= {
            "full_attention", "sliding_attention"
        }:
            raise UserError(f"{where}: its layer_types are not supported")
        used = "sliding_attention" in layers
        if used and width is None:
            raise UserError(f"{where} has layers with a window, but no sliding_window")
    elif kind == "mistral":
        used = True
    else:
        used = content.get("use_sliding_window", False)
    if kind != "mistral" and content.get("use_sliding_window"):
        used = True
    if not used or width is None:
        return None
    if type(width) is not int or width < 1:
        raise UserError(f"{where}: sliding_window={str(width)[:40]} is malformed")
    return [width - 1, 0]
