"""The positions that a pass carries: A is zero, or multiplies constants, at all others.

Below a causal mask a row of position t has nothing at later positions, at no node of the pass. And
at positions before the first word that moves (`forward.windows`) nodes are constants, so that A
there goes into the bias, <A, value>, where it arises. A chunk of rows of positions below `end`
therefore has A [R, B, end - first, F] in the place of [R, B, T, F]:

==================================  =========================  ===============================
operator                            A that it is given         A that it returns
==================================  =========================  ===============================
position by position                [R, B, end - first, F]     the same positions
scores                              [R, B, n, end - first, K]  queries alike, keys from 0 on
softmax(s) v                        [R, B, end - first, F]     scores [.., end - first, K],
                                                               values from 0 on
others                              all positions, with zeros  all positions
==================================  =========================  ===============================

Which nodes have such windows (`forward.windows`) and whether masks are causal follows from the
graph and from constants, the same on every rank. Not with gradients, alpha, outward rounding,
pipeline stages, and where the caller wants A.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.crown.graph import BoundGraph
from lirpa_megatron.forward.propagation import in_order
from lirpa_megatron.forward.windows import cut_nodes
from lirpa_megatron.operators.coefficients import LowerUpper, dense


@dataclass(frozen=True)
class PassWindow:
    """Of one chunk of rows."""

    first: int
    end: int
    length: int
    cut: frozenset[str]
    """Names of the nodes that have windows."""

    @property
    def count(self) -> int:
        return self.end - self.first

    def of(self, node: Any) -> tuple[int, int] | None:
        """(first, end) of an operator that is given these positions alone; None: all."""
        taken = node.name in self.cut and getattr(node, "takes_positions", False)
        return (self.first, self.end) if taken else None

    def is_sum(self, node: Any) -> bool:
        """Whether the node is a sum of two nodes that have its window, so that A is A at both."""
        return type(node).__name__ == "BoundAdd" and node.name in self.cut and all(
            x.name in self.cut and x.output_shape == node.output_shape for x in node.inputs
        )

    def rows(self, A: Any) -> Any:
        """Rows at the start node, IdentityRows of all positions -> of the window."""
        before = self.first * A.shape[-1]
        every = None if A.all is None else A.all - before
        shape = (*A.shape[:2], self.count, A.shape[-1])
        return replace(A, own=A.own - before, all=every, shape=shape)

    def entering(self, node: Any, A: Any) -> Any:
        """A at a node, one side, as its operator is given it."""
        if node.name not in self.cut or self.of(node) or self.is_sum(node):
            return A
        return self._whole(dense(A))

    def leaving(
        self, node: Any, index: int, A: LowerUpper
    ) -> tuple[LowerUpper, LowerUpper | None]:
        """A at an input of a node that has been visited, in the input's window; and the A there
        [R, B, first, F] that multiplies constants, if any."""
        x = node.inputs[index]
        if x.name not in self.cut and (node.name not in self.cut or self.of(node) is None):
            return A, None
        keys = index in getattr(node, "reads_all_positions", ())
        taken = self.is_sum(node) or self.of(node) is not None
        if taken and not keys:
            if len(x.output_shape) == 4:  # scores: the keys that these queries see
                return A.map(lambda A: _of_length(A, -1, self.end)), None
            return A, None
        if x.name not in self.cut:
            return A.map(lambda A: _of_length(dense(A), 2, x.output_shape[1])), None
        window = A.map(
            lambda A: _of_length(dense(A), 2, self.end).narrow(2, self.first, self.count)
        )
        still = A.map(lambda A: dense(A).narrow(2, 0, self.first)) if self.first else None
        return window, still

    def _whole(self, A: torch.Tensor) -> torch.Tensor:
        """With zeros at the other positions."""
        return F.pad(A, (0, 0, self.first, self.length - self.end))


def _of_length(A: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """The first `length` along a dimension, filled up with zeros."""
    dim, missing = dim % A.ndim, length - A.shape[dim]
    if missing <= 0:
        return A.narrow(dim, 0, length) if missing else A
    return torch.cat((A, A.new_zeros(*A.shape[:dim], missing, *A.shape[dim + 1:])), dim)


class PassWindows:
    """Of the passes of one bound graph."""

    def __init__(self, graph: BoundGraph) -> None:
        self.graph = graph

    def of_start(
        self, start: Any, ends: torch.Tensor | None, first: int
    ) -> PassWindow | None:
        """The window of a chunk of rows from a start node; None: all positions.

        Args:
            start: where the pass begins.
            ends: the largest index of a row into its numbers [T, F], and minus the least, of all
                ranks; None: rows of a specification.
            first: how many positions stand still.
        """
        cut = self._cut()
        if cut is None:
            return None
        length, end = cut[1], cut[1]
        if start.name in cut[0]:
            if ends is None or len(start.output_shape) != 3:
                return None
            most, least = (int(x) // start.output_shape[-1] for x in (ends[0], -ends[1]))
            first, end = min(first, least), most + 1
        return PassWindow(first, end, length, cut[0]) if first or end < length else None

    def _cut(self) -> tuple[frozenset[str], int] | None:
        """(nodes with windows, number of positions), once a call."""
        graph, call = self.graph, self.graph.call
        if call.causal is False:
            call.causal = None
            if graph.rounding is None and graph.stages is None and graph.below is None:
                call.causal = self._causal()
        if call.causal is None or graph.return_A:
            return None
        if any(x.opt_stage in ("init", "opt", "reuse") for x in graph.optimizable_activations):
            return None
        return None if torch.is_grad_enabled() else call.causal

    def _causal(self) -> tuple[frozenset[str], int] | None:
        graph = self.graph
        order = in_order(graph[graph.final_node_name])
        leaves = [n for n in order if getattr(n, "perturbation", None) is not None]
        shapes = {tuple(leaf.output_shape) for leaf in leaves}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or shape[1] < 2:
            return None
        if any(graph.context.sharded[leaf.name] for leaf in leaves):
            return None
        cut = cut_nodes(order, frozenset(leaf.name for leaf in leaves), shape[1], 0)
        if cut is None:
            return None
        for node in order:
            if getattr(node, "reads_centered", None) is not None and node.name in cut:
                masked = node.masked() if len(node.inputs) > 2 else None
                if masked is None or masked.shape[-2:] != (shape[1], shape[1]):
                    return None
                sees = ~masked
                if bool(sees.triu(1).any()) or not bool(sees.any(-1).all()):
                    return None  # of a query that sees no key all have weight
        return cut, shape[1]
