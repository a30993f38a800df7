"""Interval arithmetic from the nearest nodes whose bounds are known."""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa

Range = tuple[torch.Tensor, torch.Tensor]

_DEEPEST = 8


def within(node: Any, lower: torch.Tensor, upper: torch.Tensor, gradients: bool) -> Range:
    """Bounds of a node, cut with its range by interval arithmetic over the operators before it.

    Both hold, so what they have in common does. Without `gradients` the range is a constant: on
    several ranks the bounds farther back are not those that the pass has prepared for this node.
    Operators that move or mix features (linear layers, what communicates) are not gone through:
    every rank does the same, with what it has.
    """
    inputs = getattr(node, "inputs", ())
    if not inputs:
        return lower, upper
    found = _through(node, _DEEPEST)
    if found is None or found[0].shape != lower.shape:
        return lower, upper
    if not gradients:
        found = found[0].detach(), found[1].detach()
    low, high = torch.maximum(lower, found[0]), torch.minimum(upper, found[1])
    crossed = low > high  # by rounding
    return torch.where(crossed, lower, low), torch.where(crossed, upper, high)


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
    """The range of an elementwise operator's output, from those of its inputs."""
    if type(node).__name__ not in _ELEMENTWISE and not getattr(node, "elementwise", False):
        return None
    ranges = [_of(x, depth) for x in node.inputs]
    if None in ranges:
        return None
    found = node.interval_propagate(*ranges)
    return found[0], found[1]


_ELEMENTWISE = frozenset({
    "BoundAdd", "BoundSub", "BoundMul", "BoundNeg", "BoundRelu", "BoundCombine", "BoundScale",
})
