"""Regions of few inputs that are cut into pieces, which are bounded one by one (`--splits`).

A piece is a region of its own: part of the exact box, with the same disjuncts. Both halves of a cut
have the middle, a rational number, as an end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lirpa_megatron.complete.covering import Leaf, cover
from lirpa_megatron.complete.pieces import MOST_DIMENSIONS
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel.model_ranks import ModelRanks
from lirpa_megatron.verify.properties.attack import Target
from lirpa_megatron.verify.properties.counterexamples import Counterexample, confirm
from lirpa_megatron.verify.properties.loading import Loaded
from lirpa_megatron.verify.properties.property import Interval, Property, Region
from lirpa_megatron.verify.properties.specification import (
    is_impossible,
    region_rows,
    specification_matrix,
)

Bounds = dict[int, float]
"""Row index -> lower bound of `c . y - d` over a region's box."""


@dataclass(frozen=True)
class Part:
    """A piece of a target's box."""

    # position among the targets
    sample: int
    region: Region
    # of the target's box
    share: float = 1.0


@dataclass
class Pieces:
    """What was found of the targets."""

    # of each target: its rows' bounds over all pieces, the share of its box that is proved
    bounds: list[Bounds]
    shares: list[float]
    # pieces of all targets
    count: int
    is_over: bool = False
    counterexample: Counterexample | None = None


def check_dimensions(prop: Property) -> None:
    """Raises UserError for boxes in which more inputs move than splits are made for."""
    most = max((len(_moving(region)) for region in prop.regions), default=0)
    if most > MOST_DIMENSIONS:
        raise UserError(
            f"--splits is for boxes in which at most {MOST_DIMENSIONS} inputs move, in property "
            f"{prop.name} {most} do: leave it out"
        )


def bound_pieces(
    loaded: Loaded, prop: Property, targets: Sequence[Target], known: Sequence[Bounds],
    bound: Callable[[list[Region]], list[Bounds]], splits: int, at_once: int,
    is_over: Callable[[], bool], ranks: ModelRanks,
) -> Pieces:
    """Cuts the targets' boxes until all is proved, or one has a counterexample.

    Args:
        loaded: the network.
        prop: the property.
        targets: regions that are open.
        known: of each the bounds over its whole box.
        bound: bounds of regions.
        splits: most cuts of each target's box.
        at_once: regions that `bound` is given, about.
        is_over: whether the time is over, on all ranks alike.
        ranks: that hold the network.
    """
    found = Pieces([], [], 0)

    def bounded(halves: list[tuple[Part, Leaf[Part]]]) -> list[Leaf[Part]]:
        new = bound([part.region for part, _ in halves])
        leaves = []
        for (part, parent), values in zip(halves, new, strict=True):
            tighter = {row: _better(value, parent.bounds[row]) for row, value in values.items()}
            leaves.append(Leaf(part, _margin(part.region, tighter), tighter))
        return leaves

    def cut(leaves: list[Leaf[Part]]) -> list[tuple[Part, Part] | None]:
        halves: list[tuple[Part, Part] | None] = []
        for leaf in leaves:
            part, moving = leaf.piece, _moving(leaf.piece.region)
            if not moving or found.counterexample is not None:
                halves.append(None)
                continue
            points = _faces(part.region, moving).to(loaded.like)
            margins = _values(loaded, prop, part.region, points, ranks)
            worst = int(np.argmin(margins))
            if margins[worst] <= 0:
                open_ones = range(len(part.region.disjuncts))
                holds, point = confirm(
                    loaded, prop, targets[part.sample][0], open_ones, points[worst], ranks
                )
                if holds:
                    found.counterexample = point
                    halves.append(None)
                    continue
            halves.append(_halves(part, moving[_widest(margins)]))
        return halves

    roots = [
        Leaf(Part(k, region), _margin(region, own), own)
        for k, ((region, _), own) in enumerate(zip(targets, known, strict=True))
    ]
    cut_up = cover(
        roots, bounded, cut, splits, at_once,
        lambda: found.counterexample is not None or is_over(),
    )
    for k in range(len(targets)):
        leaves = cut_up.of(k)
        found.bounds.append({
            row: min(leaf.bounds[row] for leaf in leaves) for row in leaves[0].bounds
        })
        found.shares.append(cut_up.share(k))
    found.count = len(cut_up.leaves)
    found.is_over = cut_up.is_over and found.counterexample is None
    return found


def _moving(region: Region) -> list[int]:
    return [i for i, interval in enumerate(region.box) if interval.lower < interval.upper]


def _better(value: float, known: float) -> float:
    """The larger bound; one that is not finite says nothing."""
    if not math.isfinite(value):
        return known
    return max(value, known) if math.isfinite(known) else value


def _margin(region: Region, bounds: Bounds) -> float:
    """Above 0 if every disjunct has a row that cannot happen (`open_disjuncts`)."""
    margins = [
        max((bounds[row] if is_impossible(bounds[row]) or bounds[row] <= 0 else -math.inf
             for row in disjunct), default=-math.inf)
        for disjunct in region.disjuncts
    ]
    return min(margins, default=math.inf)


def _faces(region: Region, moving: Sequence[int]) -> torch.Tensor:
    """The middle of the box and of its faces, [1 + 2 d, n_in] float64."""
    low, high = map(torch.from_numpy, (region.lower, region.upper))
    points = (low / 2 + high / 2).repeat(1 + 2 * len(moving), 1)
    for k, i in enumerate(moving):
        points[1 + 2 * k, i], points[2 + 2 * k, i] = low[i], high[i]
    return points


def _values(
    loaded: Loaded, prop: Property, region: Region, points: torch.Tensor, ranks: ModelRanks
) -> np.ndarray:
    """Of each point how far the region's disjuncts are from being satisfied (rank 0's numbers)."""
    own = region_rows(region)
    rows = [prop.rows[row] for row in own]
    with torch.no_grad():
        y = loaded.forward(points).double()
    C = specification_matrix(rows, prop.n_out, torch.float64, y.device)[0]
    ends = torch.tensor([float(row.bound) for row in rows], dtype=torch.float64).to(y)
    slacks = ranks.broadcast_tensor(y @ C.t() - ends, "values at points").cpu().numpy()
    place = {row: i for i, row in enumerate(own)}
    each = [slacks[:, [place[row] for row in d]].max(1) for d in region.disjuncts if d]
    if len(each) < len(region.disjuncts):
        return np.full(len(points), -math.inf)
    return np.nan_to_num(np.stack(each).min(0), nan=math.inf)


def _widest(margins: np.ndarray) -> int:
    """The dimension along which the margin moves most, in a line or bent."""
    middle, low, high = margins[0], margins[1::2], margins[2::2]
    with np.errstate(invalid="ignore"):
        moved = np.abs(high - low) + np.abs(high + low - 2 * middle)
    return int(np.nan_to_num(moved, nan=math.inf).argmax())


def _halves(part: Part, i: int) -> tuple[Part, Part]:
    interval = part.region.box[i]
    middle = (interval.lower + interval.upper) / 2

    def half(new: Interval) -> Part:
        box = (*part.region.box[:i], new, *part.region.box[i + 1 :])
        return Part(part.sample, replace(part.region, box=box), part.share / 2)

    return (half(Interval(interval.lower, middle, interval.lower_open, False)),
            half(Interval(middle, interval.upper, False, interval.upper_open)))
