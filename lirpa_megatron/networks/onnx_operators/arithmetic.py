"""Sums, differences, products, quotients and powers.

Arithmetic with constants stays an operator of its own, in the order and the number type of the
file: folded into a neighbouring linear layer, (x - 1.7e9) / 86400 would be another function. The
one thing merged is a bias, y = x W^T and then + b, which changes no number.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lirpa_megatron.networks.description import LayerDescription
from lirpa_megatron.networks.onnx_builder import Activation, number_like, unordered
from lirpa_megatron.networks.onnx_operators import attention, patterns
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


@operator("Mean")
def mean(node: Node) -> Activation:
    total = sum_(node)
    return node.with_constant("divide", total, number_like(total, node.count))


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
            whole = patterns.gated(node, x, gate)
            if whole is None and _widens(node, gate, x):
                wide = node.builder.expanded(gate, x.shape, node.where)
                whole = patterns.normalised(node, x, wide, quotient=False)
            if whole is not None:
                return whole
        return node.pair("mul", a, b)
    index = 0 if isinstance(a, np.ndarray) else 1
    x = node.activation(1 - index)
    return scaled(node, x, node.like(x, node.constant(index), index))


@operator("Div")
def div(node: Node) -> Activation:
    a, b = node.value(0), node.value(1)
    if isinstance(b, np.ndarray):
        x = node.activation(0)
        divisor = node.like(x, node.constant(1), 1)
        if np.any(divisor == 0):
            raise node.refuse("divides by zero")
        return node.by_number("over", x, divisor) or node.with_constant("divide", x, divisor)
    if isinstance(a, Activation) and _widens(node, b, a):
        wide = node.builder.expanded(b, a.shape, node.where)
        whole = patterns.normalised(node, a, wide, quotient=True)
        if whole is not None:
            return whole
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
    if node.joint_shape(x, exponent) != x.shape:
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


@operator("Sqrt", "Reciprocal", "Exp", "Log", "Sin", "Cos", "Abs", "Sign", "Erf", "Atan")
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
    base, order = node.builder.unmoved(x)
    arrays = {name: unordered(array, order) for name, array in arrays.items()}
    y = node.builder.layer("batchnorm", [base], base.shape, node.where, arrays, eps=eps)
    return node.builder.moved_again(y, x, order)


def _widens(node: Node, x: Activation, to: Activation) -> bool:
    return x.shape != to.shape and node.joint_shape(x, to) == to.shape


def scaled(node: Node, x: Activation, constant: np.ndarray) -> Activation:
    """x c; of a normalisation as its weight."""
    half = patterns.half_of_double(node, x, constant)
    if half is not None:
        return half
    layer = node.builder.layers.get(x.layer)
    if layer is not None and x.exclusive and x.index is None and _takes_weight(node, layer):
        weight = of_features(constant, x.shape)
        if weight is not None and len(weight) == layer.attributes["size"]:
            centred = layer.attributes.get("centred", 1)
            node.builder.layers[x.layer] = replace(
                layer, op="norm", attributes={**layer.attributes, "centred": centred}
            )
            node.builder.arrays[x.layer] = {"weight": weight}
            return x
    return node.by_number("times", x, constant) or node.with_constant("scale", x, constant)


def _takes_weight(node: Node, layer: LayerDescription) -> bool:
    """Whether a layer is a normalisation that nothing has been multiplied or added to."""
    if layer.op == "layernorm":
        return True
    return layer.op == "norm" and not layer.bias and bool(
        (node.builder.arrays[layer.name]["weight"] == 1).all()
    )


def negated(node: Node, x: Activation) -> Activation:
    """-x, exactly."""
    return node.with_constant("scale", x, number_like(x, -1.0))


def clipped(node: Node, x: Activation, constant: np.ndarray, op: str) -> Activation:
    """max(x, c) or min(x, c)."""
    c = uniform(constant)
    if c is None:
        return node.pair(op, x, node.as_activation(x, constant))
    x = node.builder.expanded(x, node.joint_shape(x, constant), node.where)
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
        return _plus(node, a, node.like(a, node.constant(index, finite=False), index))
    x = node.activation(1)
    return _plus(node, x, node.like(x, node.constant(0, finite=False), 0))


def _plus(node: Node, x: Activation, constant: np.ndarray) -> Activation:
    """x + c, as the bias of the linear layer or norm that made x where it has none."""
    far = attention.mask_of(node, x, constant)
    if far is not None:
        return far
    if not np.isfinite(constant.astype(np.float64)).all():
        raise node.refuse("adds NaN or infinite values")
    layer = node.builder.layers.get(x.layer)
    if layer is not None and layer.op in ("scores", "times", "over") and not constant.any() and (
        node.joint_shape(x, constant) == x.shape
    ):
        return x  # a mask that masks nothing
    if (
        layer is not None and layer.op in ("linear", "tokens", "norm") and not layer.bias
        and x.exclusive and x.index is None
    ):
        bias = of_features(constant, x.shape)
        # A reshape may have made other vectors than those that the layer makes.
        if bias is not None and len(bias) == _vector_size(layer):
            node.builder.layers[x.layer] = replace(layer, bias=True)
            node.builder.arrays[x.layer]["bias"] = bias
            return x
    return node.with_constant("shift", x, constant)


def _vector_size(layer: LayerDescription) -> int:
    return layer.attributes.get("size", layer.n_out // layer.attributes.get("tokens", 1))


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
