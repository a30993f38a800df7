"""Tighter bounds of the boxes' inner neurons, by branch and bound for each of them.

alpha-CROWN's alpha for inner neurons serves the sum of the final bounds, and what its lines lose
grows with each layer. Here each bound of each unstable neuron is raised for itself, layer after
layer, so that a layer's lines are made from what was found out about those before it: the bound of
a row e_j or -e_j is a goal like any other, with the node in front of the ReLU as the start of the
passes. It is optimized for the whole box first, then over domains. (alpha-beta-CROWN solves
mixed-integer programs for the same purpose.)

Replicas share the neurons of a layer out: each raises the bounds of its own, and tells the others
what they are before the next layer begins.

A bound that was raised is a `Claim`: its domains cover the box, and the row is above it in each.
A search for it ends at 0, where the neuron is stable, or close to a value that is attained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lirpa_megatron.complete.bounding import Bounder
from lirpa_megatron.complete.inner_rows import InnerStart, Rows, inner_starts
from lirpa_megatron.complete.inner_search import Grown, grow
from lirpa_megatron.complete.inner_values import least_attained
from lirpa_megatron.complete.problem import Claim, Problem, SearchOptions
from lirpa_megatron.complete.replay import ClaimedBound, failed_claims
from lirpa_megatron.complete.roots import Roots
from lirpa_megatron.complete.state import SearchState, StateError, check_points, split_leaves
from lirpa_megatron.parallel.replicas import ALONE, Replicas

_CLOSE = 0.05
"""How close to an attained value a bound has to be, in widths of the attained interval."""
_SLACK = 1e-3
"""By how much less than what was found is claimed, in the same widths: another run, in another
number type, is to find it again."""
_EARLY = 16
"""How many times as many domains the first of these layers has as late ones; a fourth for each that
follows."""
_ROWS, _DOMAINS, _VALUES = 32, 256, 128
"""Rows whose bounds are worth another replica's while, domains of theirs, and rows whose values
are: of a smaller share each step takes nearly as long."""


class Refinement:
    """Bounds of the boxes' inner neurons, tighter with each round; call it inside `passes`.

    Args:
        graph: a BoundedModule.
        problem: whose boxes they are.
        roots: bounds so far.
        options: steps, and domains in the first round.
        is_over: whether time is, on this rank.
        replicas: that share the work.

    Attributes:
        roots: with the bounds found so far.
        claims: (box, neuron, sign) -> what they rest on, if trees are kept.
        domains: how many were bounded.
        rounds: that were finished.
        is_done: whether further rounds could change nothing.
        is_over: whether time was, in the last round.
    """

    def __init__(
        self, graph: Any, problem: Problem, roots: Roots, options: SearchOptions,
        is_over: Callable[[], bool], replicas: Replicas = ALONE,
    ) -> None:
        self.graph, self.problem, self.options, self._clock = graph, problem, options, is_over
        self.replicas = replicas
        self.roots = replace(roots, lower=roots.lower.clone(), upper=roots.upper.clone())
        self.claims: dict[tuple[int, int, int], Claim] = {}
        self.domains, self.rounds, self.is_over = 0, 0, False
        # an interval that does not contain 0 is an aim at ReLUs alone
        self.is_done = not options.refinement_iterations or bool(roots.curves)
        self._attained: dict[tuple[int, int, int], float] = {}
        # where a value is tried next
        self._points: dict[tuple[int, int, int], torch.Tensor] = {}

    @property
    def _most(self) -> int:
        """Domains of each goal in the next round, at least."""
        rounds = self.rounds - 1
        return 1 if rounds < 0 else self.options.refinement_domains * 4**rounds

    @property
    def _steps(self) -> int:
        """For each domain."""
        return self.options.inner_iterations + max(0, self.rounds - 1)

    def suppose(self, state: SearchState) -> None:
        """Takes over the bounds of a state, and how far it had come; `replay.failed_claims` has to
        say whether they hold.

        Raises:
            StateError: they are of other boxes or neurons, not one tree each, or above values that
                the neurons have.
        """
        total = len(self.roots.operator_of) - 1
        claims = {}
        for c in state.inner:
            if not (0 <= c.box < len(self.problem.low) and 0 <= c.number < total):
                raise StateError(f"neuron {c.number} of box {c.box} does not exist")
            closed, left = split_leaves(c.tree, total)
            check_points(closed, self.roots)
            key = c.box, c.number, c.sign
            if left or key in claims:
                raise StateError(f"the bound of neuron {c.number} of box {c.box} is not one tree")
            claims[key] = Claim(*key, c.bound, tuple(closed))
        for start in inner_starts(self.graph, self.roots):
            rows = start.unstable()
            keys = rows.keys()
            own = {i: claims[key] for i, key in enumerate(keys) if key in claims}
            if not own:
                continue
            self._aims(start, rows, keys)
            known, raised = start.known(rows).tolist(), {}
            for i, claim in own.items():
                if claim.bound > self._attained[keys[i]]:
                    raise StateError(f"neuron {claim.number} of box {claim.box} has values below "
                                     f"its bound {claim.bound:.3g}")
                if known[i] < claim.bound:
                    raised[i], self.claims[keys[i]] = claim.bound, claim
            start.set(rows, raised)
        self.rounds = state.rounds
        self.is_done |= state.refined or not self.options.refinement_domains
        self.domains = state.inner_domains

    def found_again(self, roots: Roots) -> Roots | None:
        """Bounds that what was supposed is replaced by; None if it does not hold, or time is over.

        Args:
            roots: bounds before any was raised.
        """

        def again() -> tuple[torch.Tensor, torch.Tensor] | None:
            found = replace(roots, lower=roots.lower.clone(), upper=roots.upper.clone())
            claims = [ClaimedBound.of(claim, roots) for claim in self.claims.values()]
            wrong = failed_claims(
                self.graph, self.problem, found, self.options, claims, self._clock
            )
            return None if wrong else (found.lower, found.upper)

        both = self.replicas.first("bounds of neurons again", again)
        return None if both is None else replace(roots, lower=both[0], upper=both[1])

    def round(self, progress: Callable[[], None] = lambda: None) -> None:
        """Raises bounds of all layers, of each with more domains than in the last round."""
        left = False
        for depth, start in enumerate(inner_starts(self.graph, self.roots)):
            left |= self._raise(start, self._times(depth))
            progress()
            if self.is_over:
                return
        self.rounds += 1
        self.is_done = not (left and self.options.refinement_domains)

    def _times(self, depth: int) -> int:
        """How many times as many domains a layer's goals have as those of late layers: it is early
        ones that all others gain from, and their passes are short."""
        return max(1, _EARLY // 4**depth) if self.rounds else 1

    def _raise(self, start: InnerStart, times: int) -> bool:
        """One ReLU's bounds; whether more domains could raise them further."""
        rows = start.unstable()
        keys = rows.keys()
        known = start.known(rows).tolist()
        aims, widths = self._aims(start, rows, keys)
        goals = [g for g in range(len(keys)) if known[g] < float(aims[g])]
        if not goals:
            return False
        problem = start.problem(self.problem, rows, aims + _SLACK * widths)
        bounder = Bounder(
            self.graph, problem, start.below, self.options, self._clock, tightens=False
        )
        options = replace(self.options, inner_iterations=self._steps)
        most = self._most * times

        def raised_by(some: list[int]) -> tuple[list[Grown], bool]:
            trees, over = grow(bounder, some, options, most)
            return [tree.grown(self.options.keep_tree) for tree in trees], over

        share = max(_ROWS, _DOMAINS // most)
        parts = self.replicas.share("bounds of neurons", goals, raised_by, share)
        self.is_over = any(over for _, (_, over) in parts)
        raised, left = {}, False
        for goal, tree in ((g, t) for gs, (ts, _) in parts for g, t in zip(gs, ts, strict=True)):
            self.domains += tree.domains
            left |= tree.can_rise
            if tree.can_rise and tree.point is not None:
                self._points[keys[goal]] = tree.point
            bound = float(aims[goal]) + tree.margin
            if known[goal] < bound:  # not if it is NaN
                raised[goal] = bound
                if self.options.keep_tree:
                    self.claims[keys[goal]] = Claim(*keys[goal], bound, tree.leaves)
        start.set(rows, raised)
        return left

    def _aims(
        self, start: InnerStart, rows: Rows, keys: list[tuple[int, int, int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each goal where its search may end, and the width of the neuron's attained interval:
        [G] each."""
        new = [i for i, key in enumerate(keys)
               if key not in self._attained or key in self._points]
        for some, values in self.replicas.share(
            "values of neurons", new, lambda own: self._attained_by(start, rows, keys, own), _VALUES
        ):
            for i, value in zip(some, values, strict=True):
                self._attained[keys[i]] = min(value, self._attained.get(keys[i], value))
                self._points.pop(keys[i], None)
        both = [(self._attained[box, number, sign], self._attained[box, number, -sign])
                for box, number, sign in keys]
        least, other = torch.tensor(both, dtype=torch.float64).view(-1, 2).t()
        widths = -least - other  # the largest value is minus the other's least
        widths = widths.nan_to_num(1.0, 1.0, 1.0).clamp(min=1e-6)
        aims = (least - _CLOSE * widths).clamp(max=0)
        return torch.where(aims.isfinite(), aims, 0.0), widths

    def _attained_by(
        self, start: InnerStart, rows: Rows, keys: list[tuple[int, int, int]], own: list[int]
    ) -> list[float]:
        """Small values of some rows."""
        some = rows.at(torch.tensor(own, device=rows.box.device))
        low, high = self.problem.low[some.box], self.problem.high[some.box]
        points = [self._points.get(keys[i], middle)
                  for i, middle in zip(own, (low + high) / 2, strict=True)]
        found = least_attained(
            self.graph, start.below.plan, some.C, low, high, torch.stack(points), self._clock
        )
        return found.tolist()
