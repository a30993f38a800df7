"""The one input of a graph, whose boxes are [K, inputs] in branch and bound, whatever its shape."""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.errors import UserError

_UNITS = 4
"""In the last place, that an interval between neighbours has at most."""


def input_names(graph: Any) -> list[str]:
    """Of the inputs of a graph, which a set may be given for."""
    return [node.name for node in auto_lirpa.roots(graph) if type(node) is auto_lirpa.BoundInput]


def that_move(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Which inputs of each box move, [K, inputs] bool.

    Not those that only enclose a number that the dtype lacks, unless no others move in any box.
    """
    few = _UNITS * torch.finfo(low.dtype).eps * torch.maximum(low.abs(), high.abs())
    found = high - low > few
    return torch.where(found.any(), found, low < high)


def check_inputs(graph: Any, where: str) -> None:
    """Raises UserError, which begins with `where`, unless a set is given for one input."""
    if len(input_names(graph)) != 1:
        raise UserError(f"{where}outputs have to depend on one input")


def shaped(graph: Any, points: torch.Tensor) -> torch.Tensor:
    """Points [P, inputs] with the shape of the input."""
    (name,) = input_names(graph)
    return points.view(len(points), *graph[name].output_shape[1:])


def box_of(graph: Any, low: torch.Tensor, high: torch.Tensor) -> Any:
    """What the graph is given for boxes [K, inputs]."""
    low, high = shaped(graph, low), shaped(graph, high)
    box = auto_lirpa.PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high)
    return auto_lirpa.BoundedTensor(low / 2 + high / 2, box)
