"""One instance: bounds first, then an attack on what they leave open."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lirpa_megatron.host import BoundedTensor, PerturbationLpNorm
from lirpa_megatron.parallel import spmd
from lirpa_megatron.verify.attack import find_counterexample
from lirpa_megatron.verify.models import Loaded
from lirpa_megatron.verify.options import VerifyOptions
from lirpa_megatron.verify.property import Property, Region
from lirpa_megatron.verify.specification import (
    minus_right_hand_sides,
    open_disjuncts,
    region_rows,
    reported_bounds,
    specification_matrix,
)


@dataclass(frozen=True)
class Outcome:
    """What was found out."""

    # unsat, sat, unknown or timeout
    result: str
    # for each row in file order
    lower_bounds: list[float | None]
    # a violating input [n_in], if result is "sat"
    counterexample: list[float] | None = None


class Deadline:
    """A time limit that all ranks agree on: rank 0's clock decides."""

    def __init__(self, seconds: float | None, group: dist.ProcessGroup | None):
        self._end = None if seconds is None else time.monotonic() + seconds
        self._group = group

    def is_over(self) -> bool:
        """Collective, unless there is no limit."""
        if self._end is None:
            return False
        return spmd.broadcast_object(time.monotonic() > self._end, self._group)


def verify_instance(
    loaded: Loaded,
    prop: Property,
    options: VerifyOptions,
    deadline: Deadline,
    group: dist.ProcessGroup | None,
) -> Outcome:
    """Decides a property as far as bounds and attack can; the same outcome on every rank.

    Args:
        loaded: the network.
        prop: the property; its sizes are the network's.
        options: method and effort.
        deadline: looked at between stages; a stage that has begun is finished.
        group: the tensor-parallel group.
    """
    bounds: list[dict[int, float]] = []
    still_open: list[tuple[Region, list[int]]] = []
    for region in prop.regions:
        if deadline.is_over():
            return Outcome("timeout", reported_bounds(prop, bounds))
        bounds.append(_bound_rows(loaded, prop, region, options, group))
        disjuncts = open_disjuncts(region, bounds[-1])
        if disjuncts:
            still_open.append((region, disjuncts))
    reported = reported_bounds(prop, bounds)
    if not still_open:
        return Outcome("unsat", reported)
    for region, disjuncts in still_open:
        if deadline.is_over():
            return Outcome("timeout", reported)
        found = find_counterexample(
            loaded.forward, prop, region, disjuncts, options.attack(), group, loaded.like
        )
        if found is not None:
            return Outcome("sat", reported, found)
    return Outcome("unknown", reported)


def _bound_rows(
    loaded: Loaded,
    prop: Property,
    region: Region,
    options: VerifyOptions,
    group: dist.ProcessGroup | None,
) -> dict[int, float]:
    """Row index -> lower bound of `c . y - d` over the region's box (rank 0's, on every rank)."""
    indices = region_rows(region)
    if not indices:
        return {}
    rows = [prop.rows[index] for index in indices]
    dtype, device = loaded.like.dtype, loaded.like.device
    lower, upper = loaded.box(region)
    box = PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper)
    x = BoundedTensor((lower + upper) / 2, box)
    C = specification_matrix(rows, prop.n_out, dtype, device)
    # Only alpha needs gradients; recording them otherwise costs memory.
    optimized = options.method == "CROWN-Optimized"
    enough = {}
    if options.method == "auto":
        enough["decision_thresh"] = torch.tensor(
            [[row.bound for row in rows]], dtype=torch.float64, device=device
        )
    with contextlib.nullcontext() if optimized else torch.no_grad():
        bound, _ = loaded.bounded_for(rows).compute_bounds(
            x=(x,), C=C, method=options.method, bound_upper=False, **enough
        )
    values = minus_right_hand_sides(bound, rows).tolist()
    return dict(zip(indices, spmd.broadcast_object(values, group), strict=True))
