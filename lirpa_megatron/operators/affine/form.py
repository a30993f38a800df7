"""What a backward pass has found of a node besides its box: an affine form in the model's input.

The products inside norms and attention leave remainders of second order, delta a * delta b. Bounded
over the *boxes* of a and b they are most of what makes transformers' bounds loose, because both
deviations come from the same input. The passes that gave the boxes also gave lines in the input;
they make one affine form per node, over which linear forms and products of them are bounded here.

Shapes: B batch, N perturbed coordinates of the input, d the last dimension of the node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lirpa_megatron.operators.numerics import dual_norm


@dataclass
class AffineForm:
    """z in center + A u +- slack for a u of the unit ball, the same u for all of the node.

    Made from CROWN's lines lA x + lb <= z <= uA x + ub, with x = m + R u and R the radii:

        A = (lA + uA)/2 R          center = (lA m + lb + uA m + ub)/2
        slack = (uA m + ub - lA m - lb)/2 + |(uA - lA)/2 R|_dual

    Attributes:
        center: [B, *node shape].
        A: [B, *node shape, N].
        slack: [B, *node shape], not negative.
        norm: of the ball of u: inf (a box), 2 or 1.
    """

    center: torch.Tensor
    A: torch.Tensor
    slack: torch.Tensor
    norm: float

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient flows to it."""
        return any(x.requires_grad for x in (self.center, self.A, self.slack))

    def view(self, function: Callable[[torch.Tensor], torch.Tensor]) -> AffineForm:
        """The form of a rearrangement of the node.

        Args:
            function: rearranges [..., *node shape] -> [..., *new shape], dimensions before the
                node's counted from the front.
        """
        A = function(self.A.movedim(-1, 0)).movedim(0, -1)
        return AffineForm(function(self.center), A, function(self.slack), self.norm)

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> AffineForm:
        """The form with each of its tensors replaced by what the function makes of it."""
        return AffineForm(
            function(self.center), function(self.A), function(self.slack), self.norm
        )

    def split(self, size: int) -> AffineForm:
        """The last dimension in parts of `size`."""
        return self.view(lambda x: x.unflatten(-1, (-1, size)))

    def free(self) -> None:
        """Frees its tensors, when nobody has use for them any more. Other forms may share them."""
        self.center = self.A = self.slack = None

    def at(self, dim: int, index: int) -> AffineForm:
        """The form of one part of a dimension, which is kept, without the last columns of zeros.

        What a causal mask keeps from a position are such columns.
        """
        A = self.A.narrow(dim, index, 1)
        used = (A != 0).flatten(0, -2).any(0).nonzero()
        columns = int(used[-1]) + 1 if len(used) else 1
        return AffineForm(
            self.center.narrow(dim, index, 1), A[..., :columns], self.slack.narrow(dim, index, 1),
            self.norm,
        )

    def reach(self) -> torch.Tensor:
        """max |A u| for each coordinate: [B, *node shape]."""
        return dual_norm(self.A, self.norm)

    def through(self, w: torch.Tensor) -> torch.Tensor:
        """w A: [R, *lead, d] with A [*lead, d, N] -> [R, *lead, N]."""
        return torch.matmul(w.movedim(0, -2), self.A).movedim(-2, 0)


@dataclass
class LinearFormBounds:
    """What a pass has found of linear forms of a node, beside the node's own coordinates.

    Attributes:
        lower, upper: bounds, [B, *shape], or for the rows of a pass [R, B, *shape].
        form: of the same shape; None where it is too large.
        rows: the coefficients of the linear forms, as they are in the pass: [*the same shape, d].
    """

    lower: torch.Tensor
    upper: torch.Tensor
    form: AffineForm | None
    rows: torch.Tensor | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient flows to it."""
        form = self.form is not None and self.form.requires_grad
        return form or self.lower.requires_grad or self.upper.requires_grad

    def mapped(
        self, function: Callable[[torch.Tensor], torch.Tensor]
    ) -> LinearFormBounds:
        """With each of its tensors replaced by what the function makes of it."""
        form = None if self.form is None else self.form.mapped(function)
        rows = None if self.rows is None else function(self.rows)
        return LinearFormBounds(function(self.lower), function(self.upper), form, rows)

    def at(self, dim: int, index: int) -> LinearFormBounds:
        """What is known of one part of a dimension, which is kept (`AffineForm.at`)."""
        form = None if self.form is None else self.form.at(dim, index)
        rows = None if self.rows is None else self.rows.narrow(dim, index, 1)
        return LinearFormBounds(
            self.lower.narrow(dim, index, 1), self.upper.narrow(dim, index, 1), form, rows
        )

