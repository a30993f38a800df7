"""The operators of a transformer, as functions: plain torch when run, one graph node when traced.

Facades call these. Outside of tracing each is ordinary differentiable torch on this rank's part of
the features. Under `torch.jit.trace` (the host's conversion) each becomes one node of the domain
`lirpa_megatron`, which `operators.CUSTOM_OPS` maps to its Bound operator.

Shapes, batch first: B batch, S sequence, h hidden, n query heads and g key/value groups of this
rank, d head size. Heads lie side by side on the last dimension: q is [B, S, n d].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.operators.elementwise.functions import FUNCTIONS
from lirpa_megatron.operators.functional import heads_first, heads_last, normalized, rotate

_KINDS = {
    "gelu": "GeluErf", "gelu_tanh": "GeluTanh", "silu": "Silu", "quick_gelu": "QuickGelu",
    "squared_relu": "SquaredRelu", "tanh": "Tanh",
}
ACTIVATIONS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    kind: (name, FUNCTIONS[name].curve().run) for kind, name in _KINDS.items()
}
"""What the configurations of models call a function -> (operator of the graph, the function)."""


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """An elementwise activation of `ACTIVATIONS` (or 'relu', which is the host's)."""
    if kind == "relu":
        return F.relu(x)
    return _elementwise(kind).apply(x) if torch.jit.is_tracing() else ACTIVATIONS[kind][1](x)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a * b, elementwise, shapes equal (a gate)."""
    return _ProductSymbol.apply(a, b) if torch.jit.is_tracing() else a * b


def norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, rms: bool = False,
    groups: int = 1,
) -> torch.Tensor:
    """LayerNorm, or RMSNorm (`rms`), of each of `groups` equal parts of the last dimension.

    Args:
        x: [B, S, groups * d].
        weight: [d], what multiplies the normalised value (1 + weight for a zero-centred norm).
        bias: [d] or None.
        eps: added to the variance (to the mean square).
        rms: whether the mean is left in.
        groups: heads, for the norms of queries and keys.
    """
    if torch.jit.is_tracing():
        inputs = (x, weight) if bias is None else (x, weight, bias)
        return _NormSymbol.apply(float(eps), int(rms), int(groups), *inputs)
    return normalized(x, weight, bias, eps, rms, groups)


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, interleaved: bool = False
) -> torch.Tensor:
    """Rotary position embedding of each head.

    Args:
        x: [B, S, heads * d].
        cos, sin: [S, r], r <= d even: the first r coordinates of each head are rotated.
        heads: on this rank.
        interleaved: pairs are neighbours (2i, 2i + 1) instead of halves (i, i + r/2).
    """
    if torch.jit.is_tracing():
        return _RotarySymbol.apply(heads, int(interleaved), x, cos, sin)
    return rotate(x, cos, sin, heads, interleaved)


def scores(q: torch.Tensor, k: torch.Tensor, head_dim: int, scale: float) -> torch.Tensor:
    """Attention scores: q [B, Q, n d], k [B, S, g d], n a multiple of g -> [B, n, Q, S]."""
    if torch.jit.is_tracing():
        return _ScoresSymbol.apply(head_dim, float(scale), q, k)
    return _ScoresSymbol.forward(None, head_dim, scale, q, k)


def attend(
    s: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, head_dim: int,
    fill: float = -10000.0, query: int | None = None,
) -> torch.Tensor:
    """softmax(s with masked entries set to `fill`) v.

    Args:
        s: [B, n, Q, S], Q = S queries, or 1.
        v: [B, S, g d].
        mask: [B or 1, 1 or n, S, S] as numbers, 1 where masked, 0 elsewhere; None masks nothing.
        head_dim: d.
        fill: Megatron's -10000, or -inf.
        query: the position (from 0) of the one query; None: all are there.

    Returns:
        [B, Q, n d].
    """
    inputs = (s, v) if mask is None else (s, v, mask)
    query = -1 if query is None else query
    if torch.jit.is_tracing():
        return _AttendSymbol.apply(head_dim, float(fill), query, *inputs)
    return _AttendSymbol.forward(None, head_dim, fill, query, *inputs)


def select_position(x: torch.Tensor, position: int, keep: bool = False) -> torch.Tensor:
    """[B, S, h] -> [B, h], or [B, 1, h] (`keep`), at one position (negative: from the end)."""
    if torch.jit.is_tracing():
        return _PositionSymbol.apply(position, int(keep), x)
    return _PositionSymbol.forward(None, position, int(keep), x)


# ------------------------------------------------------------------------- shapes


# ------------------------------------------------------------------ the graph's nodes


def _op(
    g: Any, name: str, *inputs: Any, sizes: Callable[[list[int]], list[int]] | None = None,
    **attributes: Any,
) -> Any:
    """A node of the traced graph; its shape follows from the first input's where that is known.

    Args:
        g: the graph.
        name: of the operator.
        *inputs: its inputs.
        sizes: shape of the first input -> shape of the result; the same shape by default.
        **attributes: as torch.onnx wants them, with their type as suffix.
    """
    out = g.op(f"lirpa_megatron::{name}", *inputs, **attributes)
    like = inputs[0].type()
    known = like.sizes() if like.kind() == "TensorType" else None
    if known is None:
        return out
    return out.setType(like if sizes is None else like.with_sizes(sizes(known)))


def _elementwise(kind: str) -> type[torch.autograd.Function]:
    return _ELEMENTWISE[kind]


def _make_elementwise(name: str, function: Callable) -> type[torch.autograd.Function]:
    class Symbol(torch.autograd.Function):
        @staticmethod
        def symbolic(g: Any, x: Any) -> Any:
            return _op(g, name, x)

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    Symbol.__name__ = f"_{name}Symbol"
    return Symbol


_ELEMENTWISE = {kind: _make_elementwise(*entry) for kind, entry in ACTIVATIONS.items()}


class _ProductSymbol(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, a: Any, b: Any) -> Any:
        return _op(g, "Product", a, b)

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b


class _NormSymbol(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, eps: float, rms: int, groups: int, *inputs: Any) -> Any:
        return _op(g, "Norm", *inputs, eps_f=eps, rms_i=rms, groups_i=groups)

    @staticmethod
    def forward(ctx: Any, eps: float, rms: int, groups: int, *inputs: Any) -> torch.Tensor:
        x, weight, bias = (*inputs, None)[:3]
        return normalized(x, weight, bias, eps, bool(rms), groups)


class _RotarySymbol(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, heads: int, interleaved: int, x: Any, cos: Any, sin: Any) -> Any:
        return _op(g, "Rotary", x, cos, sin, heads_i=heads, interleaved_i=interleaved)

    @staticmethod
    def forward(ctx: Any, heads: int, interleaved: int, x: Any, cos: Any, sin: Any) -> Any:
        return rotate(x, cos, sin, heads, bool(interleaved))


class _ScoresSymbol(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, head_dim: int, scale: float, q: Any, k: Any) -> Any:
        keys = k.type().sizes() if k.type().kind() == "TensorType" else None
        return _op(
            g, "Scores", q, k, head_dim_i=head_dim, scale_f=scale,
            sizes=lambda q: [q[0], q[2] // head_dim, q[1], (keys or q)[1]],
        )

    @staticmethod
    def forward(ctx: Any, head_dim: int, scale: float, q: Any, k: Any) -> torch.Tensor:
        q, k = heads_first(q, head_dim), heads_first(k, head_dim)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        return (q @ k.transpose(-1, -2)) * scale


class _AttendSymbol(torch.autograd.Function):
    @staticmethod
    def symbolic(
        g: Any, head_dim: int, fill: float, query: int, s: Any, v: Any, *mask: Any
    ) -> Any:
        finite = int(math.isfinite(fill))
        return _op(
            g, "Attend", s, v, *mask, sizes=lambda s: [s[0], s[2], s[1] * head_dim],
            head_dim_i=head_dim, finite_fill_i=finite, fill_f=fill if finite else 0.0,
            query_i=query,
        )

    @staticmethod
    def forward(
        ctx: Any, head_dim: int, fill: float, query: int, s: Any, v: Any, *mask: Any
    ) -> torch.Tensor:
        if mask:
            rows = mask[0] if query < 0 else mask[0][:, :, query : query + 1]
            s = s.masked_fill(rows != 0, fill)
        v = heads_first(v, head_dim)
        v = v.repeat_interleave(s.shape[1] // v.shape[1], dim=1)
        return heads_last(torch.softmax(s, dim=-1) @ v)


class _PositionSymbol(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, position: int, keep: int, x: Any) -> Any:
        return _op(
            g, "SelectPosition", x, position_i=position, keep_i=keep,
            sizes=lambda x: [x[0], *([1] if keep else []), x[2]],
        )

    @staticmethod
    def forward(ctx: Any, position: int, keep: int, x: torch.Tensor) -> torch.Tensor:
        y = x[:, position].clone()
        return y.unsqueeze(1) if keep else y
