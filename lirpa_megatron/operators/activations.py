"""Bounds of elementwise activations: GELU (erf, tanh), SiLU, quick GELU, squared ReLU, tanh."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron import host
from lirpa_megatron.operators import curves
from lirpa_megatron.operators.curves import Curve
from lirpa_megatron.operators.linear import dense
from lirpa_megatron.operators.lines import Relaxation
from lirpa_megatron.operators.optimizable import OptimizableOperator, total


@dataclass(frozen=True)
class _Lines:
    """Of a curve on [l, u]."""

    lower: tuple[torch.Tensor, torch.Tensor]
    """(slope, intercept) of the lower line without alpha, [B, *shape]."""
    upper: tuple[torch.Tensor, torch.Tensor]
    movable: Relaxation | None
    """All lines, for alpha."""


class BoundCurve(OptimizableOperator):
    """y = f(x) for each element.

    ========  ===================  =================================
    tensor    shape                on the ranks
    ========  ===================  =================================
    x, y      [B, *shape]          replicated or sharded, alike
    A_y, A_x  [R, B, *shape]       in the layout of the node
    ========  ===================  =================================

    With the lines kl x + bl <= f(x) <= ku x + bu on [l, u] (`operators.lines`), for lower bounds

        A_x = A+ kl + A- ku          bias = sum A+ bl + A- bu,   A+ = max(A, 0), A- = min(A, 0)

    and for upper bounds with the lines exchanged. With alpha (`operators.optimizable`) each entry
    of A has its own line: alpha moves its touch point from the best place without alpha towards the
    ends of where it may be.

    IBP is the exact image of [l, u]; a zero-width interval gives one.
    """

    curve: Curve
    feature_dim = -1

    def relaxation(self, x: Any) -> _Lines:
        """The curve's lines on [l, u]."""
        lines = Relaxation(self.curve, x.lower, x.upper)
        return _Lines(lines.line(lines.lower), lines.line(lines.upper), lines)

    def features(self, x: Any) -> _Lines:
        return replace(self.common(x), movable=None)

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The image of [l, u]; that of the box around it for a ball straight from the input."""
        lower, upper = v[0][0], v[0][1]
        norm, eps = host.Interval.get_perturbation(v[0])[:2]
        if norm != float("inf"):
            lower, upper = lower - eps, upper + eps
        return self.curve.image(lower, upper)

    def bound_backward(
        self, last_lA: Any, last_uA: Any, x: Any, start_node: Any = None, **kwargs: Any
    ) -> tuple:
        """A at x and the bias [R, B]. Shapes: see the class."""
        shared = self.common(x)

        def through(last_A: Any, side: int) -> tuple[Any, Any]:
            if last_A is None:
                return None, 0
            A = dense(last_A)
            move = self.move(start_node, side)
            if move is not None:
                lines = shared.movable
                positive, negative = (lines.lower, lines.upper)[:: 1 if side == 0 else -1]
                k, b = lines.line(positive.where(A > 0, negative), move)
                return A * k, total(A, b)
            above = A.clamp(min=0)
            below = A - above
            positive, negative = (shared.lower, shared.upper)[:: 1 if side == 0 else -1]
            (k_above, b_above), (k_below, b_below) = positive, negative
            return (above * k_above).addcmul(below, k_below), (
                total(above, b_above) + total(below, b_below)
            )

        (lA, lbias), (uA, ubias) = through(last_lA, 0), through(last_uA, 1)
        return [(lA, uA)], lbias, ubias


class BoundGeluErf(BoundCurve):
    """x Phi(x)."""

    curve = curves.GELU_ERF

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x)


class BoundGeluTanh(BoundCurve):
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""

    curve = curves.GELU_TANH

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")


class BoundSilu(BoundCurve):
    """x sigmoid(x)."""

    curve = curves.SILU

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x)


class BoundQuickGelu(BoundCurve):
    """x sigmoid(1.702 x)."""

    curve = curves.QUICK_GELU

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class BoundSquaredRelu(BoundCurve):
    """max(x, 0)^2."""

    curve = curves.SQUARED_RELU

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x).square()


class BoundTanh(BoundCurve):
    """tanh(x)."""

    curve = curves.TANH

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)
