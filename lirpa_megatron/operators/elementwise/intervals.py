"""Interval arithmetic from the nearest nodes that have bounds."""

from __future__ import annotations

import math
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.numerics import without_nan

Range = tuple[torch.Tensor, torch.Tensor]

_DEEPEST = 8


def within(node: Any, lower: torch.Tensor, upper: torch.Tensor, gradients: bool) -> Range:
    """Intersects bounds of a node with its range by interval arithmetic over preceding operators.

    Both are sound, so their intersection is. Without `gradients` the range is a constant, because
    on several ranks the bounds of earlier nodes have not passed copy_to for this pass. Operators
    that move or mix features (linear layers, communication) are not traversed: every rank does the
    same with its own features.
    """
    inputs = getattr(node, "inputs", ())
    if not inputs:
        return lower, upper
    found = _through(node, _DEEPEST)
    if found is None or found[0].shape != lower.shape:
        return lower, upper
    found = without_nan(*found)
    if not gradients:
        found = found[0].detach(), found[1].detach()
    low, high = torch.maximum(lower, found[0]), torch.minimum(upper, found[1])
    crossed = low > high  # by rounding
    return torch.where(crossed, lower, low), torch.where(crossed, upper, high)


def cut_with_range(
    node: Any, lower: torch.Tensor | None, upper: torch.Tensor | None
) -> tuple:
    """Intersects CROWN's bounds of a node with the node's range (`within`).

    A line below a curve is below it everywhere and lowest at an end of the interval. If the node is
    the curve itself, its range is tighter (bounds of a sigmoid stay in [0, 1]).

    Args:
        node: a node whose inputs have bounds.
        lower, upper: its bounds [B, *shape], or None.
    """
    both = [torch.full_like(upper, -math.inf) if lower is None else lower,
            torch.full_like(lower, math.inf) if upper is None else upper]
    found = within(node, *both, gradients=True)
    return tuple(None if x is None else y for x, y in zip((lower, upper), found, strict=True))


def is_elementwise(node: Any) -> bool:
    """Whether each number of the node depends on one number of each input (or it is a softmax)."""
    return type(node).__name__ in _ELEMENTWISE or getattr(node, "elementwise", False)


def _of(node: Any, depth: int) -> Range | None:
    """The range of a node, from its bounds or from its inputs."""
    if not node.perturbed:
        value = getattr(node, "forward_value", None)
        value = getattr(node, "value", None) if value is None else value
        return None if value is None else (value, value)
    if auto_lirpa.has_bounds(node):
        return node.lower, node.upper
    return _through(node, depth - 1) if depth > 0 and node.inputs else None


def _through(node: Any, depth: int) -> Range | None:
    """The range of an elementwise operator's output, or a softmax's, from those of its inputs."""
    if not is_elementwise(node):
        return None
    ranges = [_of(x, depth) for x in node.inputs]
    if None in ranges:
        return None
    found = node.interval_propagate(*ranges)
    return found[0], found[1]


_ELEMENTWISE = frozenset({
    "BoundSoftmax", "BoundLogSoftmax",  # over whole vectors: no rank holds only a part of one
    "BoundAdd", "BoundSub", "BoundMul", "BoundNeg", "BoundRelu", "BoundCombine", "BoundScale",
})
