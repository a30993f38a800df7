"""The names of parameters: TransformerEngine's, and those of Megatron's local layer spec.

TransformerEngine fuses a norm with the linear layer after it, so the norm's parameters bear that
layer's name. torch_dist checkpoints always use these names, whichever layers wrote them. Everywhere
else in this package the local spec's names stand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lirpa_megatron.errors import UserError

_FUSED_NORMS = (
    ("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
)
_LAYER = re.compile(r"(decoder|encoder)\.layers\.(\d+)\.(.+)")
_STACKED = re.compile(r"(decoder|encoder)\.layers\.([a-z_].*)")
_UNSUPPORTED = (
    (r"\.mlp\.(experts|router|shared_experts)\b", "MoE (expert) layers"),
    (r"\.linear_(q_proj|(q|kv)_(down|up)_proj)\b", "multi-latent attention"),
    (r"^mtp\.", "multi-token prediction"),
    (r"\.mixer\.|^mamba", "Mamba layers"),
    (r"\.(cross_attention|inter_attention|pre_cross_attn_layernorm)\b", "T5's cross attention"),
    (r"^(vision_model|vision_projection|language_model\.(embedding|encoder|decoder))\b",
     "multimodal models and Megatron's legacy (not core) models"),
    (r"\.self_attention\.(in_proj|conv1d|A_log|dt_bias)\b", "linear attention"),
    (r"\.softmax_offset$", "learnable softmax offsets"),
    (r"_scale_inv\b|_amax\b", "quantised weights"),
)


def local_name(name: str) -> str:
    """The name in the local layer spec."""
    for fused, local in _FUSED_NORMS:
        if fused in name:
            return name.replace(fused, local)
    return name


def split_layer(name: str) -> tuple[str, int, str] | None:
    """(block, index, rest) of `decoder.layers.3.mlp...`; None if it is no such name."""
    match = _LAYER.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def split_stacked(name: str) -> tuple[str, str] | None:
    """(block, rest) of `decoder.layers.mlp...`, which holds all layers; None if it is no such."""
    match = _STACKED.fullmatch(name)
    return (match[1], match[2]) if match else None


def layer_name(block: str, index: int, rest: str) -> str:
    """The inverse of `split_layer`."""
    return f"{block}.layers.{index}.{rest}"


def kind_of(names: Iterable[str], where: str) -> str:
    """ "GPT" or "BERT".

    Raises:
        UserError: another kind of model, by name.
    """
    names = list(names)
    for name in names:
        for pattern, what in _UNSUPPORTED:
            if re.search(pattern, name):
                raise UserError(f"checkpoint {where} (tensor {name}): {what} are not supported")
    has = {block: any(n.startswith(f"{block}.layers.") for n in names)
           for block in ("decoder", "encoder")}
    if has["decoder"] and has["encoder"]:
        raise UserError(
            f"checkpoint {where} has an encoder and a decoder: T5 models are not supported"
        )
    if has["decoder"]:
        return "GPT"
    if has["encoder"] and any(n.startswith("lm_head.") for n in names):
        return "BERT"
    raise UserError(
        f"checkpoint {where} holds neither a GPT nor a BERT model of Megatron-core (no tensors "
        "decoder.layers.* or encoder.layers.* and lm_head.*)"
    )
