"""From a property's rows to a specification matrix, and from bounds back to a verdict.

For the row `c . y <= d` the verifier bounds `c . y - d` from below over a region's box: a positive
lower bound proves that the row cannot happen there. A disjunct is refuted if one of its rows
cannot happen, and the property holds if every disjunct of every region is refuted.

The bound of `c . y` is computed in the run's dtype with ordinary rounding (as auto_LiRPA does): in
float32 a bound within about 1e-6 of the outputs' magnitude of zero is not beyond doubt. What is
rounded here is rounded safely: boxes outwards, and `- d` in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from lirpa_megatron.verify.property import OutputRow, Property, Region


def region_rows(region: Region) -> list[int]:
    """Indices of the rows that the region's disjuncts mention, in file order."""
    return sorted({row for disjunct in region.disjuncts for row in disjunct})


def specification_matrix(
    rows: Sequence[OutputRow], n_out: int, dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """C [1, S, n_out], one line for each row's coefficients; replicated on every rank."""
    matrix = torch.zeros(1, len(rows), n_out, dtype=dtype)
    for i, row in enumerate(rows):
        for j, coefficient in row.coefficients.items():
            matrix[0, i, j] = coefficient
    return matrix.to(device)


def outward_box(
    region: Region, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_L and x_U [1, n_in] in `dtype`, rounded so that they contain the region's box."""
    exact_lower, exact_upper = torch.from_numpy(region.lower), torch.from_numpy(region.upper)
    lower, upper = exact_lower.to(dtype), exact_upper.to(dtype)
    infinity = torch.tensor(math.inf, dtype=dtype)
    lower = torch.where(lower.double() > exact_lower, torch.nextafter(lower, -infinity), lower)
    upper = torch.where(upper.double() < exact_upper, torch.nextafter(upper, infinity), upper)
    return lower[None].to(device), upper[None].to(device)


def minus_right_hand_sides(lower: torch.Tensor, rows: Sequence[OutputRow]) -> np.ndarray:
    """Lower bounds of `c . y - d` [S] float64, from those of `c . y` (lower [1, S])."""
    return lower.detach().double().cpu().numpy()[0] - np.array([row.bound for row in rows])


def is_impossible(lower_bound: float) -> bool:
    """Whether a row with this lower bound cannot happen; NaN and infinities prove nothing."""
    return 0.0 < lower_bound < math.inf


def open_disjuncts(region: Region, lower_bounds: dict[int, float]) -> list[int]:
    """The region's disjuncts that are not refuted.

    Args:
        region: with disjuncts of row indices.
        lower_bounds: row index -> lower bound of `c . y - d` over the region's box.

    Returns:
        positions in `region.disjuncts`.
    """
    return [
        position
        for position, disjunct in enumerate(region.disjuncts)
        if not any(is_impossible(lower_bounds[row]) for row in disjunct)
    ]


def reported_bounds(
    prop: Property, lower_bounds: Sequence[dict[int, float]]
) -> list[float | None]:
    """One number for each row in file order: the smallest over the regions that mention it.

    Args:
        prop: the property.
        lower_bounds: for each region bounded so far, row index -> lower bound.

    Returns:
        None where no finite bound is known (JSON has no NaN).
    """
    reported: list[float | None] = []
    for row in range(len(prop.rows)):
        values = [float(bounds[row]) for bounds in lower_bounds if row in bounds]
        finite = bool(values) and all(math.isfinite(value) for value in values)
        reported.append(min(values) if finite else None)
    return reported
