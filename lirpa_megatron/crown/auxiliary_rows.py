"""Rows that operators have bounded besides those of their inputs' coordinates.

A norm needs the range of <v, x> for a few vectors v. What is known of x coordinate by coordinate
leaves much more open than a pass of v's own, because the coordinates' remainders do not all lie at
their ends at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.affine_forms import without_nan
from lirpa_megatron.operators.affine.form import Known


class DirectionRows:
    """Rows that each read one vector of a node, built when they are asked for.

    Args:
        vectors: v [R, B, L, d] for a node of L vectors of d numbers.
        shape: of the node, without the batch.

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
    """Bounds such rows by passes of one BoundedModule.

    Args:
        module: the BoundedModule (its `passes`, `layout`, `intermediate` and `sharded` marks).
    """

    def __init__(self, module: Any) -> None:
        self.module, self.tp = module, module.layout.collectives

    def along(self, node: auto_lirpa.Bound, vectors: torch.Tensor, shared: bool = False) -> Known:
        """What a pass finds of <v, x_i> for the vectors x_i of an intermediate node; no alpha.

        Args:
            node: of L vectors of d numbers; sharded: the rank's own L.
            vectors: v [R, B, L, d]; of a replicated node the same on every rank.
            shared: whether their gradients, on a replicated node, are summed up already.

        Returns:
            [R, B, L] numbers, the same on every rank for a replicated node.
        """
        if not self.module.sharded[node.name] and not shared:
            vectors = self.tp.copy_to(vectors)
        rows = DirectionRows(vectors, node.output_shape[1:])
        with self.module.intermediate.without_alpha(), self.module.layout.set_aside():
            found = self.module.passes.run(node, rows, self.tp.size > 1, form=True, aside=True)
        lower, upper = without_nan(found.lower.t(), found.upper.t())
        return Known(lower, upper, found.form).mapped(rows.place)

    def know(self, S: int, split: bool) -> Callable[[auto_lirpa.Bound, torch.Tensor], Known | None]:
        """`along` for the operators on the way of S rows, where these are few beside a vector's.

        Args:
            S: of all ranks together; what is decided by it is the same at every size.
            split: whether each rank has its own of them.
        """

        def know(node: auto_lirpa.Bound, vectors: torch.Tensor) -> Known | None:
            if 4 * S > vectors.shape[-1] or self.module.sharded[node.name] or not node.inputs:
                return None
            if not split:
                return self.along(node, vectors)
            # Each rank reads its own of what all have found.
            found = self.along(node, self.tp.gather_rows(vectors), shared=True)
            first, n = self.tp.rank * len(vectors), len(vectors)
            return found.mapped(lambda x: self.tp.copy_to(x)[first : first + n])

        return know
