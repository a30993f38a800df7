"""Replicated tensors that are too large to be kept by every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lirpa_megatron.parallel.collectives import Collectives


class RoundRobinTensors:
    """Tensors of which rank r keeps those with index r, r + p, ..., until all are asked for.

    Args:
        collectives: of the p ranks.
        tensors: at least p, the same on every rank, without gradients.
    """

    def __init__(self, collectives: Collectives, tensors: Sequence[torch.Tensor]) -> None:
        p = collectives.size
        self._tp, self._shapes = collectives, [x.shape for x in tensors]
        longest = max(sum(x.numel() for x in tensors[rank::p]) for rank in range(p))
        own = torch.cat([x.flatten() for x in tensors[collectives.rank :: p]])
        self._own = torch.nn.functional.pad(own, (0, longest - len(own)))

    def first(self, count: int) -> list[torch.Tensor]:
        """The first `count` of all tensors, on every rank, in one collective.

        Args:
            count: the same on every rank.
        """
        if count == 0:
            return []
        p = self._tp.size
        sizes = [[shape.numel() for shape in self._shapes[r:count:p]] for r in range(p)]
        longest = max(map(sum, sizes))
        received = self._tp.gather_results(self._own[:longest].unsqueeze(0))
        found = [received] * count
        for r in range(p):
            pieces = received[r, : sum(sizes[r])].split(sizes[r])
            for i, piece in zip(range(r, count, p), pieces, strict=True):
                found[i] = piece.view(self._shapes[i])
        return found
