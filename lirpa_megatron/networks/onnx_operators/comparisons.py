"""Comparisons with constants, and Where on them: the functions that exporters write so.

Where(x > c, a, b) is supported where it is one of

    max(x, c)         Where(x > c, x, c)         min(x, c)     Where(x < c, x, c)
    relu(x)           Where(x > 0, x, 0)         |x|           Where(x > 0, x, -x)
    leaky_relu(x)     Where(x > 0, x, s x)       elu(x)        Where(x > 0, x, s (exp(x) - 1))

or the same with x < c, and a and b exchanged. >= and > differ where x == c, at which both branches
of each of these have one value. Anything else may jump, and is refused.
"""

from __future__ import annotations

import math

import numpy as np

from lirpa_megatron.networks.onnx_builder import Activation, number_like
from lirpa_megatron.networks.onnx_operators import attention
from lirpa_megatron.networks.onnx_operators.node import (
    Condition,
    Node,
    Undefined,
    operator,
    uniform,
)

_SIGNS = {"Greater": ">", "GreaterOrEqual": ">", "Less": "<", "LessOrEqual": "<"}


@operator(*_SIGNS)
def compare(node: Node) -> Condition:
    a, b = node.value(0), node.value(1)
    if isinstance(a, Activation) and isinstance(b, Activation):
        raise node.refuse("of two activations is not supported")
    index = 0 if isinstance(a, Activation) else 1
    x = node.activation(index)
    constant = node.like(x, node.constant(1 - index), 1 - index)
    sign = _SIGNS[node.op]
    if index == 1:
        sign = ">" if sign == "<" else "<"
    return Condition(x, sign, node.builder.vector(constant, x.shape, node.where))


@operator("IsNaN", "IsInf")
def is_nan(node: Node) -> Undefined:
    return Undefined(node.activation(0))


@operator("Where")
def where(node: Node) -> Activation:
    condition = node.value(0)
    if isinstance(condition, np.ndarray):
        return _chosen(node, condition)
    if isinstance(condition, Undefined):
        return _guarded(node, condition.x)
    if not isinstance(condition, Condition):
        raise node.refuse("takes a comparison of an activation with a constant as its condition")
    x, c = condition.x, uniform(condition.constant)
    high, low = node.value(1), node.value(2)
    if condition.sign == "<":
        high, low = low, high
    made = None if c is None else _function(node, x, c, high, low)
    if made is None:
        raise node.refuse(
            "is supported for max, min, relu, abs, leaky relu and elu of the activation that its "
            "condition compares; other choices may jump"
        )
    return made


def _chosen(node: Node, condition: np.ndarray) -> Activation:
    """By a constant condition: elements of two activations, or of one and a constant."""
    a, b = node.value(1), node.value(2)
    if condition.dtype != bool or any(not isinstance(x, (Activation, np.ndarray)) for x in (a, b)):
        raise node.refuse("takes a condition and two numbers")
    shape = node.joint_shape(condition, a, b)
    node.builder.spend(math.prod(shape), node.where)
    condition = np.broadcast_to(condition, shape)
    if isinstance(a, Activation) and isinstance(b, Activation):
        both = [node.builder.expanded(x, shape, node.where) for x in (a, b)]
        width = node.builder.width(both[0])
        flat = (node.builder.batch, 2 * width) if node.builder.batch > 1 else (2 * width,)
        joined = node.builder.layer("join", both, flat, node.where)
        rows = node.builder.of_sample(np.broadcast_to(condition, shape), node.where)
        columns = np.arange(width) + np.where(rows, 0, width)
        columns = columns + np.arange(node.builder.batch)[:, None] * 2 * width
        return node.builder.moved(joined, columns.reshape(shape), node.where)
    index = 1 if isinstance(a, Activation) else 2
    x = node.builder.expanded(node.activation(index), shape, node.where)
    other = np.broadcast_to(node.like(x, node.constant(3 - index, finite=False), 3 - index), shape)
    filled = ~condition if index == 1 else condition
    lowest = np.unique(other[filled].astype(np.float64))
    if len(lowest) == 1 and lowest[0] <= attention.FAR_BELOW[x.dtype]:
        return attention.masked(node, x, filled, float(lowest[0]))
    if not np.isfinite(lowest).all():
        raise node.refuse("fills in NaN or infinite values")
    one = number_like(x, 1.0)
    y = node.with_constant("scale", x, np.where(filled, 0 * one, one))
    return node.with_constant("shift", y, np.where(filled, other, 0 * one))


def _guarded(node: Node, x: Activation) -> Activation:
    """Where(isnan(p), c, p), p a softmax that is never NaN: no row of it is all -inf."""
    layer = node.builder.layers.get(x.layer)
    scores = layer and node.builder.layers.get(layer.inputs[0])
    if layer is None or layer.op != "softmax" or x.index is not None or not x.is_same(
        node.value(2)
    ):
        raise node.refuse("replaces NaN or infinity of what is no softmax: not supported")
    if scores is not None and scores.op == "mask":
        mask = node.builder.arrays[scores.name]["mask"].reshape(-1, layer.attributes["size"])
        if (mask != 0).all(-1).any():
            raise node.refuse("guards a softmax that has all of a query's keys masked")
    return node.value(2)


def _function(node: Node, x: Activation, c: float, high, low) -> Activation | None:
    """What x is above c, and below; None if it is no function of the list."""
    if x.is_same(high) and isinstance(low, np.ndarray) and _is(low, c, x):
        return node.function("relu", x) if c == 0 else node.function("clipmin", x, min=c)
    if x.is_same(low) and isinstance(high, np.ndarray) and _is(high, c, x):
        return node.function("clipmax", x, max=c)
    if c != 0 or not isinstance(high, Activation) or not isinstance(low, Activation):
        return None
    if x.is_same(high):
        slope = _factor(node, low, x)
        if slope == -1:
            return node.function("abs", x)
        if slope is not None:
            return node.function("leakyrelu", x, negative_slope=slope)
        alpha = _exponential(node, low, x)
        return node.function("elu", x, alpha=alpha) if alpha is not None and alpha > 0 else None
    return None


def _is(constant: np.ndarray, c: float, x: Activation) -> bool:
    shape = np.broadcast_shapes(constant.shape, x.shape)
    return uniform(constant) == c and shape == x.shape


def _step(node: Node, y: Activation, op: str) -> tuple[Activation | None, float | None]:
    """What a layer with one constant reads, and the constant; (None, None) of another layer."""
    layer = node.builder.layers.get(y.layer)
    if layer is None or layer.op != op or y.index is not None:
        return None, None
    arrays = node.builder.arrays[layer.name]
    return Activation(layer.inputs[0], y.shape, y.dtype), (
        uniform(arrays["constant"]) if arrays else None
    )


def _factor(node: Node, y: Activation, x: Activation) -> float | None:
    """s of y = s x; None if y is not of this form."""
    read, factor = _step(node, y, "scale")
    return factor if read is not None and x.index is None and x.is_same(read) else None


def _exponential(node: Node, y: Activation, x: Activation) -> float | None:
    """s of y = s (exp(x) - 1); None if y is not of this form."""
    read, factor = _step(node, y, "scale")
    read, factor = (y, 1.0) if read is None else (read, factor)
    read, minus = _step(node, read, "shift")
    if read is None or minus != -1:
        return None
    read, _ = _step(node, read, "exp")
    return factor if read is not None and x.index is None and x.is_same(read) else None
