"""Bounds the parts of a tree of cuts anew, for the check of a record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from lirpa_megatron.compat.full_precision import full_precision
from lirpa_megatron.complete.box_bounds import PartBounder, Parts
from lirpa_megatron.complete.cut_tree import CutTree, claimed
from lirpa_megatron.complete.problem import Problem

_FURTHER = 3
"""How many times a part may be cut that is not proved as it is: CROWN chooses its slopes by the
sign of a difference, which in another number type may be the other one."""


def unproved_parts(
    graph: Any, problem: Problem, trees: Sequence[CutTree], most: int = 512
) -> Iterator[tuple[int, int, float]]:
    """Goals of parts that are not proved: each (goal, node of its box's tree, margin).

    Parts that a tree claims goals of are bounded by plain CROWN, batch by batch.

    Args:
        graph: a BoundedModule, of one process.
        problem: boxes and goals.
        trees: of some boxes.
        most: parts that are bounded at once, at most.

    Raises:
        ValueError: a tree's parts do not cover its box, or a goal lacks a part, with what is wrong.
    """
    bounder = PartBounder(graph, problem, most, lambda: False)
    for tree in trees:
        own = bounder.goals[tree.box, : bounder.counts[tree.box]].tolist()
        slot_of = {goal: slot for slot, goal in enumerate(own)}
        moving = bounder.moving
        ends = (side[tree.box].tolist() for side in (problem.low, problem.high))
        claims = claimed(tree, *ends, own)
        with full_precision(graph.device):
            while some := list(islice(claims, bounder.most)):
                margins = torch.full(
                    (len(some), bounder.goals.shape[1]), math.inf, dtype=torch.float64
                )
                for k, claim in enumerate(some):
                    margins[k, [slot_of[goal] for goal in claim.goals]] = -math.inf
                device = problem.low.device
                low, high = (
                    torch.tensor([getattr(c, side) for c in some], dtype=problem.low.dtype,
                                 device=device)[:, moving]
                    for side in ("low", "high")
                )
                parts = Parts(
                    torch.full((len(some),), tree.box, device=device), low, high,
                    margins.to(device), torch.tensor([c.node for c in some], device=device),
                )
                for slot, node, margin in _unproved(bounder, parts, _FURTHER):
                    yield own[slot], node, margin


def _unproved(
    bounder: PartBounder, parts: Parts, further: int
) -> Iterator[tuple[int, int, float]]:
    """(slot, node, margin) of what is not proved."""
    for first in range(0, len(parts), bounder.most):
        some = parts.at(torch.arange(first, min(first + bounder.most, len(parts))))
        found = bounder.bound(some)
        left = some.open & ~found.proved
        index = left.any(1).nonzero().flatten()
        if not len(index):
            continue
        rest = some.at(index)
        rest = replace(rest, margins=torch.where(left[index], -torch.inf, torch.inf).double())
        if further and found.scores.shape[1]:  # not of boxes of one point
            yield from _unproved(bounder, _halves(rest, found.scores[index]), further - 1)
            continue
        for k, slot in left[index].nonzero().tolist():
            yield slot, int(rest.node[k]), float(found.margins[index[k], slot])


def _halves(parts: Parts, scores: torch.Tensor) -> Parts:
    which = scores.argmax(1, keepdim=True)
    at = (parts.low + (parts.high - parts.low) / 2).gather(1, which)
    return replace(parts, high=parts.high.scatter(1, which, at)).with_others(
        replace(parts, low=parts.low.scatter(1, which, at))
    )
