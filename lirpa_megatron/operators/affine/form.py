"""Affine forms: what a backward pass says about a node beyond its box.

The products inside norms and attention leave second-order remainders delta a * delta b. Bounding
them over the *boxes* of a and b causes most of the looseness of transformers' bounds, because both
deviations come from the same input. The passes that gave the boxes also gave linear bounds in the
input. They become one affine form per node, over which linear forms and their products are bounded.

Shapes: B batch, N perturbed coordinates of the input, d the last dimension of the node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lirpa_megatron.operators.numerics import dual_norm


@dataclass
class AffineForm:
    """z in center + A u +- slack for some u in the unit ball; u is the same for the whole node.

    Computed from CROWN's lines lA x + lb <= z <= uA x + ub, with x = m + R u and R the radii:

        A = (lA + uA)/2 R          center = (lA m + lb + uA m + ub)/2
        slack = (uA m + ub - lA m - lb)/2 + |(uA - lA)/2 R|_dual

    Attributes:
        center: [B, *node shape].
        A: [B, *node shape, N].
        slack: [B, *node shape], not negative.
        norm: norm of the unit ball: inf (a box), 2 or 1.
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
        """Applies a function to each tensor of the form."""
        return AffineForm(
            function(self.center), function(self.A), function(self.slack), self.norm
        )

    def split(self, size: int) -> AffineForm:
        """Splits the last dimension into parts of `size`."""
        return self.view(lambda x: x.unflatten(-1, (-1, size)))

    def free(self) -> None:
        """Drops references to its tensors once they are not needed. Other forms may share them."""
        self.center = self.A = self.slack = None

    def at(self, dim: int, index: int) -> AffineForm:
        """The form of one part of a dimension (which stays), without trailing columns of zeros.

        A causal mask causes such columns: a position does not depend on later ones.
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
    """Results of a pass for linear forms of a node, in addition to its coordinates.

    Attributes:
        lower, upper: bounds, [B, *shape]; for the rows of a pass, [R, B, *shape].
        form: affine form of the same shape; None if it would be too large.
        rows: coefficients of the linear forms as used in the pass: [*the same shape, d].
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
        """Applies a function to each of its tensors."""
        form = None if self.form is None else self.form.mapped(function)
        rows = None if self.rows is None else function(self.rows)
        return LinearFormBounds(function(self.lower), function(self.upper), form, rows)

    def at(self, dim: int, index: int) -> LinearFormBounds:
        """The results for one part of a dimension, which stays (`AffineForm.at`)."""
        form = None if self.form is None else self.form.at(dim, index)
        rows = None if self.rows is None else self.rows.narrow(dim, index, 1)
        return LinearFormBounds(
            self.lower.narrow(dim, index, 1), self.upper.narrow(dim, index, 1), form, rows
        )

