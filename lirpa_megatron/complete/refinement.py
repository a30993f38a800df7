"""Tighter bounds of the boxes' inner neurons, each optimized for itself.

alpha-CROWN's alpha for inner neurons serves the sum of the final bounds. Here each bound of each
unstable neuron has an ascent of its own, layer after layer, so that a layer's lines are made from
what was found out about those before it: the bound of a row e_j or -e_j is a goal like any other,
with the node in front of the ReLU as the start of the passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lirpa_megatron.complete.agreement import unstable_numbers
from lirpa_megatron.complete.bounding import Bounder
from lirpa_megatron.complete.problem import Problem, SearchOptions
from lirpa_megatron.complete.roots import ReluPlace, Roots


def refined(
    graph: Any, problem: Problem, roots: Roots, options: SearchOptions,
    is_over: Callable[[], bool],
) -> Roots:
    """The roots with tighter bounds of unstable neurons; call it inside `passes`.

    Args:
        graph: a BoundedModule.
        problem: whose boxes they are.
        roots: bounds so far.
        options: `refinement_iterations` for each neuron.
        is_over: whether time is, on this rank.
    """
    lower, upper = roots.lower.clone(), roots.upper.clone()
    for relu in reversed(roots.relus):
        known = replace(roots, lower=lower, upper=upper)
        node = graph[relu.name].inputs[0]
        plan = graph.schedule.plan(node, spec_sharded=False)
        if not any(n.name == r.name for n in plan.order for r in roots.relus):
            continue  # interval arithmetic is exact in the first layer
        if _refine(graph, problem, known, relu, known.under(plan), options, is_over):
            break
    return replace(roots, lower=lower, upper=upper)


def _refine(
    graph: Any, problem: Problem, roots: Roots, relu: ReluPlace, below: Roots,
    options: SearchOptions, is_over: Callable[[], bool],
) -> bool:
    """Tightens one ReLU's bounds in `roots`; returns whether time is over."""
    at = slice(relu.first, relu.first + relu.size)
    lower, upper = roots.lower[:, at], roots.upper[:, at]
    unstable = (lower < 0) & (upper > 0)
    tp = graph.context.collectives
    boxes, numbers = unstable_numbers(tp, unstable, roots.number_of[at], relu.sharded)
    places = roots.place_of[numbers] - relu.first
    own = (places >= 0) & (places < relu.size)
    node = graph[relu.name].inputs[0]
    columns, shape = roots.active_columns.get(node.name), node.output_shape[1:]
    for first in range(0, len(boxes), options.batch):
        some = slice(first, first + options.batch)
        box, mine, place = boxes[some], own[some], places[some]
        feature = place[mine]
        if columns is not None:
            live = len(columns)
            feature = feature // live * shape[-1] + columns[feature % live]
        rows = lower.new_zeros(len(box), shape.numel())
        rows[mine.nonzero().flatten(), feature] = 1.0
        rows = rows.view(len(box), *shape)
        both = Problem(
            problem.low, problem.high, tuple(box.tolist() * 2),
            torch.cat([rows, -rows])[:, None],
            torch.zeros(2 * len(box), 1, dtype=torch.float64, device=box.device),
        )
        bounder = Bounder(graph, both, below, options, is_over)
        found = bounder.ascend(bounder.whole(range(len(both))), options.refinement_iterations)
        low, high = found.margins.to(lower).chunk(2)
        i, j = box[mine], place[mine]
        lower[i, j] = torch.maximum(lower[i, j], low[mine])
        upper[i, j] = torch.minimum(upper[i, j], -high[mine])
        if found.is_over:
            return True
    return False

