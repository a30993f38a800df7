"""Products of A with a weight of which nearly all numbers are zero, as in networks that take a
minimum of many numbers by ReLUs, or that only select and add.

    o output and i input features        K  most nonzeros of a column of W        N  rows of A

W [o, i] is kept by columns: W[index[j, k], j] = value[j, k] for k < K, and 0 elsewhere. Then
A W [n, j] = sum_k A[n, index[j, k]] value[j, k] takes N i K multiplications in place of N o i, and
the sum is the same up to the order of its terms: terms that are 0 are left out. Columns with fewer
nonzeros are filled up with index 0 and value 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

_LEAST = 2**16
"""Numbers of a weight that are worth a look."""
_LOOKED_AT = 2**10
"""Of these first; where a 16th of them is not zero the weight is not sparse."""
_GAIN = 16
"""Times that a multiplication takes here the time of one of a dense product, at most."""


@dataclass(frozen=True)
class SparseWeight:
    """A weight [o, i] by columns."""

    index: torch.Tensor
    """[i, K]"""
    value: torch.Tensor
    """[i, K]"""
    shape: torch.Size
    count: int
    """Its nonzeros."""

    @classmethod
    def of(cls, w: torch.Tensor) -> SparseWeight | None:
        """The same weight; None if a dense product takes no longer."""
        w = w.detach()
        if w.ndim != 2 or w.numel() < _LEAST:
            return None
        some = w.flatten()[:: w.numel() // _LOOKED_AT | 1]  # odd, across rows
        if int(some.count_nonzero()) * 16 > len(some):
            return None
        if int(w.count_nonzero()) * _GAIN > w.numel():
            return None
        row, column = w.nonzero().unbind(1)
        column, order = column.sort(stable=True)
        row = row[order]
        counts = column.bincount(minlength=w.shape[1])
        most = max(1, int(counts.max()))
        if most * _GAIN > w.shape[0]:
            return None
        first = counts.cumsum(0) - counts
        slot = torch.arange(len(column), device=w.device) - first[column]
        index = torch.zeros(w.shape[1], most, dtype=torch.int64, device=w.device)
        value = w.new_zeros(w.shape[1], most)
        index[column, slot], value[column, slot] = row, w[row, column]
        return cls(index, value, w.shape, len(row))

    def is_still(self, w: torch.Tensor) -> bool:
        """Whether a tensor is this weight: as many nonzeros, and all of these where they were."""
        w = w.detach()
        if (w.shape, w.dtype, w.device) != (self.shape, self.value.dtype, self.value.device):
            return False
        if int(w.count_nonzero()) != self.count:
            return False
        columns = torch.arange(len(self.index), device=w.device)[:, None]
        return torch.equal(
            torch.where(self.value != 0, w[self.index, columns], 0.0), self.value
        )

    def product(
        self, A: torch.Tensor, out: torch.Tensor | None = None, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A [R, ..., o'] W -> [R, ..., i'], without gradients.

        Args:
            A: at the output, of the features `out` [o'] (None: all).
            out: in ascending order.
            into: input features that are wanted [i'] (None: all).
        """
        index, value = self.index, self.value
        if into is not None:
            index, value = index[into], value[into]
        if out is not None:
            place = torch.full(self.shape[:1], -1, device=A.device)
            place[out] = torch.arange(len(out), device=A.device)
            index = place[index]
            value, index = torch.where(index < 0, 0.0, value), index.clamp(min=0)
        if not A.shape[-1] or not A.numel():
            return A.new_zeros(*A.shape[:-1], len(index))
        columns = A.flatten(0, -2).t().contiguous()  # [o', N]; is so already after such a product
        found = F.embedding_bag(index, columns, per_sample_weights=value, mode="sum")
        return found.t().unflatten(0, A.shape[:-1])
