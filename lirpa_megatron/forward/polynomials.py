"""Polynomials in d symbols, truncated at degree p.

A tensor of polynomials is a tensor of coefficients [M, B, ...], one for each of the M monomials,
sorted by degree: first the constant, then the d symbols in their order. For degree 1 M is d + 1,
and a polynomial with fewer coefficients does not depend on the last symbols.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch

Terms = Sequence[torch.Tensor]
"""Bounds of the homogeneous parts of a polynomial, by degree."""


class Polynomials:
    """The polynomials of degree `order` in `symbols` symbols.

    Args:
        symbols, order: see above.
        enter: what a number passes that multiplies coefficients of symbols, and not the constant
            term alone. For affine forms of which each rank has the coefficients of other symbols.

    Attributes:
        count: number M of monomials.
        start: index of the first monomial of each degree, and the end.
    """

    def __init__(self, symbols: int, order: int, enter: Callable | None = None) -> None:
        self.symbols, self.order, self._enter = symbols, order, enter or _same
        self.start = [0] + [math.comb(symbols + k, k) for k in range(order + 1)]
        self.count = self.start[-1]

    @cached_property
    def monomials(self) -> list[tuple[int, ...]]:
        """The symbols of each monomial."""
        return [
            m for k in range(self.order + 1)
            for m in itertools.combinations_with_replacement(range(self.symbols), k)
        ]

    @cached_property
    def _into(self) -> list[list[int]]:
        """For each monomial a: where its products with the first monomials go."""
        place = {m: i for i, m in enumerate(self.monomials)}
        return [
            [place[tuple(sorted(a + b))] for b in self.monomials if len(a) + len(b) <= self.order]
            for a in self.monomials
        ]

    def part(self, f: torch.Tensor, degree: int) -> torch.Tensor:
        """The coefficients of one degree."""
        return f[1:] if self.order == degree == 1 else f[self.start[degree]: self.start[degree + 1]]

    def scaled(self, f: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """f times numbers [B, ...] (or of a shape that is broadcast to it)."""
        if self._enter is _same or not by.requires_grad:
            return f * by
        return torch.cat((f[:1] * by, f[1:] * self._enter(by)))

    def multiply(
        self, f: torch.Tensor, g: torch.Tensor, product: Callable = torch.mul
    ) -> torch.Tensor:
        """The product, truncated.

        Args:
            f, g: coefficients [M, B, ...].
            product: any bilinear function of two tensors [..., B, ...].
        """
        if self.order == 1 and self._enter is _same and not torch.is_grad_enabled():
            if len(f) < len(g):  # the longer one is written over
                f, g, product = g, f, partial(_swapped, product)
            out = product(f, g[:1])
            out[1 : len(g)] += product(f[:1], g[1:])
            return out
        constant = product(f[:1], g[:1])
        if self.order == 1:
            enter = self._enter
            linear = padded(product(f[1:], enter(g[:1])), product(enter(f[:1]), g[1:]))
            return torch.cat((constant, sum(linear)))
        out = product(f[:1], g)
        for a in range(1, self.count):
            to = torch.tensor(self._into[a], device=f.device)
            out = out.index_add(0, to, product(f[a : a + 1], g[: len(to)]))
        return out


def _swapped(product: Callable, g: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    return product(f, g)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def plus(f: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """f plus numbers [B, ...] (or of a shape that is broadcast to it); may overwrite f, which must
    be new."""
    if torch.is_grad_enabled() and (f.requires_grad or number.requires_grad):
        return torch.cat((f[:1] + number, f[1:]))
    f[0] += number
    return f


def padded(*f: torch.Tensor) -> list[torch.Tensor]:
    """Coefficients with as many monomials as the longest has (affine forms)."""
    most = max(len(x) for x in f)
    return [
        x if len(x) == most else torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:])))
        for x in f
    ]


def excess(a: Terms, b: Terms, order: int) -> torch.Tensor:
    """Bound of what a product of two polynomials has beyond a degree: sum of a_m b_n, m + n > p."""
    found = [
        a[m] * b[n] for m in range(len(a)) for n in range(len(b)) if m + n > order
    ]
    return sum(found[1:], found[0])


def compose(
    algebra: Polynomials, u: torch.Tensor, sizes: Terms, taylor: Terms,
    lagrange: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """g(u) by Taylor's formula at u's constant term.

    Args:
        algebra: the polynomials.
        u: [M, B, ...].
        sizes: bounds of the parts of u, by degree.
        taylor: g^(k) / k! at u[0], k = 0 ... p.
        lagrange: S -> bound of |g^(p+1)| / (p+1)! within S of u[0].

    Returns:
        (polynomial, bound of what is beyond it).
    """
    order = algebra.order
    nothing = torch.zeros_like(sizes[0])
    a = [nothing, *sizes[1:]]
    reach = sum(a[1:], nothing)
    moving = torch.cat((torch.zeros_like(u[:1]), u[1:]))
    out = torch.cat((taylor[0].unsqueeze(0), taylor[1] * u[1:]))
    power, size, rest, over = moving, a, nothing, nothing
    for j in range(2, order + 1):
        # `over` bounds what the truncated power lacks of the power
        over = excess(size, a, order) + over * reach
        size = [sum((size[m] * a[k - m] for m in range(k + 1)), nothing) for k in range(order + 1)]
        power = algebra.multiply(moving, power)
        out = out + taylor[j] * power
        rest = rest + taylor[j].abs() * over
    return out, rest + lagrange(reach) * reach ** (order + 1)
