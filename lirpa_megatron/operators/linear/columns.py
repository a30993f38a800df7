"""Linear operators on flat activations [B, n]: move, join, sum and scale columns.

All are exact for IBP and CROWN and replicated on every rank, but for products and quotients with a
single number, which may be sharded. Their constants are inputs of the graph: `index` and `group`
are int64 vectors, `c` is a vector of numbers, or one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.coefficients import LowerUpper, Propagated, dense
from lirpa_megatron.operators.context import Visit
from lirpa_megatron.operators.operator import Operator, boxed


def like(c: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Numbers in a shape; a single one as it is."""
    return c if c.numel() == 1 else c.reshape(shape)


class _Linear(Operator, auto_lirpa.Bound):
    """Base: y = M x (+ c), with one row of M for each column of y."""

    feature_dim = 0

    def check_sharded(self, sharded: Sequence[bool], where: str) -> None:
        if not (isinstance(self, (BoundScaleColumns, BoundDivideColumns)) and (
            self.inputs[1].output_shape.numel() == 1
        )):
            raise NotImplementedError(
                f"{where}: works on columns that are sharded over the ranks: build the layer "
                "before it with gather_output=True"
            )

    def bound_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not offer forward mode")

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The ordered images of both ends; an L1 or L2 ball becomes the box around it."""
        lower, upper = boxed(v[0])
        rest = [constant[0] for constant in v[1:]]
        ends = self.forward(lower, *rest), self.forward(upper, *rest)
        return torch.minimum(*ends), torch.maximum(*ends)


class BoundSelectColumns(_Linear):
    """y = x[:, index]: x [B, n], index [m], y [B, m]; columns may be repeated or left out.

    A_x is A_y summed up at the selected columns, zero elsewhere.
    """

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x.index_select(-1, index)

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, m] -> [R, B, n]."""
        x, index = visit.inputs.views
        chosen, n = index.value, x.output_shape[-1]

        def place(A: Any) -> torch.Tensor:
            A = dense(A)
            return A.new_zeros(*A.shape[:-1], n).index_add(-1, chosen, A)

        return Propagated((A.map(place),))


class BoundSumColumns(_Linear):
    """y_j = sum of the x_i with group_i = j: x [B, n], group [n], y [B, m].

    The transpose of a selection: A_x = A_y[..., group].
    """

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.width = attr["width"]

    def forward(self, x: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0], self.width).index_add(-1, group, x)

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, m] -> [R, B, n]."""
        group = visit.inputs[1].value
        return Propagated((A.map(lambda A: dense(A).index_select(-1, group)),))


class BoundJoinColumns(_Linear):
    """y = [x_1 ... x_k] side by side: x_i [B, n_i], y [B, sum n_i]; A_x_i is a slice of A_y."""

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        return torch.cat(x, dim=-1)

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ends = [boxed(interval) for interval in v]
        return torch.cat([e[0] for e in ends], -1), torch.cat([e[1] for e in ends], -1)

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, sum n_i] -> [R, B, n_i] each."""
        widths = [x.output_shape[-1] for x in visit.inputs.views]
        parts = A.map(lambda A: dense(A).split(widths, dim=-1))
        return Propagated(tuple(
            parts.map(lambda slices, i=i: slices[i]) for i in range(len(widths))
        ))


class BoundShiftColumns(_Linear):
    """y = x + c: A_x = A_y, bias <A_y, c>; x [B, *shape], c [prod(shape)]."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return x + like(c, x.shape[1:])

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, *shape] -> the same, and biases [R, B]."""
        A, value = A.dense(), visit.inputs[1].value
        return Propagated((A,), A.map(lambda A: A.flatten(2).matmul(value)))


class BoundScaleColumns(_Linear):
    """y = c x: A_x = c A_y; shapes as for a shift."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return x * like(c, x.shape[1:])

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, *shape] -> the same shape."""
        value = visit.inputs[1].value
        return Propagated((A.map(lambda A: dense(A) * like(value, A.shape[2:])),))


class BoundDivideColumns(_Linear):
    """y = x / c, c without zeros: A_x = A_y / c; shapes as for a shift."""

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return x / like(c, x.shape[1:])

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, *shape] -> the same shape."""
        value = visit.inputs[1].value
        return Propagated((A.map(lambda A: dense(A) / like(value, A.shape[2:])),))


COLUMN_OPS: dict[str, type[auto_lirpa.Bound]] = {
    f"lirpa_megatron::{cls.__name__.removeprefix('Bound')}": cls
    for cls in (
        BoundSelectColumns, BoundSumColumns, BoundJoinColumns, BoundShiftColumns,
        BoundScaleColumns, BoundDivideColumns,
    )
}
"""Operators of the traced graph -> Bound classes, for `CUSTOM_OPS`."""
