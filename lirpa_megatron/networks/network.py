"""The module of an imported network, as a whole and in parts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from lirpa_megatron.adapters.tracing import untraced
from lirpa_megatron.networks import functions
from lirpa_megatron.networks.description import (
    DTYPES,
    FORMAT,
    FORMAT_VERSION,
    INPUT,
    STORED_DTYPES,
    LayerDescription,
    NetworkDescription,
)
from lirpa_megatron.networks.layers import OPERATORS
from lirpa_megatron.networks.layouts import layouts_of

__all__ = [
    "DTYPES", "FORMAT", "FORMAT_VERSION", "INPUT", "STORED_DTYPES", "LayerDescription", "Network",
    "NetworkDescription",
]


class Network(nn.Module):
    """The module that a description describes; its weights are still to be loaded.

    Forward: x [B, n_in] -> [B, n_out]. Parameters are `layers.<name>.weight` [n_out, n_in],
    `layers.<name>.bias` [n_out], `layers.<name>.constant` [n], ... (`layers.OPERATORS`).

    torch.fx can trace it, and it builds under `torch.device("meta")`.
    """

    def __init__(self, description: NetworkDescription, dtype: torch.dtype | None = None):
        """
        Args:
            description: a checked description.
            dtype: what all is computed in; None: the types of the file, layer by layer, with the
                input rounded to the file's.
        """
        super().__init__()
        self.description = description
        self._run((INPUT,), description.layers)
        stored = dtype is None
        self.input_dtype = (
            STORED_DTYPES[description.input_dtype or description.dtype] if stored else None
        )
        self.layers = nn.ModuleDict()
        for layer in description.layers:
            own = STORED_DTYPES[layer.dtype] if stored else dtype
            if layer.op == "cast" and not stored:
                own = None
            self.layers[layer.name] = OPERATORS[layer.op].make(layer, own)

    @classmethod
    def from_weights(
        cls, description: NetworkDescription, weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype | None = None,
    ) -> Network:
        """The network with these full weights (names as `weight_shapes`), shared, not copied,
        unless they change their type.

        Args:
            description, dtype: as for the constructor.
            weights: as the file stores them.
        """
        with torch.device("meta"):
            network = cls(description, dtype)
        kept = {
            name: weights[name].to(parameter.dtype)
            for name, parameter in network.named_parameters()
        }
        network.load_state_dict(kept, assign=True)
        return network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.input_dtype is None else in_type(x, self.input_dtype)
        values = {INPUT: x}
        if self.reads != (INPUT,):
            values = dict(zip(self.reads, self._split(x), strict=True))
        for layer in self.runs:
            inputs = [
                self._in_layout(values[name], name, wanted)
                for name, wanted in zip(layer.inputs, self._wanted[layer.name], strict=True)
            ]
            x = self.layers[layer.name](*inputs)
            values[layer.name] = x
        if self.runs:
            last = self.runs[-1]
            x = self._in_layout(x, last.name, (last.n_out,))
        else:  # a part without layers, of a network that is arithmetic alone
            x = functions.select(x, _columns(0, self.n_in, x.device))
        return x

    def part(self, reads: Sequence[str], output: str) -> Network:
        """The function from some values to another, as a module that shares the layers.

        Args:
            reads: names of layers, or "input", whose outputs side by side are its input.
            output: the layer that makes its output; not one of `reads`.
        """
        part = copy.copy(self)
        part.input_dtype = None
        needed, runs = {output}, []
        for layer in reversed(self.description.layers):
            if layer.name in needed and layer.name not in reads:
                needed.update(layer.inputs)
                runs.append(layer)
        part._run(tuple(reads), tuple(reversed(runs)))
        return part

    def _run(self, reads: tuple[str, ...], runs: Sequence[LayerDescription]) -> None:
        """Sets what forward reads, and which layers it runs in which layouts."""
        self.reads, self.runs = reads, runs
        known = dict(zip(reads, ((width,) for width in self._widths()), strict=True))
        self._made, self._wanted = layouts_of(runs, known)

    def _in_layout(self, x: torch.Tensor, name: str, wanted: tuple[int, ...]) -> torch.Tensor:
        return x if self._made[name] == wanted else functions.arranged(x, wanted)

    @property
    def n_in(self) -> int:
        """Width of the input, of all values that a part reads together."""
        return sum(self._widths())

    def _widths(self) -> list[int]:
        widths = {INPUT: self.description.n_in}
        widths |= {layer.name: layer.n_out for layer in self.description.layers}
        return [widths[name] for name in self.reads]

    def _split(self, x: torch.Tensor) -> list[torch.Tensor]:
        if len(self.reads) == 1:
            return [x]
        parts, begin = [], 0
        for width in self._widths():
            parts.append(functions.select(x, _columns(begin, width, x.device)))
            begin += width
        return parts


def _columns(begin: int, count: int, device: torch.device) -> torch.Tensor:
    with untraced():
        return torch.arange(begin, begin + count, device=device)


@fx.wrap
def in_type(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in a number type; x itself where it has that, so that a trace holds no cast."""
    return x if x.dtype == dtype else x.to(dtype)
