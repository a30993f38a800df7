"""Bounds the leaves of a tree anew, for the check of a record."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lirpa_megatron.compat.full_precision import full_precision
from lirpa_megatron.complete import branching
from lirpa_megatron.complete.bounding import Bounded, Bounder
from lirpa_megatron.complete.domain_pass import passes
from lirpa_megatron.complete.inner_rows import inner_starts
from lirpa_megatron.complete.problem import Claim, Domain, Problem, SearchOptions
from lirpa_megatron.complete.roots import Roots, bound_roots
from lirpa_megatron.complete.steps import halves, still_open
from lirpa_megatron.complete.tree import Node, tree_of

_MORE = 10
"""How many times more steps a leaf gets that is not proved at first."""
_FURTHER = 6
"""How many more splits a leaf may get then, where there are other functions than ReLUs."""
_SHORT = 0.1
"""How much may be missing of a claim, as a share of what it raises a bound by."""


@dataclass(frozen=True)
class ClaimedBound:
    """A bound of an inner neuron that a record claims, as in `problem.Claim`, with its tree."""

    box: int
    number: int
    sign: int
    bound: float
    tree: Node

    @classmethod
    def of(cls, claim: Claim, roots: Roots) -> ClaimedBound:
        """Raises ValueError if its leaves are not those of a tree."""
        tree = tree_of(claim.leaves, len(roots.operator_of) - 1)
        return cls(claim.box, claim.number, claim.sign, claim.bound, tree)


def unproved_leaves(
    graph: Any, problem: Problem, trees: Sequence[Node], options: SearchOptions,
    claims: Sequence[ClaimedBound] = (),
) -> list[tuple[int | ClaimedBound, int, float]]:
    """Leaves whose bounds are not above their thresholds.

    Bounds of inner neurons come first, layer by layer: each that is proved is used for those after
    it, and for the goals. Where a little is missing, because alpha-CROWN's bounds of the boxes are
    others in another number type, the bound that was found is used.

    A tree is gone through from its root: alpha and beta of a domain begin with those of the domain
    that it is a half of, and are optimized until the bound is positive.

    Args:
        graph: a BoundedModule, of one process.
        problem: a goal for each tree.
        trees: of `tree.tree_of`.
        options: steps and step sizes.
        claims: of inner neurons.

    Returns:
        (goal or claim, leaf, margin) of each; those of goals only if all claims are proved.

    Raises:
        ValueError: a claim of a neuron of a first layer, where there is nothing to split.
    """
    roots = bound_roots(graph, problem)
    roots = replace(roots, lower=roots.lower.clone(), upper=roots.upper.clone())
    with passes(graph, roots.active_columns), full_precision(graph.device):
        wrong = failed_claims(graph, problem, roots, options, claims)
        if wrong:
            return wrong
        # of these alpha-CROWN, which optimizes inner bounds for them, says that they hold
        margins = roots.margins.amax(1).tolist()
        proved = {g for g, margin in enumerate(margins) if 0 < margin < math.inf}
        return [*_Replay(Bounder(graph, problem, roots, options), options).run(trees, proved)]


def failed_claims(
    graph: Any, problem: Problem, roots: Roots, options: SearchOptions,
    claims: Sequence[ClaimedBound], is_over: Callable[[], bool] = lambda: False,
) -> list[tuple[ClaimedBound, int, float]]:
    """Claims that do not hold, each with a leaf and what its bound lacks; call it inside `passes`.

    Args:
        graph, problem, options, claims: as for `unproved_leaves`, on every rank of the graph's
            group.
        roots: whose bounds are replaced by those that hold.
        is_over: whether time is, on this rank; claims then fail.

    Raises:
        ValueError: a claim of a neuron of a first layer, where there is nothing to split.
    """
    names = {start.relu.name for start in inner_starts(graph, roots)}
    for claim in claims:
        if roots.operators[int(roots.operator_of[claim.number])].name not in names:
            raise ValueError(f"neuron {claim.number} is in a first layer: its bounds rest on no "
                             "splits")
    for start in inner_starts(graph, roots):
        own = [c for c in claims if start.has(c.number)]
        if not own:
            continue
        keys = [(c.box, c.number, c.sign) for c in own]
        rows = start.rows(*torch.tensor(keys, device=roots.lower.device).t())
        bounds = torch.tensor([c.bound for c in own], dtype=torch.float64)
        goals = start.problem(problem, rows, bounds)
        bounder = Bounder(graph, goals, start.below, options, is_over, tightens=False)
        failed = _Replay(bounder, options).run([c.tree for c in own])
        known, found = start.known(rows).tolist(), [c.bound for c in own]
        for i, _, margin in failed:
            found[i] = min(found[i], own[i].bound + margin)
        allowed = [_SHORT * max(0.0, c.bound - k) for c, k in zip(own, known, strict=True)]
        wrong = [(own[i], leaf, margin) for i, leaf, margin in failed
                 if not (known[i] >= own[i].bound  # with NaN everything is wrong
                         or own[i].bound - found[i] <= allowed[i])]
        if wrong:
            return wrong
        start.set(rows, {i: bound for i, bound in enumerate(found) if known[i] < bound})
    return []


def check_points(tree: Node, roots: Roots) -> None:
    """Raises ValueError where a tree splits neurons at points that they are not split at."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if node.leaf is None:
            roots.check_point(node.neuron, node.point)
            waiting += [node.on, node.off]


class _Replay:
    def __init__(self, bounder: Bounder, options: SearchOptions) -> None:
        self.bounder, self.options = bounder, options
        self.failed: list[tuple[int, int, float]] = []

    def run(
        self, trees: Sequence[Node], proved: Container[int] = ()
    ) -> list[tuple[int, int, float]]:
        """Trees of goals; those in `proved` are."""
        bounder, goals = self.bounder, [g for g in range(len(trees)) if g not in proved]
        for tree in trees:
            check_points(tree, bounder.roots)
        if not goals:
            return []
        found = bounder.ascend(bounder.whole(goals), 0)
        if len(found.open):
            bounder.measure(found.seen, found.batch.goal)
        empty = [Domain(g, (), 0.0, torch.empty(0), torch.empty(0), ()) for g in goals]
        level = self._ascended(
            list(zip(empty, [trees[g] for g in goals], strict=True)), bounder.whole(goals),
            self.options.first_iterations,
        )
        while level:
            following = []
            for first in range(0, len(level), self.options.batch):
                some = level[first : first + self.options.batch]
                following += self._split(some)
            level = following
        return self.failed

    def _split(self, parents: list[tuple[Domain, Node]]) -> list[tuple[Domain, Node]]:
        """Both children of inner nodes; returns those that are inner nodes themselves."""
        bounder = self.bounder
        batch, A = bounder.batch([domain for domain, _ in parents]), None
        if batch.curves:
            batch = bounder.narrowed(batch)
            A = bounder.quickly(batch)[1].repeat(1, 2, 1)
        both = torch.arange(len(parents), device=batch.C.device).repeat(2)
        neurons = torch.tensor([node.neuron for _, node in parents], device=both.device).repeat(2)
        points = torch.tensor([node.point for _, node in parents], dtype=torch.float64)
        points = points.to(both.device).repeat(2)
        signs = torch.ones_like(both)
        signs[len(parents) :] = -1
        children = [
            (replace(d, splits=(*d.splits, (node.neuron, sign, node.point)), margin=0.0), half)
            for sign in (1, -1) for d, node in parents
            for half in ((node.on if sign == 1 else node.off),)
        ]
        batch = batch.at(both).split(bounder.roots, neurons, signs, points, bounder.units, A)
        return self._ascended(children, batch, self.options.iterations)

    def _ascended(self, nodes: list[tuple[Domain, Node]], batch: Any, iterations: int
                  ) -> list[tuple[Domain, Node]]:
        """Leaves are to be proved; of what is proved before its leaves are, these are, too."""
        found = self.bounder.ascend(batch, iterations)
        inner, late = [], []
        for i, at in enumerate(found.open.tolist()):
            domain, node = nodes[at]
            own = Domain(
                domain.goal, domain.splits, float(found.margins[at]),
                found.batch.alpha[:, i].clone(), found.batch.beta[:, i].clone(), (),
                found.batch.weights[:, i].clone(), *found.batch.to_keep(i),
            )
            (inner if node.leaf is None else late).append((own, node))
        if late:
            batch = self.bounder.batch([domain for domain, _ in late])
            found = self.bounder.ascend(batch, _MORE * iterations)
            margins, left = found.margins, found.open
            if not self.bounder.roots.only_relus:
                proved = self._split_further([domain for domain, _ in late], found)
                left = left[~proved]
            else:
                unstable = found.batch.lines.unstable.double().sum(1)
                linear = self.bounder.tp.reduce_from(unstable) == 0
                if bool(linear.any()):
                    solved = self.bounder.solve(found.batch.at(linear.nonzero().flatten()))
                    margins = margins.scatter(0, left[linear], solved.margins)
                    left = torch.cat([left[~linear], left[linear][solved.open]])
            self.failed += [
                (late[at][0].goal, late[at][1].leaf, float(margins[at])) for at in left.tolist()
            ]
        return inner

    def _split_further(self, leaves: list[Domain], found: Bounded) -> torch.Tensor:
        """Whether some splits more prove leaves that are open: [O] bool.

        Where intervals of other functions than ReLUs are cut, bounds end slightly lower or higher
        in another number type.
        """
        bounder, options = self.bounder, self.options
        proved = torch.ones(len(found.open), dtype=torch.bool, device=found.open.device)
        waiting, places = still_open(leaves, found), list(range(len(proved)))
        for level in range(_FURTHER + 1):
            numbers, points = branching.candidates(bounder, found, 1)
            for domain, *both in zip(waiting, numbers.tolist(), points.tolist(), strict=True):
                domain.candidates = tuple(zip(*both, strict=True))
            stuck = [d.candidates[0][0] < 0 or level == _FURTHER for d in waiting]
            proved[[p for p, ends in zip(places, stuck, strict=True) if ends]] = False
            left = [i for i, p in enumerate(places) if proved[p]]
            if not left:
                break
            places = [places[i] for i in left] * 2
            domains, found = halves(bounder, [waiting[i] for i in left], options.iterations)
            waiting = still_open(domains, found)
            places = [places[i] for i in found.open.tolist()]
            if not waiting:
                break
        return proved
