"""Products of two activations: attention scores, softmax times values, and the Attention operator.

A product of matrices [..., Q, d] and [..., d, K] is one of queries and keys, head by head, with all
leading dimensions as heads. Where the left one is a softmax along its last dimension, both are one
operator, whose bounds know that weights sum to 1; the softmax as a layer of its own is left out
unless something else reads it.

Scores to which a constant of -inf is added, or a number so far below that they are lost in it (at
most -1e30, such as the least number of a type), are masked: the layer "mask" stands for that until
the softmax times values that reads it takes it up.
"""

from __future__ import annotations

import math

import numpy as np

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.onnx_builder import Activation, number_like
from lirpa_megatron.networks.onnx_operators.node import Node, operator

# Numbers of at most this, added to scores, leave nothing of them.
FAR_BELOW = {"float16": -6e4, "bfloat16": -1e30, "float32": -1e30, "float64": -1e30}


def product(node: Node, a: Activation, b: Activation) -> Activation:
    """a b, matrices on the last two dimensions, which both have."""
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[-1] != b.shape[-2]:
        raise node.refuse(f"multiplies activations of shapes {a.shape} and {b.shape}")
    lead = node.joint_shape(a.shape[:-2], b.shape[:-2])
    if node.builder.batch > 1 and not lead:
        raise node.refuse(f"mixes the samples of the file's batch of {node.builder.batch}")
    a = node.builder.expanded(a, (*lead, *a.shape[-2:]), node.where)
    b = node.builder.expanded(b, (*lead, *b.shape[-2:]), node.where)
    weights = node.builder.layers.get(a.layer)
    if weights is not None and weights.op == "softmax" and a.index is None and (
        weights.attributes["size"] == a.shape[-1]
    ):
        return attend(node, Activation(weights.inputs[0], a.shape, a.dtype), b)
    return scores(node, a, _turned(node, b))


def scores(node: Node, q: Activation, k: Activation) -> Activation:
    """q k^T: [*lead, Q, d] and [*lead, K, d] -> [*lead, Q, K]."""
    heads = math.prod(q.shape[:-2]) // node.builder.batch
    sizes = {"heads": heads, "queries": q.shape[-2], "keys": k.shape[-2]}
    shape = (*q.shape[:-1], k.shape[-2])
    return node.builder.layer("scores", [_merged(node, q), _merged(node, k)], shape, node.where,
                              **sizes)


def attend(node: Node, s: Activation, v: Activation) -> Activation:
    """softmax(s) v: [*lead, Q, K] and [*lead, K, d] -> [*lead, Q, d]."""
    batch, lead, (queries, keys) = node.builder.batch, s.shape[:-2], s.shape[-2:]
    heads = math.prod(lead) // batch
    arrays, masks, fill = {}, 0, "-inf"
    below = node.builder.layers.get(s.layer)
    if below is not None and below.op == "mask":
        mask = node.builder.arrays[s.layer]["mask"].reshape(heads, queries, keys)
        mask = mask[:1] if (mask == mask[:1]).all() else mask
        arrays, masks, fill = {"mask": mask}, len(mask), below.attributes["fill"]
        s = Activation(below.inputs[0], s.shape, s.dtype)
    d = v.shape[-1]
    y = node.builder.layer(
        "attend", [s, _merged(node, v)], (batch, queries, heads * d), node.where, arrays,
        heads=heads, queries=queries, keys=keys, masks=masks, fill=fill,
    )
    positions = node.builder.positions(y, node.where).reshape(batch, queries, heads, d)
    return node.builder.moved(y, positions.swapaxes(1, 2).reshape(*lead, queries, d), node.where)


def mask_of(node: Node, x: Activation, constant: np.ndarray) -> Activation | None:
    """x + c where some of c are far below 0; None where none of them are."""
    if not (constant <= FAR_BELOW[x.dtype]).any():
        return None
    shape = node.joint_shape(x, constant)
    node.builder.spend(math.prod(shape), node.where)
    c = np.broadcast_to(constant, shape)
    far = c <= FAR_BELOW[x.dtype]
    lowest = np.unique(c[far].astype(np.float64))
    if len(lowest) > 1 or not np.isfinite(c[~far].astype(np.float64)).all():
        raise node.refuse("adds several numbers that are far below 0, or infinite ones")
    x = node.builder.expanded(x, c.shape, node.where)
    rest = np.where(far, np.zeros_like(c), c)
    if np.any(rest != 0):
        x = node.with_constant("shift", x, rest)
    return masked(node, x, far, float(lowest[0]))


def masked(node: Node, x: Activation, where: np.ndarray, fill: float) -> Activation:
    """x with `fill` where a constant is true, for a softmax that is multiplied by values."""
    where = np.broadcast_to(where, x.shape)
    mask = node.builder.vector(where.astype(number_like(x, 1.0).dtype), x.shape, node.where)
    return node.builder.layer(
        "mask", [x], x.shape, node.where, {"mask": mask}, dtype=x.dtype,
        fill="-inf" if fill == -math.inf else fill, node=node.where,
    )


def check_masks(layers) -> None:
    """Raises UserError for a mask that no attention has taken up."""
    for layer in layers:
        if layer.op == "mask":
            raise UserError(
                f"{layer.attributes['node']} adds or fills in a number that is far below 0, which "
                "is supported in front of a softmax that is multiplied by values (attention) "
                "alone: use a finite one such as -10000"
            )


@operator("Attention")
def attention(node: Node) -> Activation:
    """softmax(sqrt(c) Q (sqrt(c) K)^T + mask) V; the heads of [B, T, n d] are split first."""
    q, k, v = (node.activation(i) for i in range(3))
    known = {"scale", "is_causal", "q_num_heads", "kv_num_heads", "softmax_precision",
             "qk_matmul_output_mode", "softcap"}
    if set(node.attributes) - known or node.attributes.get("softcap", 0.0) or any(
        node.value(i) is not None for i in range(4, node.count)
    ) or any(node.reads.get(name) for name in node.proto.output[1:]):
        raise node.refuse("is supported with queries, keys, values and a mask, and one output")
    ranks, mask = {len(x.shape) for x in (q, k, v)}, node.constant(3, finite=False)
    if ranks not in ({3}, {4}):
        raise node.refuse("takes queries, keys and values of three or of four dimensions")
    flat = ranks == {3}
    if flat:
        heads = [node.attributes.get(n, 0) for n in ("q_num_heads", "kv_num_heads")]
        if not all(heads):
            raise node.refuse("has operands of three dimensions without numbers of heads")
        q, k, v = (_split(node, x, n) for x, n in zip((q, k, v), (heads[0], *heads[1:] * 2),
                                                      strict=True))
    if k.shape[:3] != v.shape[:3] or k.shape[3] != q.shape[3] or k.shape[0] != q.shape[0]:
        raise node.refuse(f"has operands of shapes {q.shape}, {k.shape}, {v.shape}")
    if k.shape[1] != q.shape[1]:
        if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise node.refuse(f"has {q.shape[1]} heads of queries and {k.shape[1]} of keys")
        k, v = (_repeated(node, x, q.shape[1] // k.shape[1]) for x in (k, v))
    scale = node.attributes.get("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    root = number_like(q, math.sqrt(scale))
    q, k = (
        node.by_number("times", x, root) or node.with_constant("scale", x, root) for x in (q, k)
    )
    s = scores(node, q, k)
    if mask is not None and node.joint_shape(s, mask) != s.shape:
        raise node.refuse(f"has a mask of shape {mask.shape} for scores of {s.shape}")
    if node.attributes.get("is_causal", 0):
        above = np.triu(np.ones(s.shape[-2:], bool), 1)
        s = masked(node, s, above, -math.inf) if mask is None else s
        if mask is not None:
            raise node.refuse("with a mask and is_causal is not supported")
    elif mask is not None and mask.dtype == bool:
        s = masked(node, s, ~mask, -math.inf) if not mask.all() else s
    elif mask is not None:
        mask = node.like(s, mask, 3)
        far = mask_of(node, s, mask)
        s = node.with_constant("shift", s, mask) if far is None else far
    y = attend(node, s, v)
    if not flat:
        return y
    positions = node.builder.positions(y, node.where).swapaxes(1, 2)
    return node.builder.moved(y, positions.reshape(*positions.shape[:2], -1), node.where)


def _split(node: Node, x: Activation, heads: int) -> Activation:
    """[B, T, n d] -> [B, n, T, d]."""
    if x.shape[-1] % heads:
        raise node.refuse(f"splits {x.shape[-1]} features into {heads} heads")
    positions = node.builder.positions(x, node.where).reshape(*x.shape[:2], heads, -1)
    return node.builder.moved(x, positions.swapaxes(1, 2), node.where)


def _repeated(node: Node, x: Activation, times: int) -> Activation:
    positions = node.builder.positions(x, node.where)
    return node.builder.moved(x, positions.repeat(times, axis=1), node.where)


def _turned(node: Node, x: Activation) -> Activation:
    positions = node.builder.positions(x, node.where)
    return node.builder.moved(x, positions.swapaxes(-1, -2), node.where)


def _merged(node: Node, x: Activation) -> Activation:
    """[*lead, T, d] -> [batch, T, heads d]: a token's vectors of all heads side by side."""
    batch, (count, d) = node.builder.batch, x.shape[-2:]
    positions = node.builder.positions(x, node.where).reshape(batch, -1, count, d)
    return node.builder.moved(
        x, positions.swapaxes(1, 2).reshape(batch, count, -1), node.where
    )
