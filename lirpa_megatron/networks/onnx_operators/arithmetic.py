"""Sums, differences, products, quotients and powers.

Arithmetic with constants stays an operator of its own, in the order and the number type of the
file: folded into a neighbouring linear layer, (x - 1.7e9) / 86400 would be another function. The
one thing merged is a bias, y = x W^T and then + b, which changes no number.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lirpa_megatron.networks.onnx_builder import Activation, number_like
from lirpa_megatron.networks.onnx_operators.node import Node, operator, uniform


@operator("Add")
def add(node: Node) -> Activation:
    return _sum(node, node.value(0), node.value(1), 1)


@operator("Sub")
def sub(node: Node) -> Activation:
    a, b = node.value(0), node.value(1)
    if isinstance(a, Activation) and isinstance(b, Activation):
        return node.pair("sub", a, b)
    if isinstance(a, Activation):
        return _plus(node, a, -node.like(a, node.constant(1), 1))
    x = node.activation(1)
    return _plus(node, negated(node, x), node.like(x, node.constant(0), 0))


@operator("Sum")
def sum_(node: Node) -> Activation:
    return _folded(node, lambda a, i: _sum(node, a, node.value(i), i))


@operator("Neg")
def neg(node: Node) -> Activation:
    return negated(node, node.activation(0))


@operator("Mul")
def mul(node: Node) -> Activation:
    a, b = node.value(0), node.value(1)
    if isinstance(a, Activation) and isinstance(b, Activation):
        if a.is_same(b):
            return node.function("power", a, exponent=2)
        for x, gate in ((a, b), (b, a)):
            if (whole := _gated(node, x, gate)) is not None:
                return node.function(whole, x)
        return node.pair("mul", a, b)
    index = 0 if isinstance(a, np.ndarray) else 1
    x = node.activation(1 - index)
    return node.with_constant("scale", x, node.like(x, node.constant(index), index))


@operator("Div")
def div(node: Node) -> Activation:
    a, b = node.value(0), node.value(1)
    if isinstance(b, np.ndarray):
        x = node.activation(0)
        divisor = node.like(x, node.constant(1), 1)
        if np.any(divisor == 0):
            raise node.refuse("divides by zero")
        return node.with_constant("divide", x, divisor)
    below = node.function("reciprocal", node.activation(1))
    if isinstance(a, Activation):
        return node.pair("mul", a, below)
    above = node.like(below, node.constant(0), 0)
    return below if uniform(above) == 1.0 else node.with_constant("scale", below, above)


@operator("Pow")
def pow_(node: Node) -> Activation:
    x, exponent = node.activation(0), node.value(1)
    k = uniform(exponent) if isinstance(exponent, np.ndarray) else None
    if k is None:
        raise node.refuse("is supported with one constant exponent for all elements")
    if np.broadcast_shapes(x.shape, exponent.shape) != x.shape:
        raise node.refuse(f"has an exponent of shape {exponent.shape} for operands of {x.shape}")
    if k == 1:
        return x
    if abs(k) == 0.5:
        root = node.function("sqrt", x)
        return root if k > 0 else node.function("reciprocal", root)
    if k != int(k) or not 1 <= abs(k) <= 64:
        raise node.refuse(f"has the exponent {k:g}: whole numbers up to 64, and 0.5, are supported")
    power = x if abs(k) == 1 else node.function("power", x, exponent=int(abs(k)))
    return power if k > 0 else node.function("reciprocal", power)


@operator("Sqrt", "Reciprocal", "Exp", "Log", "Sin", "Cos", "Abs", "Sign", "Erf")
def function(node: Node) -> Activation:
    return node.function(node.op.lower(), node.activation(0))


@operator("Max", "Min")
def extremum(node: Node) -> Activation:
    op = node.op.lower()

    def joined(a: Activation, i: int) -> Activation:
        other = node.value(i)
        if isinstance(other, Activation):
            return a if a.is_same(other) else node.pair(op, a, other)
        return clipped(node, a, node.like(a, node.constant(i), i), op)

    return _folded(node, joined)


@operator("BatchNormalization")
def batch_normalization(node: Node) -> Activation:
    x = node.activation(0)
    if node.attributes.get("training_mode", 0) or len([n for n in node.proto.output if n]) > 1:
        raise node.refuse("is in training mode: export the network for inference")
    if len(x.shape) < 2:
        raise node.refuse(f"takes [batch, channels, ...], its operand has shape {x.shape}")
    names = ("weight", "bias", "mean", "variance")
    arrays = {}
    for i, name in enumerate(names, start=1):
        constant = node.like(x, node.constant(i), i)
        if constant.shape != (x.shape[1],):
            raise node.refuse(f"has {name} of shape {constant.shape} for {x.shape[1]} channels")
        constant = constant.reshape(-1, *[1] * (len(x.shape) - 2))
        arrays[name] = node.builder.vector(constant, x.shape, node.where)
    eps = node.number("epsilon", 1e-5)
    if not np.all(arrays["variance"].astype(np.float64) + eps > 0):
        raise node.refuse("has a variance that is not positive")
    return node.builder.layer(
        "batchnorm", [x], x.shape, node.where, arrays, eps=eps
    )


def _gated(node: Node, x: Activation, gate: Activation) -> str | None:
    """The name of x gate where the gate is a function of x: x sigmoid(x) is silu(x), and
    x tanh(softplus(x)) is mish(x)."""

    def read_by(name: str, op: str) -> str:
        layer = node.builder.layers.get(name)
        return layer.inputs[0] if layer is not None and layer.op == op else ""

    if x.index is not None or gate.index is not None or x.shape != gate.shape:
        return None
    if read_by(gate.layer, "sigmoid") == x.layer:
        return "silu"
    if read_by(read_by(gate.layer, "tanh"), "softplus") == x.layer:
        return "mish"
    return None


def negated(node: Node, x: Activation) -> Activation:
    """-x, exactly."""
    return node.with_constant("scale", x, number_like(x, -1.0))


def clipped(node: Node, x: Activation, constant: np.ndarray, op: str) -> Activation:
    """max(x, c) or min(x, c)."""
    c = uniform(constant)
    if c is None:
        raise node.refuse("with several constants is not supported, only with one for all elements")
    x = node.builder.expanded(x, np.broadcast_shapes(x.shape, constant.shape), node.where)
    if op == "max":
        return node.function("relu", x) if c == 0 else node.function("clipmin", x, min=c)
    return node.function("clipmax", x, max=c)


def _folded(node: Node, join) -> Activation:
    """Joins all operands of an operator of any number of them, beginning with an activation."""
    begin = next(i for i in range(node.count) if isinstance(node.value(i), Activation))
    result = node.activation(begin)
    for i in range(node.count):
        if i != begin:
            result = join(result, i)
    return result


def _sum(node: Node, a, b, index: int) -> Activation:
    if isinstance(a, Activation) and isinstance(b, Activation):
        return node.pair("add", a, b)
    if isinstance(a, Activation):
        return _plus(node, a, node.like(a, node.constant(index), index))
    x = node.activation(1)
    return _plus(node, x, node.like(x, node.constant(0), 0))


def _plus(node: Node, x: Activation, constant: np.ndarray) -> Activation:
    """x + c, as the bias of the linear layer that made x where it has none."""
    layer = node.builder.layers.get(x.layer)
    if (
        layer is not None and layer.op in ("linear", "tokens") and not layer.bias
        and x.exclusive and x.index is None
    ):
        bias = of_features(constant, x.shape)
        if bias is not None:
            node.builder.layers[x.layer] = replace(layer, bias=True)
            node.builder.arrays[x.layer]["bias"] = bias
            return x
    return node.with_constant("shift", x, constant)


def of_features(constant: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A constant that is the same for all vectors of a tensor of this shape, as one vector [n]."""
    dims = constant.shape
    while dims and dims[0] == 1:
        dims = dims[1:]
    if len(dims) > 1 or constant.ndim > len(shape):
        return None
    if dims and dims[0] != shape[-1] or len(dims) == 1 and constant.shape[-1] != shape[-1]:
        return None
    return np.broadcast_to(constant.reshape(dims), (shape[-1],)).copy()
