"""Branch and bound on what bounds and the attack have left open of a property (`--complete`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lirpa_megatron.bounded_module import BoundedModule
from lirpa_megatron.compat.auto_lirpa import BoundedTensor, PerturbationLpNorm
from lirpa_megatron.complete import strategy
from lirpa_megatron.complete.cut_tree import CutTree
from lirpa_megatron.complete.points import Walks
from lirpa_megatron.complete.problem import Claim, Leaf, Problem, Searched, SearchOptions
from lirpa_megatron.complete.state import SearchState
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel.model_ranks import ModelRanks
from lirpa_megatron.verify.properties.attack import Target
from lirpa_megatron.verify.properties.counterexamples import Counterexample, confirm
from lirpa_megatron.verify.properties.loading import Loaded
from lirpa_megatron.verify.properties.preimages import Preimages
from lirpa_megatron.verify.properties.property import Property, Region
from lirpa_megatron.verify.properties.specification import (
    RowsToBound,
    inward_box,
    region_rows,
    specification_matrix,
)

Progress = Callable[[str], None]
"""Told what goes on, in a few words."""

_CONFIRMED = 3
"""Points of a batch of domains that are tried on the stored network."""


@dataclass
class Decided:
    """What branch and bound made of a property.

    Attributes:
        result: unsat, sat, unknown or timeout.
        bounds: (position of the target, row) -> what is now known of `c . y - d`.
        domains: how many were bounded.
        open: how many were left.
        bound: smallest bound of an open disjunct; above 0 if all are proved.
        counterexample: if the result is sat.
        note: why it is unknown.
        leaves: (target, disjunct, leaf) of the trees, if they are kept; after `merge` the region's
            position in place of the target's.
        claims: bounds of inner neurons that they rest on; `box` as in `leaves`.
        inner_domains: how many domains were bounded for these.
        branching: what was split, "relu", "nonlinear" or "input".
        cuts: of boxes, if they are kept: `box` as in `leaves`, disjuncts in the place of goals.
        state: where the last search was, if something was left of it: trees by (region, disjunct),
            boxes as regions' positions.
    """

    result: str
    bounds: dict[tuple[int, int], float] = field(default_factory=dict)
    domains: int = 0
    open: int = 0
    bound: float | None = None
    counterexample: Counterexample | None = None
    note: str | None = None
    leaves: list[tuple[int, int, Leaf]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    inner_domains: int = 0
    branching: str | None = None
    cuts: list[CutTree] = field(default_factory=list)
    state: SearchState | None = None

    def merge(self, other: Decided, regions: Sequence[int]) -> None:
        """With what was found out about other targets, of regions at these positions."""
        self.domains += other.domains
        self.inner_domains += other.inner_domains
        self.open += other.open
        known = [b for b in (self.bound, other.bound) if b is not None]
        self.bound = min(known) if known else None
        self.counterexample = self.counterexample or other.counterexample
        if other.result != "unsat" and self.result != "sat":
            self.result = other.result
            self.note = other.note or self.note
        self.leaves += [(regions[k], d, leaf) for k, d, leaf in other.leaves]
        self.claims += [replace(claim, box=regions[claim.box]) for claim in other.claims]
        self.branching = self.branching or other.branching
        self.cuts += [replace(tree, box=regions[tree.box]) for tree in other.cuts]
        self.state = None if other.state is None else _moved(
            other.state, {(k, d): (regions[k], d) for k, d in other.state.trees},
            dict(enumerate(regions)),
        )


def _moved(
    state: SearchState, trees: Mapping[Any, Any], boxes: Mapping[int, int]
) -> SearchState:
    """With other names of goals and boxes; those without a name are left out."""
    return replace(
        state,
        trees={trees[name]: tree for name, tree in state.trees.items() if name in trees},
        cuts={boxes[box]: nodes for box, nodes in state.cuts.items() if box in boxes},
        inner=tuple(replace(c, box=boxes[c.box]) for c in state.inner if c.box in boxes),
    )


@dataclass(frozen=True)
class Goals:
    """The open disjuncts of some targets, as a problem of branch and bound."""

    problem: Problem
    # of each goal: its target, and the disjunct's position in the region's
    of: tuple[tuple[int, int], ...]
    # of each goal and row: the property's row, and what its margin is divided by
    rows: tuple[tuple[tuple[int, float], ...], ...]


def choice(
    loaded: Loaded, bounded: BoundedModule, targets: Sequence[Target], branching: str = "auto"
) -> str:
    """What branch and bound splits of a network in some regions (`strategy.chosen`).

    Raises:
        UserError: it cannot, by name.
    """
    low, high = (torch.cat(side) for side in
                 zip(*(loaded.box(region) for region, _ in targets), strict=True))
    return strategy.chosen(bounded, low, high, branching)


def why_not(
    loaded: Loaded, bounded: BoundedModule, targets: Sequence[Target], branching: str
) -> str | None:
    """Why branch and bound cannot split a network in some regions, in one line; None: it can."""
    try:
        choice(loaded, bounded, targets, branching)
    except UserError as error:
        return str(error)
    return None


def goals_of(
    loaded: Loaded, bounded: BoundedModule, prop: Property, targets: Sequence[Target]
) -> Goals:
    """The goals of targets whose rows `bounded` bounds: of each open disjunct, that one of its rows
    cannot happen at any point of the box.

    Where the dtype does not have a row's coefficients, the threshold is higher by what their
    rounding may change over the box (`RowsToBound`).
    """
    like, boxes, of, rows, C, ends = loaded.like, [], [], [], [], []
    for k, (region, disjuncts) in enumerate(targets):
        boxes.append(loaded.box(region))
        own = region_rows(region)
        to_bound = RowsToBound([prop.rows[row] for row in own], like.dtype)
        matrix = like.new_zeros(len(to_bound), prop.n_out)
        to_bound.fill(matrix)
        lower = None
        if len(to_bound) > len(own):
            lower = _crown(bounded, boxes[-1], matrix)
        thresholds, scales = to_bound.ends(lower), to_bound.scales
        place = {row: i for i, row in enumerate(own)}
        for d in disjuncts:
            chosen = [place[row] for row in region.disjuncts[d]]
            of.append((k, d))
            rows.append([(own[i], scales[i]) for i in chosen])
            C.append(matrix[chosen])
            ends.append([thresholds[i] for i in chosen])
    most = max(map(len, rows))
    padded = [list(range(len(r))) + [0] * (most - len(r)) for r in rows]
    low, high = (torch.cat(side) for side in zip(*boxes, strict=True))
    return Goals(
        Problem(
            low, high, tuple(k for k, _ in of),
            torch.stack([c[p] for c, p in zip(C, padded, strict=True)]),
            torch.tensor([[e[i] for i in p] for e, p in zip(ends, padded, strict=True)],
                         dtype=torch.float64, device=like.device),
        ),
        tuple(of), tuple(tuple(r[i] for i in p) for r, p in zip(rows, padded, strict=True)),
    )


def _crown(bounded: BoundedModule, box: tuple, C: torch.Tensor) -> np.ndarray:
    ends = PerturbationLpNorm(norm=float("inf"), x_L=box[0], x_U=box[1])
    x = BoundedTensor((box[0] + box[1]) / 2, ends)
    with torch.no_grad():
        bound, _ = bounded.compute_bounds(x=(x,), C=C[None], method="CROWN", bound_upper=False)
    return bound[0].double().cpu().numpy()


def decide(
    loaded: Loaded, bounded: BoundedModule, prop: Property, targets: Sequence[Target],
    options: SearchOptions, ranks: ModelRanks, progress: Progress | None = None,
    regions: Sequence[int] = (), start: SearchState | None = None,
) -> Decided:
    """Branch and bound on the open disjuncts of some regions; the same on every rank and replica.

    Args:
        loaded: the network.
        bounded: its bounded module for these regions' rows.
        prop: the property.
        targets: regions and their open disjuncts, which all have rows.
        options: of the search.
        ranks: that hold the network, and its replicas, which share the work.
        progress: told of what goes on.
        regions: with `start`, the targets' positions among the property's.
        start: what an earlier search has left, as in `Decided.state` after `merge`.

    Raises:
        StateError: `start` is not of this network or these boxes.
    """
    goals = goals_of(loaded, bounded, prop, targets)
    if start is not None:
        names = {(regions[k], d): goal for goal, (k, d) in enumerate(goals.of)}
        boxes = {region: k for k, region in enumerate(regions)}
        own = _moved(start, names, boxes)
        options = replace(options, start=own if own.trees or own.cuts else None)
    hunt = _Hunt(loaded, prop, targets, goals, ranks)

    def shown(bound: float, left: int, domains: int, seconds: float) -> None:
        progress(f"bound {bound:.4g}, {left} domains left of {domains}, {seconds:.0f} s")

    found = strategy.decide(
        bounded, goals.problem, options, hunt.confirm, progress and shown, ranks.replicas
    )
    decided = Decided(
        {"proved": "unsat", "refuted": "sat"}.get(found.status, found.status),
        domains=found.domains, open=found.open, bound=found.bound, note=found.why,
        counterexample=found.point,
        leaves=[(*goals.of[leaf.goal], leaf) for leaf in found.leaves],
        claims=found.claims, inner_domains=found.inner_domains, branching=found.branching,
        cuts=[_of_disjuncts(goals, tree) for tree in found.cuts],
        state=found.state and _moved(
            found.state, dict(enumerate(goals.of)), {k: k for k in range(len(targets))}
        ),
    )
    if decided.result == "unknown" and hunt.near is not None:
        decided = replace(decided, note=f"{decided.note}; {hunt.near}")
    _note_bounds(goals, found, decided)
    return decided


def _of_disjuncts(goals: Goals, tree: CutTree) -> CutTree:
    """With disjuncts in the place of goals."""
    return CutTree(tree.box, tuple(
        replace(node, proved=tuple(goals.of[goal][1] for goal in node.proved))
        for node in tree.nodes
    ))


def _note_bounds(goals: Goals, found: Searched, decided: Decided) -> None:
    """The margin of a disjunct of one row is that row's."""
    for (k, _), rows, margin in zip(goals.of, goals.rows, found.margins, strict=True):
        if len(set(rows)) == 1:
            row, scale = rows[0]
            decided.bounds[k, row] = margin / scale


class _Hunt:
    """Tries on the network itself where bounds of domains are attained."""

    def __init__(
        self, loaded: Loaded, prop: Property, targets: Sequence[Target], goals: Goals,
        ranks: ModelRanks,
    ) -> None:
        self.loaded, self.prop, self.ranks = loaded, prop, ranks
        self.targets, self.goals = targets, goals
        self.near: str | None = None
        self._boxes = [inward_box(r, loaded.like.dtype, loaded.like.device) for r, _ in targets]
        self._walks = Walks(loaded.forward, loaded.bounded.context.collectives)
        self._preimages: dict[int, Preimages] = {}
        self._random = torch.Generator().manual_seed(0)

    def confirm(self, goal: int, points: torch.Tensor) -> Counterexample | None:
        """As `exploring.Confirm`."""
        k, disjunct = self.goals.of[goal]
        low, high = self._boxes[k]
        rows = [self.prop.rows[i] for i in self.targets[k][0].disjuncts[disjunct]]
        C = specification_matrix(rows, self.prop.n_out, torch.float64, low.device)[0]
        ends = torch.tensor([float(r.bound) for r in rows], dtype=torch.float64).to(C)
        if self.loaded.normalisation is not None:  # bounds are of what comes out of it
            if k not in self._preimages:
                self._preimages[k] = Preimages(self.loaded, self.targets[k][0])
            found = self._preimages[k].of(points)
            if found is None:
                share = torch.rand(8, len(low), generator=self._random).round().to(low)
                found = low + share * (high - low)
            points = found
        near, margins = self._walks.closest(C, ends, low, high, points.to(low))
        for point, margin in list(zip(near, margins.tolist(), strict=True))[:_CONFIRMED]:
            if margin > 0:
                break
            holds, example = confirm(
                self.loaded, self.prop, self.targets[k][0], [disjunct], point, self.ranks
            )
            if holds:
                return example
            self.near = "a point violates the property by no more than rounding"
        return None


def one_module(
    loaded: Loaded, prop: Property, targets: Sequence[Target], most: int
) -> list[tuple[BoundedModule, list[int]]]:
    """Targets that are decided together: positions of at most `most` neighbours of one module."""
    groups: list[tuple[BoundedModule, list[int]]] = []
    for position, (region, _) in enumerate(targets):
        own = loaded.bounded_for([prop.rows[row] for row in region_rows(region)])
        if not groups or groups[-1][0] is not own or len(groups[-1][1]) == most:
            groups.append((own, []))
        groups[-1][1].append(position)
    return groups


def has_rows(region: Region, disjuncts: Sequence[int]) -> bool:
    """Whether the outputs are constrained in all of these disjuncts."""
    return all(region.disjuncts[d] for d in disjuncts)
