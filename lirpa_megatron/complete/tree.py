"""A proof by branch and bound as a tree, and what makes it one: its leaves cover the whole box.

An inner node splits one neuron at one point, z >= p and z <= p; every point of the box satisfies
one of them. So leaves cover the box if, from the root on, they are all the same leaf, or all begin
with a split of the same neuron at the same point, of both signs, and those of each sign cover their
half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lirpa_megatron.complete.problem import Split

_DEEPEST = 400
"""Splits of a leaf; trees are gone through by recursion."""


@dataclass(frozen=True)
class Node:
    """A split of a neuron, or a leaf."""

    leaf: int | None
    """Its position among the leaves; None: it is split."""
    neuron: int = -1
    point: float = 0.0
    on: Node | None = None
    off: Node | None = None


def tree_of(leaves: Sequence[Sequence[Split]], neurons: int) -> Node:
    """The tree that some leaves are those of.

    Args:
        leaves: of each the splits, from the root on.
        neurons: how many there are.

    Raises:
        ValueError: they do not cover the whole box, or overlap; with what is wrong.
    """
    deepest = max(map(len, leaves), default=0)
    if deepest > _DEEPEST:
        raise ValueError(f"{deepest} splits of one leaf are more than {_DEEPEST}")
    return _node(leaves, list(range(len(leaves))), (), neurons)


def _node(
    leaves: Sequence[Sequence[Split]], own: list[int], path: tuple[Split, ...], neurons: int
) -> Node:
    depth = len(path)
    where = f"with the splits {[list(split) for split in path]}" if path else "without a split"
    if not own:
        raise ValueError(f"no leaf covers the domain {where}")
    if any(len(leaves[i]) == depth for i in own):
        if len(own) > 1:
            raise ValueError(f"{len(own)} leaves overlap in the domain {where}")
        return Node(own[0])
    found = {leaves[i][depth][0] for i in own}
    if len(found) > 1:
        raise ValueError(f"the domain {where} is split at {len(found)} neurons at once")
    (neuron,) = found
    points = {leaves[i][depth][2] for i in own}
    if len(points) > 1:
        raise ValueError(f"the domain {where} is split at {len(points)} points of neuron {neuron}")
    (point,) = points
    if not 0 <= neuron < neurons or (neuron, point) in {(n, p) for n, _, p in path}:
        raise ValueError(f"the domain {where} cannot be split at neuron {neuron}")
    if not math.isfinite(point):
        raise ValueError(f"the domain {where} cannot be split at the point {point}")
    if any(leaves[i][depth][1] not in (1, -1) for i in own):
        raise ValueError(f"a split of the domain {where} has a sign that is neither 1 nor -1")
    halves = [
        _node(leaves, [i for i in own if leaves[i][depth][1] == sign],
              (*path, (neuron, sign, point)), neurons)
        for sign in (1, -1)
    ]
    return Node(None, neuron, point, *halves)
