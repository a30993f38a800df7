"""Pre-LN transformers for the benchmarks: in plain torch, of this package's symbols, of Megatron.

The plain one has the weights; a Megatron model takes this rank's part of them.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

PARTS = ("norm", "attention", "gelu")
GELU = functools.partial(F.gelu, approximate="tanh")


class Layer(nn.Module):
    """Attention and MLP with residuals; `parts`: from `adapters.traced_ops`; the rest is torch's.

    Args:
        hidden, ffn, heads: sizes.
        parts: of PARTS; empty is a module of torch alone.
    """

    def __init__(self, hidden: int, ffn: int, heads: int, parts: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.f1, self.f2 = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)
        self.heads, self.size, self.parts = heads, hidden // heads, parts

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = normalize(x, self.n1, self.parts)
        x = x + self.o(self.attend(self.q(y), self.k(y), self.v(y), mask))
        y = self.f1(normalize(x, self.n2, self.parts))
        if "gelu" not in self.parts:
            return x + self.f2(GELU(y))
        from lirpa_megatron.adapters import traced_ops

        return x + self.f2(traced_ops.activation(y, "gelu_tanh"))

    def attend(self, q, k, v, mask):
        if "attention" in self.parts:
            from lirpa_megatron.adapters import traced_ops

            scores = traced_ops.scores(q, k, self.size, self.size**-0.5)
            return traced_ops.attend(scores, v, mask, self.size)
        batch, length, hidden = q.shape
        q, k, v = (z.view(batch, length, self.heads, self.size).transpose(1, 2) for z in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.size)
        if mask is not None:
            scores = scores + mask * -10000.0
        y = torch.softmax(scores, dim=-1) @ v
        return y.transpose(1, 2).reshape(batch, length, hidden)


def normalize(x: torch.Tensor, layer: nn.LayerNorm, parts: tuple[str, ...]) -> torch.Tensor:
    """The LayerNorm, in torch or as one operator."""
    if not parts:
        return layer(x)
    if "norm" not in parts:  # in pieces: BoundedModule makes its own operator of the layer
        z = x - x.mean(-1, keepdim=True)
        deviation = ((z * z).mean(-1, keepdim=True) + layer.eps).sqrt()
        return z / deviation * layer.weight + layer.bias
    from lirpa_megatron.adapters import traced_ops

    return traced_ops.norm(x, layer.weight, layer.bias, layer.eps)


class Plain(nn.Module):
    """Hidden [B, S, h] -> outputs [B, K] of a linear head at one position.

    Args:
        layers, hidden, ffn, heads, outputs: sizes.
        position: that the head reads (from 0).
        causal: the length that a causal mask is for; None for attention to all positions.
        parts: as for `Layer`.
    """

    def __init__(self, layers, hidden, ffn, heads, outputs, position=0, causal=None, parts=()):
        super().__init__()
        self.layers = nn.ModuleList(Layer(hidden, ffn, heads, parts) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, outputs)
        self.position, self.parts = position, parts
        mask = None if causal is None else torch.ones(1, 1, causal, causal).triu(1)
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        mask = self.mask if mask is None else mask
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(normalize(x[:, self.position], self.norm, self.parts))


def config(plain: Plain):
    """Megatron's TransformerConfig of the plain model."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from lirpa_megatron.parallel import runtime

    first = plain.layers[0]
    return TransformerConfig(
        num_layers=len(plain.layers), hidden_size=first.q.in_features,
        ffn_hidden_size=first.f1.out_features, num_attention_heads=first.heads,
        tensor_model_parallel_size=runtime.tp_size(), params_dtype=torch.float32,
        use_cpu_initialization=True, gradient_accumulation_fusion=False, hidden_dropout=0.0,
        attention_dropout=0.0, masked_softmax_fusion=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, persist_layer_norm=False, apply_rope_fusion=False,
        attention_softmax_in_fp32=True, activation_func=GELU,
    )


def fill(block: nn.Module, plain: Plain) -> None:
    """Copies this rank's part of the plain weights into Megatron's TransformerBlock."""
    from lirpa_megatron.parallel import runtime

    full: dict[str, torch.Tensor] = {}

    def put(name, weight, bias):
        full[f"{name}.weight"], full[f"{name}.bias"] = weight, bias

    for i, layer in enumerate(plain.layers):
        def packed(parameters, heads=layer.heads):  # Megatron's rows: q, k, v of each head
            return torch.stack([p.unflatten(0, (heads, -1)) for p in parameters], 1).flatten(0, 2)

        qkv, at = (layer.q, layer.k, layer.v), f"layers.{i}"
        put(f"{at}.input_layernorm", layer.n1.weight, layer.n1.bias)
        put(f"{at}.self_attention.linear_qkv", packed([m.weight for m in qkv]),
            packed([m.bias for m in qkv]))
        put(f"{at}.self_attention.linear_proj", layer.o.weight, layer.o.bias)
        put(f"{at}.pre_mlp_layernorm", layer.n2.weight, layer.n2.bias)
        put(f"{at}.mlp.linear_fc1", layer.f1.weight, layer.f1.bias)
        put(f"{at}.mlp.linear_fc2", layer.f2.weight, layer.f2.bias)
    put("final_layernorm", plain.norm.weight, plain.norm.bias)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            value = full.pop(name)
            if getattr(parameter, "tensor_model_parallel", False):
                parts = value.chunk(runtime.tp_size(), parameter.partition_dim)
                value = parts[runtime.tp_rank()]
            parameter.copy_(value)
    assert not full, f"Megatron's block has no {list(full)}"


class Classifier(nn.Module):
    """Megatron's TransformerBlock, without a mask, and a linear head on one position."""

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
        from megatron.core.transformer.transformer_block import TransformerBlock

        from lirpa_megatron import at_position

        block = TransformerBlock(config(plain), bert_layer_local_spec)
        fill(block, plain)
        self.block, self.head = at_position(block.eval(), plain.position), plain.head

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(hidden))


def bound_plainly(model: nn.Module, x: torch.Tensor):
    """auto_LiRPA's own BoundedModule, with its defaults."""
    from lirpa_megatron.compat import auto_lirpa

    class Host(auto_lirpa.HostBoundedModule):
        _named_members = auto_lirpa.named_members

    with auto_lirpa.conversion(x):
        return Host(model, x, device=x.device)


# ------------------------------------------------------------------------ where the time goes


@contextlib.contextmanager
def profiled():
    """Yields a dictionary name -> [seconds, calls], filled while the block runs."""
    from lirpa_megatron.crown import affine_forms, backward_pass, intermediate_bounds

    spent: dict[str, list] = collections.defaultdict(lambda: [0.0, 0])

    def timed(function, name_of):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                entry = spent[name_of(args)]
                entry[0] += time.perf_counter() - start
                entry[1] += 1

        return wrapper

    wrapped = [
        (backward_pass.BackwardPass, "_through",
         lambda args: f"backward {type(args[1]).__name__}"),
        (backward_pass.BackwardPass, "_concretize", lambda args: "concretization"),
        (affine_forms.InputSet, "rows", lambda args: "affine forms"),
        (intermediate_bounds.Intermediate, "ibp", lambda args: "IBP of a node"),
    ]
    saved = [(owner, name, getattr(owner, name)) for owner, name, _ in wrapped]
    for owner, name, name_of in wrapped:
        setattr(owner, name, timed(getattr(owner, name), name_of))
    try:
        yield spent
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
