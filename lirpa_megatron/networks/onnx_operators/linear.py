"""Products with constant matrices: Gemm, MatMul."""

from __future__ import annotations

import math

import numpy as np

from lirpa_megatron.networks.onnx_builder import Activation
from lirpa_megatron.networks.onnx_operators.arithmetic import of_features
from lirpa_megatron.networks.onnx_operators.node import Node, operator


@operator("MatMul")
def matmul(node: Node) -> Activation:
    a, b = node.value(0), node.value(1)
    if isinstance(a, Activation) and isinstance(b, Activation):
        raise node.refuse("of two activations is not supported")
    if isinstance(a, Activation):
        weight = _matrix(node, 1, a)
        y = _linear(node, a, weight.T)
        return _without(node, y, -1) if node.constant(1).ndim == 1 else y
    x = node.activation(1)
    weight = _matrix(node, 0, x)
    if len(x.shape) == 1:
        y = _linear(node, x, weight)
    else:
        y = _swapped(node, _linear(node, _swapped(node, x), weight))
    return _without(node, y, -1 if len(x.shape) == 1 else -2) if node.constant(0).ndim == 1 else y


@operator("Gemm")
def gemm(node: Node) -> Activation:
    """alpha A' B' + beta C; alpha and beta stay multiplications of their own."""
    a, b = node.value(0), node.value(1)
    both = isinstance(a, Activation), isinstance(b, Activation)
    if all(both):
        raise node.refuse("of two activations is not supported")
    transposed = [bool(node.attributes.get(name, 0)) for name in ("transA", "transB")]
    index = 0 if both[0] else 1
    x = node.activation(index)
    if len(x.shape) != 2:
        raise node.refuse(f"takes a matrix as operand {index}, which has shape {x.shape}")
    weight = _matrix(node, 1 - index, x)
    x = _swapped(node, x) if transposed[index] else x
    weight = weight.T if transposed[1 - index] else weight
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    C = node.value(2)
    bias = None
    if both[0]:
        shape = (x.shape[0], weight.shape[1])
        if isinstance(C, np.ndarray) and alpha == 1.0:
            bias = of_features(_times(beta, node.like(x, node.constant(2), 2)), shape)
        y = _linear(node, x, weight.T, bias)
    else:
        y = _swapped(node, _linear(node, _swapped(node, x), weight))
    if alpha != 1.0:
        y = node.with_constant("scale", y, np.asarray(alpha).astype(weight.dtype))
    if C is None or bias is not None:
        return y
    if isinstance(C, Activation):
        C = C if beta == 1.0 else node.with_constant("scale", C,
                                                     np.asarray(beta).astype(weight.dtype))
        return node.pair("add", y, C)
    return node.with_constant("shift", y, _times(beta, node.like(y, node.constant(2), 2)))


def _times(factor: float, array: np.ndarray) -> np.ndarray:
    return array if factor == 1.0 else np.asarray(factor).astype(array.dtype) * array


def _matrix(node: Node, index: int, x: Activation) -> np.ndarray:
    """A constant operand as a matrix [rows, columns]; a vector as one row, or one column."""
    value = node.like(x, node.constant(index), index)
    while value.ndim > 2 and value.shape[0] == 1:
        value = value[0]
    if value.ndim == 1:
        return value[:, None] if index == 1 else value[None]
    if value.ndim != 2:
        raise node.refuse(f"has an operand of shape {value.shape}, expected a matrix")
    return value


def _linear(
    node: Node, x: Activation, weight: np.ndarray, bias: np.ndarray | None = None
) -> Activation:
    """Each vector of x on the last dimension times weight [n_out, n_in]."""
    if x.shape[-1] != weight.shape[1]:
        raise node.refuse(
            f"does not fit: the activation has {x.shape[-1]} features, the weight expects "
            f"{weight.shape[1]}"
        )
    if len(x.shape) == 1 and node.builder.batch > 1:
        raise node.refuse(f"mixes the samples of the file's batch of {node.builder.batch}")
    tokens = math.prod(x.shape[:-1]) // node.builder.batch
    arrays = {"weight": weight} | ({} if bias is None else {"bias": bias})
    attributes = {"tokens": tokens} if tokens > 1 else {}
    return node.builder.layer(
        "tokens" if tokens > 1 else "linear", [x], (*x.shape[:-1], weight.shape[0]), node.where,
        arrays, bias=bias is not None, **attributes,
    )


def _swapped(node: Node, x: Activation) -> Activation:
    """The last two dimensions exchanged."""
    positions = node.builder.positions(x, node.where)
    return node.builder.moved(x, np.swapaxes(positions, -1, -2), node.where)


def _without(node: Node, x: Activation, axis: int) -> Activation:
    """A dimension of size one left out."""
    return node.builder.moved(x, node.builder.positions(x, node.where).squeeze(axis), node.where)
