"""The arithmetic with constants at a network's input, through which a box goes exactly.

A normalisation in front, (x - 1.7e9) / 86400 in float32, loses digits: as the file computes it, it
is a step function of x, and bounds of the real-valued one would not be of the network. But each of
its values is a monotone function of one coordinate of the input, because rounding to nearest is
monotone: x <= x' implies fl(x - m) <= fl(x' - m), and fl(x / d) likewise, with the order reversed
for d < 0. So its exact range over a box is spanned by its values at the two ends, computed in the
type and order of the file; bounds are of the rest of the network over that box.

A BatchNormalization has no one order (some programs fold it to x s + t): the hull of both is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.description import INPUT, STORED_DTYPES, NetworkDescription
from lirpa_megatron.networks.modules import BatchNorm
from lirpa_megatron.networks.network import Network

_ARITHMETIC = {"shift", "scale", "divide", "batchnorm", "cast"}
_MOVES = {"select", "join"}


@dataclass(frozen=True)
class Normalisation:
    """Which part of a network it is."""

    # names of its layers, in an order in which they can run
    layers: tuple[str, ...]
    # what the rest of the network reads: layers, and "input" where it also reads the input itself
    border: tuple[str, ...]


def normalisation(description: NetworkDescription) -> Normalisation | None:
    """The arithmetic at a network's input; None if there is none."""
    monotone, computed = {INPUT}, set()
    for layer in description.layers:
        if layer.op in _ARITHMETIC | _MOVES and monotone.issuperset(layer.inputs):
            monotone.add(layer.name)
            if layer.op in _ARITHMETIC or computed.intersection(layer.inputs):
                computed.add(layer.name)
    # What only moves the input stays with the rest, which then knows that it is the same.
    border = {
        name if name in computed else INPUT
        for layer in description.layers if layer.name not in monotone
        for name in layer.inputs if name in monotone
    }
    if description.layers[-1].name in monotone:
        border.add(description.layers[-1].name)
    if not border & computed:
        return None
    names = [layer.name for layer in description.layers if layer.name in monotone]
    return Normalisation(tuple(names), tuple(sorted(border)))


def through(
    network: Network, part: Normalisation | None, lower: np.ndarray, upper: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """The box of what comes out of the normalisation, for all inputs that the file's type has in a
    box, or that a number of the box is rounded to.

    Args:
        network: in the types of the file.
        part: of it; None: the box alone, rounded.
        lower, upper: [n_in] float64.

    Returns:
        [n] each, float64 (which holds the numbers of all types), on the CPU.

    Raises:
        UserError: a value overflows.
    """
    description = network.description
    dtype = STORED_DTYPES[description.input_dtype or description.dtype]
    ends = {INPUT: outward(torch.from_numpy(lower), torch.from_numpy(upper), dtype)}
    border: tuple[str, ...] = (INPUT,)
    if part is not None:
        border = part.border
        for layer in description.layers:
            if layer.name in part.layers:
                ends[layer.name] = _step(network, layer, ends)
    made = [torch.cat([ends[name][side].double() for name in border]) for side in (0, 1)]
    if not all(bool(torch.isfinite(end).all()) for end in made):
        raise UserError(
            "the box of inputs overflows the number type of the network's input or of the "
            "arithmetic in front of it"
        )
    return made[0], made[1]


def _step(network: Network, layer, ends) -> tuple[torch.Tensor, torch.Tensor]:
    module = network.layers[layer.name]
    device = next(iter([*module.parameters(), *module.buffers()]), torch.empty(0)).device
    functions = [module, module.at_once] if isinstance(module, BatchNorm) else [module]
    values = []
    with torch.no_grad():
        for side in (0, 1):
            inputs = [ends[name][side][None].to(device) for name in layer.inputs]
            values += [function(*inputs)[0].cpu() for function in functions]
    stacked = torch.stack(values)
    return stacked.amin(0), stacked.amax(0)


def outward(
    lower: torch.Tensor, upper: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ends of a box of float64 numbers in another type, rounded so that they contain it."""
    low, high = lower.to(dtype), upper.to(dtype)
    low = torch.where(low.double() > lower, _next(low, up=False), low)
    high = torch.where(high.double() < upper, _next(high, up=True), high)
    return low, high


def _next(x: torch.Tensor, up: bool) -> torch.Tensor:
    """The next number of the type (torch.nextafter has no half precisions)."""
    if x.dtype in (torch.float32, torch.float64):
        return torch.nextafter(x, torch.full_like(x, float("inf") if up else -float("inf")))
    bits = x.view(torch.int16).int()
    # Bit patterns grow with the magnitude: as signed steps from zero they are in order.
    steps = torch.where(bits < 0, -(bits & 0x7FFF), bits) + (1 if up else -1)
    bits = torch.where(steps < 0, -steps - 0x8000, steps)
    return bits.to(torch.int16).view(x.dtype)
