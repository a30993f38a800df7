"""The loop: the worst domains are split, their children bounded, until none is left.

Every rank processes the same domains in the same order: bounds and the clock are rank 0's, and
neurons to split are chosen from the scores of all ranks (`agreement`).
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lirpa_megatron.compat.full_precision import full_precision
from lirpa_megatron.complete import branching
from lirpa_megatron.complete.bounding import Bounded, Bounder
from lirpa_megatron.complete.domain_pass import passes
from lirpa_megatron.complete.problem import Domain, Leaf, Problem, Searched, SearchOptions
from lirpa_megatron.complete.refinement import refined
from lirpa_megatron.complete.roots import Roots, bound_roots

Confirm = Callable[[int, torch.Tensor], torch.Tensor | None]
"""Called on every rank with a goal and points [P, inputs] of its box where it may fail, the most
promising first; returns one at which it does, or None."""
Progress = Callable[[float, int, int, float], None]
"""Called now and then with the bound, open domains, bounded domains and seconds."""


def search(
    graph: Any, problem: Problem, options: SearchOptions, confirm: Confirm,
    progress: Progress | None = None, roots: Roots | None = None,
) -> Searched:
    """Branch and bound; every rank of the graph's group calls it alike.

    Args:
        graph: a BoundedModule.
        problem: what is to be proved.
        options: how.
        confirm: decides whether a point is a counterexample.
        progress: told of what goes on.
        roots: the boxes' bounds, if they are known.

    Raises:
        UserError: the graph is not one of linear operators and ReLUs.
    """
    begin = time.monotonic()
    if roots is None:
        roots = bound_roots(graph, problem, lambda: _is_over(options, begin))
    with passes(graph, roots.active_columns), full_precision(graph.device):
        if options.refinement_iterations:
            roots = refined(graph, problem, roots, options, lambda: _is_over(options, begin))
        return _Search(graph, problem, roots, options, confirm, progress, begin).run()


def _is_over(options: SearchOptions, begin: float) -> bool:
    return options.timeout is not None and time.monotonic() - begin > options.timeout

class _Search:
    def __init__(
        self, graph: Any, problem: Problem, roots: Roots, options: SearchOptions,
        confirm: Confirm, progress: Progress | None, begin: float,
    ) -> None:
        self.problem, self.options, self.begin = problem, options, begin
        self.confirm, self.progress = confirm, progress
        self.bounder = Bounder(
            graph, problem, roots, options, lambda: _is_over(options, begin)
        )
        self.heap: list[tuple[float, int, Domain]] = []
        self.count = itertools.count()
        self.bounded = 0
        self.proved_bounds = [math.inf] * len(problem)
        self.stuck: list[Domain] = []
        self.leaves: list[Leaf] = []
        self.refuted: tuple[int, torch.Tensor] | None = None

    # ------------------------------------------------------------------ the loop

    def run(self) -> Searched:
        over = self._begin()
        while self.heap and not over and self.refuted is None:
            if self.options.most_domains is not None:
                if self.bounded >= self.options.most_domains:
                    return self._result("unknown", "the limit on domains was reached")
            taken = [heapq.heappop(self.heap)[2]
                     for _ in range(min(self.options.batch, len(self.heap)))]
            over = self._step(taken)
            if over:  # what was taken is open still
                for domain in taken:
                    self._push(domain)
            if self.progress is not None:
                self.progress(self._bound(), self._open(), self.bounded, self._seconds())
        if self.refuted is not None:
            return self._result("refuted")
        if over:
            return self._result("timeout")
        if self.stuck:
            return self._result(
                "unknown", f"{len(self.stuck)} domains without an unstable neuron were left, the "
                f"closest with a bound of {max(d.margin for d in self.stuck):.3g}",
            )
        return self._result("proved")

    def _begin(self) -> bool:
        """The goals' boxes; those that alpha-CROWN proved have no more to be done."""
        known = self.bounder.roots.margins.amax(1).tolist()
        left = []
        for goal, margin in enumerate(known):
            if 0 < margin < math.inf:
                self._close(Domain(goal, (), margin, *[self.bounder.units[:0]] * 2, ()), margin)
            else:
                left.append(goal)
        if not left:
            return False
        batch = self.bounder.whole(left)
        found = self.bounder.ascend(batch, 0)
        self.bounder.measure(found.seen, found.batch.goal)
        batch = self.bounder.whole(left)
        domains = [Domain(g, (), known[g], None, None, ()) for g in left]
        found = self.bounder.ascend(batch, self.options.first_iterations)
        return self._sort_out(domains, found)

    def _step(self, parents: list[Domain]) -> bool:
        """Splits domains; returns whether time is over, and then nothing has changed."""
        bounder = self.bounder
        batch = bounder.batch(parents)
        tried = torch.tensor([d.candidates for d in parents], device=batch.C.device)
        pair, neurons, over = branching.children(bounder, batch, tried)
        if over:
            return True
        both = [(d, int(n)) for d, n in zip(parents, neurons.tolist(), strict=True)]
        domains = [
            replace(d, splits=(*d.splits, (n, sign))) for sign in (1, -1) for d, n in both
        ]
        found = bounder.ascend(pair, self.options.iterations)
        if found.is_over:
            return True
        return self._sort_out(domains, found)

    def _sort_out(self, domains: list[Domain], found: Bounded) -> bool:
        """Proved domains are closed, others go on; returns whether time is over."""
        self.bounded += len(domains)
        rest = self._after(domains, found)
        if not rest:
            return found.is_over
        chosen = branching.candidates(self.bounder, found, self.options.tried).tolist()
        last = []
        for domain, numbers in zip(rest, chosen, strict=True):
            domain.candidates = tuple(numbers)
            if numbers[0] < 0:
                last.append(domain)
            else:
                self._push(domain)
        self._try_points(found)
        if self.refuted is None and last:
            return self._finish(last)
        return found.is_over

    def _finish(self, domains: list[Domain]) -> bool:
        """Domains in which the network is linear: nothing is left but the multipliers."""
        for first in range(0, len(domains), self.options.batch):
            some = domains[first : first + self.options.batch]
            steps = self.options.last_iterations
            for solve in (partial(self.bounder.ascend, iterations=steps), self.bounder.solve):
                found = solve(self.bounder.batch(some))
                some = self._after(some, found)
                if some:
                    self._try_points(found)
                if found.is_over or self.refuted is not None or not some:
                    break
            self.stuck += some
            if found.is_over or self.refuted is not None:
                return found.is_over
        return False

    def _after(self, domains: list[Domain], found: Bounded) -> list[Domain]:
        """Closes what was proved; returns the others, as they are now."""
        margins, batch = found.margins.tolist(), found.batch
        for i in found.proved.nonzero().flatten().tolist():
            self._close(domains[i], margins[i])
        rest = []
        for i, at in enumerate(found.open.tolist()):
            domain = domains[at]
            alpha = batch.alpha[:, i]
            rest.append(Domain(
                domain.goal, domain.splits, max(domain.margin, margins[at]),
                alpha.half() if alpha.dtype is torch.float32 else alpha.clone(),
                batch.beta[:, i, : len(domain.splits)].clone(), (),
            ))
        return rest

    def _try_points(self, found: Bounded) -> None:
        """Where the bounds are attained, the goals may fail."""
        if self.refuted is not None:
            return
        goals = found.batch.goal.tolist()
        worst = sorted(range(len(goals)), key=lambda i: found.margins[found.open[i]].item())
        for goal in sorted(set(goals)):
            index = [i for i in worst if goals[i] == goal]
            points = found.minimiser[index]
            if found.point is not None:  # by turns
                points = torch.stack([points, found.point[index]], 1).flatten(0, 1)
            point = self.confirm(goal, points)
            if point is not None:
                self.refuted = goal, point
                return

    # ------------------------------------------------------------------- results

    def _push(self, domain: Domain) -> None:
        heapq.heappush(self.heap, (domain.margin, next(self.count), domain))

    def _close(self, domain: Domain, margin: float) -> None:
        self.proved_bounds[domain.goal] = min(self.proved_bounds[domain.goal], margin)
        if self.options.keep_tree:
            self.leaves.append(Leaf(domain.goal, domain.splits, margin))

    def _left(self) -> Iterable[Domain]:
        return itertools.chain((d for *_, d in self.heap), self.stuck)

    def _open(self) -> int:
        return len(self.heap) + len(self.stuck)

    def _bound(self) -> float:
        worst = self.heap[0][0] if self.heap else math.inf
        return min(worst, *(d.margin for d in self.stuck), *self.proved_bounds)

    def _seconds(self) -> float:
        return time.monotonic() - self.begin

    def _result(self, status: str, why: str | None = None) -> Searched:
        margins = list(self.proved_bounds)
        for domain in self._left():
            margins[domain.goal] = min(margins[domain.goal], domain.margin)
        goal, point = self.refuted or (None, None)
        return Searched(
            status, min(margins), margins, self.bounded, self._open(), self._seconds(), why,
            point, goal, self.leaves if status == "proved" else [],
        )

