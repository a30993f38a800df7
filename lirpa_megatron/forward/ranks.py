"""What rules exchange between ranks: sums over the features of a sharded node.

Replicated numbers that a rank uses on its own features pass `enter`, whose gradient is summed over
the ranks; `total` makes replicated numbers of each rank's part of a sum.
"""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.parallel.collectives import Collectives


class Ranks:
    """The ranks, as seen from a node.

    Args:
        collectives: of the model's tensor-parallel group.
        sharded: whether the node's features are sharded; otherwise nothing is exchanged.
    """

    def __init__(self, collectives: Collectives, sharded: bool) -> None:
        self._tp, self._apart = collectives, sharded and collectives.size > 1
        self.size = collectives.size if sharded else 1
        self.rank = collectives.rank if sharded else 0

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """A replicated value, for this rank's features."""
        return self._tp.copy_to(x) if self._apart else x

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' x, replicated."""
        return self._tp.reduce_from(x) if self._apart else x

    def any(self, x: torch.Tensor) -> bool:
        """Whether a flag is set on any rank."""
        return bool(self._tp.largest(x.double()) if self._apart else x)

    def most(self, x: torch.Tensor) -> torch.Tensor:
        """The largest of all ranks' x, elementwise, replicated."""
        return self._tp.gather_results(x.unsqueeze(0)).amax(0) if self._apart else x


def sum_twice_differentiable(x: torch.Tensor, collectives: Collectives) -> torch.Tensor:
    """`Collectives.reduce_from` whose gradient has the right gradient, too.

    The adjoint of a Row layer is a copy to all ranks, so a gradient of the adjoint is a sum over
    them. Megatron's mapping has the identity as its backward, and nothing behind it.
    """
    return _Sum.apply(x, collectives) if collectives.size > 1 else x


class _Sum(torch.autograd.Function):
    """The sum over ranks; backward `_Copy`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, collectives: Collectives) -> torch.Tensor:
        ctx.collectives = collectives
        return collectives.reduce_from(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Copy.apply(grad, ctx.collectives), None


class _Copy(torch.autograd.Function):
    """The identity; backward `_Sum`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, collectives: Collectives) -> torch.Tensor:
        ctx.collectives = collectives
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Sum.apply(grad, ctx.collectives), None
