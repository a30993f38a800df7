"""Output constraints that no outputs satisfy, whatever the network.

Exact, by Fourier-Motzkin elimination: a variable is removed by adding each pair of rows in which it
has opposite signs, scaled to cancel it; what is left in the end are rows without variables,
`0 <= d` or `0 < d`, and one that is false is the contradiction (Schrijver, Theory of Linear and
Integer Programming, 12.2). A variable that has one sign in all rows can satisfy all rows that have
it, so they go first; of the properties that are met little is left then.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from lirpa_megatron.verify.properties.property import OutputRow

_MOST_ROWS = 300
"""Rows at one time; where there would be more, no contradiction is said to be found."""

# coefficients, right-hand side, whether the row is strict
_Row = tuple[dict[int, Fraction], Fraction, bool]


def contradict(rows: Iterable[OutputRow]) -> bool:
    """Whether no outputs satisfy all rows; False also where deciding it takes too much."""
    left: list[_Row] = _strongest((r.coefficients, r.bound, r.strict) for r in rows)
    while left:
        left = _without_one_sided(left)
        if not left or len(left) > _MOST_ROWS:
            return False
        counts: dict[int, list[int]] = {}
        for coefficients, _, _ in left:
            for j, c in coefficients.items():
                counts.setdefault(j, [0, 0])[c > 0] += 1
        chosen = min(counts, key=lambda j: counts[j][0] * counts[j][1])
        kept = [row for row in left if chosen not in row[0]]
        above = [row for row in left if row[0].get(chosen, 0) < 0]
        below = [row for row in left if row[0].get(chosen, 0) > 0]
        if len(above) * len(below) > 10 * _MOST_ROWS:
            return False
        for low in above:
            for high in below:
                made = _added(low, high, chosen)
                if made[0]:
                    kept.append(made)
                elif made[1] < 0 or (made[1] == 0 and made[2]):
                    return True
        left = _strongest(kept)
    return False


def _added(low: _Row, high: _Row, j: int) -> _Row:
    """The sum of two rows, the second one scaled so that variable j cancels."""
    factor = -low[0][j] / high[0][j]
    coefficients = dict(low[0])
    for name, c in high[0].items():
        coefficients[name] = coefficients.get(name, 0) + factor * c
    return (
        {name: c for name, c in coefficients.items() if c},
        low[1] + factor * high[1],
        low[2] or high[2],
    )


def _without_one_sided(rows: list[_Row]) -> list[_Row]:
    while True:
        signs: dict[int, set[bool]] = {}
        for coefficients, _, _ in rows:
            for j, c in coefficients.items():
                signs.setdefault(j, set()).add(c > 0)
        free = {j for j, found in signs.items() if len(found) == 1}
        if not free:
            return rows
        rows = [row for row in rows if not free & row[0].keys()]


def _strongest(rows: Iterable[_Row]) -> list[_Row]:
    """Of rows with the same left-hand side, up to a factor, the one that implies the others."""
    best: dict[tuple, _Row] = {}
    for coefficients, bound, strict in rows:
        first = min(coefficients)
        size = abs(coefficients[first])
        scaled = {j: c / size for j, c in sorted(coefficients.items())}
        row = scaled, bound / size, strict
        key = tuple(scaled.items())
        other = best.get(key)
        if other is None or (row[1], not strict) < (other[1], not other[2]):
            best[key] = row
    return list(best.values())
