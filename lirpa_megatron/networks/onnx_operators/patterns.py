"""Functions that exporters write in several nodes, found in the layers made so far.

A gate times what it gates, and a division by a deviation, are one operator here, because bounds of
the parts do not know that they depend on each other:

    x s(x)                               silu
    x tanh(softplus(x))                  mish
    x (1 + erf(x / c)) / 2               erfgate
    x (1 + tanh(a (x + b x^3))) / 2      tanhgate
    (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)      layernorm
    x / sqrt(mean(x^2) + eps)            norm

The numbers c, a, b and eps are the file's own, and a half may stand at x, at the gate, or behind
the product: the function is the same.
"""

from __future__ import annotations

import math

import numpy as np

from lirpa_megatron.networks.onnx_builder import Activation, number_like
from lirpa_megatron.networks.onnx_operators.node import Node, uniform


def gated(node: Node, x: Activation, gate: Activation) -> Activation | None:
    """x gate where the gate is a function of x; None for any other product."""
    if x.index is not None or gate.index is not None or x.shape != gate.shape:
        return None
    at = _Walk(node)
    for name, ops in (("silu", ("sigmoid",)), ("mish", ("tanh", "softplus"))):
        if at.below(gate.layer, *ops) == x.layer:
            return node.function(name, x)
    half_x, half_gate = at.constant(x.layer, "scale"), at.constant(gate.layer, "scale")
    for source, one_plus, factor in (
        (x.layer, gate.layer, 2.0), (x.layer, half_gate[0], 2.0 * (half_gate[1] or 0.0)),
        (half_x[0], gate.layer, 2.0 * (half_x[1] or 0.0)),
    ):
        found = None if source is None else _one_plus(at, one_plus, source)
        if found is not None and factor in (1.0, 2.0):
            name, numbers = found
            whole = Activation(source, x.shape, x.dtype, exclusive=False)
            y = node.function(name, whole, **numbers)
            if factor == 1.0:
                return y
            return node.with_constant("scale", y, number_like(y, 2.0))
    return None


def half_of_double(node: Node, x: Activation, constant: np.ndarray) -> Activation | None:
    """x c where x is 2 y of a gate and c is 1/2: y, exactly."""
    y, factor = _Walk(node).constant(x.layer, "scale")
    gate = node.builder.layers.get(y)
    if x.index is None and factor == 2.0 and uniform(constant) == 0.5 and gate is not None and (
        gate.op in ("erfgate", "tanhgate")
        and np.broadcast_shapes(x.shape, constant.shape) == x.shape
    ):
        return Activation(y, x.shape, x.dtype, exclusive=x.exclusive)
    return None


def normalised(node: Node, a: Activation, b: Activation, quotient: bool) -> Activation | None:
    """a / b where b is the deviation of a's vectors (a b where it is its reciprocal)."""
    if a.index is not None or a.shape != b.shape or b.index is None:
        return None
    at, size = _Walk(node), a.shape[-1]
    count = node.builder.width(a) // size
    each = np.repeat(np.arange(count), size)
    name = b.layer if quotient else at.below(b.layer, "reciprocal")
    mean, eps = at.constant(at.below(name, "sqrt"), "shift")
    square = _mean_of(at, mean, each, size)
    if square is None or eps is None or not eps > 0 or not np.array_equal(b.index, each) or (
        at.below(square, "power") != a.layer or at.of(square).attributes["exponent"] != 2
    ):
        return None
    minus = at.of(a.layer)
    if minus is not None and minus.op == "sub":
        x, repeated = minus.inputs
        chosen = at.of(repeated)
        if chosen is not None and chosen.op == "select" and (
            chosen.attributes["index"] == each.tolist()
            and _mean_of(at, chosen.inputs[0], each, size) == x
        ):
            whole = Activation(x, a.shape, a.dtype, exclusive=False)
            return node.builder.layer("layernorm", [whole], a.shape, node.where, size=size, eps=eps)
    one = np.ones_like(number_like(a, 1.0), shape=size)
    return node.builder.layer("norm", [a], a.shape, node.where, {"weight": one}, size=size,
                              eps=eps, centred=0)


def _mean_of(at: _Walk, name: str | None, each: np.ndarray, size: int) -> str | None:
    """What `name` is the mean of, vector by vector of this size; None if it is none."""
    total, count = at.constant(name, "divide")
    layer = at.of(total)
    if layer is None or layer.op != "sum" or count != size:
        return None
    return layer.inputs[0] if layer.attributes["index"] == each.tolist() else None


def _one_plus(at: _Walk, name: str, x: str) -> tuple[str, dict[str, float]] | None:
    """(operator, attributes) of x times half of the layer `name`, which is 1 + erf or 1 + tanh."""
    inner, one = at.constant(name, "shift")
    layer = at.of(inner)
    if one != 1.0 or layer is None or layer.op not in ("erf", "tanh"):
        return None
    argument = layer.inputs[0]
    if layer.op == "erf":
        for op in ("divide", "scale"):
            source, c = at.constant(argument, op)
            if source == x and c is not None and c > 0:
                return "erfgate", {"divisor": c if op == "divide" else 1 / c}
        return None
    total, a = at.constant(argument, "scale")
    added = at.of(total)
    if added is None or added.op != "add" or x not in added.inputs or a is None or not a > 0:
        return None
    other = added.inputs[1 - added.inputs.index(x)]
    cube, b = at.constant(other, "scale")
    if b is not None and b > 0 and _is_cube(at, cube, x):
        return "tanhgate", {"factor": a, "cubic": b}
    return None


def _is_cube(at: _Walk, name: str, x: str) -> bool:
    layer = at.of(name)
    if layer.op == "power":
        return layer.inputs == (x,) and layer.attributes["exponent"] == 3
    if layer.op != "mul" or x not in layer.inputs:
        return False
    square = at.of(layer.inputs[1 - layer.inputs.index(x)])
    return square is not None and square.op == "power" and (
        square.inputs == (x,) and square.attributes["exponent"] == 2
    )


class _Walk:
    """From layers to what they read; everything is None where a step does not fit."""

    def __init__(self, node: Node) -> None:
        self.layers, self.arrays = node.builder.layers, node.builder.arrays

    def of(self, name: str | None):
        return None if name is None else self.layers.get(name)

    def below(self, name: str | None, *ops: str) -> str | None:
        """What a chain of layers of these operators, the last one first, reads."""
        for op in ops:
            layer = self.of(name)
            if layer is None or layer.op != op:
                return None
            name = layer.inputs[0]
        return name

    def constant(self, name: str | None, op: str) -> tuple[str | None, float | None]:
        """What a layer with one number reads, and the number."""
        layer = self.of(name)
        if layer is not None and layer.op == {"scale": "times", "divide": "over"}.get(op):
            return layer.inputs[0], layer.attributes["number"]
        if layer is None or layer.op != op:
            return None, None
        number = uniform(self.arrays[name]["constant"])
        return (None, None) if number is None or math.isnan(number) else (layer.inputs[0], number)
