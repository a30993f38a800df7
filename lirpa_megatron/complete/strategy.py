"""What is split to prove a problem: neurons, or the boxes of inputs themselves.

A cut of the box halves the intervals of all neurons that depend on that input, and each part is
bounded by one pass of CROWN, inner bounds included; but in d dimensions it takes 2^d parts to halve
a box. A split of a ReLU removes one relaxation, whatever the dimension, and there are at most 2^N
patterns of N neurons. A cut of another function's interval makes one relaxation tighter, and can
be repeated.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from lirpa_megatron.complete.agreement import from_rank_zero
from lirpa_megatron.complete.box_search import search_boxes
from lirpa_megatron.complete.exploring import Confirm
from lirpa_megatron.complete.inputs import check_inputs, that_move
from lirpa_megatron.complete.problem import Problem, Searched, SearchOptions
from lirpa_megatron.complete.roots import (
    check_graph,
    check_nonlinear,
    check_setting,
    neuron_count,
)
from lirpa_megatron.complete.search import Progress, search
from lirpa_megatron.complete.state import StateError
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel.replicas import ALONE, Replicas

BRANCHING = ("auto", "relu", "nonlinear", "input")

_FEW, _MOST = 8, 16
"""Inputs that move: up to which boxes are cut, and where nothing else can be split."""
_NEURONS = 16
"""ReLUs for each of these inputs that are too many to be split."""
_TRIAL, _PARTS = 0.4, 2**15
"""Where 9 to 16 inputs move: the share of the time, and the parts, in which cuts of boxes have to
prove what is to be proved; after that ReLUs are split."""


def decide(
    graph: Any, problem: Problem, options: SearchOptions, confirm: Confirm,
    progress: Progress | None = None, replicas: Replicas = ALONE,
) -> Searched:
    """Branch and bound over what is `chosen`; arguments and errors as for `search.search`.

    With `auto`, where 9 to 16 inputs move in a network of ReLUs alone, boxes are cut first, for a
    while.
    """
    split, start = chosen(graph, problem.low, problem.high, options.branching), options.start
    tries = options.branching == "auto" and split == "relu" and _may_cut(graph, problem)
    cuts = split == "input" or tries
    if start is not None and (start.cuts and not cuts or start.trees and split == "input"):
        raise StateError("neurons were split, and boxes are to be cut now" if start.trees else
                         "boxes were cut, and neurons are to be split now")
    if split == "input":
        return search_boxes(graph, problem, options, confirm, progress, replicas)
    if not tries or start is not None and start.trees:
        return search(graph, problem, options, confirm, progress, replicas=replicas)
    begin = time.monotonic()
    found = search_boxes(graph, problem, _for_a_while(options), confirm, progress, replicas)

    def is_over() -> bool:
        nothing = problem.thresholds.new_zeros(1)
        mine = options.is_over(time.monotonic() - begin)
        return from_rank_zero(graph.context.collectives, nothing, mine)[1]

    most = None if options.most_domains is None else options.most_domains - found.domains
    if found.status in ("proved", "refuted") or most is not None and most <= 0 \
            or replicas.first("the clock", is_over):
        return found
    timeout = None
    if options.timeout is not None:
        timeout = max(0.0, options.timeout - (time.monotonic() - begin))
    rest = replace(options, timeout=timeout, most_domains=most, start=None)
    later = search(graph, problem, rest, confirm, progress, replicas=replicas)
    return replace(
        later, domains=found.domains + later.domains, seconds=time.monotonic() - begin
    )


def _may_cut(graph: Any, problem: Problem) -> bool:
    """Whether cuts of boxes may prove what splits of ReLUs do not, though they may not either."""
    moving = int(that_move(problem.low, problem.high).any(0).sum())
    return _FEW < moving <= _MOST and _refusal(graph, check_boxes) is None


def _for_a_while(options: SearchOptions) -> SearchOptions:
    """Of a search that is a trial."""
    timeout = None if options.timeout is None else _TRIAL * options.timeout
    most = _PARTS if options.most_domains is None else min(_PARTS, options.most_domains)
    return replace(options, timeout=timeout, most_domains=most)


def chosen(graph: Any, low: torch.Tensor, high: torch.Tensor, asked: str = "auto") -> str:
    """"relu", "nonlinear" or "input".

    `auto` cuts boxes in which at most 8 inputs move, of networks with more than 16 ReLUs for each
    of these inputs; and boxes in which at most 16 do, of networks that ReLUs are not the only
    nonlinear operators of. In others of these it splits ReLUs and cuts the intervals of
    functions of one variable, whatever else is there.

    Args:
        graph: a BoundedModule.
        low, high: boxes, [K, inputs].
        asked: one of `BRANCHING`.

    Raises:
        UserError: the graph cannot be split, by name.
    """
    if asked not in BRANCHING:
        raise UserError(f"branching {asked!r}: choose one of {', '.join(BRANCHING)}")
    if asked == "input":
        check_boxes(graph)
        return "input"
    if asked == "nonlinear":
        check_nonlinear(graph)
        return "nonlinear"
    why = _refusal(graph, check_graph)
    if asked == "relu" or why is None and _refusal(graph, check_boxes) is not None:
        check_graph(graph)
        return "relu"
    moving = int(that_move(low, high).sum(1).max())
    if why is None:
        few = 0 < moving <= _FEW and neuron_count(graph) > _NEURONS * moving
        return "input" if few else "relu"
    if moving <= _MOST and _refusal(graph, check_boxes) is None:
        return "input"
    why = _refusal(graph, check_nonlinear)
    if why is None:
        return "nonlinear"
    if moving > _MOST:
        raise UserError(f"{why}; and boxes are cut where at most {_MOST} inputs move, here "
                        f"{moving} do")
    check_boxes(graph)
    return "input"


def check_boxes(graph: Any) -> None:
    """Raises UserError for a graph whose input boxes cannot be cut."""
    where = "branch and bound cuts boxes: "
    check_setting(graph, where)
    check_inputs(graph, where)


def _refusal(graph: Any, check: Any) -> str | None:
    try:
        check(graph)
    except UserError as error:
        return str(error)
    return None
