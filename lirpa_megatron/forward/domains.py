"""The sets that symbols lie in, and bounds of polynomials over them.

Symbols come in groups, one after the other; a group is `count` copies of one set of `size` symbols:

==========  =======================================  ============================================
kind        the set                                  max of a linear form a
==========  =======================================  ============================================
"box"       |s_i| <= 1                               sum |a_i|
"l2"        |s|_2 <= 1                               |a|_2
"l1"        |s|_1 <= 1                               max |a_i|
"simplex"   s_i = w_i - 1/(size+1), w_i >= 0,        max over the size + 1 corners
            sum w_i <= 1 (barycentric coordinates)
==========  =======================================  ============================================

Homogeneous parts of degree 2 and more are bounded

- for one symbol in [-1, 1]: by |coefficient|, exactly;
- for one simplex: by the control points of Bernstein's form. A homogeneous part of degree k at a
  convex combination of corners is a convex combination of its polar form at k-tuples of corners;
  this holds elementwise and in every norm;
- otherwise by sum |coefficients| (all sets lie in |s_i| <= 1).

What is said of all of a polynomial over a simplex uses the control points of degree p.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.linalg import vector_norm

from lirpa_megatron.forward.polynomials import Polynomials
from lirpa_megatron.forward.sums import absolute_sum, in_cache, in_ellipsoid, singular
from lirpa_megatron.operators.numerics import safe_root

_CORNERS = 8
"""Boxes of at most so many symbols have the norm of a linear part bounded at all corners."""


@dataclass(frozen=True)
class Group:
    """Copies of one set of symbols."""

    kind: str
    size: int
    count: int = 1

    @property
    def symbols(self) -> int:
        return self.size * self.count


@dataclass(frozen=True)
class _Tables:
    """Bernstein's control points, as matrices from coefficients."""

    controls: dict[int, list[list[float]]]
    """For each degree k: of a homogeneous part, [points, M_k]."""
    whole: list[list[float]]
    """Of degree p, of a whole polynomial, [points, M]."""


@functools.lru_cache(maxsize=64)
def _tables(symbols: int, order: int, interval: bool) -> _Tables:
    """Of [-1, 1] (`interval`), or of a simplex around 0."""
    if interval:
        corners: list[tuple[float, ...]] = [(-1.0,), (1.0,)]
    else:
        middle = 1 / (symbols + 1)
        corners = [tuple((i == k) - middle for i in range(symbols)) for k in range(-1, symbols)]

    @functools.cache
    def polar(monomial: tuple[int, ...], chosen: tuple[int, ...]) -> float:
        """The polar form of a monomial at as many corners."""
        if symbols == 1:
            return math.prod(corners[c][0] for c in chosen)
        values = [
            math.prod(corners[c][v] for c, v in zip(each, monomial, strict=True))
            for each in itertools.permutations(chosen)
        ]
        return sum(values) / len(values)

    def points(degree: int) -> list[tuple[int, ...]]:
        return list(itertools.combinations_with_replacement(range(len(corners)), degree))

    monomials = Polynomials(symbols, order).monomials
    controls = {
        k: [[polar(m, c) for m in monomials if len(m) == k] for c in points(k)]
        for k in range(1, order + 1)
    }
    whole = []
    for place in points(order):
        row = []
        for m in monomials:
            chosen = list(itertools.combinations(place, len(m)))
            row.append(sum(polar(m, c) for c in chosen) / len(chosen) if m else 1.0)
        whole.append(row)
    return _Tables(controls, whole)


class Domain:
    """Where all symbols of a run lie.

    Args:
        groups: in the order of the symbols.
        order: degree of the polynomials.
    """

    def __init__(self, groups: list[Group], order: int) -> None:
        self.groups, self.order = list(groups), order
        self.algebra = Polynomials(self.symbols, order)

    @property
    def symbols(self) -> int:
        return sum(group.symbols for group in self.groups)

    def extend(self, symbols: int, balls: int = 0) -> None:
        """Further symbols, for affine forms: in [-1, 1], or in so many L2 balls."""
        group = Group("l2", symbols // balls, balls) if balls else Group("box", 1, symbols)
        self.groups.append(group)
        self.algebra = Polynomials(self.symbols, self.order)

    # ------------------------------------------------------------------ linear parts

    def _by_group(self, part: torch.Tensor):
        """(group, coefficients [count, size, B, ...]) of a linear part [N, B, ...]."""
        first = 0
        for group in self.groups:
            own = part[first : first + group.symbols]
            first += group.symbols
            if not len(own):
                return
            yield group, own.unflatten(0, (-1, group.size))

    def _support(self, part: torch.Tensor) -> torch.Tensor:
        """max of a linear part over the set, elementwise: [N, B, ...] -> [B, ...]."""
        if self.is_box:
            return absolute_sum(part)
        if self.is_sum and len(part):
            return self.supports(lambda i, j: (part[i:j],), len(part), in_cache(part))[0]
        total = part.new_zeros(part.shape[1:])
        for group, own in self._by_group(part):
            if group.kind == "box":
                total = total + absolute_sum(own.flatten(0, 1))
                continue
            if group.kind == "l2":
                found = vector_norm(own, 2, 1)
            elif group.kind == "l1":
                found = own.abs().amax(1)
            else:
                found = own.amax(1).clamp(min=0) - own.sum(1) / (group.size + 1)
            total = total + found.sum(0)
        return total

    def supports(
        self, rows: Callable[[int, int], tuple[torch.Tensor, ...]], count: int, step: int
    ) -> list[torch.Tensor]:
        """`_support` of several linear parts in a domain that `is_sum`, some symbols at a time.

        Args:
            rows: (i, j) -> of each part the coefficients [j - i, B, ...] of these symbols.
            count: of symbols, not 0.
            step: how many to look at at a time.

        Returns:
            [B, ...] of each part.
        """
        total: list[Any] = []
        first = 0
        for group in self.groups:
            box = group.kind == "box"
            width = group.symbols if box else group.size
            for begin in range(first, min(first + group.symbols, count), max(1, width)):
                found: list[Any] = []
                for i in range(begin, begin + width, step):
                    parts = rows(i, min(i + step, begin + width))
                    sums = [(x.abs() if box else x.square()).sum(0) for x in parts]
                    found = [a + b for a, b in zip(found, sums, strict=True)] if found else sums
                found = found if box else [safe_root(x) for x in found]
                total = [a + b for a, b in zip(total, found, strict=True)] if total else found
            first += group.symbols
        return total

    @property
    def is_sum(self) -> bool:
        """All symbols lie in boxes and L2 balls, whose supports are sums."""
        return all(group.kind in ("box", "l2") for group in self.groups)

    @property
    def is_box(self) -> bool:
        """All symbols lie in [-1, 1]."""
        return all(group.kind == "box" for group in self.groups)

    @property
    def _symmetric(self) -> bool:
        return all(group.kind != "simplex" for group in self.groups)

    def _linear_norm(self, part: torch.Tensor) -> torch.Tensor:
        """max of the L2 norm over the last dimension of a linear part: [N, B, ..., n] -> [B, ...].

        Boxes, which are one: the least of the norm of the majorant, the sum of the columns' norms,
        and what the ellipsoid {sum D_n u_n^2 <= sum D} around the box gives, (sum D)^(1/2) times
        the largest singular value of A D^(-1/2), D the columns' norms; with few symbols at the
        corners, by the Gram matrix, exactly. An L2 ball: the largest singular value. Boxes and L2
        balls: the same with one ellipsoid around all of them, all symbols of a ball with one D, its
        Frobenius norm, which counts once in sum D. L1 ball and simplex: at the corners, exactly.
        """
        if self.is_box:
            return self._box_norm(part)
        if self.is_sum and len({group.kind for group in self.groups}) == 2 and len(part):
            return self._mixed_norm(part)
        boxes, others = [], part.new_zeros(part.shape[1:-1])
        for group, own in self._by_group(part):
            if group.kind == "box":
                boxes.append(own.flatten(0, 1))
                continue
            columns = safe_root(own.square().sum(-1))  # [count, size, B, ...]
            if group.kind == "l2":
                found = safe_root(columns.square().sum(1))
                if group.size > 1:
                    each = [singular(copy) for copy in own]
                    found = torch.minimum(found, torch.stack(each))
            elif group.kind == "l1":
                found = columns.amax(1)
            else:
                mean = own.sum(1, keepdim=True) / (group.size + 1)
                corners = torch.cat((own - mean, -mean), 1)
                found = safe_root(corners.square().sum(-1)).amax(1)
            others = others + found.sum(0)
        return others + self._box_norm(torch.cat(boxes)) if boxes else others

    def _box_norm(self, part: torch.Tensor) -> torch.Tensor:
        """`_linear_norm` of all boxes, which are one box."""
        if not len(part):
            return part.new_zeros(part.shape[1:-1])
        columns = torch.cat([safe_root(x.square().sum(-1)) for x in part.split(in_cache(part))])
        majorant = absolute_sum(part)
        found = torch.minimum(columns.sum(0), safe_root(majorant.square().sum(-1)))
        if len(part) <= _CORNERS and len(self.groups) == 1:
            return torch.minimum(found, self._at_corners(part))
        if len(part) <= part.shape[-1]:
            D = columns.clamp(min=torch.finfo(part.dtype).tiny ** 0.25)
            size = singular(part / D.sqrt().unsqueeze(-1))
            return torch.minimum(found, D.sum(0).sqrt() * size)
        return torch.minimum(found, in_ellipsoid(part, columns, columns.sum(0), majorant))

    def shares_of(self, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights D of an ellipsoid around boxes and L2 balls, in proportion to the sizes of the
        symbols [N, ...], all symbols of a ball alike: (D [N, ...], its sum, balls once [...])."""
        total, weights, first = sizes.new_zeros(sizes.shape[1:]), [], 0
        for group in self.groups:
            own = sizes[first : first + group.symbols]
            first += group.symbols
            if not len(own):
                break
            if group.kind == "l2":
                own = safe_root(own.unflatten(0, (-1, group.size)).square().sum(1))
            weights.append(own.repeat_interleave(group.symbols // len(own), dim=0))
            total = total + own.sum(0)
        return torch.cat(weights), total

    def _mixed_norm(self, part: torch.Tensor) -> torch.Tensor:
        """`_linear_norm` of boxes and L2 balls, by one ellipsoid around all of them."""
        columns = torch.cat([safe_root(x.square().sum(-1)) for x in part.split(in_cache(part))])
        columns, total = self.shares_of(columns)
        majorant = self._support(part)
        found = torch.minimum(total, safe_root(majorant.square().sum(-1)))
        return torch.minimum(found, in_ellipsoid(part, columns, total, majorant))

    @staticmethod
    def _at_corners(part: torch.Tensor) -> torch.Tensor:
        """max |A s|_2 over the corners of a box of few symbols, [N, B, ..., n] -> [B, ...]."""
        rows = part.movedim(0, -2)
        gram = rows @ rows.transpose(-1, -2)
        signs = torch.tensor(
            [(1.0, *s) for s in itertools.product((-1.0, 1.0), repeat=len(part) - 1)],
            dtype=part.dtype, device=part.device,
        )
        return safe_root(((signs @ gram) * signs).sum(-1).amax(-1).clamp(min=0))

    # ----------------------------------------------------------------- higher parts

    @property
    def is_interval(self) -> bool:
        """One symbol in [-1, 1]."""
        return self.symbols == 1 and self.groups[0].kind != "simplex"

    @property
    def is_simplex(self) -> bool:
        """One simplex (of one symbol: half of an interval)."""
        return len(self.groups) == 1 and self.groups[0].kind == "simplex" and (
            self.groups[0].count == 1
        )

    @property
    def _tables(self) -> _Tables:
        return _tables(self.symbols, self.order, self.is_interval)

    @staticmethod
    def _times(rows: list[list[float]], f: torch.Tensor) -> torch.Tensor:
        return torch.tensordot(f.new_tensor(rows), f, 1)

    def controls(self, part: torch.Tensor, degree: int) -> torch.Tensor | None:
        """Control points [points, B, ...] of a homogeneous part; None where there are none."""
        if self.is_interval:
            return part
        return self._times(self._tables.controls[degree], part) if self.is_simplex else None

    # ------------------------------------------------------------------ what rules use

    def size(self, part: torch.Tensor, degree: int) -> torch.Tensor:
        """Bound of |part|, elementwise: [M_k, B, ...] -> [B, ...]."""
        if degree == 1:
            if self._symmetric:
                return self._support(part)
            return torch.maximum(self._support(part), self._support(-part))
        controls = self.controls(part, degree)
        return part.abs().sum(0) if controls is None else controls.abs().amax(0)

    def norm(self, part: torch.Tensor, degree: int) -> torch.Tensor:
        """Bound of the L2 norm over the last dimension: [M_k, B, ..., n] -> [B, ...]."""
        if degree == 1:
            return self._linear_norm(part)
        controls = self.controls(part, degree)
        if controls is not None:
            return safe_root(controls.square().sum(-1)).amax(0)
        return torch.minimum(
            safe_root(part.abs().sum(0).square().sum(-1)), safe_root(part.square().sum(-1)).sum(0)
        )

    def _parts(self, f: torch.Tensor, constant: Callable, bound: Callable) -> list[torch.Tensor]:
        found = [constant(f[0])]
        for k in range(1, self.order + 1):
            part = self.algebra.part(f, k)
            found.append(bound(part, k) if len(part) else torch.zeros_like(found[0]))
        return found

    def sizes(self, f: torch.Tensor) -> list[torch.Tensor]:
        """Bounds of |part| for each degree from 0, [B, ...] each."""
        return self._parts(f, torch.abs, self.size)

    def norms(self, f: torch.Tensor) -> list[torch.Tensor]:
        """Bounds of the parts' L2 norms over the last dimension, from degree 0."""
        return self._parts(f, lambda x: safe_root(x.square().sum(-1)), self.norm)

    def lower(self, f: torch.Tensor) -> torch.Tensor:
        """A lower bound of the polynomial, [M, B, ...] -> [B, ...].

        Degree 1: exact. In a box, even powers are not below 0.
        """
        if self.order == 1:
            return f[0] - self._support(f[1:] if self._symmetric else -f[1:])
        if self.is_interval or self.is_simplex:
            return self._times(self._tables.whole, f).amin(0)
        low = f[0] - self._support(-self.algebra.part(f, 1))
        for i, m in enumerate(self.algebra.monomials):
            if len(m) > 1:
                even = all(m.count(v) % 2 == 0 for v in m)
                low = low + (f[i].clamp(max=0) if even else -f[i].abs())
        return low

    def upper(self, f: torch.Tensor) -> torch.Tensor:
        """An upper bound of the polynomial."""
        return -self.lower(-f)

    def ends(self, f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(lower, upper) bounds of the polynomial."""
        if self.order == 1 and self._symmetric:
            reach = self._support(f[1:])
            return f[0] - reach, f[0] + reach
        return self.lower(f), self.upper(f)
