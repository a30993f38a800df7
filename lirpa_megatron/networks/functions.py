"""What moves, joins, sums and scales the columns of flat activations, as functions.

Plain torch when run; one node of the graph each when the host traces a network, which
`operators.linear.columns` bounds. x is [B, n] everywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lirpa_megatron.adapters import traced_ops
from lirpa_megatron.adapters.tracing import operator, untraced


def select(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[:, index], index [m] int64 -> [B, m]."""
    return _select(x, index)


def join(*x: torch.Tensor) -> torch.Tensor:
    """Side by side: [B, n_1], [B, n_2] ... -> [B, n_1 + n_2 ...]."""
    return _join(*x)


def sum_groups(x: torch.Tensor, group: torch.Tensor, width: int) -> torch.Tensor:
    """y[:, j] = the sum of the x[:, i] with group[i] == j: group [n] int64 -> [B, width]."""
    return _sum_groups(width, x, group)


def shift(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """x + c, c [n]."""
    return _shift(x, c)


def scale(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """x c, c [n]."""
    return _scale(x, c)


def divide(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """x / c, c [n] without zeros."""
    return _divide(x, c)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b, elementwise."""
    return traced_ops.product(a, b)


def on_tokens(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tokens: int
) -> torch.Tensor:
    """x [B, T n] as T vectors, each times weight [m, n], plus bias [m] or None -> [B, T m]."""
    return columns(F.linear(parts(x, tokens), weight, bias))


def softmax(x: torch.Tensor, size: int) -> torch.Tensor:
    """Softmax of each part of `size` columns."""
    return columns(torch.softmax(parts(x, x.shape[-1] // size), dim=-1))


def log_softmax(x: torch.Tensor, size: int) -> torch.Tensor:
    """Logarithm of the softmax of each part of `size` columns."""
    return columns(torch.log_softmax(parts(x, x.shape[-1] // size), dim=-1))


def layer_norm(x: torch.Tensor, size: int, eps: float) -> torch.Tensor:
    """Each part of `size` columns minus its mean, over its standard deviation."""
    x = parts(x, x.shape[-1] // size)
    if not torch.jit.is_tracing():
        return columns(F.layer_norm(x, (size,), eps=eps))
    with untraced():
        weight = x.new_ones(size)
    return columns(traced_ops.norm(x, weight, None, eps))


def parts(x: torch.Tensor, count: int) -> torch.Tensor:
    """[B, T n] -> [B, T, n], T the count."""
    return _parts(int(count), x)


def columns(x: torch.Tensor) -> torch.Tensor:
    """[B, T, n] -> [B, T n]."""
    return _columns(x)


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
_shift = operator("ShiftColumns", lambda x, c: x + c)
_scale = operator("ScaleColumns", lambda x, c: x * c)
_divide = operator("DivideColumns", lambda x, c: x / c)
_parts = operator(
    "PartsOfColumns", lambda count, x: x.unflatten(-1, (count, -1)).clone(), ("count_i",),
    sizes=lambda count, x: [x[0], count, x[1] // count],
)
_columns = operator(
    "ColumnsOfParts", lambda x: x.flatten(1).clone(), sizes=lambda x: [x[0], x[1] * x[2]]
)
