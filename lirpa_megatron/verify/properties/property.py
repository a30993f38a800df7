"""What a property says, independent of the file it came from.

A property is *violated* by an input x with output y = network(x) if x lies in the set of one of
its regions and y satisfies every row of one of that region's disjuncts. It *holds* if there is no
such input; so it holds if it has no region, or none with a disjunct.

Numbers of a property are exact: decimal numbers of the file are rationals, and so is what is made
of them. They are rounded where tensors are made of them, outwards where bounds are to hold.

    n_in   number of input variables, X_0 ... in row-major order of the network's input
    n_out  number of output variables
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from lirpa_megatron.networks.wiring import Wiring


@dataclass(frozen=True, slots=True)  # large files make millions
class Interval:
    """The values that one input may have; an end that is None is not there."""

    lower: Fraction | None = None
    upper: Fraction | None = None
    # whether the end itself is left out
    lower_open: bool = False
    upper_open: bool = False

    def meet(self, other: Interval) -> Interval:
        """The values in both."""
        lower, lower_open = self.lower, self.lower_open
        if other.lower is not None:
            if lower is None or other.lower > lower:
                lower, lower_open = other.lower, other.lower_open
            elif other.lower == lower:
                lower_open = lower_open or other.lower_open
        upper, upper_open = self.upper, self.upper_open
        if other.upper is not None:
            if upper is None or other.upper < upper:
                upper, upper_open = other.upper, other.upper_open
            elif other.upper == upper:
                upper_open = upper_open or other.upper_open
        return Interval(lower, upper, lower_open, upper_open)

    def is_empty(self) -> bool:
        if self.lower is None or self.upper is None:
            return False
        closed = not (self.lower_open or self.upper_open)
        return self.lower > self.upper or (self.lower == self.upper and not closed)

    def holds(self, value: Fraction) -> bool:
        below = self.lower is not None and (
            value < self.lower or (self.lower_open and value == self.lower)
        )
        above = self.upper is not None and (
            value > self.upper or (self.upper_open and value == self.upper)
        )
        return not (below or above)


@dataclass(frozen=True, slots=True)
class OutputRow:
    """One linear constraint on the outputs, `sum(coefficients[j] * Y_j) <= bound`."""

    # output index -> coefficient; never empty, no zeros
    coefficients: dict[int, Fraction]
    # right-hand side
    bound: Fraction
    # line of the file where the constraint begins
    line: int
    # `<` instead of `<=`
    strict: bool = False

    def slack(self, y: Sequence[Fraction]) -> Fraction:
        """By how much outputs satisfy the row, `bound - sum(...)`; exact."""
        return self.bound - sum(c * y[j] for j, c in self.coefficients.items())

    def allows(self, slack: Fraction) -> bool:
        return slack > 0 or (slack == 0 and not self.strict)


@dataclass(frozen=True)
class Tensor:
    """An input or output that a file of VNN-LIB 2.0 declares."""

    name: str
    # "real", or a number type: "float32", ...
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Declared:
    """A network that a file of VNN-LIB 2.0 declares."""

    name: str
    # flattened in row-major order, one after the other, these are its inputs and outputs
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    # the network that it is equal to, if it says so
    equal_to: str | None = None

    @property
    def n_in(self) -> int:
        return sum(tensor.size for tensor in self.inputs)

    @property
    def n_out(self) -> int:
        return sum(tensor.size for tensor in self.outputs)


@dataclass(frozen=True)
class Region:
    """A box of inputs and the outputs that are unsafe for it, in disjunctive normal form."""

    # of each input, bounded on both sides and not empty
    box: tuple[Interval, ...]
    # each disjunct: the indices of the rows (in Property.rows) that must all be satisfied
    disjuncts: tuple[tuple[int, ...], ...]

    @cached_property
    def lower(self) -> np.ndarray:
        """[n_in] float64, at most the smallest value of each input: rounded down."""
        return np.array([rounded_down(interval.lower) for interval in self.box])

    @cached_property
    def upper(self) -> np.ndarray:
        """[n_in] float64, at least the largest value of each input: rounded up."""
        return np.array([rounded_up(interval.upper) for interval in self.box])

    @cached_property
    def inner(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends [n_in] float64 of the numbers of that type inside the box: the first
        and the last one of each input; the first is above the last where there is none."""
        first = [_next_to(rounded_up(i.lower), i.lower, i.lower_open, math.inf) for i in self.box]
        last = [_next_to(rounded_down(i.upper), i.upper, i.upper_open, -math.inf) for i in self.box]
        return np.array(first), np.array(last)


def rounded_down(value: Fraction) -> float:
    """The largest float64 that is not above the value."""
    nearest = float(value)
    return nearest if Fraction(nearest) <= value else math.nextafter(nearest, -math.inf)


def rounded_up(value: Fraction) -> float:
    """The smallest float64 that is not below the value."""
    nearest = float(value)
    return nearest if Fraction(nearest) >= value else math.nextafter(nearest, math.inf)


def _next_to(rounded: float, end: Fraction, is_open: bool, towards: float) -> float:
    """The end itself is stepped over where it is left out, and so is a number that is written like
    it: 0.1 is larger than the decimal number 0.1, but a counterexample of 0.1 is not."""
    at_end = end in (Fraction(rounded), Fraction(repr(rounded)))
    return math.nextafter(rounded, towards) if is_open and at_end else rounded


@dataclass(frozen=True)
class Property:
    """A whole property file."""

    # file name without folder and extensions
    name: str
    # number of input variables declared; those that are equal count once
    n_in: int
    # number of output variables declared, and behind them the inputs that rows also have
    n_out: int
    # every output constraint, in file order
    rows: tuple[OutputRow, ...]
    # the property is violated by a violation in any region
    regions: tuple[Region, ...]
    # why it holds whatever the network does; None if that depends on the network
    vacuous: str | None = None
    # networks that the file declares: VNN-LIB 2.0
    networks: tuple[Declared, ...] = ()
    # how the network that it is about is made of the files'; None: it is one, as it is
    wiring: Wiring | None = None

    def declared_inputs(self, point: Sequence[float]) -> list[float]:
        """The value of each input that the file declares, [at least n_in], at a point [n_in]."""
        if self.wiring is None:
            return list(point)
        return [point[variable] for reads in self.wiring.reads for variable in reads]
