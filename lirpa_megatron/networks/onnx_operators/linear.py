"""Products with constant matrices: Gemm, MatMul, and Conv on patches that do not overlap."""

from __future__ import annotations

import math

import numpy as np

from lirpa_megatron.networks.onnx_builder import Activation, number_like
from lirpa_megatron.networks.onnx_operators import attention
from lirpa_megatron.networks.onnx_operators.arithmetic import of_features
from lirpa_megatron.networks.onnx_operators.node import Node, operator


@operator("MatMul")
def matmul(node: Node) -> Activation:
    a, b = node.value(0), node.value(1)
    if isinstance(a, Activation) and isinstance(b, Activation):
        return attention.product(node, a, b)
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


@operator("Einsum")
def einsum(node: Node) -> Activation:
    """Products with a constant matrix, in which each of its letters but one is summed over."""
    equation = node.attributes["equation"].decode().replace(" ", "")
    terms, _, out = equation.partition("->")
    terms = terms.split(",")
    if len(terms) != 2 or "." in equation or not out:
        raise node.refuse(f"with the equation {equation!r} is not supported")
    both = [isinstance(node.value(i), Activation) for i in range(2)]
    for i, term in enumerate(terms):
        if len(getattr(node.value(i), "shape", ())) != len(term) or len(set(term)) < len(term):
            raise node.refuse(f"has the equation {equation!r}, which does not fit")
    if all(both):
        a, b = terms
        if (a[:-2], a[-1]) == (b[:-2], b[-1]) and out == a[:-1] + b[-2]:
            return attention.scores(node, node.activation(0), node.activation(1))
        if (a[:-2], a[-1]) == (b[:-2], b[-2]) and out == a[:-1] + b[-1]:
            return attention.product(node, node.activation(0), node.activation(1))
        raise node.refuse(f"of two activations with the equation {equation!r} is not supported")
    index = 0 if both[0] else 1
    x, own, other = node.activation(index), terms[index], terms[1 - index]
    weight = node.like(x, node.constant(1 - index), 1 - index)
    summed = [letter for letter in own if letter not in out]
    made = [letter for letter in other if letter not in own]
    if (
        len(summed) != 1 or len(made) != 1 or set(other) != {summed[0], made[0]}
        or out != own.replace(summed[0], made[0])
    ):
        raise node.refuse(f"with the equation {equation!r} is not supported")
    at = own.index(summed[0])
    last = node.builder.moved(
        x, np.moveaxis(node.builder.positions(x, node.where), at, -1), node.where
    )
    y = _linear(node, last, weight if other.index(summed[0]) == 1 else weight.T)
    return node.builder.moved(
        y, np.moveaxis(node.builder.positions(y, node.where), -1, at), node.where
    )


@operator("CumSum")
def cum_sum(node: Node) -> Activation:
    """A product with a triangle of ones."""
    x = node.activation(0)
    axis = node.axis(x, int(node.constant(1).reshape(-1)[0]))
    n = x.shape[axis]
    node.builder.spend(n * n, node.where)
    weight = np.tri(n, k=-node.attributes.get("exclusive", 0))
    weight = weight.T if node.attributes.get("reverse", 0) else weight
    order = np.moveaxis(node.builder.positions(x, node.where), axis, -1)
    y = _linear(node, node.builder.moved(x, order, node.where),
                weight.astype(number_like(x, 1.0).dtype))
    return node.builder.moved(
        y, np.moveaxis(node.builder.positions(y, node.where), -1, axis), node.where
    )


@operator("Conv")
def conv(node: Node) -> Activation:
    """A linear layer on patches: x [B, C, ...] where the stride is the kernel."""
    x = node.activation(0)
    weight = node.like(x, node.constant(1), 1)
    kernel, n = weight.shape[2:], weight.ndim - 2
    sizes = {
        name: list(node.attributes.get(name, [1] * n)) for name in ("strides", "dilations")
    }
    patches = sizes["strides"] == list(kernel) and (
        sizes["dilations"] == [1] * n or all(k == 1 for k in kernel)
    )
    padded = any(node.attributes.get("pads", ())) or node.attributes.get("auto_pad", b"NOTSET") in (
        b"SAME_UPPER", b"SAME_LOWER"
    )
    if not patches or padded or node.attributes.get("group", 1) != 1 or len(x.shape) != n + 2:
        raise node.refuse(
            "is a convolution, which is supported only as a patch embedding (stride equal to the "
            "kernel, no padding, one group): verify convolutional networks with auto_LiRPA"
        )
    counts = [size // k for size, k in zip(x.shape[2:], kernel, strict=True)]
    if weight.shape[1] != x.shape[1] or not all(counts):
        raise node.refuse(f"does not fit: {x.shape} is read by a weight of shape {weight.shape}")
    positions = node.builder.positions(x, node.where)
    cut = positions[(..., *(slice(0, c * k) for c, k in zip(counts, kernel, strict=True)))]
    cut = cut.reshape(*x.shape[:2], *(d for pair in zip(counts, kernel, strict=True) for d in pair))
    order = [0, *range(2, 2 + 2 * n, 2), 1, *range(3, 3 + 2 * n, 2)]
    patch = cut.transpose(order).reshape(x.shape[0], *counts, -1)
    bias = None if node.value(2) is None else node.like(x, node.constant(2), 2)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise node.refuse(f"has a bias of shape {bias.shape} for {len(weight)} channels")
    y = _linear(node, node.builder.moved(x, patch, node.where),
                weight.reshape(len(weight), -1), bias)
    return node.builder.moved(
        y, np.moveaxis(node.builder.positions(y, node.where), -1, 1), node.where
    )


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
