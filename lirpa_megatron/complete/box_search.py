"""Branch and bound over the input: the worst parts of boxes are cut, until all are proved.

A part is bounded by CROWN as a box of its own, all of its goals together: inner bounds are computed
once for them. It is cut in the middle of the input along which the bounds' own planes move most
("smart branching"). Points where bounds are attained, and the parts' centres, are tried on the
network; the best ones are handed on as counterexamples.

Every rank cuts the same parts in the same order: bounds, scores and the clock are rank 0's.
Replicas have the same parts, and bound shares of each batch (`parallel.replicas`).

A search that goes on from a state (`SearchOptions.start`) cuts the boxes as it was done, and takes
the parts that were open. When none is left, those that are said to be proved are bounded like any
others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch

from lirpa_megatron.complete.box_bounds import BoundedParts, PartBounder, Parts
from lirpa_megatron.complete.cut_tree import Growing
from lirpa_megatron.complete.exploring import Confirm
from lirpa_megatron.complete.problem import Problem, Searched, SearchOptions
from lirpa_megatron.complete.state import CLOSED, OPEN, Box, SearchState, cut_leaves
from lirpa_megatron.parallel.replicas import ALONE, Replicas

_RANDOM = 4
"""Points drawn in each open part, beside its centre and where its bound is attained."""
_TRIED = 16
"""Points of a goal that are handed on."""
_SHARE = 32
"""Parts that are worth another replica's while."""
_SAME = 1e-5
"""Scores that differ by less, as a share, are equal: the first input is cut."""


def search_boxes(
    graph: Any, problem: Problem, options: SearchOptions,
    confirm: Confirm,
    progress: Callable[[float, int, int, float], None] | None = None, replicas: Replicas = ALONE,
) -> Searched:
    """Cuts boxes until all goals are decided; every rank of the graph's group, in all replicas,
    calls it alike.

    Args:
        graph: a BoundedModule (`strategy.check_boxes`).
        problem, options, confirm, progress, replicas: as for `search.search`.

    Raises:
        StateError: the state to go on from is not one of these boxes.
    """
    return _Run(graph, problem, options, confirm, progress, replicas).run()


class _Run:
    def __init__(
        self, graph: Any, problem: Problem, options: SearchOptions, confirm: Any, progress: Any,
        replicas: Replicas,
    ) -> None:
        self.options, self.confirm, self.progress = options, confirm, progress
        self.replicas = replicas
        self.begin = time.monotonic()
        self.bounder = PartBounder(graph, problem, options.box_batch, self._is_over)
        whole = self.bounder.whole()
        self.waiting, self.small = whole, _first_of(whole, 0)
        # said to be proved
        self.claimed = self.small
        self.trees = Growing(len(problem.low)) if options.keep_tree else None
        self.proved = [math.inf] * len(problem)
        self.bounded = self.turn = 0
        if options.start is not None:
            self._go_on(whole, options.start)
        self.random = torch.Generator().manual_seed(0)
        self.refuted: tuple[int, Any] | None = None

    def _is_over(self) -> bool:
        return self.options.is_over(self._seconds())

    def _seconds(self) -> float:
        return time.monotonic() - self.begin

    def run(self) -> Searched:
        """Until nothing is left."""
        most = self.options.most_domains
        while len(self.waiting) or len(self.claimed):
            if not len(self.waiting):
                self.waiting, self.claimed = self.claimed, _first_of(self.claimed, 0)
            if most is not None and self.bounded >= most:
                return self._result("unknown", "the limit on domains was reached")
            count = self.bounder.most * len(self.replicas.members)
            parts, self.waiting = _worst_first(self.waiting, count)
            over = self._step(parts)
            if self.refuted is not None:
                return self._result("refuted")
            if self.progress is not None:
                self.progress(
                    self._bound(), len(self.waiting), self.bounded, self._seconds()
                )
            if over and (len(self.waiting) or len(self.claimed)):
                return self._result("timeout")
        if len(self.small):
            return self._result("unknown", f"{len(self.small)} parts that are too small to be cut "
                                           "were left")
        return self._result("proved")

    def _step(self, parts: Parts) -> bool:
        """Bounds parts and cuts those that stay open; returns whether time is over."""
        over = False
        for index, (found, refuted) in self.replicas.share(
            "bounds of parts", list(range(len(parts))), lambda own: self._explored(parts.at(own)),
            _SHARE, lambda: torch.stack([parts.low, parts.high]).cpu().numpy().tobytes(),
        ):
            own = parts.at(index)
            self.bounded += len(own)
            self._note(own, found)
            rest, left = _left(own, found)
            self._cut(rest, found.scores[left])
            self.refuted = self.refuted or refuted
            over = over or found.is_over
        return over

    def _explored(self, parts: Parts) -> tuple[BoundedParts, tuple[int, Any] | None]:
        """What bounds say of parts, and whether there is a counterexample in them."""
        found = self.bounder.bound(parts)
        rest, left = _left(parts, found)
        return found, self._try(rest, found.minimiser[left]) if len(left) else None

    def _note(self, parts: Parts, found: BoundedParts) -> None:
        where, which = found.proved.nonzero(as_tuple=True)
        goals = self.bounder.goals[parts.box[where], which].tolist()
        margins = found.margins[where, which].tolist()
        for node, goal, margin in zip(parts.node[where].tolist(), goals, margins, strict=True):
            self.proved[goal] = min(self.proved[goal], margin)
            if self.trees is not None:
                self.trees.prove(node, goal, margin)

    def _cut(self, parts: Parts, scores: torch.Tensor) -> None:
        """The halves go to the waiting ones."""
        if not scores.shape[1]:  # boxes of one point
            self.small = self.small.with_others(parts)
            return
        middle = parts.low + (parts.high - parts.low) / 2
        inside = (parts.low < middle) & (middle < parts.high)
        scores = torch.where(inside, scores, -1.0)
        best = scores.amax(1, keepdim=True)
        which = (scores >= best * (1 - _SAME)).to(torch.int8).argmax(1)
        can = best[:, 0] >= 0
        self.small = self.small.with_others(parts.at((~can).nonzero().flatten()))
        index = can.nonzero().flatten()
        parts, which = parts.at(index), which[index]
        column = which[:, None]
        at = middle[index].gather(1, column)
        below, above = parts.node, parts.node
        if self.trees is not None:
            inputs = self.bounder.moving[which].tolist()
            cuts = zip(parts.node.tolist(), inputs, at[:, 0].double().tolist(), strict=True)
            both = torch.tensor([self.trees.cut(*cut) for cut in cuts], dtype=torch.int64)
            below, above = both.view(-1, 2).to(parts.node).unbind(1)
        low, high = parts.low.scatter(1, column, at), parts.high.scatter(1, column, at)
        halves = (Parts(parts.box, parts.low, high, parts.margins, below),
                  Parts(parts.box, low, parts.high, parts.margins, above))
        self.waiting = self.waiting.with_others(halves[0]).with_others(halves[1])

    def _try(self, parts: Parts, minimiser: torch.Tensor) -> tuple[int, Any] | None:
        """The points closest to a counterexample of the closest goal, and of another one in turn.
        """
        shares = torch.rand(_RANDOM + 1, *parts.low.shape, generator=self.random)
        shares[0] = 0.5
        drawn = (parts.low + shares.to(parts.low) * (parts.high - parts.low)).flatten(0, 1)
        drawn = torch.minimum(drawn, parts.high.repeat(_RANDOM + 1, 1))
        every = parts.at(torch.arange(len(parts), device=parts.box.device).repeat(_RANDOM + 2))
        drawn = self.bounder.placed(every.at(torch.arange(len(drawn), device=drawn.device)), drawn)
        points = torch.cat([drawn, minimiser])
        values = self.bounder.values(every, points)
        goals = self.bounder.goals[every.box]
        least = values.new_full((len(self.proved),), torch.inf)
        least.scatter_reduce_(0, goals.flatten(), values.flatten(), "amin")
        order = least.argsort(stable=True)[: int((least < torch.inf).sum())].tolist()
        self.turn += 1
        for goal in dict.fromkeys([*order[:1], *order[self.turn % max(1, len(order)) :][:1]]):
            own = torch.where(goals == goal, values, torch.inf).amin(1)
            closest = own.argsort(stable=True)[:_TRIED]
            point = self.confirm(goal, points[closest[own[closest] < math.inf]])
            if point is not None:
                return goal, point
        return None

    # ------------------------------------------------------------------------ a state

    def _go_on(self, whole: Parts, start: SearchState) -> None:
        """Cuts boxes as an earlier search has done; parts of it are bounded in full."""
        moving, dtype = self.bounder.moving.tolist(), whole.low.dtype
        parts: dict[int, list[Parts]] = {CLOSED: [], OPEN: []}
        for box in range(len(whole)):
            nodes = start.cuts.get(box, (OPEN,))
            root = (tuple(whole.low[box].tolist()), tuple(whole.high[box].tolist()), box)
            both = cut_leaves(
                nodes, root, moving, lambda at: torch.tensor(at, dtype=dtype).item() == at,
                *([] if self.trees is None else [self.trees.cut]),
            )
            for kind, found in zip((CLOSED, OPEN), both, strict=True):
                parts[kind].append(_parts_of(whole.at(torch.tensor([box])), found))
        self.claimed, self.waiting = (_joined(parts[kind]) for kind in (CLOSED, OPEN))
        self.bounded = start.domains

    def _state(self) -> SearchState | None:
        if self.trees is None:
            return None
        left = {*self.waiting.node.tolist(), *self.small.node.tolist()}
        cuts = {}
        for box in range(self.trees.boxes):
            cuts[box] = tuple(
                self.trees.cut_of(node) or (OPEN if node in left else CLOSED)
                for node in self.trees.numbers(box)
            )
        return SearchState(cuts=cuts, domains=self.bounded)

    # ------------------------------------------------------------------------- results

    def _bound(self) -> float:
        every = self.waiting, self.small, self.claimed
        known = (parts.margins.min().item() for parts in every if len(parts))
        return min((*known, *self.proved))

    def margins(self) -> list[float]:
        """Of each goal the smallest bound that is known."""
        margins = list(self.proved)
        for parts in (self.waiting, self.small, self.claimed):
            if not len(parts):
                continue
            for box, count in enumerate(self.bounder.counts):
                own = parts.margins[parts.box == box]
                if len(own):
                    least = own.amin(0).tolist()
                    for slot in range(count):
                        goal = int(self.bounder.goals[box, slot])
                        margins[goal] = min(margins[goal], least[slot])
        return margins

    def _result(self, status: str, why: str | None = None) -> Searched:
        margins = self.margins()
        goal, point = self.refuted or (None, None)
        trees = self.trees.trees() if self.trees is not None and status == "proved" else []
        return Searched(
            status, min(margins), margins, self.bounded, len(self.waiting) + len(self.small),
            self._seconds(), why, point, goal, branching="input", cuts=trees,
            state=self._state() if status in ("unknown", "timeout") else None,
        )


def _first_of(parts: Parts, count: int) -> Parts:
    return parts.at(torch.arange(count, device=parts.box.device))


def _parts_of(box: Parts, boxes: list[Box]) -> Parts:
    """Parts of one box, of which nothing is known."""
    lows, highs, numbers = zip(*boxes, strict=True) if boxes else ((), (), ())
    shape = len(boxes), box.low.shape[1]
    every = box.at(torch.zeros(len(boxes), dtype=torch.int64, device=box.box.device))
    low, high = (box.low.new_tensor(ends).view(shape) for ends in (lows, highs))
    return replace(
        every, low=low, high=high,
        node=torch.tensor(numbers, dtype=torch.int64, device=box.box.device),
    )


def _joined(some: list[Parts]) -> Parts:
    return Parts(*(torch.cat([getattr(p, f.name) for p in some]) for f in fields(Parts)))


def _left(parts: Parts, found: BoundedParts) -> tuple[Parts, torch.Tensor]:
    """Parts that stay open with their bounds, and which they are."""
    margins = torch.where(found.proved | ~parts.open, torch.inf, found.margins)
    left = (margins < torch.inf).any(1).nonzero().flatten()
    return replace(parts, margins=margins).at(left), left


def _worst_first(parts: Parts, most: int) -> tuple[Parts, Parts]:
    """About the worst `most` parts, and the others.

    Of equal ones the first in line, so that every rank takes the same.
    """
    if len(parts) <= most:
        return parts, _first_of(parts, 0)
    worst = parts.worst
    limit = worst.kthvalue(most).values
    chosen = (worst <= limit).nonzero().flatten()[:most]
    rest = torch.ones(len(parts), dtype=torch.bool, device=worst.device)
    rest[chosen] = False
    return parts.at(chosen), parts.at(rest.nonzero().flatten())
