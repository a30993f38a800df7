"""Branch and bound for bounds: of each goal the worst domains are split until it holds or the
number of domains is used up. What has been found by then is a bound all the same: that of the worst
domain that is left.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lirpa_megatron.complete.bounding import Bounded, Bounder
from lirpa_megatron.complete.problem import Domain, SearchOptions, Split
from lirpa_megatron.complete.steps import finish, halves, rank, splittable, still_open

_FEW, _RISE = 16, 0.1
"""Domains that each goal may have, and after which its bound has to have risen by this share of
what was missing. Where it has not, what is loose are intervals of earlier layers."""
_NUMBERS = 2**27
"""Numbers that the open domains of a group of goals may have."""


@dataclass(frozen=True)
class Grown:
    """What a `Tree` says of its goal, without its domains; attributes as there."""

    margin: float
    can_rise: bool
    domains: int
    point: torch.Tensor | None
    leaves: tuple[tuple[Split, ...], ...]
    """`all_leaves`, if they are kept."""


@dataclass
class Tree:
    """What is known of one goal.

    Attributes:
        open: its domains that may be split, the worst first, by `rank`.
        stuck: margins of those that may not, because nothing is unstable there.
        leaves: splits of those that were proved.
        domains: how many were bounded.
        first: the margin without a split.
        point: where the bound of the worst one of the last step is attained, [inputs].
    """

    open: list[tuple[float, int, Domain]] = field(default_factory=list)
    stuck: list[tuple[float, tuple[Split, ...]]] = field(default_factory=list)
    leaves: list[tuple[Split, ...]] = field(default_factory=list)
    domains: int = 0
    first: float = float("-inf")
    point: torch.Tensor | None = None

    @property
    def margin(self) -> float:
        """The worst domain's margin, or 0 if all were proved."""
        return min([self.limit, *(margin for margin, *_ in self.open[:1])])

    @property
    def limit(self) -> float:
        """More than this splits cannot reach."""
        return min([0.0, *(margin for margin, _ in self.stuck)])

    @property
    def can_rise(self) -> bool:
        """Whether splits may raise the margin, by more than a little."""
        return bool(self.open) and self.open[0][0] < self.limit and not self._is_slow

    @property
    def _is_slow(self) -> bool:
        return self.domains >= _FEW and self.margin < (1 - _RISE) * self.first

    @property
    def all_leaves(self) -> list[tuple[Split, ...]]:
        """Splits of domains that cover the box; the margin of each is at least `margin`."""
        return [*self.leaves, *(s for _, s in self.stuck), *(d.splits for *_, d in self.open)]

    def grown(self, keep_leaves: bool) -> Grown:
        """What others are told of it."""
        leaves = tuple(self.all_leaves) if keep_leaves else ()
        return Grown(self.margin, self.can_rise, self.domains, self.point, leaves)


def grow(
    bounder: Bounder, goals: Sequence[int], options: SearchOptions, most: int
) -> tuple[list[Tree], bool]:
    """A tree for each goal; every rank calls it alike.

    Args:
        bounder: of a problem whose goals have one row.
        goals: of the problem.
        options: steps for each domain, domains that are split at once.
        most: domains of each goal.

    Returns:
        trees, and whether time was over.
    """
    trees: list[Tree] = []
    each = max(1, min(options.inner_batch, _NUMBERS // (most * len(bounder.roots.place_of))))
    for first in range(0, len(goals), each):
        grown, over = _Grower(bounder, options, most).run(goals[first : first + each])
        trees += grown
        if over:
            return trees + [Tree(stuck=[(float("-inf"), ())])] * (len(goals) - len(trees)), True
    return trees, False


class _Grower:
    """The trees of one group of goals."""

    def __init__(self, bounder: Bounder, options: SearchOptions, most: int) -> None:
        self.bounder, self.options, self.most = bounder, options, most
        self.trees: dict[int, Tree] = {}
        self.count = itertools.count()

    def run(self, goals: Sequence[int]) -> tuple[list[Tree], bool]:
        bounder, options = self.bounder, self.options
        self.trees = {goal: Tree() for goal in goals}
        begin = bounder.ascend(bounder.whole(goals), 0)
        bounder.measure(begin.seen, begin.batch.goal)
        found = bounder.ascend(bounder.whole(goals), options.refinement_iterations)
        self._sort([Domain(g, (), float("-inf"), None, None, ()) for g in goals], found)
        for tree in self.trees.values():
            tree.first = tree.margin
        over = found.is_over
        while not over and (parents := self._taken()):
            step = halves(bounder, parents, options.inner_iterations)
            if step is None:
                for domain in parents:
                    self._push(domain)
                over = True
            else:
                self._sort(*step)
        return list(self.trees.values()), over

    def _taken(self) -> list[Domain]:
        """The worst domains of each goal that may have more."""
        left = [t for t in self.trees.values() if t.can_rise and t.domains < self.most]
        if not left:
            return []
        share = max(1, self.options.inner_batch // len(left))
        return [
            heapq.heappop(tree.open)[2]
            for tree in left
            for _ in range(min(share, len(tree.open), (self.most - tree.domains + 1) // 2))
        ]

    def _sort(self, domains: list[Domain], found: Bounded) -> None:
        for domain in domains:
            self.trees[domain.goal].domains += 1
        self._close(domains, found)
        rest = still_open(domains, found)
        for i in sorted(range(len(rest)), key=lambda i: -rest[i].margin):
            self.trees[rest[i].goal].point = found.minimiser[i]
        split, stuck = splittable(self.bounder, rest, found, self.options.inner_tried)
        for domain in split:
            self._push(domain)
        if stuck:
            self._finish(stuck)

    def _finish(self, domains: list[Domain]) -> None:
        """Domains in which the node is linear in the input."""
        left = finish(self.bounder, domains, self.options.last_iterations, self._close)
        for domain in left:
            self.trees[domain.goal].stuck.append((domain.margin, domain.splits))

    def _close(self, domains: Sequence[Domain], found: Bounded) -> bool:
        for i in found.proved.nonzero().flatten().tolist():
            self.trees[domains[i].goal].leaves.append(domains[i].splits)
        return True

    def _push(self, domain: Domain) -> None:
        heapq.heappush(
            self.trees[domain.goal].open, (rank(domain.margin), next(self.count), domain)
        )
