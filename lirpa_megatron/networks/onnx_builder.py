"""Builds a network's description while an ONNX graph is read.

An ONNX tensor that depends on the input is an `Activation`: columns of a layer's output, in an
order. What only moves elements (Transpose, Slice, Reshape, ...) makes another order; a layer that
selects columns is added when an operator needs them so, and never where nothing moved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.description import (
    INPUT,
    STORED_DTYPES,
    LayerDescription,
)

# Elements that all steps of the import together may make: files come from strangers.
MAX_ELEMENTS = 2**28
# Numbers that the indices of all layers together may have: they are part of the description.
MAX_INDICES = 2**22
# Layers of a network.
MAX_LAYERS = 10_000

_ONNX_NAMES = {"float32": "FLOAT", "float64": "DOUBLE"}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Activation:
    """An ONNX tensor that depends on the input."""

    # the layer whose output it takes its elements from, or "input"
    layer: str
    # as ONNX sees it, the batch included
    shape: Shape
    # a key of STORED_DTYPES
    dtype: str
    # columns of the layer's output, one for each element of a sample; None: all, in order
    index: np.ndarray | None = None
    # whether nothing but this tensor reads the layer's output
    exclusive: bool = True

    def is_same(self, other: Any) -> bool:
        """Whether the other one is the same tensor, element by element."""
        return (
            isinstance(other, Activation)
            and (self.layer, self.shape) == (other.layer, other.shape)
            and (self.index is other.index or (
                self.index is not None and other.index is not None
                and np.array_equal(self.index, other.index)
            ))
        )


@dataclass
class Builder:
    """The layers so far, and what makes new ones.

    Attributes:
        batch: samples in one input of the file; with more than one, each activation's first
            dimension is the batch, and what would mix samples is refused.
    """

    n_in: int
    batch: int = 1
    layers: dict[str, LayerDescription] = field(default_factory=dict)
    # parameters by layer and name, as the file stores them
    arrays: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    elements: int = 0
    indices: int = 0
    _numbers: dict[str, int] = field(default_factory=dict)
    _selections: dict[tuple[str, bytes], str] = field(default_factory=dict)
    _parts: dict[tuple[str, bytes], str] = field(default_factory=dict)

    def spend(self, elements: int, where: str) -> None:
        """Counts elements that are about to be made.

        Raises:
            UserError: more than a network of this kind can need.
        """
        self.elements += elements
        if self.elements > MAX_ELEMENTS:
            raise UserError(f"{where} makes too many elements ({elements:,}) to be read")

    def width(self, x: Activation) -> int:
        """Elements of one sample."""
        return math.prod(x.shape) // self.batch

    def _width_of(self, layer: str) -> int:
        return self.n_in if layer == INPUT else self.layers[layer].n_out

    # ----------------------------------------------------------------- moving elements

    def positions(self, x: Activation, where: str) -> np.ndarray:
        """The numbers 0, 1, ... in the shape of x, for `moved`."""
        self.spend(4 * math.prod(x.shape), where)  # and what is made of them
        return np.arange(math.prod(x.shape), dtype=np.int64).reshape(x.shape)

    def moved(self, x: Activation, positions: np.ndarray, where: str) -> Activation:
        """The tensor of these elements of x (positions as `positions` numbers them)."""
        columns = self.of_sample(positions, where)
        if self.batch > 1:
            columns = columns[0] if self._keeps_samples(columns, self.width(x)) else None
            if columns is None:
                raise UserError(f"{where} mixes the samples of the file's batch of {self.batch}")
        else:
            columns = columns[0]
        index = columns if x.index is None else x.index[columns]
        n = self._width_of(x.layer)
        if len(index) == n and np.array_equal(index, np.arange(n)):
            index = None
        return replace(x, shape=positions.shape, index=index)

    def of_sample(self, array: np.ndarray, where: str) -> np.ndarray:
        """[batch, elements of a sample]."""
        if array.size == 0:
            raise UserError(f"{where} makes an empty tensor, of shape {array.shape}")
        if self.batch > 1 and (array.ndim == 0 or array.shape[0] != self.batch):
            raise UserError(
                f"{where} makes a tensor of shape {array.shape} of a batch of {self.batch}: "
                "its first dimension must stay the batch"
            )
        return array.reshape(self.batch, -1)

    def _keeps_samples(self, columns: np.ndarray, width: int) -> bool:
        rows = np.arange(self.batch)[:, None]
        return bool(((columns // width == rows) & (columns % width == columns[0])).all())

    def expanded(self, x: Activation, shape: Shape, where: str) -> Activation:
        """x broadcast to a shape."""
        if x.shape == shape:
            return x
        self.spend(math.prod(shape), where)
        return self.moved(x, np.broadcast_to(self.positions(x, where), shape), where)

    def vector(self, constant: np.ndarray, shape: Shape, where: str) -> np.ndarray:
        """A constant broadcast to an activation's shape, as a flat vector of one sample."""
        self.spend(math.prod(shape), where)
        rows = self.of_sample(np.broadcast_to(constant, shape), where)
        if not (rows == rows[:1]).all():
            raise UserError(f"{where}: the constant differs between the samples of the batch")
        return rows[0].copy()

    def plain(self, x: Activation, where: str) -> Activation:
        """x as a layer's whole output, in order."""
        x = self.of_own_layer(x)
        if x.index is None:
            return x
        if len(x.index) > MAX_INDICES:
            raise UserError(f"{where} moves too many elements ({len(x.index):,}) to be supported")
        key = x.layer, x.index.tobytes()
        if key not in self._selections:
            made = self.layer("select", [replace(x, index=None)], x.shape, where,
                              n_out=len(x.index), index=x.index.tolist())
            self._selections[key] = made.layer
        return replace(x, layer=self._selections[key], index=None, exclusive=False)

    # ----------------------------------------------------------------- making layers

    def layer(
        self, op: str, inputs: Sequence[Activation], shape: Shape, where: str,
        arrays: Mapping[str, np.ndarray] | None = None, n_in: int | None = None,
        n_out: int | None = None, bias: bool = False, dtype: str | None = None, **attributes: Any,
    ) -> Activation:
        """Adds a layer.

        Args:
            op: a key of `layers.OPERATORS`.
            inputs: what it reads.
            shape: of what it makes, the batch included.
            where: the node, for errors.
            arrays: its parameters.
            n_in, n_out: widths, where they are not those of the shapes.
            bias, attributes: as in LayerDescription.
            dtype: what it computes in; None: its inputs' type.
        """
        widths = None if op == "select" else [n_in or self.width(x) for x in inputs]
        if op != "select":
            inputs = [self.plain(x, where) for x in inputs]
        if len({x.dtype for x in inputs}) > 1:
            types = ", ".join(x.dtype for x in inputs)
            raise UserError(f"{where} reads activations of different types ({types})")
        if len(self.layers) >= MAX_LAYERS:
            raise UserError(f"{where}: networks of more than {MAX_LAYERS} layers are not supported")
        self.indices += len(attributes.get("index", ()))
        if self.indices > MAX_INDICES:
            raise UserError(f"{where} moves too many elements to be supported")
        prefix = {"linear": "fc", "tokens": "fc"}.get(op, op)
        self._numbers[prefix] = self._numbers.get(prefix, 0) + 1
        name = f"{prefix}{self._numbers[prefix]}"
        n_in = self._width_of(inputs[0].layer) if widths is None else widths[0]
        if op == "join":
            n_in = sum(widths)
        dtype = dtype or inputs[0].dtype
        n_out = n_out or math.prod(shape) // self.batch
        self.layers[name] = LayerDescription(
            name, op, tuple(x.layer for x in inputs), n_in, n_out, bias, dtype, attributes
        )
        self.arrays[name] = dict(arrays or {})
        return Activation(name, tuple(shape), dtype)

    def with_vector(
        self, op: str, x: Activation, vector: np.ndarray, where: str, name: str = "constant"
    ) -> Activation:
        """A layer of x and a constant vector."""
        base, order = self.unmoved(x)
        arrays = {name: unordered(vector, order)}
        return self.moved_again(self.layer(op, [base], base.shape, where, arrays), x, order)

    def unmoved(self, x: Activation) -> tuple[Activation, np.ndarray | None]:
        """(all of the layer's output that x moves, x's order of it) where x has each column once;
        x as it is, and None, where it does not. What is done to each element is done before it
        moves, so that vectors stay together."""
        x = self.of_own_layer(x)
        n = self._width_of(x.layer)
        if x.index is None or n > MAX_INDICES or len(x.index) != n or len(np.unique(x.index)) < n:
            return x, None
        shape = (self.batch, n) if self.batch > 1 else (n,)
        return replace(x, shape=shape, index=None), x.index

    def moved_again(self, y: Activation, x: Activation, order: np.ndarray | None) -> Activation:
        """What was made of x `unmoved`, in x's shape and order."""
        return replace(y, shape=x.shape, index=order)

    def of_own_layer(self, x: Activation) -> Activation:
        """Some features of all tokens of a linear layer, as a linear layer of its own: queries,
        keys and values that one layer makes side by side. Anything else as it is."""
        layer = self.layers.get(x.layer)
        if x.index is None or len(x.index) > MAX_INDICES or layer is None or layer.op != "tokens":
            return x
        tokens = layer.attributes["tokens"]
        size = layer.n_out // tokens
        if len(x.index) % tokens or len(x.index) >= layer.n_out:
            return x
        order = np.argsort(x.index, kind="stable")
        columns = x.index[order].reshape(tokens, -1)
        rows = columns[0]
        if rows[-1] >= size or (np.diff(rows) <= 0).any() or not np.array_equal(
            columns, rows + size * np.arange(tokens)[:, None]
        ):
            return x
        key = x.layer, rows.tobytes()
        if key not in self._parts:
            arrays = {name: array[rows] for name, array in self.arrays[x.layer].items()}
            source = Activation(layer.inputs[0], (), x.dtype)
            self._parts[key] = self.layer(
                "tokens", [source], (), "", arrays, n_in=layer.n_in, n_out=len(rows) * tokens,
                bias=layer.bias, tokens=tokens,
            ).layer
        index = np.empty_like(order)
        index[order] = np.arange(len(order))
        return replace(x, layer=self._parts[key], exclusive=False,
                       index=None if np.array_equal(index, np.arange(len(index))) else index)

    def needed(self, last: str) -> list[LayerDescription]:
        """The layers that one depends on, in order; it comes last."""
        needed = {last}
        for layer in reversed(self.layers.values()):
            if layer.name in needed:
                needed.update(layer.inputs)
        chosen = [layer for layer in self.layers.values() if layer.name in needed]
        return [layer for layer in chosen if layer.name != last] + [self.layers[last]]


def unordered(vector: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    """Numbers for an activation in this order of a layer's columns, for the layer's columns."""
    if order is None:
        return vector
    own = np.empty_like(vector)
    own[order] = vector
    return own


def type_name(array: np.ndarray) -> str:
    """A float array's type as a key of STORED_DTYPES; "" of another one's."""
    name = array.dtype.name
    return name if name in STORED_DTYPES else ""


def number_like(x: Activation, value: float) -> np.ndarray:
    """A number in an activation's type."""
    number = TensorProto.DataType.Value(_ONNX_NAMES.get(x.dtype, x.dtype.upper()))
    return np.asarray(value).astype(helper.tensor_dtype_to_np_dtype(number))


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """The same numbers in the same type."""
    if type_name(array) == "bfloat16":
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C"))
