"""What moves, joins, sums and scales the columns of flat activations, as functions.

Plain torch when run; one node of the graph each when the host traces a network, which
`operators.linear.columns` bounds. x is [B, n] everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.adapters import traced_ops
from lirpa_megatron.adapters.traced_ops import _op
from lirpa_megatron.adapters.tracing import untraced


def select(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[:, index], index [m] int64 -> [B, m]."""
    if not torch.jit.is_tracing():
        return x.index_select(-1, index)
    return _Select.apply(len(index), x, index)


def join(*x: torch.Tensor) -> torch.Tensor:
    """Side by side: [B, n_1], [B, n_2] ... -> [B, n_1 + n_2 ...]."""
    if not torch.jit.is_tracing():
        return torch.cat(x, dim=-1)
    return _Join.apply(sum(int(part.shape[-1]) for part in x), *x)


def sum_groups(x: torch.Tensor, group: torch.Tensor, width: int) -> torch.Tensor:
    """y[:, j] = the sum of the x[:, i] with group[i] == j: group [n] int64 -> [B, width]."""
    if torch.jit.is_tracing():
        return _Sum.apply(width, x, group)
    return x.new_zeros(x.shape[0], width).index_add(-1, group, x)


def shift(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """x + c, c [n]."""
    return _Shift.apply(x, c) if torch.jit.is_tracing() else x + c


def scale(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """x c, c [n]."""
    return _Scale.apply(x, c) if torch.jit.is_tracing() else x * c


def divide(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """x / c, c [n] without zeros."""
    return _Divide.apply(x, c) if torch.jit.is_tracing() else x / c


class _Select(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, width: int, x: Any, index: Any) -> Any:
        return _op(g, "SelectColumns", x, index, sizes=lambda s: [s[0], width])

    @staticmethod
    def forward(ctx: Any, width: int, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x.index_select(-1, index)


class _Join(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, width: int, *x: Any) -> Any:
        return _op(g, "JoinColumns", *x, sizes=lambda s: [s[0], width])

    @staticmethod
    def forward(ctx: Any, width: int, *x: torch.Tensor) -> torch.Tensor:
        return torch.cat(x, dim=-1)


class _Sum(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, width: int, x: Any, group: Any) -> Any:
        return _op(g, "SumColumns", x, group, sizes=lambda s: [s[0], width], width_i=width)

    @staticmethod
    def forward(ctx: Any, width: int, x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0], width).index_add(-1, group, x)


class _Shift(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, x: Any, c: Any) -> Any:
        return _op(g, "ShiftColumns", x, c)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return x + c


class _Scale(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, x: Any, c: Any) -> Any:
        return _op(g, "ScaleColumns", x, c)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return x * c


class _Divide(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, x: Any, c: Any) -> Any:
        return _op(g, "DivideColumns", x, c)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return x / c


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
    if torch.jit.is_tracing():
        return _Parts.apply(int(count), x)
    return x.unflatten(-1, (count, -1))


def columns(x: torch.Tensor) -> torch.Tensor:
    """[B, T, n] -> [B, T n]."""
    return _Columns.apply(x) if torch.jit.is_tracing() else x.flatten(1)


class _Parts(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, count: int, x: Any) -> Any:
        return _op(g, "PartsOfColumns", x, count_i=count,
                   sizes=lambda s: [s[0], count, s[1] // count])

    @staticmethod
    def forward(ctx: Any, count: int, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (count, -1)).clone()


class _Columns(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, x: Any) -> Any:
        return _op(g, "ColumnsOfParts", x, sizes=lambda s: [s[0], s[1] * s[2]])

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).clone()
