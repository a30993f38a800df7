"""Where a network can be cut into pipeline stages, and the network of one stage.

A stage hands the next one a single value, so a network is cut where everything behind depends on
one layer's output alone: not inside of a residual branch, nor where a later layer reads the input
again. It is cut before linear layers, so that each part has one at least; what stands in front of
the first one, such as a normalisation of the input, belongs to the first part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from lirpa_megatron.networks.description import INPUT, LayerDescription, NetworkDescription

_LINEAR = ("linear", "tokens")


def parts_of(description: NetworkDescription) -> list[list[LayerDescription]]:
    """The smallest parts that a network can be cut into, in the order in which they run."""
    layers, parts = description.layers, [[]]
    for k, layer in enumerate(layers):
        has_linear = any(before.op in _LINEAR for before in parts[-1])
        if layer.op in _LINEAR and has_linear and _only_the_last_crosses(layers, k):
            parts.append([])
        parts[-1].append(layer)
    return parts


def _only_the_last_crosses(layers: Sequence[LayerDescription], k: int) -> bool:
    """Whether the layers from k on read nothing before them but the output of layer k - 1."""
    inside = {layer.name for layer in layers[k:]}
    read = {name for layer in layers[k:] for name in layer.inputs}
    return read - inside == {layers[k - 1].name}


def stage_of(
    description: NetworkDescription, counts: Sequence[int], stage: int
) -> NetworkDescription:
    """The network of one stage: its input is the output of the stage before it.

    Layers keep their names, and so do their weights.

    Args:
        description: of the whole network.
        counts: how many of its parts (`parts_of`) each stage has.
        stage: which one.
    """
    parts, begin = parts_of(description), sum(counts[:stage])
    own = [layer for part in parts[begin : begin + counts[stage]] for layer in part]
    found = replace(description, layers=tuple(own))
    if stage > 0:
        last = parts[begin - 1][-1]
        found = replace(
            found, input_shape=(last.n_out,), input_dtype=last.dtype,
            layers=tuple(_reading_the_input(layer, last.name) for layer in own),
        )
    if stage < len(counts) - 1:
        found = replace(found, output_shape=(own[-1].n_out,))
    return found


def _reading_the_input(layer: LayerDescription, of: str) -> LayerDescription:
    return replace(layer, inputs=tuple(INPUT if name == of else name for name in layer.inputs))


def width_of(description: NetworkDescription, names: Sequence[str]) -> int:
    """Width of some layers' outputs, or of the input, side by side."""
    widths = {layer.name: layer.n_out for layer in description.layers}
    widths[INPUT] = math.prod(description.input_shape)
    return sum(widths[name] for name in names)
