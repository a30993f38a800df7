"""A node of an ONNX graph as the operators' functions read it, and the table of these functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.onnx_builder import Activation, Builder, type_name
from lirpa_megatron.networks.onnx_constants import attributes_of

_NUMBERS = ("times", "over")

HANDLERS: dict[str, Callable[[Node], Any]] = {}
"""Operator -> what makes its result (one value, or a list of them) of a node."""


def operator(*names: str) -> Callable:
    """Enters a function into the table under these operators' names."""

    def enter(function: Callable) -> Callable:
        for name in names:
            HANDLERS[name] = function
        return function

    return enter


@dataclass(frozen=True)
class Condition:
    """What a comparison of an activation with constants makes: true where x `sign` c."""

    x: Activation
    # ">" or "<"; equality does not matter to what is made of it
    sign: str
    # [n] of one sample, flat
    constant: np.ndarray


@dataclass(frozen=True)
class Undefined:
    """Where an activation is NaN, or infinite."""

    x: Activation


@dataclass
class Node:
    """One node, its operands and the builder."""

    proto: onnx.NodeProto
    opset: int
    builder: Builder
    # what has been made so far, by name
    values: Mapping[str, Any]
    # how often each tensor is read
    reads: Mapping[str, int]

    def __post_init__(self) -> None:
        self.op = self.proto.op_type
        self.where = place(self.proto)
        self.attributes = attributes_of(self.proto)

    def refuse(self, reason: str) -> UserError:
        """An error about this node."""
        return UserError(f"{self.where} {reason}")

    @property
    def count(self) -> int:
        """Operands, absent ones at the end left out."""
        return len(self.proto.input)

    def value(self, index: int) -> Any:
        """An operand; None if it is left out."""
        if index >= len(self.proto.input) or not self.proto.input[index]:
            return None
        name = self.proto.input[index]
        value = self.values[name]
        if isinstance(value, Activation) and self.reads[name] > 1:
            return replace(value, exclusive=False)
        return value

    def activation(self, index: int) -> Activation:
        """An operand that depends on the input."""
        value = self.value(index)
        if isinstance(value, Activation):
            return value
        what = "absent" if value is None else "a constant"
        if isinstance(value, Condition):
            what = "a comparison of activations"
        raise self.refuse(f"takes an activation as operand {index}, which is {what}")

    def constant(self, index: int, finite: bool = True) -> np.ndarray | None:
        """An operand that does not depend on the input; None if it is left out."""
        value = self.value(index)
        if value is None:
            return None
        if not isinstance(value, np.ndarray):
            raise self.refuse(f"takes a constant as operand {index}, which is an activation")
        if finite and type_name(value) and not np.isfinite(value.astype(np.float64)).all():
            raise UserError(f"tensor {self.proto.input[index]!r} has NaN or infinite values")
        return value

    def integers(self, attribute: str, index: int) -> list[int] | None:
        """A list that is an attribute in some operator sets and an operand in others."""
        if attribute in self.attributes:
            return [int(n) for n in np.atleast_1d(self.attributes[attribute])]
        value = self.constant(index)
        return None if value is None else [int(n) for n in value.reshape(-1)]

    def number(self, attribute: str, default: float) -> float:
        """A float attribute: a float32, given as the float64 of the same value."""
        return float(self.attributes.get(attribute, default))

    def like(self, x: Activation, constant: np.ndarray, index: int) -> np.ndarray:
        """A constant operand, which must be of the activation's type."""
        if type_name(constant) != x.dtype:
            raise self.refuse(
                f"has operands of different types: an activation of {x.dtype} and "
                f"{self.proto.input[index]!r} of {constant.dtype.name}"
            )
        return constant

    def axis(self, x: Activation, axis: int) -> int:
        """An axis of x as a number from 0; the batch's is refused where there are samples."""
        rank = len(x.shape)
        if not -rank <= axis < rank:
            raise self.refuse(f"has axis {axis}, its operand has {rank} dimensions")
        axis %= rank
        if axis == 0 and self.builder.batch > 1:
            raise self.refuse(f"mixes the samples of the file's batch of {self.builder.batch}")
        return axis

    def joint_shape(self, *operands: Any) -> tuple[int, ...]:
        """The shape to which activations and constants (or shapes) are broadcast together."""
        shapes = [x if isinstance(x, tuple) else x.shape for x in operands]
        try:
            return np.broadcast_shapes(*shapes)
        except ValueError:
            raise self.refuse(
                f"has operands of shapes {' and '.join(map(str, shapes))}, which do not fit"
            ) from None

    def as_activation(self, x: Activation, constant: np.ndarray) -> Activation:
        """A constant as a layer: zero times one of x's columns, plus the constant."""
        builder = self.builder
        vector = builder.vector(constant, constant.shape, self.where)
        positions = np.zeros(constant.shape, np.int64)
        if builder.batch > 1:
            samples = np.arange(builder.batch) * builder.width(x)
            positions += samples.reshape(-1, *[1] * (constant.ndim - 1))
        y = builder.moved(x, positions, self.where)
        y = builder.with_vector("scale", y, np.zeros_like(vector), self.where)
        return builder.with_vector("shift", y, vector, self.where)

    def function(self, op: str, x: Activation, **attributes: Any) -> Activation:
        """A layer that computes x elementwise."""
        base, order = self.builder.unmoved(x)
        y = self.builder.layer(op, [base], base.shape, self.where, **attributes)
        return self.builder.moved_again(y, x, order)

    def by_number(self, op: str, x: Activation, constant: np.ndarray) -> Activation | None:
        """x times or over a number, inside of attention, where it must not keep heads from being
        sharded; None for any other x or constant."""
        base, order = self.builder.unmoved(x)
        layer, number = self.builder.layers.get(base.layer), uniform(constant)
        if number is None or layer is None or layer.op not in ("tokens", "scores", *_NUMBERS) or (
            self.joint_shape(x, constant) != x.shape
        ):
            return None
        y = self.builder.layer(op, [base], base.shape, self.where, number=number)
        return self.builder.moved_again(y, x, order)

    def with_constant(self, op: str, x: Activation, constant: np.ndarray) -> Activation:
        """A layer of x and a constant (shift, scale, divide), which are broadcast to each other."""
        shape = self.joint_shape(x, constant)
        x = self.builder.expanded(x, shape, self.where)
        vector = self.builder.vector(constant, shape, self.where)
        return self.builder.with_vector(op, x, vector, self.where)

    def pair(self, op: str, a: Activation, b: Activation) -> Activation:
        """A layer of two activations, which are broadcast to each other."""
        shape = self.joint_shape(a, b)
        both = [self.builder.expanded(x, shape, self.where) for x in (a, b)]
        return self.builder.layer(op, both, shape, self.where)


def place(node: onnx.NodeProto) -> str:
    """How errors name a node."""
    name = node.name or next((n for n in node.output if n), "without outputs")
    return f"node {name!r} ({node.op_type})"


def uniform(constant: np.ndarray) -> float | None:
    """The value of a constant that has one; None if it has several."""
    values = np.asarray(constant, dtype=np.float64).reshape(-1)
    return float(values[0]) if len(values) and (values == values[0]).all() else None
