"""The loop: the worst domains are split, their children bounded, until none is left.

Two things bring a proof closer: splits, and tighter bounds of inner neurons (`refinement`). Which
of them is the better one shows on the way, so that they take turns: after each round of refinement
the goals are searched, for as long as that round has taken at most and only while the bound rises.
Then inner bounds are raised further, until they cannot be, and what is left is searched again.

Every rank of a replica processes the same domains in the same order: bounds and the clock are rank
0's, and neurons to split are chosen from the scores of all ranks (`agreement`).

Replicas (`parallel.replicas`) all have the same queue. The worst domains are dealt to them, batch
by batch; each bounds its own, and tells the others what became of them (`exploring.Explored`:
splits, bounds, alpha and beta of those that stay open). So the search ends for all at once: when
the queue is empty, when one of them has a counterexample, or when the clock of one says so. A
replica that is killed takes nothing along but a batch, whose domains are dealt again. Batches are
whole: of a smaller one each step takes nearly as long, so that one replica does what is less than
two. Where one process bounds the worst domains and looks at the queue again, replicas take more at
once: the number of domains may differ; verdicts do not, unless time or the limit of domains ends
the search.

A search that goes on from a state (`SearchOptions.start`) takes over its bounds of inner neurons,
and the domains that were open. When all are proved, nothing is yet: those bounds are found again
as `check` does it, and all leaves are bounded with what was found, as open domains are. Only that
is the proof. If a bound does not hold, the search begins anew.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lirpa_megatron.compat.full_precision import full_precision
from lirpa_megatron.complete.bounding import Bounder
from lirpa_megatron.complete.domain_pass import passes
from lirpa_megatron.complete.exploring import Confirm, Explored, Explorer
from lirpa_megatron.complete.planes import most_domains
from lirpa_megatron.complete.problem import (
    Domain,
    Leaf,
    Problem,
    Searched,
    SearchOptions,
    Split,
)
from lirpa_megatron.complete.refinement import Refinement
from lirpa_megatron.complete.roots import Roots, bound_roots
from lirpa_megatron.complete.state import SearchState, check_points, split_leaves
from lirpa_megatron.complete.steps import rank
from lirpa_megatron.parallel.replicas import ALONE, Replicas

_FEW = 500
"""Domains that every search may have, and after which splits have to have gained something."""
_RISE, _PROVED = 0.3, 0.1
"""What: a share of what was missing that the bound has risen by, or of the last domains proved."""
_CHEAPER = 4
"""How many domains of inner neurons' bounds one of a goal is worth, at least."""

_GOALS = 128
"""Goals whose boxes are worth another replica's while: of fewer each step takes nearly as long."""

Progress = Callable[[float, int, int, float], None]
"""Called now and then with the bound, open domains, bounded domains and seconds."""


def search(
    graph: Any, problem: Problem, options: SearchOptions, confirm: Confirm,
    progress: Progress | None = None, roots: Roots | None = None, replicas: Replicas = ALONE,
) -> Searched:
    """Branch and bound; every rank of the graph's group, in all replicas, calls it alike.

    Args:
        graph: a BoundedModule.
        problem: what is to be proved.
        options: how.
        confirm: decides whether a point is a counterexample.
        progress: told of what goes on.
        roots: the boxes' bounds, if they are known.
        replicas: that share the work, inside `Replicas.guard`.

    Raises:
        UserError: the graph is not one of linear operators and functions of one variable.
        StateError: the state to go on from is not one of this problem.
    """
    return _Run(graph, problem, options, confirm, progress, replicas).run(roots)


_Leaves = tuple[list[tuple[Split, ...]], list[tuple[Split, ...]]]
"""Splits of leaves of a goal: that are proved, and that are not."""


class _Run:
    """Rounds of refinement and searches, until all goals are decided."""

    def __init__(
        self, graph: Any, problem: Problem, options: SearchOptions, confirm: Confirm,
        progress: Progress | None, replicas: Replicas,
    ) -> None:
        self.graph, self.problem, self.options = graph, problem, options
        self.confirm, self.progress, self.replicas = confirm, progress, replicas
        self.begin = time.monotonic()
        self.margins = [-math.inf] * len(problem)
        self.left = list(range(len(problem)))
        self.bounded = self.inner = 0
        self.leaves: list[Leaf] = []
        # whether what was found rests on bounds that a state has claimed
        self.supposed = False

    def is_over(self) -> bool:
        return self.options.is_over(self._seconds())

    def run(self, roots: Roots | None) -> Searched:
        if roots is None:
            roots = bound_roots(self.graph, self.problem, self.is_over, self.replicas)
        most = most_domains(roots.planes)
        self.options = replace(
            self.options, batch=min(self.options.batch, most),
            inner_batch=min(self.options.inner_batch, most),
        )
        known = roots.margins.amax(1).tolist()
        self.margins = [margin if margin < math.inf else -math.inf for margin in known]
        with passes(self.graph, roots.active_columns), full_precision(self.graph.device):
            found = None
            if self.options.start is not None:
                found = self._go_on(roots, self.options.start)
            if found is None:
                found = self._result(*self._loop(self._refinement(roots)))
            return found

    def _refinement(self, roots: Roots) -> Refinement:
        return Refinement(
            self.graph, self.problem, roots, self.options, self.is_over, self.replicas
        )

    def _loop(
        self, inner: Refinement, search: _Search | None = None
    ) -> tuple[str, _Search, Refinement]:
        """Rounds and searches by turns, perhaps after a first search."""
        while True:
            if search is None:
                if not inner.is_done:
                    inner.round(self._shown)
                    self.inner = inner.domains
                search = self._search(inner, inner.roots)
            status = search.run()
            self._note(search)
            if status not in ("stuck", "limit") or self._is_last(inner):
                return status, search, inner
            search = None

    def _go_on(self, roots: Roots, state: SearchState) -> Searched | None:
        """The search that was ended; None if bounds that the state claims do not hold."""
        inner, total = self._refinement(roots), len(roots.operator_of) - 1
        inner.suppose(state)
        self.bounded, self.inner, self.supposed = state.domains, inner.domains, True
        given = {goal: split_leaves(tree, total) for goal, tree in state.trees.items()}
        check_points([leaf for both in given.values() for some in both for leaf in some], roots)
        for goal, (closed, left) in given.items():
            if not left:
                self.left.remove(goal)
                self.leaves += [Leaf(goal, splits, math.inf) for splits in closed]
        status, search, _ = self._loop(inner, self._search(inner, inner.roots, given))
        if status != "proved":
            return self._result(status, search, inner)
        # so far it is proved if all that was claimed holds
        held = inner.found_again(roots)
        if held is None:
            if self.replicas.first("the clock", search.explorer.bounder.time_is_over):
                return self._result("timeout", search, inner)
            self.supposed, self.leaves = False, []
            self.left = list(range(len(self.problem)))
            return None
        given = {goal: ([], []) for goal in range(len(self.problem))}
        for leaf in self.leaves:
            given[leaf.goal][1].append(leaf.splits)
        self.left, self.leaves, self.supposed = list(given), [], False
        search = self._search(inner, held, given)
        status = search.run()
        self._note(search)
        return self._result(status, search, inner)

    def _search(
        self, inner: Refinement, roots: Roots, given: Mapping[int, _Leaves] | None = None
    ) -> _Search:
        """A search with some bounds of inner neurons; perhaps it goes on from given leaves."""
        is_last = inner.is_done or (given is not None and not self.supposed)
        most = math.inf if is_last else max(_FEW, inner.domains // _CHEAPER)
        if self.options.most_domains is not None:
            most = min(most, self.options.most_domains - self.bounded)
        bounder = Bounder(self.graph, self.problem, roots, self.options, self.is_over)
        return _Search(
            Explorer(bounder, self.options, self.confirm), self.left, most, is_last,
            self._shown, self.replicas, given or {},
        )

    def _is_last(self, inner: Refinement) -> bool:
        most = self.options.most_domains
        return inner.is_done or (most is not None and self.bounded >= most)

    def _note(self, search: _Search) -> None:
        """What a search has found out; proofs of goals that it left open are not kept."""
        for goal, margin in search.margins().items() if not self.supposed else ():
            self.margins[goal] = max(self.margins[goal], margin)
        self.bounded += search.bounded
        still = search.open_goals()
        self.left = [goal for goal in self.left if goal in still]
        self.leaves += [leaf for leaf in search.leaves if leaf.goal not in still]

    def _shown(self, bound: float | None = None, left: int = 0, domains: int = 0) -> None:
        if self.progress is not None:
            known = min(self.margins) if bound is None else bound
            self.progress(known, left, self.bounded + domains, self._seconds())

    def _seconds(self) -> float:
        return time.monotonic() - self.begin

    def _result(self, status: str, search: _Search, inner: Refinement) -> Searched:
        why = None
        if status == "stuck":
            why = (f"{len(search.stuck)} domains without a neuron to split were left, the closest "
                   f"with a bound of {max(d.margin for d in search.stuck):.3g}")
        elif status == "limit":
            why = "the limit on domains was reached"
        goal, point = search.refuted or (None, None)
        proofs = self.options.keep_tree and status == "proved"
        return Searched(
            "unknown" if why else status, min(self.margins), self.margins, self.bounded,
            search.open(), self._seconds(), why, point, goal, self.leaves if proofs else [],
            list(inner.claims.values()) if proofs else [], self.inner,
            "relu" if inner.roots.only_relus else "nonlinear",
            state=self._state(search, inner) if status in ("timeout", "limit") else None,
        )

    def _state(self, search: _Search, inner: Refinement) -> SearchState | None:
        """Where the search is; None if trees are not kept, or are too deep."""
        if not self.options.keep_tree:
            return None
        still = search.open_goals()
        closed = [*self.leaves, *(leaf for leaf in search.leaves if leaf.goal in still)]
        try:
            return SearchState.of_splits(
                len(self.problem), len(inner.roots.operator_of) - 1, closed, search.open_domains(),
                inner.claims.values(), rounds=inner.rounds, refined=inner.is_done,
                domains=self.bounded, inner_domains=inner.domains,
            )
        except ValueError:
            return None


class _Search:
    """One search with some bounds of inner neurons.

    Args:
        explorer: that has them.
        goals: of the problem.
        most: domains.
        is_last: whether it goes on however little splits gain.
        progress: told of the bound, open domains and bounded domains.
        replicas: that share the work.
        given: of goals that were searched before, leaves that are proved and those that are not.
    """

    def __init__(
        self, explorer: Explorer, goals: Sequence[int], most: float, is_last: bool,
        progress: Callable[[float, int, int], None], replicas: Replicas,
        given: Mapping[int, _Leaves],
    ) -> None:
        self.explorer, self.options, self.replicas = explorer, explorer.options, replicas
        self.goals, self.most, self.is_last, self.progress = goals, most, is_last, progress
        self.heap: list[tuple[float, int, Domain]] = []
        self.given, self.unseen = given, []
        self.count = itertools.count()
        self.bounded, self.closed, self.first = 0, 0, -math.inf
        # of these two, what they were when `_is_slow` has looked last
        self.last = 0, 0
        self.proved_bounds = dict.fromkeys(goals, math.inf)
        self.stuck: list[Domain] = []
        self.leaves: list[Leaf] = []
        self.refuted: tuple[int, Any] | None = None

    # ------------------------------------------------------------------ the loop

    def run(self) -> str:
        """"proved", "refuted", "timeout", "limit" of domains, or "stuck": domains are left that
        cannot be split."""
        over = self._begin()
        while (self.unseen or self.heap) and not over and self.refuted is None:
            if self.bounded >= self.most or self._is_slow():
                return "limit"
            batch, count = self.options.batch, len(self.unseen or self.heap)
            if count >= batch:  # whole batches
                count = batch * min(count // batch, len(self.replicas.members))
            work = self.explorer.anew if self.unseen else self.explorer.halves
            if self.unseen:
                taken, self.unseen = self.unseen[:count], self.unseen[count:]
            else:
                taken = [heapq.heappop(self.heap)[2] for _ in range(count)]
            over = self._note(self.replicas.share(
                "bounds of domains", taken, work, batch, partial(_names, taken)
            ))
            self.progress(self._bound(), self.open(), self.bounded)
        if self.refuted is not None:
            return "refuted"
        if over and self.open():
            return "timeout"
        return "stuck" if self.stuck else "proved"

    def _is_slow(self) -> bool:
        """Whether splits gain too little, where there is something else to do."""
        last_bounded, last_closed = self.last
        count = self.bounded - last_bounded
        if self.is_last or count < _FEW:
            return False
        share = (self.closed - last_closed) / count
        self.last = self.bounded, self.closed
        return share < _PROVED and self._bound() < (1 - _RISE) * self.first

    def _begin(self) -> bool:
        """The goals' boxes; those that alpha-CROWN proved have no more to be done. Returns whether
        time is over."""
        bounder = self.explorer.bounder
        margins = bounder.roots.margins.amax(1).tolist()
        left, before = [], []
        for goal in self.goals:
            if 0 < margins[goal] < math.inf:
                self._close(Leaf(goal, (), margins[goal]))
            elif goal in self.given:
                before.append(goal)
                closed, still = self.given[goal]
                self.leaves += [Leaf(goal, splits, math.inf) for splits in closed]
                self.unseen += [
                    Domain(goal, splits, margins[goal], None, None, ()) for splits in still
                ]
            else:
                left.append(goal)
        if before:
            bounder.units[before] = self.replicas.first(
                "units", lambda: self.explorer.measured(before)
            )
        parts = self.replicas.share("bounds of boxes", left, self.explorer.whole, _GOALS)
        over = self._note(parts)
        for goals, explored in parts:
            bounder.units[goals] = explored.units
        if left and not before:
            self.first = self._bound()
        return over

    def _note(self, parts: Sequence[tuple[Sequence[Any], Explored]]) -> bool:
        """What replicas have found out; returns whether time is over, by the clock of one."""
        for _, explored in parts:
            self.bounded += explored.bounded
            for leaf in explored.closed:
                self._close(leaf)
            for domain in explored.open:
                heapq.heappush(self.heap, (rank(domain.margin), next(self.count), domain))
            self.stuck += explored.stuck
            self.refuted = self.refuted or explored.refuted
        return any(explored.is_over for _, explored in parts)

    # ------------------------------------------------------------------- results

    def _close(self, leaf: Leaf) -> None:
        self.closed += 1
        self.proved_bounds[leaf.goal] = min(self.proved_bounds[leaf.goal], leaf.margin)
        if self.options.keep_tree:
            self.leaves.append(leaf)

    def _bound(self) -> float:
        worst = self.heap[0][0] if self.heap else math.inf
        others = (d.margin for d in (*self.stuck, *self.unseen))
        return min(worst, *others, *self.proved_bounds.values())

    def open(self) -> int:
        """How many domains are left."""
        return len(self.heap) + len(self.stuck) + len(self.unseen)

    def open_domains(self) -> Iterator[Domain]:
        """Those that are left."""
        return itertools.chain((d for *_, d in self.heap), self.stuck, self.unseen)

    def open_goals(self) -> set[int]:
        """Goals that have some."""
        return {d.goal for d in self.open_domains()}

    def margins(self) -> dict[int, float]:
        """Of each goal what is known."""
        margins = dict(self.proved_bounds)
        for domain in self.open_domains():
            margins[domain.goal] = min(margins[domain.goal], domain.margin)
        return margins


def _names(domains: Sequence[Domain]) -> bytes:
    return repr([(domain.goal, domain.splits) for domain in domains]).encode()
