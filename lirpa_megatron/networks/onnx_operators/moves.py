"""Operators that move elements, join tensors or change the number type."""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto, helper

from lirpa_megatron.networks.description import STORED_DTYPES
from lirpa_megatron.networks.onnx_builder import Activation, number_like
from lirpa_megatron.networks.onnx_constants import MOVES, evaluate
from lirpa_megatron.networks.onnx_operators.node import Node, operator


@operator(*MOVES)
def move(node: Node) -> list[Activation]:
    """The operator itself says where elements go: it is evaluated on their positions."""
    x = node.activation(0)
    rest = [node.constant(i) for i in range(1, node.count)]
    positions = node.builder.positions(x, node.where)
    made = evaluate(node.proto, [positions, *rest], node.opset, node.where, node.builder.spend)
    return [node.builder.moved(x, p, node.where) for p in made]


@operator("Pad")
def pad(node: Node) -> Activation:
    """Positions are padded with -1, which stands for the constant; other modes repeat elements."""
    x = node.activation(0)
    mode = node.attributes.get("mode", b"constant")
    value = np.asarray(node.attributes.get("value", 0.0)).astype(number_like(x, 0.0).dtype)
    given = node.constant(2)
    value = value if given is None else node.like(x, given, 2)
    pads, axes = node.constant(1), node.constant(3)
    if node.opset < 11:
        pads = np.asarray(node.attributes.get("pads", []), np.int64)
    rest = [pads, np.array(-1), *([] if axes is None else [axes])]
    proto = helper.make_node(
        "Pad", [node.proto.input[0], "pads", "value", "axes"][: 1 + len(rest)], ["made"], mode=mode
    )
    positions = node.builder.positions(x, node.where)
    (made,) = evaluate(proto, [positions, *rest], max(node.opset, 18), node.where,
                       node.builder.spend)
    filled = made < 0
    if not filled.any():
        return node.builder.moved(x, made, node.where)
    # What stands at the padding is multiplied by 0: of each sample its first element.
    first = positions.reshape(node.builder.batch, -1)[:, :1]
    rows = node.builder.of_sample(np.where(filled, 0, made), node.where)
    rows = np.where(node.builder.of_sample(filled, node.where), first, rows)
    y = node.builder.moved(x, rows.reshape(made.shape), node.where)
    one = number_like(x, 1.0)
    y = node.with_constant("scale", y, np.where(filled, 0 * one, one))
    if not np.any(value):
        return y
    return node.with_constant("shift", y, np.where(filled, value, 0 * one))


@operator("Identity")
def identity(node: Node) -> Activation:
    return node.value(0)


@operator("Dropout")
def dropout(node: Node) -> list:
    training = node.constant(2)
    if training is not None and np.any(training):
        raise node.refuse("is in training mode: export the network for inference")
    return [node.activation(0), None]


@operator("Shape", "Size")
def shape(node: Node) -> np.ndarray:
    """A constant: the batch of the file, or one sample where the file leaves it open."""
    dims = node.activation(0).shape
    if node.op == "Size":
        return np.array(math.prod(dims), dtype=np.int64)
    return np.array(dims[node.attributes.get("start", 0) : node.attributes.get("end", len(dims))],
                    dtype=np.int64)


@operator("Cast", "CastLike")
def cast(node: Node) -> Activation:
    x = node.activation(0)
    if node.op == "Cast":
        number = node.attributes.get("to", 0)
        to = TensorProto.DataType.Name(number).lower() if number else "undefined"
        dtype = {"float": "float32", "double": "float64"}.get(to, to)
    else:
        like = node.value(1)
        dtype = like.dtype if isinstance(like, Activation) else like.dtype.name
    if dtype not in STORED_DTYPES:
        raise node.refuse(f"to {dtype} of an activation is not supported, only between floats")
    if dtype == x.dtype:
        return x
    return node.builder.layer("cast", [x], x.shape, node.where, dtype=dtype)


@operator("Concat")
def concat(node: Node) -> Activation:
    """Positions of all operands are joined by the operator; constants are shifts of zeros."""
    operands = [node.value(i) for i in range(node.count)]
    first = next(x for x in operands if isinstance(x, Activation))
    parts: list[Activation] = []
    arrays = []
    begin = 0
    for i, operand in enumerate(operands):
        x = operand if isinstance(operand, Activation) else _constant_columns(node, first, i)
        parts.append(x)
        # Numbered within a sample, sample after sample, as `moved` reads them.
        columns = node.builder.positions(x, node.where) % node.builder.width(x)
        arrays.append(columns + begin)
        begin += node.builder.width(x)
    (made,) = evaluate(node.proto, arrays, node.opset, node.where, node.builder.spend)
    if len(parts) == 1:
        joined = parts[0]
    else:
        flat = (node.builder.batch, begin) if node.builder.batch > 1 else (begin,)
        joined = node.builder.layer("join", parts, flat, node.where)
    rows = node.builder.of_sample(made, node.where)
    samples = np.arange(node.builder.batch)[:, None] * begin
    return node.builder.moved(joined, (rows + samples).reshape(made.shape), node.where)


def _constant_columns(node: Node, x: Activation, index: int) -> Activation:
    constant = node.like(x, node.constant(index), index)
    if not constant.size:
        raise node.refuse(f"joins an empty constant, operand {index}")
    return node.as_activation(x, constant)
