"""One instance: bounds first, then an attack on what they leave open."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lirpa_megatron.bounded_module import BoundedModule
from lirpa_megatron.compat.auto_lirpa import BoundedTensor, PerturbationLpNorm
from lirpa_megatron.complete.state import SearchState
from lirpa_megatron.parallel.model_ranks import ALONE, ModelRanks
from lirpa_megatron.verify.properties import complete, splits
from lirpa_megatron.verify.properties.attack import AttackOptions, Target, find_candidates
from lirpa_megatron.verify.properties.counterexamples import Counterexample, confirm
from lirpa_megatron.verify.properties.loading import Loaded
from lirpa_megatron.verify.properties.options import VerifyOptions
from lirpa_megatron.verify.properties.property import Property, Region
from lirpa_megatron.verify.properties.specification import (
    RowsToBound,
    open_disjuncts,
    region_rows,
    reported_bounds,
)

# Boxes bounded at once, and numbers that a square of the network's widest layer may have for each.
_MOST_BOXES, _BOX_ELEMENTS = 256, 2**23
# Walks of the attack at once, and how many of the closest points are tried on the stored network.
_MOST_WALKS, _CONFIRMED = 4096, 8
# Disjuncts that a point is checked against; beyond it the one that the attack had in mind.
_MOST_DISJUNCTS = 200


@dataclass(frozen=True)
class Outcome:
    """What was found out."""

    # unsat, sat, unknown or timeout
    result: str
    # for each row in file order
    lower_bounds: list[float | None]
    # a violating input, if result is "sat"
    counterexample: Counterexample | None = None
    # what a reader must know of the result, one line
    note: str | None = None
    # what branch and bound did, with --complete and where it was needed
    decided: complete.Decided | None = None
    # with splits: the share of the boxes' volume that is proved, and how many pieces there are
    proved_share: float | None = None
    pieces: int | None = None


class Deadline:
    """A time limit that all ranks agree on: rank 0's clock decides.

    Args:
        seconds: None: there is no limit.
        ranks: that agree.
        stop: asked beside the clock whether time is over; None: nothing is.
    """

    def __init__(
        self, seconds: float | None, ranks: ModelRanks = ALONE,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._ranks, self.stop = ranks, stop

    def is_over(self) -> bool:
        """Collective, unless there is no limit."""
        if self._end is None and self.stop is None:
            return False
        over = self._end is not None and time.monotonic() > self._end
        over = over or (self.stop is not None and self.stop())
        return self._ranks.broadcast_object(over, "the deadline")

    def left(self) -> float | None:
        """Seconds, by this rank's clock; None: there is no limit."""
        return None if self._end is None else self._end - time.monotonic()


def verify_instance(
    loaded: Loaded,
    prop: Property,
    options: VerifyOptions,
    deadline: Deadline,
    ranks: ModelRanks = ALONE,
    progress: complete.Progress | None = None,
    start: SearchState | None = None,
) -> Outcome:
    """Decides a property as far as bounds and attack can, and with `options.complete` branch and
    bound after them; the same outcome on every rank. Of several replicas one does what comes before
    branch and bound, which all share.

    Args:
        loaded: the network.
        prop: the property; its sizes are the network's.
        options: method and effort.
        deadline: looked at between stages; a stage that has begun is finished.
        ranks: that hold the network, and its replicas.
        progress: told of what branch and bound does.
        start: what an earlier branch and bound has left, as `complete.Decided.state`.
    """
    if prop.vacuous is not None:
        return Outcome("unsat", reported_bounds(prop, []), note=prop.vacuous)
    found = ranks.replicas.first(
        "bounds and attack", lambda: _begin(loaded, prop, options, deadline, ranks)
    )
    if found.ended or not options.complete:
        return found.outcome
    still_open = [(prop.regions[place], disjuncts) for place, disjuncts in found.left]
    outcome = _complete(
        loaded, prop, still_open, [place for place, _ in found.left], found.bounds, options,
        deadline, ranks, found.outcome.note, progress, start,
    )
    cut = found.outcome
    return replace(outcome, proved_share=cut.proved_share, pieces=cut.pieces)


@dataclass(frozen=True)
class _Begun:
    """What bounds and the attack have found out."""

    outcome: Outcome
    # whether nothing is left to be decided, or no time
    ended: bool = True
    # of each region: row -> bound
    bounds: list[dict[int, float]] = field(default_factory=list)
    # positions of regions, and their disjuncts that are open
    left: list[tuple[int, Sequence[int]]] = field(default_factory=list)


def _begin(
    loaded: Loaded, prop: Property, options: VerifyOptions, deadline: Deadline, ranks: ModelRanks
) -> _Begun:
    """Bounds, an attack on what they leave open, and bounds of pieces if they are asked for."""
    bounds: list[dict[int, float]] = []
    still_open: list[Target] = []
    places: list[int] = []
    for bounded, regions in _batches(loaded, prop):
        if deadline.is_over():
            return _Begun(Outcome("timeout", reported_bounds(prop, bounds)))
        for region, found in zip(
            regions, _bound_rows(loaded, bounded, prop, regions, options, ranks), strict=True
        ):
            bounds.append(found)
            disjuncts = open_disjuncts(region, found)
            if disjuncts:
                places.append(len(bounds) - 1)
                still_open.append((region, disjuncts))
    reported = reported_bounds(prop, bounds)
    if not still_open:
        whole = {"proved_share": 1.0, "pieces": len(bounds)} if options.splits else {}
        return _Begun(Outcome("unsat", reported, **whole))
    near = None
    moving = max(int((region.lower < region.upper).sum()) for region, _ in still_open)
    for attack in options.attacks(moving, len(still_open), loaded.description.weights):
        each = max(1, _MOST_WALKS // attack.restarts)
        for begin in range(0, len(still_open), each):
            if deadline.is_over():
                return _Begun(Outcome("timeout", reported, note=near))
            holds, found = _attack(loaded, prop, still_open[begin : begin + each], attack, ranks)
            if holds:
                return _Begun(Outcome("sat", reported, found))
            near = near or _near_miss(found)
    pieces: dict[str, Any] = {}
    if options.splits:
        cut = _by_splits(loaded, prop, still_open, places, bounds, options, deadline, ranks)
        closed = len(bounds) - len(places)
        pieces = {"proved_share": (closed + sum(cut.shares)) / len(bounds),
                  "pieces": cut.count + closed}
        reported = reported_bounds(prop, bounds)
        parts = [k for k, share in enumerate(cut.shares) if share < 1]
        still_open, places = ([every[k] for k in parts] for every in (still_open, places))
        if cut.counterexample is not None:
            return _Begun(Outcome("sat", reported, cut.counterexample, **pieces))
        if cut.is_over or not parts:
            ended = ("timeout", near) if cut.is_over else ("unsat", None)
            return _Begun(Outcome(ended[0], reported, note=ended[1], **pieces))
    left = [(place, disjuncts) for place, (_, disjuncts) in zip(places, still_open, strict=True)]
    return _Begun(Outcome("unknown", reported, note=near, **pieces), False, bounds, left)


def _by_splits(
    loaded: Loaded, prop: Property, targets: list[Target], places: list[int],
    bounds: list[dict[int, float]], options: VerifyOptions, deadline: Deadline, ranks: ModelRanks,
) -> splits.Pieces:
    """Bounds of the targets' pieces; what they say of a whole region is noted in `bounds`."""

    def bound(regions: list[Region]) -> list[dict[int, float]]:
        part = replace(prop, regions=tuple(regions))
        return [
            found for bounded, some in _batches(loaded, part)
            for found in _bound_rows(loaded, bounded, prop, some, options, ranks)
        ]

    found = splits.bound_pieces(
        loaded, prop, targets, [bounds[place] for place in places], bound, options.splits,
        most_boxes(loaded), deadline.is_over, ranks,
    )
    for place, tighter in zip(places, found.bounds, strict=True):
        bounds[place] = tighter
    return found


def _complete(
    loaded: Loaded, prop: Property, targets: list[Target], places: list[int],
    bounds: list[dict[int, float]], options: VerifyOptions, deadline: Deadline, ranks: ModelRanks,
    near: str | None, progress: complete.Progress | None, start: SearchState | None,
) -> Outcome:
    """Branch and bound on open targets; `places` are those of their regions in `bounds`."""
    total = complete.Decided("unsat", note=near)
    for bounded, positions in complete.one_module(loaded, prop, targets, most_boxes(loaded)):
        if ranks.replicas.first("the deadline", deadline.is_over):
            total.result = "timeout"
            break
        some = [targets[i] for i in positions]
        why = complete.why_not(loaded, bounded, some, options.branching)
        if why is None and not all(complete.has_rows(*target) for target in some):
            why = "branch and bound needs constraints on the outputs"
        if why is not None:
            return Outcome("unknown", reported_bounds(prop, bounds), note=why)
        effort = options.search(deadline.left())
        if deadline.stop is not None:
            effort = replace(effort, stop=deadline.stop)
        regions = [places[i] for i in positions]
        found = complete.decide(
            loaded, bounded, prop, some, effort, ranks, progress, regions, start
        )
        for (k, row), margin in found.bounds.items():
            known = bounds[places[positions[k]]]
            known[row] = max(known[row], margin)
        total.merge(found, regions)
        if total.result in ("sat", "timeout"):
            break
    return Outcome(
        total.result, reported_bounds(prop, bounds), total.counterexample,
        total.note if total.result in ("unknown", "timeout") else None, total,
    )


def _batches(
    loaded: Loaded, prop: Property
) -> Iterator[tuple[BoundedModule, list[Region]]]:
    """Regions bounded together: neighbours in the file, of the same module."""
    most = most_boxes(loaded)
    batch: list[Region] = []
    bounded = None
    for region in prop.regions:
        own = loaded.bounded_for([prop.rows[row] for row in region_rows(region)])
        if batch and (own is not bounded or len(batch) == most):
            yield bounded, batch
            batch = []
        bounded = own
        batch.append(region)
    if batch:
        yield bounded, batch


def most_boxes(loaded: Loaded) -> int:
    widest = max(layer.n_out for layer in loaded.description.layers)
    return max(1, min(_MOST_BOXES, _BOX_ELEMENTS // widest**2))


def _bound_rows(
    loaded: Loaded,
    bounded: BoundedModule,
    prop: Property,
    regions: Sequence[Region],
    options: VerifyOptions,
    ranks: ModelRanks,
) -> list[dict[int, float]]:
    """Of each region: row index -> lower bound of `c . y - d` over its box (rank 0's numbers)."""
    indices = [region_rows(region) for region in regions]
    like = loaded.like
    wanted = [RowsToBound([prop.rows[row] for row in own], like.dtype) for own in indices]
    most = max(map(len, wanted))
    if most == 0:
        return [{} for _ in regions]
    C = torch.zeros(len(regions), most, prop.n_out, dtype=like.dtype)
    thresholds = torch.full((len(regions), most), -1e300, dtype=torch.float64)
    for k, rows in enumerate(wanted):
        rows.fill(C[k])
        thresholds[k, : len(rows)] = torch.tensor(rows.thresholds(), dtype=torch.float64)
    lower, upper = (torch.cat(ends) for ends in zip(*map(loaded.box, regions), strict=True))
    box = PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper)
    x = BoundedTensor((lower + upper) / 2, box)
    # Only alpha needs gradients; recording them otherwise costs memory.
    optimized = options.method == "CROWN-Optimized"
    enough = {}
    if options.method == "auto" or optimized:
        enough["decision_thresh"] = thresholds.to(like.device)
    with contextlib.nullcontext() if optimized else torch.no_grad():
        bound, _ = bounded.compute_bounds(
            x=(x,), C=C.to(like.device), method=options.method, bound_upper=False, **enough
        )
    bound = ranks.broadcast_tensor(bound.double(), "the bounds").cpu().numpy()
    return [
        dict(zip(own, rows.values(bound[k], options.outward), strict=True))
        for k, (own, rows) in enumerate(zip(indices, wanted, strict=True))
    ]


def _attack(
    loaded: Loaded, prop: Property, targets: Sequence[Target], options: AttackOptions,
    ranks: ModelRanks,
) -> tuple[bool, Counterexample | None]:
    """Whether a counterexample was found, and the point that is one or comes closest to one."""
    for region, disjuncts in targets:
        free = [d for d in disjuncts if not region.disjuncts[d]]
        if free:  # the outputs are not constrained: every point of the box will do
            middle = torch.from_numpy((region.lower + region.upper) / 2).to(loaded.like)
            return confirm(loaded, prop, region, free, middle, ranks)
    closest = None
    found = find_candidates(
        loaded.forward, prop, targets, options, ranks, loaded.like
    )
    # The network as stored may round otherwise than the one that was attacked.
    eps = torch.finfo(getattr(torch, loaded.stored_dtype)).eps
    close = 16 * eps * max(1.0, *(abs(float(row.bound)) for row in prop.rows))
    for candidate in found[:_CONFIRMED]:
        if candidate.slack > close:
            break
        region, disjuncts = targets[candidate.target]
        if len(disjuncts) > _MOST_DISJUNCTS:
            disjuncts = [candidate.disjunct]
        holds, point = confirm(loaded, prop, region, disjuncts, candidate.point, ranks)
        if holds:
            return True, point
        if candidate.slack <= 0 and closest is None:
            closest = point
    return False, closest


def _near_miss(found: Counterexample | None) -> str | None:
    """Why a point that the attack took for a counterexample is none."""
    if found is None:
        return None
    if found.outside > 0:
        return f"a point {found.outside:.3g} outside of the box violates the property"
    stored, double = found.violation, found.float64_violation
    if stored is None or double is None:
        return "the network's outputs at the closest point are not finite"
    return (
        f"at the closest point the network as stored violates the property by {stored:.3g}, its "
        f"weights in float64 by {double:.3g} (below 0: it does not): not beyond rounding"
    )
