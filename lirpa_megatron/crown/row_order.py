"""Which rows of a start node each rank carries, chunk by chunk, and their order once gathered.

Index arithmetic alone: no values, no communication.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lirpa_megatron.crown.placement import StartRows


@dataclass(frozen=True)
class RowOrder:
    """The rows of a start node in chunks.

    Without `blocks` the ranks share each chunk, so that all do the same: under a causal mask late
    rows are more work than early ones. With them rank r has rows r n to (r + 1) n. The last rows
    are filled up with repetitions of the last one.
    """

    rows: StartRows
    limit: int
    """Most rows of a chunk on a rank."""
    blocks: bool
    gathered_width: int | None
    """The width of a rank's features, where the rows are those of features that the start node
    gathers; else None."""
    device: torch.device

    @property
    def is_one_chunk(self) -> bool:
        return self.limit >= self.rows.own

    def chunk(self, first: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The places of a chunk's rows on the rank, from `first` on, [rows]; and which rows of S
        they are on each rank, [p, rows] (None: the same, on every rank)."""
        n, ranks = self.rows.own, self.rows.ranks
        local = torch.arange(first, min(first + self.limit, n), device=self.device)
        if not self.rows.split:
            return local, None
        rank = torch.arange(ranks, device=self.device).unsqueeze(1)
        step, before = (n, 0) if self.blocks else (len(local), (ranks - 1) * first)
        return local, (before + local + rank * step).clamp(max=self.rows.total - 1)

    def in_order(self, found: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, one rank's after the other's, as the start node has them."""
        if self.gathered_width is not None:
            parts = found.unflatten(0, (self.rows.ranks, -1, self.gathered_width))
            return parts.transpose(0, 1).flatten(0, 2)
        if not self.rows.split:
            return found
        if not self.is_one_chunk and not self.blocks:
            found = found.index_select(0, self._places())
        return found[: self.rows.total]

    def _places(self) -> torch.Tensor:
        """Where each row is among the n rows of rank 0, those of rank 1, ...: [p n]."""
        ranks, n = self.rows.ranks, self.rows.own
        places = torch.arange(ranks * n, device=self.device).view(ranks, n)
        return torch.cat([chunk.flatten() for chunk in places.split(self.limit, 1)])
