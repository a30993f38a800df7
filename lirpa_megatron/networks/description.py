"""A network's structure as plain data: what a checkpoint stores beside the weights.

Every activation is described as flat, [B, n]: what ONNX calls a reshape only renames row-major
elements, and input variable X_i of a property is column i. The shapes in which layers compute are
those of `layouts`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks import layers as vocabulary

FORMAT = "lirpa_megatron.network"
# Version 1 had fewer operators, one number type, and no attributes; version 2 no attention.
FORMAT_VERSION = 3
INPUT = "input"
# What bounds are computed in.
DTYPES = {"float32": torch.float32, "float64": torch.float64}
# What a network may be stored in.
STORED_DTYPES = DTYPES | {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Not more than this: a name becomes an attribute of torch's ModuleDict.
_LAYER_NAME = re.compile(r"[a-z]+[0-9]+")
# Widest activation.
MAX_WIDTH = 2**24


@dataclass(frozen=True)
class LayerDescription:
    """One layer, applied to the outputs of earlier ones."""

    # unique: letters, then digits (fc1)
    name: str
    # a key of layers.OPERATORS
    op: str
    # names of the layers it reads, or "input"
    inputs: tuple[str, ...]
    # width of each activation read; of all together for "join"
    n_in: int
    # width of the activation made
    n_out: int
    # linear only: whether it has a bias
    bias: bool = False
    # a key of STORED_DTYPES: what the file computes it in ("cast": what it makes)
    dtype: str = "float32"
    # what else the operator needs: numbers and lists of integers (`layers.Operator`)
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Full (unsharded) shape of each of its parameters, by name."""
        return vocabulary.OPERATORS[self.op].tensors(self)


@dataclass(frozen=True)
class NetworkDescription:
    """The structure of a network as plain data."""

    # file name without folder and extensions
    name: str
    # a key of STORED_DTYPES: the coarsest type that the file computes in
    dtype: str
    # shape of one input as the ONNX file declares it, without a batch of several
    input_shape: tuple[int, ...]
    # shape of one output
    output_shape: tuple[int, ...]
    # in an order in which they can run; the last one makes the output
    layers: tuple[LayerDescription, ...]
    # type of the input; None: `dtype`
    input_dtype: str | None = None

    @property
    def n_in(self) -> int:
        return math.prod(self.input_shape)

    @property
    def n_out(self) -> int:
        return math.prod(self.output_shape)

    @property
    def bounds_dtype(self) -> str:
        """A key of DTYPES: the least type that holds all weights exactly."""
        return "float64" if "float64" in self._dtypes() else "float32"

    @property
    def computes_in_one_type(self) -> bool:
        """Whether the file computes in one type throughout."""
        return len(self._dtypes()) == 1

    def _dtypes(self) -> set[str]:
        return {layer.dtype for layer in self.layers} | {self.input_dtype or self.dtype}

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full (unsharded) shape of every parameter of `Network`, by name."""
        return {
            f"layers.{layer.name}.{name}": shape
            for layer in self.layers
            for name, shape in layer.tensors().items()
        }

    @property
    def weights(self) -> int:
        """How many numbers its parameters have."""
        return sum(map(math.prod, self.weight_shapes().values()))

    def to_plain(self) -> dict[str, Any]:
        """Dictionaries, lists, strings and numbers only: what JSON can hold."""
        plain = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        plain["input_shape"] = list(self.input_shape)
        plain["output_shape"] = list(self.output_shape)
        plain["layers"] = [
            {**asdict(layer), "inputs": list(layer.inputs), "attributes": dict(layer.attributes)}
            for layer in self.layers
        ]
        return plain

    @classmethod
    def from_plain(cls, plain: Any) -> NetworkDescription:
        """Inverse of `to_plain`; checks everything, for the data may come from a stranger.

        Raises:
            UserError: not a description of this format, or not a well-formed network.
        """
        if not isinstance(plain, Mapping) or plain.get("format") != FORMAT:
            raise UserError("there is no lirpa_megatron network description")
        version = plain.get("version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise UserError(
                f"the network description has version {version!r}, "
                f"this release reads versions 1 to {FORMAT_VERSION}"
            )
        try:
            dtype = _typed(plain["dtype"], str)
            description = cls(
                name=_typed(plain["name"], str),
                dtype=dtype,
                input_shape=tuple(_typed(n, int) for n in plain["input_shape"]),
                output_shape=tuple(_typed(n, int) for n in plain["output_shape"]),
                layers=tuple(_layer(layer, version, dtype) for layer in plain["layers"]),
                input_dtype=dtype if version == 1 else _typed(plain["input_dtype"], str),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the network description is malformed: {error!r}") from None
        description.check()
        return description

    def check(self) -> None:
        """Raises UserError unless this describes a runnable network."""
        for dtype in self._dtypes() | {self.dtype}:
            if dtype not in STORED_DTYPES:
                raise UserError(
                    f"the network's dtype {dtype!r} is not one of {', '.join(STORED_DTYPES)}"
                )
        if not self.layers:
            raise UserError(f"network {self.name} has no layers")
        if not all(1 <= n <= MAX_WIDTH for n in (self.n_in, self.n_out, *self.input_shape)):
            raise UserError(f"network {self.name} has an input or output of no possible size")
        widths = {INPUT: self.n_in}
        for layer in self.layers:
            if not _is_well_formed(layer, widths):
                raise UserError(f"layer {layer.name!r} of network {self.name} is malformed")
            widths[layer.name] = layer.n_out
        if widths[self.layers[-1].name] != self.n_out:
            raise UserError(
                f"the last layer of network {self.name} has {self.layers[-1].n_out} outputs, "
                f"its description says {self.n_out}"
            )


def _layer(plain: Any, version: int, dtype: str) -> LayerDescription:
    new: dict[str, Any] = {"dtype": dtype}
    if version > 1:
        new = {
            "dtype": _typed(plain["dtype"], str),
            "attributes": dict(_typed(plain["attributes"], dict)),
        }
    return LayerDescription(
        name=_typed(plain["name"], str),
        op=_typed(plain["op"], str),
        inputs=tuple(_typed(name, str) for name in plain["inputs"]),
        n_in=_typed(plain["n_in"], int),
        n_out=_typed(plain["n_out"], int),
        bias=_typed(plain["bias"], bool),
        **new,
    )


def _is_well_formed(layer: LayerDescription, widths: Mapping[str, int]) -> bool:
    operator = vocabulary.OPERATORS.get(layer.op)
    if (
        operator is None
        or not _LAYER_NAME.fullmatch(layer.name)
        or layer.name in widths
        or not all(name in widths for name in layer.inputs)
        or not 1 <= layer.n_out <= MAX_WIDTH
    ):
        return False
    return operator.fits(layer, [widths[name] for name in layer.inputs])


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not {kind.__name__}")
    return value
