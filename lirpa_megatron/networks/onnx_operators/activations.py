"""Activation functions."""

from __future__ import annotations

import math

import numpy as np

from lirpa_megatron.networks.onnx_builder import Activation, number_like
from lirpa_megatron.networks.onnx_operators.node import Node, operator, uniform


@operator("Relu", "Tanh", "Sigmoid", "Softplus", "Softsign", "Mish")
def plain(node: Node) -> Activation:
    return node.function(node.op.lower(), node.activation(0))


@operator("Swish")
def swish(node: Node) -> Activation:
    """x sigmoid(alpha x)."""
    x, alpha = node.activation(0), node.number("alpha", 1.0)
    if alpha == 1.0:
        return node.function("silu", x)
    return node.pair("mul", x, node.function("sigmoid", _times(node, x, alpha)))


@operator("HardSwish")
def hard_swish(node: Node) -> Activation:
    return node.function("hardswish", node.activation(0))


@operator("LeakyRelu")
def leaky_relu(node: Node) -> Activation:
    slope = node.number("alpha", 0.01)
    return node.function("leakyrelu", node.activation(0), negative_slope=slope)


@operator("PRelu")
def prelu(node: Node) -> Activation:
    x = node.activation(0)
    slope = node.like(x, node.constant(1), 1)
    if uniform(slope) is not None:
        return node.function("leakyrelu", x, negative_slope=uniform(slope))
    vector = node.builder.vector(slope, x.shape, node.where)
    return node.builder.with_vector("prelu", x, vector, node.where, name="slope")


@operator("Elu", "Celu")
def elu(node: Node) -> Activation:
    return _elu(node, node.op.lower(), node.number("alpha", 1.0))


@operator("Selu")
def selu(node: Node) -> Activation:
    """gamma elu(x)."""
    alpha = node.number("alpha", 1.6732632423543772)
    gamma = node.number("gamma", 1.0507009873554805)
    return _times(node, _elu(node, "elu", alpha), gamma)


def _elu(node: Node, op: str, alpha: float) -> Activation:
    if not alpha > 0:
        raise node.refuse(f"has alpha {alpha:g}, which must be positive")
    return node.function(op, node.activation(0), alpha=alpha)


@operator("Gelu")
def gelu(node: Node) -> Activation:
    approximate = node.attributes.get("approximate", b"none")
    op = {b"none": "gelu", b"tanh": "gelutanh"}.get(approximate)
    if op is None:
        raise node.refuse(f"has approximate={approximate!r}")
    return node.function(op, node.activation(0))


@operator("Clip")
def clip(node: Node) -> Activation:
    x = node.activation(0)
    ends = {}
    for i, name in enumerate(("min", "max"), start=1):
        value = node.attributes.get(name)
        if value is None and node.value(i) is not None:
            constant = node.like(x, node.constant(i, finite=False), i)
            if node.joint_shape(x, constant) != x.shape:
                raise node.refuse(f"has {name} of shape {constant.shape}")
            value = uniform(constant)
        if value is not None and math.isnan(value):
            raise node.refuse(f"has {name} NaN")
        # The largest number of the type, which exporters write for "none", clips nothing either.
        if value is not None and abs(value) < float(np.finfo(np.float32).max):
            ends[name] = float(value)
    if not ends:
        return x
    if "max" not in ends:
        op = "relu" if ends["min"] == 0 else "clipmin"
        return node.function(op, x, **({} if op == "relu" else ends))
    if "min" not in ends:
        return node.function("clipmax", x, **ends)
    if ends["min"] >= ends["max"]:
        raise node.refuse(f"has min={ends['min']:g} and max={ends['max']:g}")
    return node.function("clip", x, **ends)


@operator("HardSigmoid")
def hard_sigmoid(node: Node) -> Activation:
    """max(0, min(1, alpha x + beta))."""
    x = node.activation(0)
    y = _times(node, x, node.number("alpha", 0.2))
    y = node.with_constant("shift", y, number_like(y, node.number("beta", 0.5)))
    return node.function("clip", y, min=0.0, max=1.0)


@operator("ThresholdedRelu")
def thresholded_relu(node: Node) -> Activation:
    alpha = node.number("alpha", 1.0)
    if alpha != 0:
        raise node.refuse(f"jumps at {alpha:g}: not supported (alpha=0 is Relu)")
    return node.function("relu", node.activation(0))


def _times(node: Node, x: Activation, factor: float) -> Activation:
    return node.with_constant("scale", x, number_like(x, factor))
