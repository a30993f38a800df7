"""The modules of imported networks' layers that torch.nn does not have.

They take and return activations in the layouts of `layouts`. They call `functions` by its
attributes, so that torch.fx sees each as one step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lirpa_megatron.adapters.tracing import untraced
from lirpa_megatron.networks import functions


class Indexed(nn.Module):
    """A selection (`select`) or sum (`sum`) of columns, by an index."""

    def __init__(self, index: Sequence[int], width: int | None = None) -> None:
        super().__init__()
        # On the CPU also where weights are still on the meta device: it is part of the structure.
        values = torch.tensor(index, dtype=torch.int64, device="cpu")
        self.register_buffer("index", values, persistent=False)
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.width is None:
            return functions.select(x, self.index)
        return functions.sum_groups(x, self.index, self.width)


class WithConstant(nn.Module):
    """x and a constant: the function `functions.NAME`."""

    def __init__(self, name: str, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.name = name
        self.constant = nn.Parameter(torch.empty(n, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(functions, self.name)(x, self.constant)


class Norm(nn.Module):
    """LayerNorm of each vector (`centred`), or RMSNorm, with weight [size] and perhaps a bias."""

    def __init__(self, size: int, eps: float, centred: bool, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.eps, self.centred = eps, centred
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functions.norm(x, self.weight, self.bias, self.eps, self.centred)


class Attend(nn.Module):
    """softmax(s) v; where the mask [1 or heads, queries, keys] is not 0, s is `fill`."""

    def __init__(self, head_dim: int, mask: Sequence[int], fill: float | str, dtype: torch.dtype):
        super().__init__()
        self.head_dim, self.fill = head_dim, float(fill)
        self.mask = nn.Parameter(torch.empty(*mask, dtype=dtype)) if mask else None

    def forward(self, s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functions.attend(s, v, self.mask, self.head_dim, self.fill)


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) weight + bias, in this order; each [n]."""

    def __init__(self, n: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        for name in ("mean", "variance", "weight", "bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(n, dtype=dtype)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with untraced():
            minus_mean, deviation = -self.mean, torch.sqrt(self.variance + self.eps)
        x = functions.divide(functions.shift(x, minus_mean), deviation)
        return functions.shift(functions.scale(x, self.weight), self.bias)

    def at_once(self, x: torch.Tensor) -> torch.Tensor:
        """The same as x s + (bias - mean s), as other programs compute it."""
        s = self.weight / torch.sqrt(self.variance + self.eps)
        return x * s + (self.bias - self.mean * s)


class PReLU(nn.Module):
    """x where x > 0, else slope x; slope [n]."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.empty(n, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_tracing():
            return F.prelu(x, self.slope)
        # The same in exact arithmetic, and a relaxation of the ReLU is one of the whole.
        with untraced():
            rest = 1 - self.slope
        return functions.scale(x, self.slope) + functions.scale(F.relu(x), rest)


class Function(nn.Module):
    """A function of one or more activations, with attributes."""

    def __init__(self, function: Callable, attributes: Mapping[str, Any]) -> None:
        super().__init__()
        self.function, self.attributes = function, dict(attributes)

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        return self.function(*x, **self.attributes)


class Cast(nn.Module):
    """Rounds to a type; None: stays in the type that everything is computed in."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.dtype is None else x.to(self.dtype)
