"""Bounds of elementwise functions: one operator for each entry of `elementwise.functions`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.coefficients import LowerUpper, Propagated, dense
from lirpa_megatron.operators.context import OperatorInputs, Visit
from lirpa_megatron.operators.elementwise.curves import Curve
from lirpa_megatron.operators.elementwise.functions import FUNCTIONS, Function
from lirpa_megatron.operators.elementwise.intervals import within
from lirpa_megatron.operators.elementwise.tangent_lines import Relaxation
from lirpa_megatron.operators.numerics import row_sum
from lirpa_megatron.operators.operator import boxed
from lirpa_megatron.operators.optimizable import OptimizableOperator


@dataclass(frozen=True)
class _Lines:
    """The relaxation of a curve on [l, u]."""

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

    With the lines kl x + bl <= f(x) <= ku x + bu on [l, u] (`tangent_lines`), for lower bounds

        A_x = A+ kl + A- ku          bias = sum A+ bl + A- bu,   A+ = max(A, 0), A- = min(A, 0)

    and for upper bounds with the lines exchanged. With alpha (`operators.optimizable`) each entry
    of A has its own line: alpha moves the point of tangency from its default towards the ends of
    its range.

    IBP gives the exact image of [l, u], of zero width if [l, u] has zero width.

    Degenerate intervals: see `tangent_lines`. If [l, u] leaves the domain of f or contains a
    pole, y is unbounded: -infinity to infinity. CROWN's bounds may leave a domain that intervals
    do not leave (the line below x^2 + 1 can be negative), so for such f [l, u] is intersected with
    the range that interval arithmetic gives for the preceding operators (`intervals`).
    """

    function: Function
    curve: Curve
    elementwise = True
    takes_positions = True
    feature_dim = -1
    alpha_range = 4.0
    """With 2, alpha-CROWN's bounds on wide intervals were up to 4% wider after 20 steps."""

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        numbers = {name: attr[name] for name in self.function.parameters if name in attr}
        self.curve = self.function.curve(**numbers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.curve.run(x)

    def relaxation(self, inputs: OperatorInputs) -> _Lines:
        """The curve's lines on [l, u] of the first input."""
        x = inputs[0]
        lower, upper = x.lower, x.upper
        if self.curve.limited:
            one_rank = self.context.collectives.size == 1
            lower, upper = within(x.node, lower, upper, one_rank)
        lines = Relaxation(self.curve, lower, upper)
        return _Lines(lines.line(lines.lower), lines.line(lines.upper), lines)

    def sharded_relaxation(self, inputs: OperatorInputs) -> _Lines:
        return replace(self.shared_relaxation(inputs), movable=None)

    def at_positions(self, shared: _Lines, first: int, end: int) -> _Lines:
        lower, upper = (
            tuple(x[:, first:end] for x in line) for line in (shared.lower, shared.upper)
        )
        return _Lines(lower, upper, None)

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The image of [l, u]; for a ball at the model's input, of the box around it."""
        return self.curve.image(*boxed(v[0]))

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A at x and the bias [R, B]. Shapes: see the class."""
        A_x, bias = self.through_lines(A, visit)
        return Propagated((A_x,), bias)

    def through_lines(self, A: LowerUpper, visit: Visit) -> tuple[LowerUpper, LowerUpper]:
        """A of f(x) [R, B, *shape] -> A of x, and the bias [R, B]."""
        shared = self.relaxation_at(visit)

        def through(last_A: Any, side: int) -> tuple[Any, Any]:
            if last_A is None:
                return None, 0
            A = dense(last_A)
            move = self.move(visit, side)
            if move is not None:
                lines = shared.movable
                positive, negative = (lines.lower, lines.upper)[:: 1 if side == 0 else -1]
                k, b = lines.line(positive.where(A > 0, negative), move)
                return A * k, row_sum(A, b)
            above = A.clamp(min=0)
            below = A - above
            positive, negative = (shared.lower, shared.upper)[:: 1 if side == 0 else -1]
            (k_above, b_above), (k_below, b_below) = positive, negative
            return (above * k_above).addcmul(below, k_below), (
                row_sum(above, b_above) + row_sum(below, b_below)
            )

        (lA, lbias), (uA, ubias) = through(A.lower, 0), through(A.upper, 1)
        return LowerUpper(lA, uA), LowerUpper(lbias, ubias)


_MADE: dict[str, type[BoundCurve]] = {}


def elementwise_operators() -> dict[str, type[auto_lirpa.Bound]]:
    """Operator of the graph -> Bound class, for all current entries of the table."""
    for name, function in FUNCTIONS.items():
        known = _MADE.get(name)
        if known is None or known.function is not function:
            body: dict[str, Any] = {"function": function, "__doc__": function.make.__doc__}
            if not function.parameters:
                body["curve"] = function.curve()
            _MADE[name] = type(f"Bound{name}", (BoundCurve,), body)
    return {f"lirpa_megatron::{name}": made for name, made in _MADE.items() if name in FUNCTIONS}
