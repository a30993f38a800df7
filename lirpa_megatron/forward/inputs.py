"""Perturbation sets as symbols: x = centre + sum_i direction_i s_i."""

from __future__ import annotations

from collections.abc import Sequence
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

Symbols = tuple[torch.Tensor, torch.Tensor, list[Group]]
"""(centre [B, *shape], directions [N, B, *shape], groups with N symbols in all)."""


def of_leaf(leaf: auto_lirpa.Bound) -> Symbols:
    """The symbols of a perturbed input. Coordinates that no sample moves have none.

    - a box: one symbol for each coordinate;
    - L1 and L2 balls: one for each coordinate, in one group or one for each position;
    - hulls: at each position with K vertices K - 1 barycentric symbols; the centre is their mean;
    - directions: one for each, in [-1, 1];
    - any other set in a box: the box.
    """
    ptb, x = leaf.perturbation, leaf.center
    if isinstance(ptb, PerturbationSegments):
        directions = ptb.directions.to(x).movedim(1, 0)
        return ptb.centre.to(x), directions, [Group("box", 1, len(directions))]
    if isinstance(ptb, PerturbationHull):
        return _hull(x, ptb.vertices.to(x))
    if isinstance(ptb, PerturbationPositions):
        return _positions(x, ptb)
    if auto_lirpa.is_ball(ptb):
        radii = torch.as_tensor(ptb.eps).to(x).expand_as(x)
        directions = _each_coordinate(radii)
        return x, directions, [Group("l2" if ptb.norm == 2 else "l1", len(directions))]
    lower, upper = leaf.lower, leaf.upper
    directions = _each_coordinate((upper - lower) / 2)
    # Rounding of the middle: the box of all symbols still holds both ends.
    centre = lower + (upper - lower) / 2
    return centre, directions, [Group("box", 1, len(directions))]


def _each_coordinate(radii: torch.Tensor) -> torch.Tensor:
    """One direction for each coordinate with a radius in some sample: [N, B, *shape]."""
    flat = radii.flatten(1)
    moved = (flat != 0).any(0).nonzero().flatten()
    places = torch.nn.functional.one_hot(moved, flat.shape[1]).to(flat)  # [N, numel]
    return (places.unsqueeze(1) * flat).unflatten(2, radii.shape[1:])


def _hull(x: torch.Tensor, vertices: torch.Tensor) -> Symbols:
    """At each position v = mean + sum_k (v_k - v_0) s_k over the simplex around 0."""
    apart = vertices - vertices[:, :, :1]  # [B, S, K, h]
    moved = (apart != 0).any(-1).any(0)  # [S, K]
    places = moved.any(-1).nonzero().flatten().tolist()
    K = vertices.shape[2]
    if not places:
        return vertices[:, :, 0], x.new_zeros(0, *x.shape), []
    directions = x.new_zeros(len(places), K - 1, *x.shape)
    centre = vertices[:, :, 0].clone()
    for n, place in enumerate(places):
        directions[n, :, :, place] = apart[:, place, 1:].movedim(1, 0)
        centre[:, place] = vertices[:, place].mean(1)
    return centre, directions.flatten(0, 1), [Group("simplex", K - 1, len(places))]


def _positions(x: torch.Tensor, ptb: PerturbationPositions) -> Symbols:
    radii = ptb.radii.to(x).unsqueeze(-1).expand_as(x)
    directions = _each_coordinate(radii)
    kind = "l2" if ptb.dual == 2 else "l1"
    size = len(directions) if ptb.joint else x.shape[-1]
    return x, directions, [Group(kind, size, len(directions) // size)] if len(directions) else []


def most_symbols(order: int) -> int | None:
    """Symbols that polynomials of a degree are made for; None: as many as there are."""
    return {1: None, 2: 16, 3: 8}.get(order, 1)


def of_leaves(leaves: Sequence[Any], order: int) -> tuple[dict[str, Symbols], list[Group]]:
    """The symbols of all perturbed inputs: leaf name -> its own, and all groups in their order.

    Raises:
        UserError: more symbols than polynomials of this degree are made for.
    """
    found = {leaf.name: of_leaf(leaf) for leaf in leaves}
    groups = [group for symbols in found.values() for group in symbols[2]]
    count = sum(group.symbols for group in groups)
    most = most_symbols(order)
    if most is not None and count > most:
        raise UserError(
            f"order={order} is for sets of at most {most} dimension{'s' if most > 1 else ''}, this "
            f"one has {count}: choose order=1"
        )
    return found, groups
