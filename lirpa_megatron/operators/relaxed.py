"""Base of the operators that relax <A, y> for each row of A as a whole."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from lirpa_megatron.arithmetic.near import Near
from lirpa_megatron.operators.affine.form import LinearFormBounds
from lirpa_megatron.operators.coefficients import LowerUpper, Propagated, dense
from lirpa_megatron.operators.context import CallState, Visit
from lirpa_megatron.operators.optimizable import OptimizableOperator


class RowRelaxed(OptimizableOperator):
    """Bounds <A, y> from below, row by row; the upper bound is minus the lower bound for -A.

    A CROWN operator usually relaxes each coordinate of y separately. Given the row A, the scalar
    <A, y> can be relaxed instead. This is tighter if the coordinates of y share their nonlinear
    part (the length of a vector, the denominator of a softmax).

    A subclass defines

    - `relaxation(inputs)`: what all rows share;
    - `lower_plane(A, relaxation, move, known)`: a plane below <A, y> on the inputs' bounds, as
      coefficients for each perturbable input, in order, and a bias [R, B]. It is sound for every
      alpha `move` in [-1, 1] (None means no alpha, as 0); `known` answers `wanted_rows`;
    - `reads_form`: the inputs whose affine form (`affine.form`) it uses.
    """

    relaxes_rows = True

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.attributes = attr

    def value_of(self, index: int) -> torch.Tensor:
        """An input's value at the clean input of the model."""
        return self.context.value_of(self.inputs[index])

    def affords(self, numel: int, call: CallState) -> bool:
        """Whether a table of `numel` numbers on each rank is within form_limit, over all ranks."""
        ranks = self.context.collectives.size if self.context.is_sharded(self) else 1
        return numel * ranks <= call.form_limit

    def replicated(self, x: torch.Tensor) -> torch.Tensor:
        """A replicated value for use on this operator's features, with the right gradient."""
        if not self.context.is_sharded(self):
            return x
        if isinstance(x, Near):
            return Near(self.context.collectives.copy_to(x.value), x.off)
        return self.context.collectives.copy_to(x)

    def lower_plane(
        self, A: torch.Tensor, shared: Any, move: torch.Tensor | None = None,
        known: LinearFormBounds | None = None,
    ) -> tuple[tuple, torch.Tensor]:
        raise NotImplementedError

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A at the inputs and the bias [R, B], for both sides. Shapes: see the class."""
        shared = self.relaxation_at(visit)
        moves = [self.move(visit, side) for side in (0, 1)]
        blocks = rows_below(A, self.context.tuning.few)
        answers = visit.answers or (None,) * len(blocks)
        if A.lower is not None and A.upper is not None and len(blocks) == 1:
            R, move = len(blocks[0]) // 2, None
            if moves[0] is not None:
                move = torch.cat([m.expand(R, *m.shape[1:]) for m in moves])
            planes, bias = self.lower_plane(blocks[0], shared, move, answers[0])
            return Propagated(
                tuple(LowerUpper(A_x[:R], -A_x[R:]) for A_x in planes),
                LowerUpper(bias[:R], -bias[R:]),
            )
        rest = iter(zip(blocks, answers, strict=True))
        lower, lbias, upper, ubias = (), 0, (), 0
        if A.lower is not None:
            block, known = next(rest)
            lower, lbias = self.lower_plane(block, shared, moves[0], known)
        if A.upper is not None:
            block, known = next(rest)
            planes, below = self.lower_plane(block, shared, moves[1], known)
            upper, ubias = tuple(-A_x for A_x in planes), -below
        # Further inputs (weights, masks) are not perturbed.
        return Propagated(
            tuple(LowerUpper(*sides) for sides in itertools.zip_longest(lower, upper)),
            LowerUpper(lbias, ubias),
        )


def rows_below(A: LowerUpper, few: int) -> list[torch.Tensor]:
    """Rows a for which <a, y> is bounded from below: A's lower side and minus its upper side, in
    one block if they are few (`Tuning.few`)."""
    lower, upper = (None if side is None else dense(side) for side in A)
    if lower is not None and upper is not None and _are_few(lower, few):
        return [torch.cat((lower, -upper))]
    found = [lower, None if upper is None else -upper]
    return [rows for rows in found if rows is not None]


def _are_few(A: torch.Tensor, few: int) -> bool:
    """Whether rows of both sides are bounded together, to start fewer small operators."""
    return A.device.type != "cpu" or A.numel() <= few

