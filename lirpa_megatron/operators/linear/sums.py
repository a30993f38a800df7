"""Elementwise sums of two values and products with constants: linear, so exact.

    Combine   y = s a + t b     s and t are numbers; b may be a constant
    Scale     y = c a           c is a constant

The host has such operators too, but it guesses from a constant's shape whether it has a batch. Here
values have the same shape [B, *shape], and constants any shape that broadcasts to it, as in torch.

==========  ==================================  ==============================================
tensor      shape                               on the ranks
==========  ==================================  ==============================================
a, y        [B, *shape]                         replicated or sharded, alike
b           [B, *shape], constants broadcast    as a; constants of sharded values: own features
A           [R, B, *shape]                      in the layout of the node
==========  ==================================  ==============================================

IBP: s a + t b, with the ends of a and b chosen by the signs of s and t; c a likewise. Exact up to
rounding, including infinite ends (0 times an infinite end is 0).
CROWN: A_a = s A and A_b = t A, or the bias t <A, b> for a constant b; A_a = c A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.coefficients import LowerUpper, Propagated
from lirpa_megatron.operators.context import GraphContext, Visit
from lirpa_megatron.operators.linear.structure import check_alike
from lirpa_megatron.operators.operator import Operator, boxed


class _Linear(Operator, auto_lirpa.Bound):
    boxes_balls = True
    """IBP replaces an L1 or L2 ball at the model's input by the box around it."""

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.attributes = attr
        self.context: GraphContext = self.options["context"]

    def bound_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not offer forward mode")


class BoundCombine(_Linear):
    """y = s a + t b, attributes `s` and `t` of the graph's node. Shapes: see the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.factors = float(self.attributes["s"]), float(self.attributes["t"])

    def check_sharded(self, sharded: Sequence[bool], where: str) -> None:
        check_alike(self, sharded, where)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        s, t = self.factors
        return _times(s, a) + _times(t, b)

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds of y."""
        ends = [boxed(x)[:: 1 if f > 0 else -1] for x, f in zip(v, self.factors, strict=True)]
        return self.forward(ends[0][0], ends[1][0]), self.forward(ends[0][1], ends[1][1])

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A at a and b, and the bias [R, B]."""
        A, As, bias = A.dense(), [], LowerUpper()
        for x, factor in zip(visit.inputs.views, self.factors, strict=True):
            own = A.map(lambda A, f=factor: _times(f, A))
            As.append(own if x.perturbed else LowerUpper())
            if not x.perturbed:
                bias = own.map(lambda A, v=x.value: _summed(A * v.to(A)))
        return Propagated(tuple(As), bias)


class BoundScale(_Linear):
    """y = c a: inputs a and c, c a constant. Shapes: see the module."""

    def forward(self, a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return a * c

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds of y."""
        (lower, upper), c = boxed(v[0]), v[1][0]
        low, high = torch.where(c < 0, upper, lower), torch.where(c < 0, lower, upper)
        zero = c == 0
        return low.masked_fill(zero, 0.0) * c, high.masked_fill(zero, 0.0) * c

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A at a; nothing at c."""
        value = visit.inputs[1].value
        return Propagated((A.dense().map(lambda A: A * value.to(A)),))


def _times(factor: float, x: torch.Tensor) -> torch.Tensor:
    return x if factor == 1 else -x if factor == -1 else factor * x


def _summed(A: torch.Tensor) -> torch.Tensor:
    """[R, B, ...] -> [R, B]."""
    return A.reshape(*A.shape[:2], -1).sum(-1)


SUM_OPS: dict[str, type[auto_lirpa.Bound]] = {
    "lirpa_megatron::Combine": BoundCombine,
    "lirpa_megatron::Scale": BoundScale,
}
"""Operators of the traced graph -> Bound classes."""
