"""Bounds of a leaky ReLU whose slope is a parameter."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.operators.coefficients import LowerUpper, Propagated
from lirpa_megatron.operators.context import Visit
from lirpa_megatron.operators.elementwise.activations import BoundCurve
from lirpa_megatron.operators.elementwise.functions import Function, bent
from lirpa_megatron.operators.operator import boxed


class BoundPRelu(BoundCurve):
    """y = x for x > 0, w x for x < 0; w one number, or one for each channel (dimension 1).

    ========  ===================  =============================================================
    tensor    shape                on the ranks
    ========  ===================  =============================================================
    x, y      [B, C, ...]          replicated or sharded, alike
    w         [1] or [C]           replicated; [C] with x [B, C] sharded: sharded alike
    A_y, A_x  [R, B, C, ...]       in the layout of the node
    ========  ===================  =============================================================

    y = w x + (1 - w) relu(x), exactly. With the lines kl x + bl <= relu(x) <= ku x + bu
    (`tangent_lines`) and A' = (1 - w) A, for lower bounds A_x = w A + A'+ kl + A'- ku. This is the
    convex hull of f for any w. With alpha each entry of A has its own line below relu. Gradients
    flow to w.

    IBP is exact: the values at both ends, and 0 if the interval contains it. Degenerate intervals:
    see `tangent_lines`.
    """

    function = Function("PRelu", lambda: bent(0.0, 1.0, F.relu))
    takes_positions = False  # dimension 1 has the channels

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requires_input_bounds = [0]

    @property
    def feature_dim(self) -> int | None:  # type: ignore[override]
        """The slopes of several channels cannot be gathered with the lines."""
        return -1 if self.inputs[1].output_shape.numel() == 1 else None

    @staticmethod
    def _slopes(w: torch.Tensor, dims: int) -> torch.Tensor:
        """w, broadcast to a tensor [B, C, ...] of `dims` dimensions (not counting rows)."""
        return w.reshape(-1, *[1] * (dims - 2)) if dims > 1 else w

    def forward(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.prelu(x, w)

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The image of [l, u]; for a ball at the model's input, of the box around it."""
        (lower, upper), w = boxed(v[0]), v[1][0]
        ends = [self.forward(x, w) for x in (lower, upper)]
        zero = torch.where((lower < 0) & (upper > 0), 0.0, ends[0])
        return (
            torch.minimum(torch.minimum(*ends), zero), torch.maximum(torch.maximum(*ends), zero)
        )

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A at x and the bias [R, B]. Shapes: see the class."""
        w = self._slopes(visit.inputs[1].lower, visit.inputs[0].lower.ndim)
        A = A.dense()
        A_x, bias = self.through_lines(A.map(lambda A: A * (1 - w)), visit)
        A_x.add(*A.map(lambda A: A * w))
        return Propagated((A_x,), bias)
