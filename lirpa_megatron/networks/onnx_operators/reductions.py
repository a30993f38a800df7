"""Operators along axes: sums, means, extremes, softmax, layer normalisation."""

from __future__ import annotations

import math

import numpy as np

from lirpa_megatron.networks.onnx_builder import Activation, number_like
from lirpa_megatron.networks.onnx_operators.node import Node, operator

# Elements of which the largest or least is taken.
_MAX_COMPARED = 256


@operator(
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "GlobalAveragePool", "ReduceL1",
    "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp",
)
def reduce(node: Node) -> Activation:
    """Norms are sums of absolute values or squares; log sum exp is x_1 minus its log-softmax."""
    x = node.activation(0)
    if node.op == "GlobalAveragePool":
        axes, keep = list(range(2, len(x.shape))), True
    else:
        axes, keep = node.integers("axes", 1), bool(node.attributes.get("keepdims", 1))
        if not axes:  # left out, or given without elements: ONNX reads both alike
            if node.attributes.get("noop_with_empty_axes", 0):
                return x
            axes = list(range(len(x.shape)))
    axes = sorted({node.axis(x, axis) for axis in axes})
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    shape = kept if keep else tuple(n for i, n in enumerate(x.shape) if i not in axes)
    count = math.prod(x.shape[i] for i in axes)
    if node.op == "ReduceLogSumExp":
        y = _on_last(node, x, axes, "logsoftmax")
        first = tuple(0 if i in axes else slice(None) for i in range(len(x.shape)))
        both = [
            node.builder.moved(z, node.builder.positions(z, node.where)[first].reshape(shape),
                               node.where)
            for z in (x, y)
        ]
        return node.builder.layer("sub", both, shape, node.where)
    if node.op == "ReduceL1":
        x = node.function("abs", x)
    elif node.op in ("ReduceL2", "ReduceSumSquare"):
        x = node.function("power", x, exponent=2)
    if count == 1 and node.op != "ReduceL2":
        return _reshaped(node, x, shape)
    if node.op in ("ReduceMax", "ReduceMin"):
        return _reshaped(node, _extremum(node, x, axes, count, node.op[6:].lower()), shape)
    groups = np.arange(math.prod(kept)).reshape(kept)
    index = node.builder.of_sample(np.broadcast_to(groups, x.shape), node.where)[0]
    y = node.builder.layer("sum", [x], shape, node.where, index=index.tolist())
    if node.op == "ReduceL2":
        return node.function("sqrt", node.function("relu", y))  # bounds of y may be negative
    if node.op not in ("ReduceMean", "GlobalAveragePool"):
        return y
    return node.with_constant("divide", y, number_like(y, count))


@operator("Softmax", "LogSoftmax")
def softmax(node: Node) -> Activation:
    x = node.activation(0)
    axis = node.axis(x, node.attributes.get("axis", -1 if node.opset >= 13 else 1))
    # Before operator set 13 all dimensions from the axis on are one.
    axes = [axis] if node.opset >= 13 else list(range(axis, len(x.shape)))
    return _on_last(node, x, axes, node.op.lower())


@operator("LayerNormalization")
def layer_normalization(node: Node) -> Activation:
    x = node.activation(0)
    if len([n for n in node.proto.output if n]) > 1:
        raise node.refuse("with more than one output is not supported")
    return _norm(node, x, 1)


@operator("RMSNormalization")
def rms_normalization(node: Node) -> Activation:
    return _norm(node, node.activation(0), 0)


@operator("InstanceNormalization", "GroupNormalization")
def group_normalization(node: Node) -> Activation:
    """LayerNorm of each group of channels, x [B, C, ...]; then each channel (before set 21 each
    group) times its scale, plus its bias."""
    x = node.activation(0)
    channels = x.shape[1]
    groups = channels if node.op == "InstanceNormalization" else node.attributes["num_groups"]
    if len(x.shape) < 3 or channels % groups:
        raise node.refuse(f"takes [batch, channels, ...] in {groups} groups, not {x.shape}")
    size = math.prod(x.shape[1:]) // groups
    if size == 1:
        raise node.refuse("normalises single numbers, which makes them 0")
    y = node.builder.layer("layernorm", [x], x.shape, node.where, size=size,
                           eps=node.number("epsilon", 1e-5))
    for i, op in ((1, "scale"), (2, "shift")):
        constant = node.like(x, node.constant(i), i)
        if len(constant) == groups != channels:
            constant = constant.repeat(channels // groups)
        if constant.shape != (channels,):
            raise node.refuse(f"has {constant.shape} numbers for {channels} channels")
        y = node.with_constant(op, y, constant.reshape(-1, *[1] * (len(x.shape) - 2)))
    return y


def _norm(node: Node, x: Activation, centred: int) -> Activation:
    axis = node.axis(x, node.attributes.get("axis", -1))
    size, eps = math.prod(x.shape[axis:]), node.number("epsilon", 1e-5)
    arrays = {}
    for i, name in ((1, "weight"), (2, "bias")):
        if i == 1 or node.value(i) is not None:
            constant = node.like(x, node.constant(i), i)
            if np.broadcast_shapes(constant.shape, x.shape[axis:]) != x.shape[axis:]:
                raise node.refuse(f"has {name} of shape {constant.shape} for {x.shape[axis:]}")
            arrays[name] = np.broadcast_to(constant, x.shape[axis:]).reshape(-1).copy()
    return node.builder.layer(
        "norm", [x], x.shape, node.where, arrays, bias="bias" in arrays, size=size, eps=eps,
        centred=centred,
    )


@operator("ArgMax", "ArgMin")
def argmax(node: Node) -> Activation:
    raise node.refuse(
        "is not supported: export the network without it, and compare the scores in the property"
    )


def _on_last(node: Node, x: Activation, axes: list[int], op: str, **attributes) -> Activation:
    """A function of all elements along some axes, which are moved to the end and back."""
    order = [i for i in range(len(x.shape)) if i not in axes] + axes
    positions = node.builder.positions(x, node.where)
    size = math.prod(x.shape[i] for i in axes)
    turned = node.builder.moved(x, positions.transpose(order), node.where)
    y = node.builder.layer(op, [turned], turned.shape, node.where, size=size, **attributes)
    back = np.argsort(order)
    return node.builder.moved(y, node.builder.positions(y, node.where).transpose(back), node.where)


def _extremum(node: Node, x: Activation, axes: list[int], count: int, op: str) -> Activation:
    """The largest (least) of the elements along some axes: halves against halves."""
    if count > _MAX_COMPARED:
        raise node.refuse(f"of {count} elements is not supported, only up to {_MAX_COMPARED}")
    order = [i for i in range(len(x.shape)) if i not in axes] + axes
    positions = node.builder.positions(x, node.where).transpose(order)
    lead = positions.shape[: len(positions.shape) - len(axes)]
    y = node.builder.moved(x, positions.reshape(*lead, count), node.where)
    while count > 1:
        here = node.builder.positions(y, node.where)
        half = (count + 1) // 2  # of an odd number the middle one is in both halves
        parts = [
            node.builder.moved(y, p, node.where)
            for p in (here[..., :half], here[..., count - half :])
        ]
        y = node.builder.layer(op, parts, parts[0].shape, node.where)
        count = half
    return y


def _reshaped(node: Node, x: Activation, shape: tuple[int, ...]) -> Activation:
    return node.builder.moved(x, node.builder.positions(x, node.where).reshape(shape), node.where)
