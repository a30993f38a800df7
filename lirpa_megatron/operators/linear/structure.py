"""Operators that move, repeat, join or sum numbers within each sample: linear, so exact.

    Rearrange   y[b, i] = x[b, index[i]]          reshape, slice, gather, transpose, pad, ...
    Sum         y[b, i] = scale * sum_k x[b, ...]  sum and mean over dimensions other than the batch
    Concat      y[b] = [x_1[b] ... x_n[b]]         along a dimension other than the batch

All coefficients are nonnegative, so IBP maps lower bounds to lower bounds and upper to upper
bounds; it is exact for each output number. CROWN's A_x is the transposed map of A_y. Degenerate and
infinite intervals pass through unchanged; sums get no rounding margin.

In IBP, an L1 or L2 ball at the model's input becomes the box around it.

Sharded values (the rank's own features on the last dimension) are allowed if the last dimension is
unchanged; `sharded_nodes` refuses other cases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.errors import UserError
from lirpa_megatron.operators.coefficients import LowerUpper, Propagated, dense
from lirpa_megatron.operators.context import GraphContext, Visit
from lirpa_megatron.operators.operator import Operator, boxed


class _Structure(Operator, auto_lirpa.Bound):
    """Base: all features are treated in the same way, sharded or not.

    Attributes:
        boxes_balls: IBP replaces a ball at the model's input by the box around it.
        keeps_features: whether the last dimension is unchanged.
    """

    feature_dim = -1
    keeps_features = False
    boxes_balls = True

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.context: GraphContext = self.options["context"]

    def check_sharded(self, sharded: Sequence[bool], where: str) -> None:
        if not self.keeps_features:
            raise NotImplementedError(
                f"{where}: slices, joins or adds up features that are sharded over the ranks: "
                "build the layer before it with gather_output=True"
            )

    def bound_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not offer forward mode")


class BoundRearrange(_Structure):
    """y[b].flatten()[i] = x[b].flatten()[index[i]], y [B, *shape].

    Attributes of the graph's node: `shape`, the shape of y without the batch; `features`, 1 if x
    and y have the same last dimension and index addresses only the dimensions before it; `batched`,
    0 for a constant without a batch, where the map covers all dimensions.

    Inputs: x; index [prod(shape)] int64 if numbers change places (otherwise a reshape). An index
    one past the last number stands for `fill` (padding).

    Backward: A_x is A_y summed up at index. Padding adds fill times its A_y to the bias.
    """

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.shape = [int(n) for n in attr["shape"]]
        self.keeps_features = bool(attr["features"])
        self.batched, self.fill = bool(attr["batched"]), float(attr["fill"])
        self.pads = bool(attr["pads"])

    def forward(self, x: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        first = 1 if self.batched else 0
        return self._moved(x, index, first)

    def _moved(self, x: torch.Tensor, index: torch.Tensor | None, first: int) -> torch.Tensor:
        """The map on the dimensions from `first` on (not the last, if features are unchanged)."""
        last = (x.shape[-1],) if self.keeps_features else ()
        shape = self.shape[:-1] if self.keeps_features else self.shape
        x = x.reshape(*x.shape[:first], -1, *last)
        if self.pads:
            edge = x.new_full((*x.shape[:first], 1, *last), self.fill)
            x = torch.cat((x, edge), dim=first)
        if index is not None:
            x = x.index_select(first, index)
        return x.reshape(*x.shape[:first], *shape, *last)

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds of y."""
        index = [v[1][0]] if len(v) > 1 else []
        lower, upper = boxed(v[0])
        return self.forward(lower, *index), self.forward(upper, *index)

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, *shape] -> [R, B, *x shape], and the bias [R, B] of padding."""
        index = visit.inputs[1].value if len(visit.inputs) > 1 else None
        into = list(visit.inputs[0].output_shape[1:])
        width = math.prod(into[:-1] if self.keeps_features else into)

        def flat(A: torch.Tensor) -> torch.Tensor:
            last = (A.shape[-1],) if self.keeps_features else ()
            return A.reshape(*A.shape[:2], -1, *last)

        def back(A: torch.Tensor) -> torch.Tensor:
            A_y = flat(A)
            last = A_y.shape[3:]
            if index is not None:
                zeros = A_y.new_zeros(*A_y.shape[:2], width + self.pads, *last)
                A_y = zeros.index_add(2, index, A_y)[:, :, :width]
            return A_y.reshape(*A.shape[:2], *(into[:-1] if last else into), *last)

        def padding(A: torch.Tensor) -> torch.Tensor:
            return self.fill * flat(A)[:, :, index == width].flatten(2).sum(-1)

        A = A.dense()
        bias = A.map(padding) if self.pads and self.fill else LowerUpper()
        return Propagated((A.map(back),), bias)


class BoundSum(_Structure):
    """y = scale * sum of x over `dims`: x [B, ...]; `dims` stay with size 1 if `keepdim`.

    Backward: A_x is scale A_y, broadcast over `dims`.
    """

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.dims = sorted(int(d) for d in attr["dims"])
        self.keepdim, self.scale = bool(attr["keepdim"]), float(attr["scale"])
        self.keeps_features = not attr["last"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(self.dims, keepdim=self.keepdim) * self.scale

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds of y."""
        lower, upper = boxed(v[0])
        return self.forward(lower), self.forward(upper)

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, ...] -> [R, B, *x shape]."""
        into = list(visit.inputs[0].output_shape[1:])

        def back(A: torch.Tensor) -> torch.Tensor:
            A = dense(A) * self.scale
            if not self.keepdim:
                for dim in self.dims:
                    A = A.unsqueeze(dim + 1)
            sizes = [*into[:-1], A.shape[-1] if self.keeps_features else into[-1]]
            return A.expand(*A.shape[:2], *sizes)

        return Propagated((A.map(back),))


class BoundConcat(_Structure):
    """y = the inputs concatenated along `dim` (not the batch); constants may have a batch of 1.

    Backward: each input gets its slice of A_y; a constant's slice contributes to the bias.
    """

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.dim = int(attr["dim"])
        self.keeps_features = not attr["last"]

    def check_sharded(self, sharded: Sequence[bool], where: str) -> None:
        super().check_sharded(sharded, where)
        check_alike(self, sharded, where)

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        batch = max(part.shape[0] for part in x)
        for part in x:
            self._check_batch(part, batch)
        return torch.cat([part.expand(batch, *part.shape[1:]) for part in x], self.dim)

    @staticmethod
    def _check_batch(part: torch.Tensor, batch: int) -> None:
        if part.shape[0] not in (1, batch):
            raise UserError(
                f"the model joins constants made for a batch of {part.shape[0]} with values of a "
                f"batch of {batch}: build the BoundedModule with an example of the batch to bound"
            )

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds of y."""
        lower, upper = zip(*(boxed(part) for part in v), strict=True)
        return self.forward(*lower), self.forward(*upper)

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, ...] -> one for each input, and the constants' bias [R, B]."""
        parts = visit.inputs.views
        widths = [part.output_shape[self.dim] for part in parts]
        A = A.map(lambda A: dense(A).split(widths, self.dim + 1))
        As, bias = [], LowerUpper(0, 0)
        for i, part in enumerate(parts):
            own = A.map(lambda slices, i=i: slices[i])
            if part.perturbed:
                As.append(own)
                continue
            As.append(LowerUpper())
            value = part.value
            self._check_batch(value, own.either.shape[1])
            bias.add(*own.map(lambda A, v=value: (A * v.to(A)).flatten(2).sum(-1)))
        return Propagated(tuple(As), bias)


def check_alike(node: auto_lirpa.Bound, sharded: Sequence[bool], where: str) -> None:
    """Refuses a mix of sharded and replicated values."""
    of_inputs = [s for x, s in zip(node.inputs, sharded, strict=True) if x.from_input]
    if len(set(of_inputs)) > 1:
        raise NotImplementedError(
            f"{where}: one value is sharded over the ranks, another is not: build the layer "
            "before the sharded one with gather_output=True"
        )


class BoundOfConstants(_Structure):
    """A value that a model computes from its parameters, buffers and constants only; no bounds.

    Attribute of the graph's node: `call`, the function's index in `GraphContext.calls`.
    """

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.call = self.context.calls[int(attr["call"])]
        self.never_perturbed = True

    def check_sharded(self, sharded: Sequence[bool], where: str) -> None:
        """Checks nothing: any constants are allowed."""

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        return self.call(*x)

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The value, twice."""
        value = self.forward(*(x[0] for x in v))
        return value, value


STRUCTURE_OPS: dict[str, type[auto_lirpa.Bound]] = {
    "lirpa_megatron::Rearrange": BoundRearrange,
    "lirpa_megatron::Sum": BoundSum,
    "lirpa_megatron::Concat": BoundConcat,
    "lirpa_megatron::OfConstants": BoundOfConstants,
}
"""Operators of the traced graph -> Bound classes."""
