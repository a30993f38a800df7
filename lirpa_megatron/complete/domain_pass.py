"""The backward pass over a batch of domains, on the bound graph of a BoundedModule.

The engine's pass (`crown.backward_pass`) with another step at ReLUs (`split_relu`) and other
functions of one variable (`split_curve`), and boxes of the domains' own. It moves and sums A over
the ranks as every other pass does; bounds of inner nodes are never computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.complete.split_relu import LeastOverBox
from lirpa_megatron.crown.backward_pass import BackwardPass
from lirpa_megatron.crown.chunks import in_turns
from lirpa_megatron.crown.graph import BoundGraph
from lirpa_megatron.crown.placement import PassPlan
from lirpa_megatron.operators.coefficients import LowerUpper, Propagated, RowBounds, dense
from lirpa_megatron.operators.context import CallState, Visit


class DomainPass(BackwardPass):
    """One pass from the output for a batch of domains.

    Args:
        graph, plan: the bound graph and the course of the pass.
        splits: operator's name -> what it is relaxed with (`SplitRelu`, `SplitCurve`).
        low, high: the domains' boxes, [D, inputs].

    After it has run:
        seen: operator's name -> A at its output, [R, D, n], without gradient.
        minimiser: where each row's bound is attained, [R, D, inputs].
        size: of the terms that a bound is the sum of, [R, D].
        A, constant: the rows as functions of the input, [R, D, inputs] and [R, D].
    """

    def __init__(
        self, graph: BoundGraph, plan: PassPlan, splits: Mapping[str, Any],
        low: torch.Tensor, high: torch.Tensor,
    ) -> None:
        super().__init__(graph, plan, plan.start)
        self.splits, self.low, self.high = splits, low, high
        self.seen: dict[str, torch.Tensor] = {}
        self.minimiser: torch.Tensor | None = None
        self.size: torch.Tensor | None = None
        self.A: torch.Tensor | None = None
        self.constant: torch.Tensor | None = None

    def lower(self, C: torch.Tensor) -> torch.Tensor:
        """Lower bounds [R, D] of the rows C [R, D, outputs]."""
        (found,) = in_turns([self.steps(LowerUpper(C, None), keep_A=False)], 1)
        return found.lower

    def _through(
        self, node: auto_lirpa.Bound, A: LowerUpper, visit: Visit, alpha: Any, index: Any
    ) -> Propagated:
        split = self.splits.get(node.name)
        if split is None:
            return super()._through(node, A, visit, alpha, index)
        self.seen[node.name] = A.lower.detach().flatten(2)
        return split.bound_backward(A)

    def _concretize(self, leaf: auto_lirpa.Bound, A: LowerUpper, result: RowBounds) -> None:
        lower = dense(A.lower).flatten(2)
        self.A, self.constant = lower.detach(), result.lower.detach()
        least, self.minimiser, size = LeastOverBox.apply(lower, self.low, self.high)
        self.size = size + self.constant.abs()
        result.lower = result.lower + least


@contextlib.contextmanager
def passes(graph: Any, active_columns: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While passes over domains run: a call's state of their own.

    Args:
        graph: a BoundedModule.
        active_columns: as in `CallState`; of all domains together.
    """
    before = graph.call
    call = CallState(method="CROWN", active_columns=dict(active_columns))
    object.__setattr__(graph, "call", call)
    try:
        yield
    finally:
        object.__setattr__(graph, "call", before)
