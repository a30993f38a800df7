"""What rules exchange between ranks: sums over the features of a sharded node.

Replicated numbers that a rank uses on its own features pass `enter`, whose gradient is summed over
the ranks; `total` makes replicated numbers of each rank's part of a sum.
"""

from __future__ import annotations

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
