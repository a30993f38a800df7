"""Base of the operators that relax <A, y> for each row of A as a whole."""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.operators.affine.form import AffineForm
from lirpa_megatron.operators.coefficients import dense
from lirpa_megatron.operators.context import Layout
from lirpa_megatron.operators.optimizable import OptimizableOperator

_FEW = 2**14
"""Numbers of A up to which, on a CPU, both sides are bounded in one call."""


class RowRelaxed(OptimizableOperator):
    """y of several inputs, bounded from below row by row; from above by minus the bound of -A.

    A CROWN operator usually relaxes each coordinate of y by itself. Knowing the row A of what is
    wanted of y, the scalar <A, y> can be relaxed instead, which is tighter where y's coordinates
    share what makes them nonlinear (the length of a vector, the denominator of a softmax).

    A subclass defines

    - `relaxation(*inputs)`: what all rows have in common;
    - `lower_plane(A, relaxation, move)`: coefficients for each input that can be perturbed, in
      order, and a bias [R, B], of a plane below <A, y> on the inputs' bounds, for every alpha
      `move` in [-1, 1] (None: no alpha, the same as 0);
    - `reads_form`: the inputs whose affine form (`affine.form`) it makes use of.
    """

    reads_form: frozenset[int] = frozenset()

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.attributes = attr
        self.layout: Layout = self.options["layout"]

    def value_of(self, index: int) -> torch.Tensor:
        """An input's value at the clean input of the model."""
        return self.layout.value_of(self.inputs[index])

    def form_of(self, index: int) -> AffineForm | None:
        """The input's affine form, if a pass of this call has found it."""
        return self.layout.forms.get(self.inputs[index].name)

    def affords(self, numel: int) -> bool:
        """Whether a table of `numel` numbers here, for all ranks together, is within form_limit."""
        ranks = self.layout.collectives.size if self.layout.sharded.get(self.name) else 1
        return numel * ranks <= self.layout.form_limit

    def replicated(self, x: torch.Tensor) -> torch.Tensor:
        """A replicated value for use on this operator's features: with the right gradient."""
        sharded = self.layout.sharded.get(self.name, False)
        return self.layout.collectives.copy_to(x) if sharded else x

    def lower_plane(
        self, A: torch.Tensor, shared: Any, move: torch.Tensor | None = None
    ) -> tuple[tuple, torch.Tensor]:
        raise NotImplementedError

    def bound_backward(
        self, last_lA: Any, last_uA: Any, *x: Any, start_node: Any = None, **kwargs: Any
    ) -> tuple:
        """A and bias of both sides. Shapes: see the class; a bias is [R, B]."""
        shared = self.shared_relaxation(*x)
        lower: tuple = ()
        upper: tuple = ()
        lbias = ubias = 0
        sides = [None if A is None else dense(A) for A in (last_lA, last_uA)]
        moves = [self.move(start_node, side) for side in (0, 1)]
        if None not in sides and _are_few(sides[0]):
            R = len(sides[0])
            move = None
            if moves[0] is not None:
                move = torch.cat([m.expand(R, *m.shape[1:]) for m in moves])
            planes, bias = self.lower_plane(torch.cat((sides[0], -sides[1])), shared, move)
            lower, upper = zip(*((A[:R], -A[R:]) for A in planes), strict=True)
            lbias, ubias = bias[:R], -bias[R:]
        else:
            if last_lA is not None:
                lower, lbias = self.lower_plane(sides[0], shared, moves[0])
            if last_uA is not None:
                planes, below = self.lower_plane(-sides[1], shared, moves[1])
                upper, ubias = tuple(-A for A in planes), -below
        # Inputs beyond the planes' (weights, masks) are not perturbed.
        absent = [None] * len(x)
        both = zip([*lower, *absent], [*upper, *absent], strict=False)
        return list(both)[: len(x)], lbias, ubias


def _are_few(A: torch.Tensor) -> bool:
    """Whether rows of both sides are bounded together: where starting an operator is its cost."""
    return A.device.type != "cpu" or A.numel() <= _FEW

