"""Assigns the rows of a start node to ranks and chunks, and gives their order after gathering.

Only index arithmetic: no values, no communication.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lirpa_megatron.crown.placement import StartRows


@dataclass(frozen=True)
class RowOrder:
    """The rows of a start node in chunks.

    Without `blocks` the ranks share each chunk, which balances their work: under a causal mask late
    rows cost more than early ones. With `blocks`, rank r has rows r n to (r + 1) n. The last chunk
    is padded by repeating the last row.
    """

    rows: StartRows
    limit: int
    """Maximum number of a chunk's rows on one rank."""
    blocks: bool
    gathered_width: int | None
    """Features per rank, if the rows are features that the start node gathers; otherwise None."""
    device: torch.device

    @property
    def is_one_chunk(self) -> bool:
        return self.limit >= self.rows.own

    def chunk(self, first: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Positions of a chunk's rows on the rank, starting at `first`, [rows]; and their indices
        among the S rows for each rank, [p, rows] (None: equal to the positions on every rank)."""
        n, ranks = self.rows.own, self.rows.ranks
        local = torch.arange(first, min(first + self.limit, n), device=self.device)
        if not self.rows.split:
            return local, None
        rank = torch.arange(ranks, device=self.device).unsqueeze(1)
        step, before = (n, 0) if self.blocks else (len(local), (ranks - 1) * first)
        return local, (before + local + rank * step).clamp(max=self.rows.total - 1)

    def in_order(self, found: torch.Tensor) -> torch.Tensor:
        """Brings rows that are concatenated in rank order into the start node's order."""
        if self.gathered_width is not None:
            parts = found.unflatten(0, (self.rows.ranks, -1, self.gathered_width))
            return parts.transpose(0, 1).flatten(0, 2)
        if not self.rows.split:
            return found
        if not self.is_one_chunk and not self.blocks:
            found = found.index_select(0, self._places())
        return found[: self.rows.total]

    def _places(self) -> torch.Tensor:
        """Position of each row in the concatenation of rank 0's n rows, rank 1's, ...: [p n]."""
        ranks, n = self.rows.ranks, self.rows.own
        places = torch.arange(ranks * n, device=self.device).view(ranks, n)
        return torch.cat([chunk.flatten() for chunk in places.split(self.limit, 1)])
