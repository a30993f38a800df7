"""What a property says, independent of the file it came from.

A property is *violated* by an input x with output y = network(x) if x lies in the box of one of
its regions and y satisfies every row of one of that region's disjuncts. It *holds* if there is no
such input.

    n_in   number of input variables, X_0 ... in row-major order of the network's input
    n_out  number of output variables
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class OutputRow:
    """One linear constraint on the outputs, `sum(coefficients[j] * Y_j) <= bound`."""

    # output index -> coefficient; never empty, no zeros
    coefficients: dict[int, float]
    # right-hand side
    bound: float
    # line of the file where the constraint begins
    line: int


@dataclass(frozen=True)
class Region:
    """A box of inputs and the outputs that are unsafe for it, in disjunctive normal form."""

    # [n_in] float64, the smallest value of each input
    lower: np.ndarray
    # [n_in] float64, the largest value of each input
    upper: np.ndarray
    # each disjunct: the indices of the rows (in Property.rows) that must all be satisfied
    disjuncts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Property:
    """A whole property file."""

    # file name without folder and extensions
    name: str
    # number of input variables declared
    n_in: int
    # number of output variables declared
    n_out: int
    # every output constraint, in file order
    rows: tuple[OutputRow, ...]
    # the property is violated by a violation in any region
    regions: tuple[Region, ...]
