"""What imported networks compute beside torch's own functions.

Plain torch when run; one node of the graph each when the host traces a network. Activations are
columns [B, n], or vectors side by side [B, T, h], or rows of weights [B, heads, Q, K]; what a layer
reads and makes is its layout (`layouts`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import fx

from lirpa_megatron.adapters import traced_ops
from lirpa_megatron.adapters.plain import structure
from lirpa_megatron.adapters.tracing import operator, shape_of, untraced
from lirpa_megatron.operators.elementwise import gated
from lirpa_megatron.operators.linear.columns import like


@fx.wrap
def arranged(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """x [B, ...] in another shape, [B, *shape], in row-major order."""
    if shape_of(x)[1:] == tuple(shape):
        return x
    if torch.jit.is_tracing():
        return structure.rearranged(x, lambda p: p.reshape(p.shape[0], *shape), True)
    return x.reshape(x.shape[0], *shape)


@fx.wrap
def select(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[:, index], index [m] int64: [B, n] -> [B, m]; of whole vectors [B, T, h] -> [B, T', h],
    or [B, h] of a single one."""
    if x.ndim == 2:
        return _select(x, index)
    with untraced():
        rows = torch.div(index[:: x.shape[-1]], x.shape[-1], rounding_mode="floor").tolist()
    if len(rows) == 1:
        return traced_ops.select_position(x, rows[0])
    return structure.rearranged(x, lambda p: p[:, rows], True) if _traced() else x[:, rows]


@fx.wrap
def join(*x: torch.Tensor) -> torch.Tensor:
    """Side by side: [B, n_1], [B, n_2] ... -> [B, n_1 + n_2 ...]; likewise [B, T_i, h]."""
    if x[0].ndim == 2:
        return _join(*x)
    return structure.joined(x, 1) if _traced() else torch.cat(x, dim=1)


@fx.wrap
def sum_groups(x: torch.Tensor, group: torch.Tensor, width: int) -> torch.Tensor:
    """y[:, j] = the sum of the x[:, i] with group[i] == j: group [n] int64 -> [B, width].

    Of vectors [B, T, h]: their sum, [B, h].
    """
    if x.ndim == 2:
        return _sum_groups(width, x, group)
    return structure.added_up(x, [1], False, 1.0) if _traced() else x.sum(1)


@fx.wrap
def shift(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """x + c, c [n] or a number for each element of x in order."""
    return _shift(x, c)


@fx.wrap
def scale(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """x c, c as for `shift`."""
    return _scale(x, c)


@fx.wrap
def divide(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """x / c, c without zeros, as for `shift`."""
    return _divide(x, c)


@fx.wrap
def times(x: torch.Tensor, number: float) -> torch.Tensor:
    """x times a number."""
    return _scale(x, _as_tensor(x, number))


@fx.wrap
def over(x: torch.Tensor, number: float) -> torch.Tensor:
    """x over a number."""
    return _divide(x, _as_tensor(x, number))


def _as_tensor(x: torch.Tensor, number: float) -> torch.Tensor:
    with untraced(), torch.no_grad():
        return x.new_full((1,), number)


def erf_gate(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """x / 2 (1 + erf(x / divisor)): GELU where the divisor is the root of 2."""
    if _traced():
        return _erf_gate(divisor, x)
    return gated.half_erf(x, divisor)


def tanh_gate(x: torch.Tensor, factor: float, cubic: float) -> torch.Tensor:
    """x / 2 (1 + tanh(factor (x + cubic x^3))): GELU's approximation."""
    if _traced():
        return _tanh_gate(factor, cubic, x)
    return gated.half_tanh(x, factor, cubic)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b, elementwise."""
    return traced_ops.product(a, b)


@fx.wrap
def softmax(x: torch.Tensor, size: int) -> torch.Tensor:
    """Softmax along the last dimension, of this size."""
    return torch.softmax(x, dim=-1)


@fx.wrap
def log_softmax(x: torch.Tensor, size: int) -> torch.Tensor:
    """Logarithm of the softmax along the last dimension."""
    return torch.log_softmax(x, dim=-1)


@fx.wrap
def layer_norm(x: torch.Tensor, size: int, eps: float) -> torch.Tensor:
    """Each vector minus its mean, over its standard deviation: x [B, T, size]."""
    with untraced():
        weight = x.new_ones(size)
    return norm(x, weight, None, eps, True)


@fx.wrap
def norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, centred: bool
) -> torch.Tensor:
    """LayerNorm of each vector, or RMSNorm (not `centred`), times weight [size], plus bias."""
    if _traced():
        return traced_ops.norm(x, weight, bias, eps, rms=not centred)
    if centred:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return y if bias is None else y + bias


@fx.wrap
def scores(q: torch.Tensor, k: torch.Tensor, head_dim: int) -> torch.Tensor:
    """q k^T, head by head: q [B, Q, n d], k [B, K, n d] -> [B, n, Q, K]."""
    return traced_ops.scores(q, k, head_dim, 1.0)


@fx.wrap
def attend(
    s: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, head_dim: int, fill: float
) -> torch.Tensor:
    """softmax(s with `fill` where the mask is 1) v: s [B, n, Q, K], v [B, K, n d], mask [1 or n, Q,
    K]."""
    with untraced():
        mask = None if mask is None else mask.unsqueeze(0)
    return traced_ops.attend(s, v, mask, head_dim, fill)


# For `adapters.parallel_plan`: each feature is its own; heads are each their own.
times.elementwise = over.elementwise = True
scores.head_dim_at, attend.head_dim_at = 2, 3


def _traced() -> bool:
    return torch.jit.is_tracing()


_select = operator(
    "SelectColumns", lambda x, index: x.index_select(-1, index),
    sizes=lambda x, index: [x[0], index[0]],
)
_join = operator(
    "JoinColumns", lambda *x: torch.cat(x, dim=-1), sizes=lambda *x: [x[0][0], sum(s[1] for s in x)]
)
_sum_groups = operator(
    "SumColumns",
    lambda width, x, group: x.new_zeros(x.shape[0], width).index_add(-1, group, x),
    ("width_i",), sizes=lambda width, x, group: [x[0], width],
)
_erf_gate = operator("ErfGate", lambda divisor, x: gated.half_erf(x, divisor), ("divisor_f",))
_tanh_gate = operator(
    "TanhGate", lambda factor, cubic, x: gated.half_tanh(x, factor, cubic),
    ("factor_f", "cubic_f"),
)
_shift = operator("ShiftColumns", lambda x, c: x + like(c, x.shape[1:]))
_scale = operator("ScaleColumns", lambda x, c: x * like(c, x.shape[1:]))
_divide = operator("DivideColumns", lambda x, c: x / like(c, x.shape[1:]))
