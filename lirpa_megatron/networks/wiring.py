"""One network made of others: two side by side on shared inputs, inputs handed on to the outputs.

    n_in   input variables, of which each network reads some, in an order of its own
    y      outputs of the networks, one after the other, then the variables that are handed on

A bound of `c . y` is then one of a sum over both networks and the inputs themselves: CROWN adds up
what reaches an input variable from all of them, so that linear parts that are equal cancel.

What is handed on is not computed with: as an output it is the input, exactly. Each network is
sharded by itself, and its outputs are whole on every rank before they are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.description import INPUT, LayerDescription, NetworkDescription
from lirpa_megatron.networks.network import Network

# Names of the layers that are added; those of networks are prefixed with one letter.
_READS, _JOINED, _HANDED_ON = "reads", "whole1", "handed1"
_PREFIXES = "ab"
_COARSE_FIRST = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Wiring:
    """How networks are put together."""

    # number of input variables
    n_in: int
    # of each network, of which one may be there twice, the variable that each of its inputs is
    reads: tuple[tuple[int, ...], ...]
    # variables that are outputs too
    handed_on: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether it is one network as it is."""
        return self.reads == (tuple(range(self.n_in)),) and not self.handed_on


def wired(networks: Sequence[NetworkDescription], wiring: Wiring) -> NetworkDescription:
    """The description of the whole.

    Args:
        networks: one for each of `wiring.reads`, each with as many inputs as that says.

    Raises:
        UserError: they read or make different number types.
    """
    first = networks[0]
    if len({n.input_dtype or n.dtype for n in networks}) > 1:
        types = " and ".join(n.input_dtype or n.dtype for n in networks)
        raise UserError(
            f"networks {' and '.join(n.name for n in networks)} read different number types "
            f"({types}): only networks of one type can be compared"
        )
    layers: list[LayerDescription] = []
    ends, variables = [], tuple(range(wiring.n_in))
    dtype = first.input_dtype or first.dtype
    for k, (network, reads) in enumerate(zip(networks, wiring.reads, strict=True)):
        source = INPUT
        if reads != variables:
            source = f"{_READS}{k + 1}"
            layers.append(_select(source, INPUT, wiring.n_in, reads, dtype))
        names = {layer.name: layer_name(layer.name, k, wiring) for layer in network.layers}
        names[INPUT] = source
        layers += [
            replace(layer, name=names[layer.name], inputs=tuple(names[n] for n in layer.inputs))
            for layer in network.layers
        ]
        ends.append((layers[-1].name, network.n_out))
    if wiring.handed_on:
        layers.append(_select(_HANDED_ON, INPUT, wiring.n_in, wiring.handed_on, dtype))
        ends.append((_HANDED_ON, len(wiring.handed_on)))
    n_out = sum(width for _, width in ends)
    if len(ends) > 1:
        last = layers[-1].dtype if not wiring.handed_on else networks[-1].layers[-1].dtype
        inputs = tuple(name for name, _ in ends)
        layers.append(LayerDescription(_JOINED, "join", inputs, n_out, n_out, dtype=last))
    name = "+".join(dict.fromkeys(network.name for network in networks))
    coarsest = min((n.dtype for n in networks), key=_COARSE_FIRST.index)
    made = NetworkDescription(name, coarsest, (wiring.n_in,), (n_out,), tuple(layers), dtype)
    made.check()
    return made


def layer_name(name: str, network: int, wiring: Wiring) -> str:
    """What a layer of one of the networks is called in the whole."""
    return _PREFIXES[network] + name if len(wiring.reads) > 1 else name


def _select(
    name: str, of: str, width: int, index: Sequence[int], dtype: str
) -> LayerDescription:
    attributes = {"index": list(index)}
    return LayerDescription(name, "select", (of,), width, len(index), False, dtype, attributes)


def wired_network(
    whole: NetworkDescription, networks: Sequence[Network], wiring: Wiring,
    dtype: torch.dtype | None, device: torch.device | str = "cpu",
) -> Network:
    """The module of the whole, which shares the layers of its networks.

    Args:
        whole: as `wired` makes it.
        networks: sharded, in the same order; those of the same file may be the same module.
        dtype: what they compute in, as for `Network`.
        device: of their parameters.
    """
    with torch.device("meta"):
        made = Network(whole, dtype)
    for k, network in enumerate(networks):
        for name, layer in network.layers.items():
            made.layers[layer_name(name, k, wiring)] = layer
    for layer in made.layers.values():
        for name, buffer in layer.named_buffers(recurse=False):
            layer._buffers[name] = buffer.to(device)
    return made
