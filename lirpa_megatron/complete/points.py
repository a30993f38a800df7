"""Counterexamples: points where bounds are attained, moved by gradient steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lirpa_megatron.complete.agreement import from_rank_zero
from lirpa_megatron.parallel.collectives import Collectives


@dataclass(frozen=True)
class Walks:
    """Looks for points where a goal fails.

    Args:
        forward: x [P, inputs] -> y [P, outputs], both replicated; its inner layers may be sharded.
        tp: the ranks that hold the model; rank 0's points and decisions count.
        steps: of each walk.
        most: walks at once.
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    tp: Collectives
    steps: int = 12
    most: int = 16

    def closest(
        self, C: torch.Tensor, thresholds: torch.Tensor, low: torch.Tensor, high: torch.Tensor,
        points: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each walk the point at which the goal holds least.

        Args:
            C, thresholds: the goal's rows, [R, outputs] and [R].
            low, high: its box, [inputs].
            points: where walks begin, the most promising first: [P, inputs].

        Returns:
            points [at most `most`, inputs] and their margins, of the best row each: [P]; smallest
            margins first. At a margin of at most 0 the goal fails.
        """
        x = points[: self.most].clamp(low, high)
        best, margin = x, None
        width = high - low
        for step in range(self.steps + 1):
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                y = self.forward(x)
                rows = y.to(thresholds.dtype) @ C.to(thresholds.dtype).t() - thresholds
                found = rows.amax(1)
                (slope,) = torch.autograd.grad(found.sum(), x)
            found = found.detach().nan_to_num(nan=torch.inf)
            if margin is None:
                margin = found
            else:
                closer = found < margin
                best = torch.where(closer[:, None], x.detach(), best)
                margin = torch.where(closer, found, margin)
            if step == self.steps:
                break
            rate = 0.3 * 0.7**step
            x = (x.detach() - rate * width * slope.sign()).clamp(low, high)
        margin, order = margin.sort()
        both = torch.cat([margin[:, None], best[order].to(margin)], 1)
        both, _ = from_rank_zero(self.tp, both, False)
        return both[:, 1:].to(points), both[:, 0]
