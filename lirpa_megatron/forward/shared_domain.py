"""Bounds of affine forms of which each rank has the coefficients of its own symbols.

The bounds are those of all ranks' coefficients together, the same on all ranks: elementwise bounds
are sums (maxima) over the symbols, so each rank adds up its own and the ranks add their sums.
Norms of vectors look at all symbols of a token at once, so each rank looks at some tokens.
"""

from __future__ import annotations

import torch
from torch.linalg import vector_norm

from lirpa_megatron.forward.domains import Domain
from lirpa_megatron.forward.polynomials import Polynomials
from lirpa_megatron.forward.shares import Shares
from lirpa_megatron.operators.numerics import safe_root


class SharedDomain(Domain):
    """A domain, as seen by the coefficients of a rank's own symbols.

    Args:
        domain: of all symbols; affine forms alone.
        shares: which symbols are the rank's.
    """

    def __init__(self, domain: Domain, shares: Shares) -> None:
        self.groups, self.order, self._shares = domain.groups, domain.order, shares
        self.algebra = Polynomials(domain.symbols, domain.order, shares.enter)

    def extend(self, symbols: int, balls: int = 0) -> None:
        raise AssertionError("errors become symbols of the whole domain")

    def _support(self, part: torch.Tensor) -> torch.Tensor:
        """See `Domain`: [n, B, ...] -> [B, ...].

        Of a box and of a simplex' mean the ranks' terms are added; of an L2 ball their squares, for
        each copy; of an L1 ball and of a simplex' corners the largest is taken.
        """
        linear, squares, largest = part.new_zeros(part.shape[1:]), [], []
        first = 0
        for group in self.groups:
            own = part[self._shares.own(first, group.symbols)]
            if group.kind == "box":
                linear = linear + vector_norm(own, 1, 0)
                first += group.symbols
                continue
            for _ in range(group.count):
                own = part[self._shares.own(first, group.size)]
                first += group.size
                if group.kind == "l2":
                    squares.append(vector_norm(own, 2, 0).square())
                    continue
                if group.kind == "simplex":
                    linear = linear - own.sum(0) / (group.size + 1)
                if not len(own):  # a rank may have no symbol of a copy
                    largest.append(torch.zeros_like(linear))
                elif group.kind == "l1":
                    largest.append(own.abs().amax(0))
                else:
                    largest.append(own.amax(0).clamp(min=0))
        sums = self._shares.ranks.total(torch.stack((linear, *squares)))
        total = sums[0] + safe_root(sums[1:]).sum(0)
        if largest:
            total = total + self._shares.ranks.most(torch.stack(largest)).sum(0)
        return total

    def _linear_norm(self, part: torch.Tensor) -> torch.Tensor:
        return self._shares.by_tokens(part, super()._linear_norm)
