"""From the assertions of a file to a property: boxes of inputs, and what outputs violate it.

What a file asserts holds together. An assertion that is one conjunct is added to what holds for all
(`Assertions.add`); of the others all combinations are made, and those whose box is empty dropped.

Constraints that relate inputs to outputs, or several inputs to each other, become rows on outputs:
the inputs in them are handed on to the outputs (`networks.wiring`). Those on inputs alone that hold
for the whole file also narrow its box: from

    sum_i a_i x_i <= d  follows  a_k x_k <= d - sum_(i != k) min a_i x_i.

Inputs that are equal are one variable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.wiring import Wiring
from lirpa_megatron.verify.properties.contradictions import contradict
from lirpa_megatron.verify.properties.property import (
    Declared,
    Interval,
    OutputRow,
    Property,
    Region,
    rounded_down,
    rounded_up,
)
from lirpa_megatron.verify.properties.vnnlib_formula import Box, Dnf, conjunction

_EVERYTHING = Interval()
_ROUNDS = 10
_MOST_TERMS = 200_000
"""Of the narrowing of the box."""


@dataclass
class Assertions:
    """What a file asserts, so far."""

    # of single conjuncts, which nearly all assertions are: kept out of the product
    common: Box = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    # the others
    choices: list[Dnf] = field(default_factory=list)

    def add(self, dnf: Dnf) -> None:
        if len(dnf) != 1:
            self.choices.append(dnf)
            return
        box, rows = dnf[0]
        for index, interval in box.items():
            self.common[index] = interval.meet(self.common.get(index, _EVERYTHING))
        self.rows += rows

    def renamed(self, new: Sequence[int]) -> Assertions:
        """With input variable i called new[i]; several may get one name."""
        made = Assertions(rows=self.rows)
        for index, interval in self.common.items():
            made.add([({new[index]: interval}, ())])
        for dnf in self.choices:
            made.choices.append([
                (renamed, rows) for box, rows in dnf
                if (renamed := _renamed(box, new)) is not None
            ])
        return made


def _renamed(box: Box, new: Sequence[int]) -> Box | None:
    made: Box = {}
    for index, interval in box.items():
        both = interval.meet(made.get(new[index], _EVERYTHING))
        if both.is_empty():
            return None
        made[new[index]] = both
    return made


def assemble(
    name: str, n_in: int, n_out: int, rows: Sequence[OutputRow], assertions: Assertions,
    variable_name: Callable[[int], str], networks: tuple[Declared, ...] = (),
    reads: tuple[tuple[int, ...], ...] | None = None,
) -> Property:
    """The property of a file.

    Args:
        name: the property's.
        n_in, n_out: numbers of variables; inputs that are equal are one.
        rows: constraints; coefficient -1 - i is input variable i's, others are outputs'.
        assertions: over these.
        variable_name: of an input variable, for errors.
        networks: that the file declares.
        reads: of each network the variable that each of its inputs is; None: of one, all in order.

    Raises:
        UserError: an input has no bounds.
        VnnlibError: too many combinations.
    """
    handed_on = tuple(sorted({-1 - key for row in rows for key in row.coefficients if key < 0}))
    column = {-1 - i: n_out + k for k, i in enumerate(handed_on)}
    moved = tuple(
        row if min(row.coefficients) >= 0 else replace(row, coefficients={
            column.get(key, key): c for key, c in row.coefficients.items()
        })
        for row in rows
    )
    wiring: Wiring | None = Wiring(n_in, reads or (tuple(range(n_in)),), handed_on)
    if wiring.is_plain:
        wiring = None
    regions = _regions(n_in, rows, assertions, variable_name)
    prop = Property(
        name, n_in, n_out + len(handed_on), moved, regions, networks=networks, wiring=wiring
    )
    if not regions:
        return replace(prop, vacuous="no input satisfies the constraints on inputs")
    return _without_contradictions(prop)


def _regions(
    n_in: int, rows: Sequence[OutputRow], assertions: Assertions,
    variable_name: Callable[[int], str],
) -> tuple[Region, ...]:
    """The disjuncts of the whole file, those of the same box together."""
    common = _narrowed(assertions.common, [rows[i] for i in assertions.rows])
    if any(interval.is_empty() for interval in common.values()):
        return ()
    inner = [
        [choice for choice in dnf if not _is_empty(choice[0], common)]
        for dnf in assertions.choices
    ]
    disjuncts: dict[tuple, list[tuple[int, ...]]] = {}
    for box, more in conjunction(inner, 1, within=common):
        key = tuple(sorted(box.items()))
        disjuncts.setdefault(key, []).append(tuple(sorted({*assertions.rows, *more})))
    regions = []
    around = [common.get(index, _EVERYTHING) for index in range(n_in)]
    for key, unsafe in disjuncts.items():
        box = list(around)
        for index, interval in key:
            box[index] = box[index].meet(interval)
        for index, interval in enumerate(box):
            for side in ("lower", "upper"):
                if getattr(interval, side) is None:
                    raise UserError(f"{variable_name(index)} has no {side} bound")
        regions.append(Region(tuple(box), tuple(unsafe)))
    return tuple(regions)


def _is_empty(box: Box, common: Box) -> bool:
    return any(
        interval.meet(common.get(index, _EVERYTHING)).is_empty() for index, interval in box.items()
    )


def _narrowed(box: Box, rows: Sequence[OutputRow]) -> Box:
    """The box without points that rows on inputs alone exclude, as far as a few rounds show."""
    rows = [row for row in rows if max(row.coefficients) < 0]
    terms = sum(len(row.coefficients) for row in rows)
    box = dict(box)
    for _ in range(min(_ROUNDS, _MOST_TERMS // terms) if terms else 0):
        before = dict(box)
        for row in rows:
            _narrow(box, row)
        if box == before or any(interval.is_empty() for interval in box.values()):
            break
    return box


def _narrow(box: Box, row: OutputRow) -> None:
    """Meets the box with what a row on inputs says of each of them."""
    ends: dict[int, tuple[Fraction | None, bool]] = {}
    for key, c in row.coefficients.items():
        interval = box.get(-1 - key, _EVERYTHING)
        end = interval.lower if c > 0 else interval.upper
        is_open = interval.lower_open if c > 0 else interval.upper_open
        ends[key] = (None if end is None else c * end, is_open)
    without = [key for key, (end, _) in ends.items() if end is None]
    if len(without) > 1:
        return
    total = sum((end for end, _ in ends.values() if end is not None), Fraction(0))
    for key in without or ends:
        c = row.coefficients[key]
        own = ends[key][0]
        limit = (row.bound - total + (own or 0)) / c
        others_open = any(is_open for k, (_, is_open) in ends.items() if k != key)
        strict = row.strict or others_open
        # of few digits: what is derived from derived ends would grow without limit
        try:
            rounded = Fraction(rounded_up(limit) if c > 0 else rounded_down(limit))
        except OverflowError:
            continue
        strict = strict and rounded == limit
        known = box.get(-1 - key, _EVERYTHING)
        new = (Interval(upper=rounded, upper_open=strict) if c > 0
               else Interval(lower=rounded, lower_open=strict))
        box[-1 - key] = known.meet(new)


def _without_contradictions(prop: Property) -> Property:
    """Without the disjuncts that no outputs satisfy."""
    known: dict[tuple[int, ...], bool] = {}
    regions = []
    for region in prop.regions:
        kept = []
        for disjunct in region.disjuncts:
            if disjunct not in known:
                known[disjunct] = contradict(prop.rows[row] for row in disjunct)
            if not known[disjunct]:
                kept.append(disjunct)
        if kept:
            regions.append(replace(region, disjuncts=tuple(kept)))
    if not regions:
        reason = "no outputs satisfy the constraints on outputs, which contradict each other"
        return replace(prop, regions=(), vacuous=reason)
    return replace(prop, regions=tuple(regions))
