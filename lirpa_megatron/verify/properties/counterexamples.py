"""What makes a point a counterexample, and by how much it is one.

The verdict is about the network as it is stored, with its number type, run by this process. A
point is a counterexample, and the result `sat`, if

1. it lies in the region's box: its coordinates are numbers of the type that the network reads, and
   inside the exact box. Where that type has no number in it (0.1 <= X_0 <= 0.1), the coordinate is
   a decimal number in the box that rounds to what the network reads;
2. the outputs of the network as stored satisfy all rows of a disjunct, strict ones strictly,
   decided exactly: outputs are rationals, and so are the property's numbers;
3. the outputs of the same weights computed in float64 satisfy them too; or those of 2 by more than
   rounding explains (`CLEAR` of the largest output): another order of summation, in another runtime
   or in exact arithmetic, could make a violation within rounding vanish.

A point for which 2 or 3 fails leaves the result `unknown`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from lirpa_megatron.parallel.model_ranks import ALONE, ModelRanks
from lirpa_megatron.verify.properties.loading import Loaded
from lirpa_megatron.verify.properties.property import Interval, Property, Region
from lirpa_megatron.verify.properties.specification import inward_box

CLEAR = 1e-5


@dataclass(frozen=True)
class Counterexample:
    """A point and what the network makes of it."""

    # [n_in]; numbers whose decimal spelling lies in the box
    point: list[float]
    # [n_out] of the network as stored
    outputs: list[float]
    # by how much the disjunct's rows are satisfied by the network as stored, the least of them;
    # None: the disjunct has no rows
    violation: float | None
    # the same of its weights in float64
    float64_violation: float | None
    # by how much the point lies outside of the box, where no decimal spelling of 17 digits is in it
    outside: float = 0.0


def confirm(
    loaded: Loaded, prop: Property, region: Region, disjuncts: Sequence[int], point: torch.Tensor,
    ranks: ModelRanks = ALONE,
) -> tuple[bool, Counterexample]:
    """Runs the network as it is stored on a point of the box.

    Args:
        loaded: the network.
        prop, region: what may be violated.
        disjuncts: positions in the region's.
        point: [n_in], the same on every rank; moved to the nearest one that the network reads.
        ranks: that hold the network.

    Returns:
        whether it is a counterexample, and the disjunct's numbers that come closest to one; the
        same on every rank.
    """
    lower, upper = inward_box(region, loaded.input_dtype, loaded.like.device)
    read = point.detach().to(lower).clamp(lower, upper)
    spelled, outside = _spelled(read, region)
    with torch.no_grad():
        stored = loaded.stored_forward(read[None])[0]
        double = loaded.float64_forward(read[None].double())[0]
    # The last bits of a reduction may differ between ranks: rank 0's count.
    outputs, exact = ranks.broadcast_object(
        (stored.double().tolist(), double.tolist()), "the outputs"
    )
    found = {d: _violation(prop, region.disjuncts[d], outputs, spelled) for d in disjuncts}
    best = max(disjuncts, key=found.__getitem__)
    holds, violation = found[best]
    holds_exactly, float64_violation = _violation(prop, region.disjuncts[best], exact, spelled)
    clear = violation > CLEAR * max([1.0, *map(abs, outputs)])
    is_one = holds and (holds_exactly or clear) and outside == 0.0
    return is_one, Counterexample(
        spelled, outputs, _number(violation), _number(float64_violation), outside
    )


_INFINITE = Fraction(10**400)


def _violation(
    prop: Property, disjunct: Sequence[int], outputs: Sequence[float], point: Sequence[float]
) -> tuple[bool, Fraction]:
    """Whether outputs satisfy all rows, and by how much at least; exact. Where rows also have
    inputs, these are those of the point, as it is written."""
    if not all(map(math.isfinite, outputs)):
        return False, -_INFINITE
    if not disjunct:
        return True, _INFINITE
    y = [Fraction(value) for value in outputs]
    if prop.wiring is not None:
        handed_on = [Fraction(repr(point[i])) for i in prop.wiring.handed_on]
        y[len(y) - len(handed_on) :] = handed_on
    slacks = [(prop.rows[row], prop.rows[row].slack(y)) for row in disjunct]
    return all(row.allows(slack) for row, slack in slacks), min(slack for _, slack in slacks)


def _number(value: Fraction) -> float | None:
    return float(value) if abs(value) < 10**300 else None


def _spelled(read: torch.Tensor, region: Region) -> tuple[list[float], float]:
    """Numbers in the box, as they are written, that are read as these; and how far outside."""
    point, outside = [], 0.0
    values = read.double().tolist()
    for value, interval in zip(values, region.box, strict=True):
        chosen = value
        if not interval.holds(Fraction(repr(value))):
            options = [float(interval.lower), float(interval.upper)]
            options = [o for o in options if _is_read_as(o, value, read.dtype)]
            inside = [o for o in options if interval.holds(Fraction(repr(o)))]
            chosen = (inside or options or [value])[0]
            if not inside:
                # at an end that is left out, the distance is 0
                distance = float(_distance(Fraction(repr(chosen)), interval))
                outside = max(outside, distance, math.ulp(chosen))
        point.append(chosen)
    return point, outside


def _is_read_as(number: float, value: float, dtype: torch.dtype) -> bool:
    return float(torch.tensor(number, dtype=torch.float64).to(dtype)) == value


def _distance(value: Fraction, interval: Interval) -> Fraction:
    return max(Fraction(0), interval.lower - value, value - interval.upper)
