"""The operators of imported networks: what each needs, and which module computes it.

Activations are [B, n], or in the layouts that `layouts` says. Constants (`constant`, `slope`, ...)
are parameters, so that checkpoints store them beside the weights; indices are part of the
description.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lirpa_megatron.networks import functions
from lirpa_megatron.networks.modules import (
    Attend,
    BatchNorm,
    Cast,
    Function,
    Indexed,
    Norm,
    PReLU,
    WithConstant,
)


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
            and (not layer.bias or layer.op in ("linear", "tokens", "norm"))
            and self.widths(layer, widths)
        )


# ------------------------------------------------------------------------------ attributes


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_nonzero(value: Any) -> bool:
    return _is_number(value) and value != 0


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_exponent(value: Any) -> bool:
    return type(value) is int and 2 <= value <= 64


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_flag(value: Any) -> bool:
    return type(value) is int and value in (0, 1)


def _is_fill(value: Any) -> bool:
    return value == "-inf" or _is_number(value) and value < 0


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


def _scores_fit(layer: Any, widths: Sequence[int]) -> bool:
    heads, queries, keys = (layer.attributes[name] for name in ("heads", "queries", "keys"))
    return (
        widths[0] == layer.n_in and layer.n_in % (heads * queries) == 0
        and widths[1] * queries == widths[0] * keys and layer.n_out == heads * queries * keys
    )


def _attend_fits(layer: Any, widths: Sequence[int]) -> bool:
    heads, queries, keys = (layer.attributes[name] for name in ("heads", "queries", "keys"))
    return (
        widths[0] == layer.n_in == heads * queries * keys and widths[1] % (heads * keys) == 0
        and layer.n_out * keys == widths[1] * queries
        and layer.attributes["masks"] in (0, 1, heads)
    )


# ------------------------------------------------------------------------------ the table


def _none(layer: Any) -> dict[str, tuple[int, ...]]:
    return {}


def _weight(layer: Any) -> dict[str, tuple[int, ...]]:
    tokens = layer.attributes.get("tokens", 1)
    n_in, n_out = layer.n_in // tokens, layer.n_out // tokens
    return {"weight": (n_out, n_in)} | ({"bias": (n_out,)} if layer.bias else {})


def _vectors(*names: str) -> Callable[[Any], dict[str, tuple[int, ...]]]:
    return lambda layer: {name: (layer.n_in,) for name in names}


def _constant(name: str) -> Operator:
    def make(layer: Any, dtype: torch.dtype) -> nn.Module:
        return WithConstant(name, layer.n_in, dtype)

    return Operator(1, _alike, {}, _vectors("constant"), make)


def _module(cls: type[nn.Module]) -> Operator:
    return Operator(1, _alike, {}, _none, lambda layer, dtype: cls())


def _function(function: Callable, arity: int = 1, **attributes: Callable) -> Operator:
    def make(layer: Any, dtype: torch.dtype) -> nn.Module:
        return Function(function, layer.attributes)

    return Operator(arity, _alike, attributes, _none, make)


def _norm_tensors(layer: Any) -> dict[str, tuple[int, ...]]:
    size = layer.attributes["size"]
    return {"weight": (size,)} | ({"bias": (size,)} if layer.bias else {})


def _mask(layer: Any) -> dict[str, tuple[int, ...]]:
    shape = tuple(layer.attributes[name] for name in ("masks", "queries", "keys"))
    return {"mask": shape} if shape[0] else {}


_HEADS = {"heads": _is_count, "queries": _is_count, "keys": _is_count}


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
        lambda layer, dtype: nn.Linear(
            layer.n_in // layer.attributes["tokens"], layer.n_out // layer.attributes["tokens"],
            bias=layer.bias, dtype=dtype,
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
        None, _join_fits, {}, _none,
        lambda layer, dtype: Function(lambda *x: functions.join(*x), {}),
    ),
    # arithmetic with constants
    "shift": _constant("shift"),
    "scale": _constant("scale"),
    "divide": _constant("divide"),
    # a single number for all elements
    "times": _function(lambda x, number: functions.times(x, number), number=_is_number),
    "over": _function(lambda x, number: functions.over(x, number), number=_is_nonzero),
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
    "atan": _function(torch.atan),
    "gelu": _function(F.gelu),
    "gelutanh": _function(lambda x: F.gelu(x, approximate="tanh")),
    "erfgate": _function(functions.erf_gate, divisor=_is_positive),
    "tanhgate": _function(functions.tanh_gate, factor=_is_positive, cubic=_is_positive),
    "silu": _function(F.silu),
    "elu": _function(F.elu, alpha=_is_positive),
    "celu": _function(F.celu, alpha=_is_positive),
    "softplus": _function(F.softplus),
    "softsign": _function(F.softsign),
    "mish": _function(F.mish),
    "hardswish": _function(F.hardswish),
    # of each vector of `size` columns
    "softmax": _on_parts(lambda x, size: functions.softmax(x, size)),
    "logsoftmax": _on_parts(lambda x, size: functions.log_softmax(x, size)),
    "layernorm": _on_parts(
        lambda x, size, eps: functions.layer_norm(x, size, eps), eps=_is_number
    ),
    "norm": Operator(
        1, _parts_fit, {"size": _is_count, "eps": _is_number, "centred": _is_flag}, _norm_tensors,
        lambda layer, dtype: Norm(
            layer.attributes["size"], layer.attributes["eps"], bool(layer.attributes["centred"]),
            layer.bias, dtype,
        ),
    ),
    # attention: vectors of all heads side by side
    "scores": Operator(
        2, _scores_fit, _HEADS, _none, lambda layer, dtype: Function(
            lambda q, k, heads, queries, keys:
                functions.scores(q, k, layer.n_in // (heads * queries)),
            layer.attributes,
        ),
    ),
    "attend": Operator(
        2, _attend_fits, {**_HEADS, "masks": _is_size, "fill": _is_fill}, _mask,
        lambda layer, dtype: Attend(
            layer.n_out // (layer.attributes["queries"] * layer.attributes["heads"]),
            _mask(layer).get("mask", ()), layer.attributes["fill"], dtype,
        ),
    ),
}
"""Name -> what a layer of this kind has to have."""
