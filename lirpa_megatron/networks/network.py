"""The networks this package imports: feed-forward graphs over flat activations.

Every activation is [B, n]: ONNX reshapes only rename row-major elements, so they leave no trace
here, and input variable X_i of a property is column i. A network is two things: a description
(plain data, stored in checkpoints) and named weights. `Network` builds the module from the
description alone, also under `torch.device("meta")`, and torch.fx can trace it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lirpa_megatron.errors import UserError

FORMAT = "lirpa_megatron.network"
FORMAT_VERSION = 1
INPUT = "input"
DTYPES = {"float32": torch.float32, "float64": torch.float64}
_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
# Not more than this: a name becomes an attribute of torch's ModuleDict.
_LAYER_NAME = re.compile(r"[a-z]+[0-9]+")
# operation -> number of inputs
_ARITY = {"linear": 1, "add": 2, "sub": 2} | dict.fromkeys(_ACTIVATIONS, 1)


@dataclass(frozen=True)
class LayerDescription:
    """One layer, applied to the outputs of earlier ones."""

    # unique: letters, then digits (fc1)
    name: str
    # linear, relu, tanh, sigmoid, add or sub
    op: str
    # names of the layers it reads, or "input"
    inputs: tuple[str, ...]
    # width of each activation read
    n_in: int
    # width of the activation made
    n_out: int
    # linear only: whether it has a bias
    bias: bool = False


@dataclass(frozen=True)
class NetworkDescription:
    """The structure of a network as plain data."""

    # file name without folder and extensions
    name: str
    # a key of DTYPES: what the weights are stored in
    dtype: str
    # shape of one input without the batch, as the ONNX file declares it
    input_shape: tuple[int, ...]
    # shape of one output without the batch
    output_shape: tuple[int, ...]
    # in an order in which they can run; the last one makes the output
    layers: tuple[LayerDescription, ...]

    @property
    def n_in(self) -> int:
        return math.prod(self.input_shape)

    @property
    def n_out(self) -> int:
        return math.prod(self.output_shape)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full (unsharded) shape of every parameter of `Network`, by name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in self.layers:
            if layer.op == "linear":
                shapes[f"layers.{layer.name}.weight"] = (layer.n_out, layer.n_in)
                if layer.bias:
                    shapes[f"layers.{layer.name}.bias"] = (layer.n_out,)
        return shapes

    def to_plain(self) -> dict[str, Any]:
        """Dictionaries, lists, strings and numbers only: what JSON can hold."""
        plain = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        plain["input_shape"] = list(self.input_shape)
        plain["output_shape"] = list(self.output_shape)
        plain["layers"] = [
            {**asdict(layer), "inputs": list(layer.inputs)} for layer in self.layers
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
        if plain.get("version") != FORMAT_VERSION:
            raise UserError(
                f"the network description has version {plain.get('version')!r}, "
                f"this release reads version {FORMAT_VERSION}"
            )
        try:
            layers = tuple(
                LayerDescription(
                    name=_typed(layer["name"], str),
                    op=_typed(layer["op"], str),
                    inputs=tuple(_typed(name, str) for name in layer["inputs"]),
                    n_in=_typed(layer["n_in"], int),
                    n_out=_typed(layer["n_out"], int),
                    bias=_typed(layer["bias"], bool),
                )
                for layer in plain["layers"]
            )
            description = cls(
                name=_typed(plain["name"], str),
                dtype=_typed(plain["dtype"], str),
                input_shape=tuple(_typed(n, int) for n in plain["input_shape"]),
                output_shape=tuple(_typed(n, int) for n in plain["output_shape"]),
                layers=layers,
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"the network description is malformed: {error!r}") from None
        description.check()
        return description

    def check(self) -> None:
        """Raises UserError unless this describes a runnable network."""
        if self.dtype not in DTYPES:
            raise UserError(f"the network's dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if not self.layers:
            raise UserError(f"network {self.name} has no layers")
        widths = {INPUT: self.n_in}
        for layer in self.layers:
            known = all(name in widths for name in layer.inputs)
            if (
                layer.op not in _ARITY
                or len(layer.inputs) != _ARITY[layer.op]
                or not known
                or layer.name in widths
                or not _LAYER_NAME.fullmatch(layer.name)
                or any(widths[name] != layer.n_in for name in layer.inputs)
                or layer.n_out < 1
                or (layer.op != "linear" and layer.n_out != layer.n_in)
            ):
                raise UserError(f"layer {layer.name!r} of network {self.name} is malformed")
            widths[layer.name] = layer.n_out
        if widths[self.layers[-1].name] != self.n_out:
            raise UserError(
                f"the last layer of network {self.name} has {self.layers[-1].n_out} outputs, "
                f"its description says {self.n_out}"
            )


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not {kind.__name__}")
    return value


class Network(nn.Module):
    """The module that a description describes; its weights are still to be loaded.

    Forward: x [B, n_in] -> [B, n_out]. Parameters are `layers.<name>.weight` [n_out, n_in] and
    `layers.<name>.bias` [n_out].
    """

    def __init__(self, description: NetworkDescription, dtype: torch.dtype | None = None):
        """
        Args:
            description: a checked description.
            dtype: of the parameters; None: the description's own.
        """
        super().__init__()
        self.description = description
        dtype = dtype or DTYPES[description.dtype]
        self.layers = nn.ModuleDict()
        for layer in description.layers:
            if layer.op == "linear":
                self.layers[layer.name] = nn.Linear(
                    layer.n_in, layer.n_out, bias=layer.bias, dtype=dtype
                )
            elif layer.op in _ACTIVATIONS:
                self.layers[layer.name] = _ACTIVATIONS[layer.op]()

    @classmethod
    def from_weights(
        cls, description: NetworkDescription, weights: Mapping[str, torch.Tensor]
    ) -> Network:
        """The network with these full weights, shared, not copied (names as `weight_shapes`)."""
        with torch.device("meta"):
            network = cls(description)
        network.load_state_dict(weights, assign=True)
        return network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = {INPUT: x}
        for layer in self.description.layers:
            inputs = [values[name] for name in layer.inputs]
            if layer.op == "add":
                x = inputs[0] + inputs[1]
            elif layer.op == "sub":
                x = inputs[0] - inputs[1]
            else:
                x = self.layers[layer.name](inputs[0])
            values[layer.name] = x
        return x
