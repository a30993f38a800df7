"""The operators of imported networks: what each needs, and the module that computes it.

All work on flat activations [B, n]. Constants (`constant`, `slope`, ...) are parameters [n], so
that checkpoints store them beside the weights; indices are part of the description.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lirpa_megatron.adapters.tracing import untraced
from lirpa_megatron.networks import functions


@dataclass(frozen=True)
class Operator:
    """What a layer of this kind has to have."""

    # number of inputs; None: any, at least one
    arity: int | None
    # (layer, width of each input) -> whether widths and attributes go together
    widths: Callable[[Any, Sequence[int]], bool]
    # attribute -> whether a value of it is possible
    attributes: Mapping[str, Callable[[Any], bool]]
    # layer -> name and full shape of each parameter
    tensors: Callable[[Any], dict[str, tuple[int, ...]]]
    # (layer, dtype) -> its module
    make: Callable[[Any, torch.dtype], nn.Module]

    def fits(self, layer: Any, widths: Sequence[int]) -> bool:
        """Whether a layer's description is one of this operator."""
        return (
            (len(widths) == self.arity if self.arity is not None else len(widths) >= 1)
            and set(layer.attributes) == set(self.attributes)
            and all(possible(layer.attributes[n]) for n, possible in self.attributes.items())
            and (not layer.bias or layer.op in ("linear", "tokens"))
            and self.widths(layer, widths)
        )


class TokenLinear(nn.Linear):
    """A linear layer on each of T equal parts: x [B, T n] -> [B, T m]."""

    def __init__(self, tokens: int, n_in: int, n_out: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__(n_in, n_out, bias=bias, dtype=dtype)
        self.tokens = tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functions.on_tokens(x, self.weight, self.bias, self.tokens)


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
    """x and a constant: x + c, x c, x / c."""

    def __init__(self, function: Callable, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        self.constant = nn.Parameter(torch.empty(n, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.constant)


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


# ------------------------------------------------------------------------------ attributes


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_exponent(value: Any) -> bool:
    return type(value) is int and 2 <= value <= 64


def _are_indices(value: Any) -> bool:
    return type(value) is list and all(type(i) is int and i >= 0 for i in value)


# ------------------------------------------------------------------------------ widths


def _alike(layer: Any, widths: Sequence[int]) -> bool:
    return all(width == layer.n_in for width in widths) and layer.n_out == layer.n_in


def _linear_fits(layer: Any, widths: Sequence[int]) -> bool:
    return widths[0] == layer.n_in


def _tokens_fit(layer: Any, widths: Sequence[int]) -> bool:
    tokens = layer.attributes["tokens"]
    return widths[0] == layer.n_in and layer.n_in % tokens == 0 and layer.n_out % tokens == 0


def _select_fits(layer: Any, widths: Sequence[int]) -> bool:
    index = layer.attributes["index"]
    inside = all(i < layer.n_in for i in index)
    return widths[0] == layer.n_in and len(index) == layer.n_out and inside


def _sum_fits(layer: Any, widths: Sequence[int]) -> bool:
    index = layer.attributes["index"]
    inside = all(i < layer.n_out for i in index)
    return widths[0] == layer.n_in and len(index) == layer.n_in and inside


def _join_fits(layer: Any, widths: Sequence[int]) -> bool:
    return sum(widths) == layer.n_in == layer.n_out


def _parts_fit(layer: Any, widths: Sequence[int]) -> bool:
    return _alike(layer, widths) and layer.n_in % layer.attributes["size"] == 0


# ------------------------------------------------------------------------------ the table


def _none(layer: Any) -> dict[str, tuple[int, ...]]:
    return {}


def _weight(layer: Any) -> dict[str, tuple[int, ...]]:
    tokens = layer.attributes.get("tokens", 1)
    n_in, n_out = layer.n_in // tokens, layer.n_out // tokens
    return {"weight": (n_out, n_in)} | ({"bias": (n_out,)} if layer.bias else {})


def _vectors(*names: str) -> Callable[[Any], dict[str, tuple[int, ...]]]:
    return lambda layer: {name: (layer.n_in,) for name in names}


def _constant(function: Callable) -> Operator:
    def make(layer: Any, dtype: torch.dtype) -> nn.Module:
        return WithConstant(function, layer.n_in, dtype)

    return Operator(1, _alike, {}, _vectors("constant"), make)


def _module(cls: type[nn.Module]) -> Operator:
    return Operator(1, _alike, {}, _none, lambda layer, dtype: cls())


def _function(function: Callable, arity: int = 1, **attributes: Callable) -> Operator:
    def make(layer: Any, dtype: torch.dtype) -> nn.Module:
        return Function(function, layer.attributes)

    return Operator(arity, _alike, attributes, _none, make)


def _on_parts(function: Callable, **attributes: Callable) -> Operator:
    def make(layer: Any, dtype: torch.dtype) -> nn.Module:
        return Function(function, layer.attributes)

    return Operator(1, _parts_fit, {"size": _is_count, **attributes}, _none, make)


OPERATORS: dict[str, Operator] = {
    "linear": Operator(
        1, _linear_fits, {}, _weight,
        lambda layer, dtype: nn.Linear(layer.n_in, layer.n_out, bias=layer.bias, dtype=dtype),
    ),
    "tokens": Operator(
        1, _tokens_fit, {"tokens": _is_count}, _weight,
        lambda layer, dtype: TokenLinear(
            layer.attributes["tokens"], layer.n_in // layer.attributes["tokens"],
            layer.n_out // layer.attributes["tokens"], layer.bias, dtype,
        ),
    ),
    # columns
    "select": Operator(
        1, _select_fits, {"index": _are_indices}, _none,
        lambda layer, dtype: Indexed(layer.attributes["index"]),
    ),
    "sum": Operator(
        1, _sum_fits, {"index": _are_indices}, _none,
        lambda layer, dtype: Indexed(layer.attributes["index"], layer.n_out),
    ),
    "join": Operator(
        None, _join_fits, {}, _none, lambda layer, dtype: Function(functions.join, {})
    ),
    # arithmetic with constants
    "shift": _constant(functions.shift),
    "scale": _constant(functions.scale),
    "divide": _constant(functions.divide),
    "batchnorm": Operator(
        1, _alike, {"eps": _is_number}, _vectors("mean", "variance", "weight", "bias"),
        lambda layer, dtype: BatchNorm(layer.n_in, layer.attributes["eps"], dtype),
    ),
    # a change of the number type; LayerDescription.dtype says which
    "cast": Operator(1, _alike, {}, _none, lambda layer, dtype: Cast(dtype)),
    # arithmetic of two activations
    "add": _function(lambda a, b: a + b, arity=2),
    "sub": _function(lambda a, b: a - b, arity=2),
    "mul": _function(functions.product, arity=2),
    "max": _function(torch.maximum, arity=2),
    "min": _function(torch.minimum, arity=2),
    # activations
    "relu": _module(nn.ReLU),
    "tanh": _module(nn.Tanh),
    "sigmoid": _module(nn.Sigmoid),
    "prelu": Operator(
        1, _alike, {}, _vectors("slope"), lambda layer, dtype: PReLU(layer.n_in, dtype)
    ),
    "leakyrelu": _function(F.leaky_relu, negative_slope=_is_number),
    "clip": _function(torch.clamp, min=_is_number, max=_is_number),
    "clipmin": _function(lambda x, min: torch.clamp(x, min=min), min=_is_number),
    "clipmax": _function(lambda x, max: torch.clamp(x, max=max), max=_is_number),
    "abs": _function(torch.abs),
    "sign": _function(torch.sign),
    "exp": _function(torch.exp),
    "log": _function(torch.log),
    "sqrt": _function(torch.sqrt),
    "reciprocal": _function(torch.reciprocal),
    "power": _function(lambda x, exponent: x.pow(exponent), exponent=_is_exponent),
    "sin": _function(torch.sin),
    "cos": _function(torch.cos),
    "erf": _function(torch.erf),
    "gelu": _function(F.gelu),
    "gelutanh": _function(lambda x: F.gelu(x, approximate="tanh")),
    "silu": _function(F.silu),
    "elu": _function(F.elu, alpha=_is_positive),
    "celu": _function(F.celu, alpha=_is_positive),
    "softplus": _function(F.softplus),
    "softsign": _function(F.softsign),
    "mish": _function(F.mish),
    "hardswish": _function(F.hardswish),
    # of each part of `size` columns
    "softmax": _on_parts(functions.softmax),
    "logsoftmax": _on_parts(functions.log_softmax),
    "layernorm": _on_parts(functions.layer_norm, eps=_is_number),
}
"""Name -> what a layer of this kind has to have."""
