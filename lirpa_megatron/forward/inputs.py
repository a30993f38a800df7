"""Perturbation sets as symbols: x = centre + sum_i direction_i s_i."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.errors import UserError
from lirpa_megatron.forward.domains import Group
from lirpa_megatron.problem.perturbations import (
    PerturbationHull,
    PerturbationPositions,
    PerturbationSegments,
)


@dataclass(frozen=True)
class Symbols:
    """Of one perturbed input."""

    centre: torch.Tensor
    """[B, *shape]."""
    groups: list[Group]
    """With N symbols in all."""
    directions: Callable[[int, int], torch.Tensor]
    """(first, number) -> the directions of some symbols, [number, B, *shape]."""

    @property
    def count(self) -> int:
        """N."""
        return sum(group.symbols for group in self.groups)


def of_leaf(leaf: auto_lirpa.Bound, enter: Callable[[torch.Tensor], torch.Tensor]) -> Symbols:
    """The symbols of a perturbed input. Coordinates that no sample moves have none.

    - a box: one symbol for each coordinate;
    - L1 and L2 balls: one for each coordinate, in one group or one for each position;
    - hulls: at each position with K vertices K - 1 barycentric symbols; the centre is their mean;
    - directions: one for each, in [-1, 1];
    - any other set in a box: the box.

    Args:
        leaf: the input.
        enter: what the numbers pass that directions are made of.
    """
    ptb, x = leaf.perturbation, leaf.center
    if isinstance(ptb, PerturbationSegments):
        directions = enter(ptb.directions.to(x)).movedim(1, 0)
        return Symbols(ptb.centre.to(x), [Group("box", 1, len(directions))], _some_of(directions))
    if isinstance(ptb, PerturbationHull):
        return _hull(x, ptb.vertices.to(x), enter)
    if isinstance(ptb, PerturbationPositions):
        radii = ptb.radii.to(x).unsqueeze(-1).expand_as(x)
        count, directions = _each_coordinate(enter(radii))
        size = count if ptb.joint else x.shape[-1]
        kind = "l2" if ptb.dual == 2 else "l1"
        return Symbols(x, [Group(kind, size, count // size)] if count else [], directions)
    if auto_lirpa.is_ball(ptb):
        radii = torch.as_tensor(ptb.eps).to(x).expand_as(x)
        count, directions = _each_coordinate(enter(radii))
        return Symbols(x, [Group("l2" if ptb.norm == 2 else "l1", count)], directions)
    lower, upper = leaf.lower, leaf.upper
    count, directions = _each_coordinate(enter((upper - lower) / 2))
    # Rounding of the middle: the box of all symbols still holds both ends.
    return Symbols(lower + (upper - lower) / 2, [Group("box", 1, count)], directions)


def _each_coordinate(radii: torch.Tensor) -> tuple[int, Callable[[int, int], torch.Tensor]]:
    """One direction for each coordinate with a radius in some sample: (N, directions)."""
    flat = radii.flatten(1)
    moved = (flat != 0).any(0).nonzero().flatten()

    def directions(first: int, number: int) -> torch.Tensor:
        places = moved[first : first + number]
        rows = flat.new_zeros(number, *flat.shape)
        at = torch.arange(number, device=flat.device)
        rows = rows.index_put((at[:, None], torch.arange(len(flat), device=flat.device)[None],
                               places[:, None]), flat[:, places].t())
        return rows.unflatten(2, radii.shape[1:])

    return len(moved), directions


def _some_of(directions: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda first, number: directions[first : first + number]


def _hull(
    x: torch.Tensor, vertices: torch.Tensor, enter: Callable[[torch.Tensor], torch.Tensor]
) -> Symbols:
    """At each position v = mean + sum_k (v_k - v_0) s_k over the simplex around 0."""
    apart = enter(vertices - vertices[:, :, :1])  # [B, S, K, h]
    moved = (apart != 0).any(-1).any(0)  # [S, K]
    places = moved.any(-1).nonzero().flatten().tolist()
    K = vertices.shape[2]
    if not places:
        return Symbols(vertices[:, :, 0], [], _some_of(x.new_zeros(0, *x.shape)))
    directions = x.new_zeros(len(places), K - 1, *x.shape)
    centre = vertices[:, :, 0].clone()
    for n, place in enumerate(places):
        directions[n, :, :, place] = apart[:, place, 1:].movedim(1, 0)
        centre[:, place] = vertices[:, place].mean(1)
    groups = [Group("simplex", K - 1, len(places))]
    return Symbols(centre, groups, _some_of(directions.flatten(0, 1)))


def most_symbols(order: int) -> int | None:
    """Symbols that polynomials of a degree are made for; None: as many as there are."""
    return {1: None, 2: 16, 3: 8}.get(order, 1)


def of_leaves(
    leaves: Sequence[Any], order: int, enter: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, Symbols]:
    """The symbols of all perturbed inputs, by their names, in their order.

    Raises:
        UserError: more symbols than polynomials of this degree are made for.
    """
    found = {leaf.name: of_leaf(leaf, enter) for leaf in leaves}
    count = sum(symbols.count for symbols in found.values())
    most = most_symbols(order)
    if most is not None and count > most:
        raise UserError(
            f"order={order} is for sets of at most {most} dimension{'s' if most > 1 else ''}, this "
            f"one has {count}: choose order=1"
        )
    return found
