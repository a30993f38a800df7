"""What becomes of some domains of a search: proved, to be split further, stuck, or refuted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lirpa_megatron.complete.bounding import Bounded, Bounder
from lirpa_megatron.complete.problem import Domain, Leaf, SearchOptions
from lirpa_megatron.complete.steps import finish, halves, splittable, still_open

Confirm = Callable[[int, torch.Tensor], Any]
"""Called on every rank of a replica with a goal and points [P, inputs] of its box where it may
fail, the most promising first; returns the one at which it does, in any form, or None."""


@dataclass
class Explored:
    """What was found out of some domains.

    Attributes:
        bounded: how many bounds were computed.
        closed: domains that are proved.
        open: those to be split, with candidates.
        stuck: those that cannot be.
        refuted: a goal, and what `Confirm` says of it.
        is_over: whether time is.
        units: of goals whose boxes these were, what beta is counted in, [goals, ReLUs].
    """

    bounded: int = 0
    closed: list[Leaf] = field(default_factory=list)
    open: list[Domain] = field(default_factory=list)
    stuck: list[Domain] = field(default_factory=list)
    refuted: tuple[int, Any] | None = None
    is_over: bool = False
    units: torch.Tensor | None = None


class Explorer:
    """Explores domains; every rank of the graph's group calls its methods alike.

    Args:
        bounder: bounds domains.
        options: steps.
        confirm: decides whether a point is a counterexample.
    """

    def __init__(self, bounder: Bounder, options: SearchOptions, confirm: Confirm) -> None:
        self.bounder, self.options, self.confirm = bounder, options, confirm
        self._tried = options.tried_nonlinear if bounder.roots.curves else options.tried

    def whole(self, goals: Sequence[int]) -> Explored:
        """The boxes of goals."""
        bounder, margins = self.bounder, self.bounder.roots.margins.amax(1).tolist()
        self.measured(goals)
        domains = [Domain(g, (), margins[g], None, None, ()) for g in goals]
        found = bounder.ascend(bounder.whole(goals), self.options.first_iterations)
        explored = self._sorted(domains, found)
        explored.units = bounder.units[goals]
        return explored

    def measured(self, goals: Sequence[int]) -> torch.Tensor:
        """What beta is counted in for some goals, [goals, ReLUs]."""
        found = self.bounder.ascend(self.bounder.whole(goals), 0)
        self.bounder.measure(found.seen, found.batch.goal)
        return self.bounder.units[list(goals)]

    def anew(self, domains: Sequence[Domain]) -> Explored:
        """Domains of which nothing is known but splits; `measured` has seen their goals."""
        batch = self.bounder.anew([(d.goal, d.splits) for d in domains])
        return self._sorted(domains, self.bounder.ascend(batch, self.options.first_iterations))

    def halves(self, parents: list[Domain]) -> Explored:
        """Splits domains; if time is over, they are left as they were."""
        found = halves(self.bounder, parents, self.options.iterations)
        if found is None:
            return Explored(open=parents, is_over=True)
        return self._sorted(*found)

    def _sorted(self, domains: Sequence[Domain], found: Bounded) -> Explored:
        explored = Explored(bounded=len(domains), is_over=found.is_over)
        _close(explored, domains, found)
        rest = still_open(domains, found)
        if rest:
            explored.open, last = splittable(self.bounder, rest, found, self._tried)
            self._try_points(explored, found)
            if last:
                self._finish(explored, last)
        return explored

    def _finish(self, explored: Explored, domains: list[Domain]) -> None:
        """Domains in which the network is linear, or nearly."""

        def note(some: Sequence[Domain], found: Bounded) -> bool:
            _close(explored, some, found)
            explored.is_over = explored.is_over or found.is_over
            self._try_points(explored, found)
            return explored.refuted is None and not explored.is_over

        for first in range(0, len(domains), self.options.batch):
            some: Sequence[Domain] = domains[first : first + self.options.batch]
            if explored.refuted is None and not explored.is_over:
                some = finish(self.bounder, some, self.options.last_iterations, note)
            explored.stuck += some

    def _try_points(self, explored: Explored, found: Bounded) -> None:
        """Where the bounds are attained, the goals may fail; the worst is tried first, others while
        there is time."""
        if explored.refuted is not None:
            return
        goals = found.batch.goal.tolist()
        worst = sorted(range(len(goals)), key=lambda i: found.margins[found.open[i]].item())
        for k, goal in enumerate(dict.fromkeys(goals[i] for i in worst)):
            if k and self.bounder.time_is_over():
                return
            index = [i for i in worst if goals[i] == goal]
            points = found.minimiser[index]
            if found.point is not None:  # by turns
                points = torch.stack([points, found.point[index]], 1).flatten(0, 1)
            point = self.confirm(goal, points)
            if point is not None:
                explored.refuted = goal, point
                return


def _close(explored: Explored, domains: Sequence[Domain], found: Bounded) -> None:
    margins = found.margins.tolist()
    for i in found.proved.nonzero().flatten().tolist():
        margin = min(margins[i], domains[i].least)
        explored.closed.append(Leaf(domains[i].goal, domains[i].splits, margin))
