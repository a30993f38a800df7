"""From a property's rows to a specification matrix, and from bounds back to a verdict.

For the row `c . y <= d` the verifier bounds `c . y - d` from below over a region's box: a positive
lower bound proves that the row cannot happen there (nor can `c . y < d`). A disjunct is refuted if
one of its rows cannot happen, and the property holds if every disjunct of every region is refuted.

The bound of `c . y` is computed in the run's dtype with ordinary rounding (as auto_LiRPA does): in
float32 a bound within about 1e-6 of the outputs' magnitude of zero is not beyond doubt; with
--outward it is widened by what its computation may be off (`lirpa_megatron.rounding`). What is
rounded here is rounded safely: boxes outwards, `- d` in float64 with d rounded up, and for
coefficients that the dtype does not have (0.1), see `RowsToBound`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from lirpa_megatron.verify.properties.property import OutputRow, Property, Region, rounded_up

# whole numbers up to this are exact
_EXACT = {torch.float32: 2**24, torch.float64: 2**53}


def region_rows(region: Region) -> list[int]:
    """Indices of the rows that the region's disjuncts mention, in file order."""
    return sorted({row for disjunct in region.disjuncts for row in disjunct})


def specification_matrix(
    rows: Sequence[OutputRow], n_out: int, dtype: torch.dtype, device: torch.device | None = None
) -> torch.Tensor:
    """C [1, S, n_out], one line for each row's coefficients, to nearest; replicated."""
    matrix = torch.zeros(1, len(rows), n_out, dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, coefficient in row.coefficients.items():
            matrix[0, i, j] = float(coefficient)
    return matrix.to(dtype).to(device)


class RowsToBound:
    """Rows of one region as rows of C, and the bounds of `c . y - d` from those of `C y`.

    A row whose coefficients the dtype does not have is multiplied by what makes them whole numbers
    (0.1 Y_0 <= 0.3 Y_1 becomes Y_0 <= 3 Y_1). Where that does not help, C has the nearest ones, c',
    and further rows for the outputs themselves, and

        c . y >= c' . y - sum_j |c_j - c'_j| max(|min y_j|, |max y_j|).

    Args:
        rows: S of them.
        dtype: of C, float32 or float64.
    """

    def __init__(self, rows: Sequence[OutputRow], dtype: torch.dtype) -> None:
        self.rows = rows
        self._scales: list[Fraction] = []
        # for each row of C its entries: output, coefficient in the dtype
        self._entries: list[dict[int, float]] = []
        # for each row of C by how much coefficients were rounded: output, difference
        self._errors: list[dict[int, float]] = []
        for row in rows:
            scale = _scale(row, dtype)
            scaled = {j: c * scale for j, c in row.coefficients.items()}
            nearest = {j: _nearest(c, dtype) for j, c in scaled.items()}
            errors = {j: abs(c - Fraction(nearest[j])) for j, c in scaled.items()}
            self._scales.append(scale)
            self._entries.append(nearest)
            self._errors.append({j: rounded_up(e) for j, e in errors.items() if e})
        self._uncertain = sorted({j for errors in self._errors for j in errors})
        for j in self._uncertain:
            self._entries += [{j: 1.0}, {j: -1.0}]

    def __len__(self) -> int:
        """Number of rows of C."""
        return len(self._entries)

    def fill(self, matrix: torch.Tensor) -> None:
        """Writes C into a matrix of zeros, [at least len(self), n_out]; its further rows repeat the
        first one."""
        for i, entries in enumerate(self._entries):
            for j, coefficient in entries.items():
                matrix[i, j] = coefficient
        matrix[len(self) :] = matrix[0]

    def thresholds(self) -> list[float]:
        """What the bound of each row of C has to exceed for its row to be impossible."""
        ends = [rounded_up(r.bound * s) for r, s in zip(self.rows, self._scales, strict=True)]
        return ends + [-1e300] * (len(self) - len(ends))

    def values(self, lower: np.ndarray, outward: bool = False) -> list[float]:
        """Lower bounds of `c . y - d`, [S], from those of the rows of C (float64).

        With `outward` what is rounded here is rounded down: the sum, the difference (whose sign
        is exact) and the quotient, each off by half a unit in the last place at most.
        """
        found = []
        for i, (end, lost) in enumerate(zip(self.thresholds(), self._lost(lower), strict=False)):
            kept = float(lower[i])
            if not outward:
                found.append((kept - lost - end) / float(self._scales[i]))
                continue
            kept = math.nextafter(kept - lost, -math.inf) if lost else kept
            value = (kept - end) / float(self._scales[i])
            # of a value above 0 four units are less than the value itself
            found.append(value - 4 * math.ulp(value) if value != 0 else value)
        return found

    def _lost(self, lower: np.ndarray) -> list[float]:
        """By how much `c . y` may be below `c' . y` for each row, [S]."""
        largest = {
            j: max(abs(lower[len(self.rows) + 2 * i]), abs(lower[len(self.rows) + 2 * i + 1]))
            for i, j in enumerate(self._uncertain)
        }
        return [
            sum(error * largest[j] for j, error in errors.items()) * (1 + 1e-9)  # its own rounding
            for errors in self._errors
        ]

    @property
    def scales(self) -> list[float]:
        """What each row of C is multiplied by, [S]."""
        return [float(scale) for scale in self._scales]

    def ends(self, lower: np.ndarray | None) -> list[float]:
        """What `c' . y` of each row has to exceed for the row to be impossible, [S].

        Args:
            lower: bounds of the rows of C over the region, if there are more than S of them.
        """
        ends = self.thresholds()[: len(self.rows)]
        if lower is None:
            return ends
        return [
            math.nextafter(end + lost, math.inf) if lost else end
            for end, lost in zip(ends, self._lost(lower), strict=True)
        ]


def _nearest(value: Fraction, dtype: torch.dtype) -> float:
    return float(torch.tensor(float(value), dtype=torch.float64).to(dtype))


def _scale(row: OutputRow, dtype: torch.dtype) -> Fraction:
    """1 if the dtype has the coefficients, or if no factor makes them ones that it has."""
    values = row.coefficients.values()
    if all(v.denominator == 1 and abs(v.numerator) <= _EXACT[dtype] for v in values):
        return Fraction(1)
    if all(Fraction(_nearest(v, dtype)) == v for v in values):
        return Fraction(1)
    common = math.lcm(*(v.denominator for v in values))
    divisor = math.gcd(*(int(v * common) for v in values))
    scale = Fraction(common, divisor)
    whole = all(abs(v * scale) <= _EXACT[dtype] for v in values)
    return scale if whole and abs(row.bound * scale) < 2**1000 else Fraction(1)


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


def inward_box(
    region: Region, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and last number [n_in] of the dtype inside the region's box, of each input.

    Where there is none (0.1 <= X_0 <= 0.1), both are the number nearest to the box's middle.
    """
    exact_lower, exact_upper = map(torch.from_numpy, region.inner)
    lower, upper = exact_lower.to(dtype), exact_upper.to(dtype)
    # not nextafter, which float16 does not have
    lower = torch.where(lower.double() < exact_lower, _after(lower), lower)
    upper = torch.where(upper.double() > exact_upper, -_after(-upper), upper)
    middle = torch.from_numpy(region.lower / 2 + region.upper / 2).to(dtype)
    lower, upper = (torch.where(lower > upper, middle, end) for end in (lower, upper))
    return lower.to(device), upper.to(device)


def _after(x: torch.Tensor) -> torch.Tensor:
    """The next larger number of the type."""
    if x.dtype in (torch.float32, torch.float64):
        return torch.nextafter(x, torch.full_like(x, math.inf))
    # the number's bits as a whole number, larger by one; -0 and what is below it: smaller by one
    bits = (x + 0.0).view(torch.int16)
    return torch.where(x < 0, bits - 1, bits + 1).view(x.dtype)


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
    smallest: dict[int, float] = {}
    for bounds in lower_bounds:
        for row, value in bounds.items():
            known = smallest.get(row, math.inf)
            finite = math.isfinite(value) and not math.isnan(known)  # what is not, stays so
            smallest[row] = min(known, float(value)) if finite else math.nan
    return [
        smallest[row] if math.isfinite(smallest.get(row, math.nan)) else None
        for row in range(len(prop.rows))
    ]
