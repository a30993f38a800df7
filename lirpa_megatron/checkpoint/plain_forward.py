"""Logits of a Hugging Face folder in float64, from its tensors as they are stored.

What the model's publication says, written down again in plain torch and without Megatron's layouts,
for `import-hf` to compare what it wrote with. Layers are read one at a time.
"""

from __future__ import annotations

import math

import torch

from lirpa_megatron.checkpoint.hugging_face import HuggingFaceWeights

_ROWS = 8192
"""Rows of the output layer that are read at once."""


def plain_logits(weights: HuggingFaceWeights, ids: torch.Tensor) -> torch.Tensor:
    """ids [S] of one sequence -> logits [S, V] in float64."""
    return (_gpt2 if weights.kind == "gpt2" else _llama)(weights, ids)


def _gpt2(weights: HuggingFaceWeights, ids: torch.Tensor) -> torch.Tensor:
    d = weights.arguments
    prefix = "transformer." if "transformer.wte.weight" in weights.files.names() else ""

    def get(name: str) -> torch.Tensor:
        return weights.files.read(prefix + name).double()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        gamma, beta = get(f"{name}.weight"), get(f"{name}.bias")
        return torch.nn.functional.layer_norm(x, x.shape[-1:], gamma, beta, d["layernorm_epsilon"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ get(f"{name}.weight") + get(f"{name}.bias")

    approximate = "tanh" if d["bias_gelu_fusion"] else "none"
    words = f"{prefix}wte.weight"
    x = _rows(weights, words, ids) + get("wpe.weight")[: len(ids)]
    for i in range(d["num_layers"]):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, -1)
        q, k, v = (_heads(part, d["num_attention_heads"]) for part in (q, k, v))
        x = x + linear(_attention(q, k, v), f"h.{i}.attn.c_proj")
        inner = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        x = x + linear(torch.nn.functional.gelu(inner, approximate=approximate),
                       f"h.{i}.mlp.c_proj")
    return _output(weights, norm(x, "ln_f"), words)


def _llama(weights: HuggingFaceWeights, ids: torch.Tensor) -> torch.Tensor:
    d = weights.arguments

    def get(name: str) -> torch.Tensor:
        return weights.files.read(name).double()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean = (x * x).mean(-1, keepdim=True)
        return x * torch.rsqrt(mean + d["layernorm_epsilon"]) * get(f"{name}.weight")

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        y = x @ get(f"{name}.weight").T
        return y + get(f"{name}.bias") if f"{name}.bias" in weights.files.names() else y

    heads = d["num_attention_heads"]
    groups = d["num_query_groups"] if d["group_query_attention"] else heads
    words = "model.embed_tokens.weight"
    x = _rows(weights, words, ids)
    for i in range(d["num_layers"]):
        name = f"model.layers.{i}"
        y = norm(x, f"{name}.input_layernorm")
        q, k, v = (
            _heads(linear(y, f"{name}.self_attn.{part}_proj"), count)
            for part, count in (("q", heads), ("k", groups), ("v", groups))
        )
        if d["qk_layernorm"]:
            q, k = norm(q, f"{name}.self_attn.q_norm"), norm(k, f"{name}.self_attn.k_norm")
        cos, sin = _angles(d, len(ids), q.shape[-1])
        q, k = (part * cos + _turned(part) * sin for part in (q, k))
        k, v = (part.repeat_interleave(heads // groups, 0) for part in (k, v))
        x = x + linear(_attention(q, k, v), f"{name}.self_attn.o_proj")
        y = norm(x, f"{name}.post_attention_layernorm")
        gate = torch.nn.functional.silu(linear(y, f"{name}.mlp.gate_proj"))
        x = x + linear(gate * linear(y, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
    return _output(weights, norm(x, "model.norm"), words)


def _heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """[S, n d] -> [n, S, d]."""
    return x.view(x.shape[0], count, -1).transpose(0, 1)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of [n, S, d] each -> [S, n d]."""
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def _turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _angles(d: dict, length: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [S, d]; in float32, as every implementation of these models has them."""
    steps = torch.arange(0, size, 2, dtype=torch.float32) / size
    frequencies = 1.0 / (d["rotary_base"] ** steps)
    if d["use_rope_scaling"]:
        factor = d["rope_scaling_factor"]
        waves = 2 * math.pi / frequencies
        # Llama 3.1: waves longer than the old context are stretched, those shorter than a quarter
        # of it are not, and those between are interpolated.
        share = ((8192 / waves - 1.0) / (4.0 - 1.0)).clamp(0, 1)
        frequencies = (1 - share) * frequencies / factor + share * frequencies
    positions = torch.arange(length, dtype=torch.float32)
    if d["rotary_seq_len_interpolation_factor"] is not None:
        positions = positions * (1 / d["rotary_seq_len_interpolation_factor"])
    angles = torch.outer(positions, frequencies)
    return (torch.cat([f(angles)] * 2, -1).double() for f in (torch.cos, torch.sin))


def _rows(weights: HuggingFaceWeights, key: str, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([weights.files.read(key, slice(i, i + 1)) for i in ids.tolist()]).double()


def _output(weights: HuggingFaceWeights, x: torch.Tensor, words: str) -> torch.Tensor:
    key = "lm_head.weight" if weights.untied() else words
    total = weights.files.shape(key)[0]
    return torch.cat([
        x @ weights.files.read(key, slice(first, min(first + _ROWS, total))).double().T
        for first in range(0, total, _ROWS)
    ], -1)
