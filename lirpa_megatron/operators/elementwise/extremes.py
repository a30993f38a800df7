"""Bounds of the larger and of the smaller of two values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.operators.coefficients import LowerUpper, Propagated
from lirpa_megatron.operators.context import Visit
from lirpa_megatron.operators.elementwise.activations import BoundCurve
from lirpa_megatron.operators.elementwise.functions import Function, bent
from lirpa_megatron.operators.operator import boxed


class BoundMaximum(BoundCurve):
    """y = max(a, b) for each element, a and b of equal shapes, with d = a - b as the first input.

    ==================  ===================  =================================
    tensor              shape                on the ranks
    ==================  ===================  =================================
    d, a, b, y          [B, *shape]          replicated or sharded, alike
    A_y, A_d, A_a, A_b  [R, B, *shape]       in the layout of the node
    ==================  ===================  =================================

    CROWN: exactly max(a, b) = b + relu(d). With the lines kl d + bl <= relu(d) <= ku d + bu
    (`tangent_lines`, a corner at 0), A_b = A_y and A_d as in `BoundCurve`: the plane is
    (1 - k) b + k a + const, and a or b itself if d does not change sign. d is a node of the graph
    (the host's subtraction), so its bounds exploit that a and b depend on the same input;
    subtracting their ranges would not. With alpha each entry of A has its own k in [0, 1] below.

    IBP: [max(al, bl), max(au, bu)], exact. Degenerate (zero width) d: exact up to the margin of the
    lines; infinite: the bounds of `tangent_lines`.
    """

    function = Function("Maximum", lambda: bent(0.0, 1.0, F.relu))
    sign = 1
    """1 for max(a, b) = b + relu(d), -1 for min(a, b) = a - relu(d)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requires_input_bounds = [0]

    def forward(self, d: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.maximum(a, b) if self.sign > 0 else torch.minimum(a, b)

    def infer_batch_dim(self, batch_size: int, *x: int) -> int:
        return max(x)

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Elementwise; a ball at the model's input becomes the box around it."""
        (al, au), (bl, bu) = (boxed(interval) for interval in v[1:])
        return self.forward(al, al, bl), self.forward(au, au, bu)

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A at d, a and b and the bias [R, B]. Shapes: see the class."""
        A = A.dense()
        A_d, bias = self.through_lines(A if self.sign > 0 else A.map(torch.neg), visit)
        passed = (LowerUpper(), A) if self.sign > 0 else (A,)
        return Propagated((A_d, *passed), bias)


class BoundMinimum(BoundMaximum):
    """y = min(a, b) = a - relu(a - b) for each element: see `BoundMaximum`.

    With A_d of relu(d) for -A_y, and A_a = A_y.
    """

    sign = -1
