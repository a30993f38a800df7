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

import torch
import torch.nn.functional as F

from lirpa_megatron.adapters.tracing import operator
from lirpa_megatron.operators.elementwise.functions import FUNCTIONS
from lirpa_megatron.operators.functional import heads_first, heads_last, normalized, rotate

_OPERATORS = {
    "gelu": "GeluErf", "gelu_tanh": "GeluTanh", "silu": "Silu", "quick_gelu": "QuickGelu",
    "squared_relu": "SquaredRelu", "tanh": "Tanh",
}
ACTIVATIONS: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    kind: (name, FUNCTIONS[name].curve().run) for kind, name in _OPERATORS.items()
}
"""What the configurations of models call a function -> (operator of the graph, the function)."""


def activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """An elementwise activation of `ACTIVATIONS` (or 'relu', which is the host's)."""
    return F.relu(x) if kind == "relu" else _activations[kind](x)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a * b, elementwise, shapes equal (a gate)."""
    return _product(a, b)


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
    return _norm(float(eps), int(rms), int(groups), x, weight, *([] if bias is None else [bias]))


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
    return _rotary(heads, int(interleaved), x, cos, sin)


def scores(q: torch.Tensor, k: torch.Tensor, head_dim: int, scale: float) -> torch.Tensor:
    """Attention scores: q [B, Q, n d], k [B, S, g d], n a multiple of g -> [B, n, Q, S]."""
    return _scores(head_dim, float(scale), q, k)


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
    finite = math.isfinite(fill)  # an attribute of a graph has to be
    numbers = head_dim, int(finite), float(fill) if finite else 0.0, -1 if query is None else query
    return _attend(*numbers, s, v, *([] if mask is None else [mask]))


def stage_input(x: torch.Tensor) -> torch.Tensor:
    """x, the output of the pipeline stage below."""
    return _stage_input(x)


def select_position(x: torch.Tensor, position: int, keep: bool = False) -> torch.Tensor:
    """[B, S, h] -> [B, h], or [B, 1, h] (`keep`), at one position (negative: from the end)."""
    return _select_position(position, int(keep), x)


def _run_norm(eps: float, rms: int, groups: int, *inputs: torch.Tensor) -> torch.Tensor:
    x, weight, bias = (*inputs, None)[:3]
    return normalized(x, weight, bias, eps, bool(rms), groups)


def _run_scores(head_dim: int, scale: float, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    q, k = heads_first(q, head_dim), heads_first(k, head_dim)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return (q @ k.transpose(-1, -2)) * scale


def _run_attend(
    head_dim: int, finite: int, fill: float, query: int, s: torch.Tensor, v: torch.Tensor,
    *mask: torch.Tensor,
) -> torch.Tensor:
    if mask:
        rows = mask[0] if query < 0 else mask[0][:, :, query : query + 1]
        s = s.masked_fill(rows != 0, fill if finite else -math.inf)
    v = heads_first(v, head_dim)
    v = v.repeat_interleave(s.shape[1] // v.shape[1], dim=1)
    return heads_last(torch.softmax(s, dim=-1) @ v)


def _run_position(position: int, keep: int, x: torch.Tensor) -> torch.Tensor:
    y = x[:, position].clone()
    return y.unsqueeze(1) if keep else y


_activations = {kind: operator(*entry) for kind, entry in ACTIVATIONS.items()}
_product = operator("Product", lambda a, b: a * b)
_norm = operator("Norm", _run_norm, ("eps_f", "rms_i", "groups_i"))
_rotary = operator(
    "Rotary", lambda heads, interleaved, *x: rotate(*x, heads, bool(interleaved)),
    ("heads_i", "interleaved_i"),
)
_scores = operator(
    "Scores", _run_scores, ("head_dim_i", "scale_f"),
    sizes=lambda head_dim, scale, q, k: [q[0], q[2] // head_dim, q[1], (k or q)[1]],
)
_attend = operator(
    "Attend", _run_attend, ("head_dim_i", "finite_fill_i", "fill_f", "query_i"),
    sizes=lambda head_dim, finite, fill, query, s, *others: [s[0], s[2], s[1] * head_dim],
)
_stage_input = operator("StageInput", lambda x: x.clone())
_select_position = operator(
    "SelectPosition", _run_position, ("position_i", "keep_i"),
    sizes=lambda position, keep, x: [x[0], *([1] if keep else []), x[2]],
)
