"""Linear forms of an operator's inputs that a pass bounds in addition to their coordinates.

A norm needs the range of <v, x> for a few vectors v. A separate backward pass for v gives a much
tighter range than bounds of x's coordinates do, because the remainders of the coordinates are not
all extreme at the same point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.graph import Passes
from lirpa_megatron.operators.affine.form import LinearFormBounds
from lirpa_megatron.operators.numerics import without_nan
from lirpa_megatron.operators.operator import Operator


class DirectionRows:
    """Rows that each read one vector of a node; built on request.

    Args:
        vectors: v [R, B, L, d] for a node of L vectors of d numbers.
        shape: shape of the node, without the batch.

    Row r L + i is <v_ri, x_i>.
    """

    def __init__(self, vectors: torch.Tensor, shape: Sequence[int]) -> None:
        self.vectors = vectors
        self.shape = (vectors.shape[0] * vectors.shape[2], vectors.shape[1], *shape)

    def index_select(self, dim: int, rows: torch.Tensor) -> torch.Tensor:
        """Some of the rows, [n, B, *node shape]."""
        v = self.vectors
        r, i = rows // v.shape[2], rows % v.shape[2]
        C = v.new_zeros(len(rows), *v.shape[1:])
        C[torch.arange(len(rows), device=C.device), :, i] = v[r, :, i]
        return C.reshape(len(rows), *self.shape[1:])

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all rows, [B, R L, ...] -> [R, B, L, ...]."""
        return values.unflatten(1, (-1, self.vectors.shape[2])).transpose(0, 1)


class Directions:
    """Bounds such rows by backward passes on one bound graph."""

    def __init__(self, graph: Passes) -> None:
        self.graph, self.tp = graph, graph.context.collectives

    def along(
        self, node: auto_lirpa.Bound, vectors: torch.Tensor, shared: bool = False
    ) -> LinearFormBounds:
        """Bounds <v, x_i> for the vectors x_i of an intermediate node, in a pass without alpha.

        Args:
            node: of L vectors of d numbers; sharded: the rank's own L.
            vectors: v [R, B, L, d]; for a replicated node, the same on every rank.
            shared: whether gradients of the vectors of a replicated node are already summed over
                the ranks.

        Returns:
            [R, B, L] numbers, the same on every rank for a replicated node.
        """
        if not self.graph.context.sharded[node.name] and not shared:
            vectors = self.tp.copy_to(vectors)
        rows = DirectionRows(vectors, node.output_shape[1:])
        with self.graph.intermediate.without_alpha():
            found = self.graph.schedule.run(node, rows, self.tp.size > 1, form=True, aside=True)
        lower, upper = without_nan(found.lower.t(), found.upper.t())
        known = LinearFormBounds(lower, upper, found.form).mapped(rows.place)
        known.rows = vectors
        return known

    @staticmethod
    def are_few(S: int, d: int) -> bool:
        """Whether the S rows of a pass are few compared with a vector's d numbers."""
        return 4 * S <= d

    def answer(
        self, S: int, spec_sharded: bool
    ) -> Callable[[auto_lirpa.Bound, torch.Tensor], LinearFormBounds | None]:
        """`along` for the operators that a pass of S rows visits, if S is small compared with d.

        Args:
            S: number of rows on all ranks together, so that the decision is the same at every
                tensor-parallel size.
            spec_sharded: whether each rank carries its own rows: a share of them, or those of its
                block of a start node that gathers features.
        """

        def answer(node: auto_lirpa.Bound, vectors: torch.Tensor) -> LinearFormBounds | None:
            if not self.are_few(S, vectors.shape[-1]):
                return None
            if not spec_sharded:
                return self.along(node, vectors)
            # Each rank takes its own rows from the results of all ranks.
            found = self.along(node, self.tp.gather_rows(vectors), shared=True)
            first, n = self.tp.rank * len(vectors), len(vectors)
            return found.mapped(lambda x: self.tp.copy_to(x)[first : first + n])

        return answer


class CenteredRows:
    """The rows e_ij - sum_k p_ik e_ik of attention scores; built on request.

    Args:
        weights: p [B, n, T, T], clean softmax weights.
        keep: [n, T, T], pairs that are unmasked in at least one sample of the batch.
    """

    def __init__(self, weights: torch.Tensor, keep: torch.Tensor) -> None:
        self.weights = weights
        self.pairs = keep.nonzero(as_tuple=True)
        self.shape = (len(self.pairs[0]), *weights.shape)

    def index_select(self, dim: int, rows: torch.Tensor) -> torch.Tensor:
        """Some of the rows, [R, B, n, T, T]."""
        h, i, j = (index[rows] for index in self.pairs)
        C = self.weights.new_zeros(len(rows), *self.shape[1:])
        each = torch.arange(len(rows), device=C.device)
        C[each, :, h, i] = -self.weights[:, h, i].transpose(0, 1)
        C[each, :, h, i, j] += 1
        return C

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the rows, [..., R] -> [..., n, T, T], 0 elsewhere."""
        placed = values.new_zeros(*values.shape[:-1], *self.weights.shape[1:])
        placed[(..., *self.pairs)] = values
        return placed


def bound_centered(
    graph: Passes, node: auto_lirpa.Bound, attend: Operator, first: int = 0
) -> LinearFormBounds:
    """Bounds scores relative to their weighted mean: t_ij = s_ij - sum_k p_ik s_k; 0 where masked.

    Adding a constant to all scores of a query does not change its softmax, and most of the scores'
    range is such a constant. Each rank bounds the rows of its own heads, without masked pairs.

    Args:
        graph: the bound graph.
        node: the scores.
        attend: the operator that reads them.
        first: how many queries stand still: theirs are the clean scores.
    """
    p, masked = attend.clean_weights(), attend.masked()
    keep = (~masked).any(0)
    keep[:, :first] = False
    rows = CenteredRows(p, keep)
    form = None
    if rows.shape[0]:
        ranks = graph.context.collectives.size
        found = graph.schedule.run(node, rows, ranks > 1, form=True)
        lower, upper = without_nan(rows.place(found.lower.t()), rows.place(found.upper.t()))
        form = None if found.form is None else found.form.view(rows.place)
    else:  # of queries that see no key, on every rank
        lower, upper = torch.zeros_like(p), torch.zeros_like(p)
    if first:
        s, own = attend.value_of(0)[..., :first, :], p[..., :first, :]
        still = (s - (own * s).sum(-1, keepdim=True)).masked_fill(masked[..., :first, :], 0.0)
        for x in (lower, upper) if form is None else (lower, upper, form.center):
            x[..., :first, :] = still
    return LinearFormBounds(lower, upper, form, p)


def reader_of_scores(node: auto_lirpa.Bound, readers: Sequence[Any]) -> Any:
    """The attention that reads the node as its scores; None if the node has other readers."""
    if len(readers) != 1:
        return None
    index = getattr(readers[0], "reads_centered", None)
    return readers[0] if index is not None and readers[0].inputs[index] is node else None
