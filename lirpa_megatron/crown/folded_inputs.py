"""Inputs that hardly move become part of the first layer's bias.

Of a box [l, u] let M be the inputs that move, and c and r the middle and the half-width of the
others, which are points or nearly so (decimal numbers that a dtype lacks are enclosed by its two
neighbours). A first layer z = W x + b is, for all x of the box,

    z in W_M x_M + W c + b + [-e, e],        e_j = sum over i not in M of |W_ji| r_i,

so that a row A of z passes A W_M on to M alone, and its lower bound has the term A (W c) - |A| e,
the upper one A (W c) + |A| e. That is exact where r is 0. Elsewhere |A| |W| r takes the place of
|A W| r: never less, and no more than rounding if r is. A product with W takes the M columns of W in
place of all.

Degenerate cases: without others both terms are 0; if nothing moves A has no columns, and the bound
is the constant. Shapes: R rows of A, B boxes, i inputs of which m are in M, o outputs (own features
of a sharded layer, of which A W_M and both terms are this rank's parts of the sums).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from lirpa_megatron.operators.coefficients import IdentityRows, LowerUpper, dense
from lirpa_megatron.operators.context import Visit


@dataclass(frozen=True)
class FoldedInputs:
    """Of the boxes of one call of `compute_bounds`; replicated."""

    leaf: str
    """The input's name."""
    columns: torch.Tensor
    """M in ascending order, [m]."""
    low: torch.Tensor
    """[B, m]; so is `high`."""
    high: torch.Tensor
    middle: torch.Tensor
    """c, [B, i]; 0 in M. So is `radius`, r."""
    radius: torch.Tensor
    _known: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Layer's name -> W c and e, [B, o]."""

    @classmethod
    def of(
        cls, leaf: str, columns: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> FoldedInputs:
        """For boxes [B, i]."""
        middle = low / 2 + high / 2
        # up to the end that is farther from the rounded middle
        radius = torch.maximum(high - middle, middle - low)
        middle, radius = (t.index_fill(1, columns, 0.0) for t in (middle, radius))
        return cls(leaf, columns, low[:, columns], high[:, columns], middle, radius)

    def bias(self, node: Any, A: LowerUpper, visit: Visit) -> LowerUpper:
        """The terms of the others at a first layer: [R, B] of each side; A [R, B, o']."""
        if visit.gathered is not None or node.name not in self._known:
            w, _ = node.weight_and_bias(visit)
            found = self.middle @ w.t(), self.radius @ w.abs().t()
            if visit.gathered is None:
                self._known[node.name] = found
        else:
            found = self._known[node.name]
        out = visit.columns.get(node.name)
        if out is not None:
            found = tuple(t.index_select(1, out) for t in found)
        return LowerUpper(*(
            None if side is None else _term(side, *found, sign)
            for side, sign in ((A.lower, -1), (A.upper, 1))
        ))

    def extreme(self, A: torch.Tensor, sign: int) -> torch.Tensor:
        """min (sign -1) or max (1) of <A, x_M> over the boxes: A [R, B, m] -> [R, B]."""
        A = dense(A)
        ends = A * self.low, A * self.high
        return (torch.minimum(*ends) if sign < 0 else torch.maximum(*ends)).sum(2)


def _term(A: Any, constant: torch.Tensor, error: torch.Tensor, sign: int) -> torch.Tensor:
    if isinstance(A, IdentityRows):
        return (constant + sign * error).index_select(1, A.own % A.shape[-1]).t()
    A = dense(A)
    return torch.einsum("rbo,bo->rb", A, constant) + sign * torch.einsum(
        "rbo,bo->rb", A.abs(), error
    )


def can_fold(graph: Any, leaf: str) -> bool:
    """Whether all that reads an input are layers that can take some of its columns."""
    node = graph[leaf]
    readers = [graph[name] for name in node.output_name]
    return (
        graph.rounding is None and graph.stages is None
        and len(node.output_shape) == 2 and not graph.sharded[leaf]
        and all(
            getattr(n, "leaves_out_columns", False) and node is n.inputs[0]
            and len(n.output_shape) == 2
            for n in readers
        )
    )


@contextlib.contextmanager
def folding(graph: Any, folded: FoldedInputs | None) -> Iterator[None]:
    """While a call of `compute_bounds` by CROWN, without gradients, folds inputs. A that it returns
    is of the columns M alone, and no operator may read affine forms, which want all of it.

    Args:
        graph: a BoundedModule.
        folded: of the boxes of the call; None: it does not.
    """
    object.__setattr__(graph, "folded", folded)
    try:
        yield
    finally:
        object.__setattr__(graph, "folded", None)
