"""Ranges of linear forms of vectors that lie in a box and, if it is known, in an affine form."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lirpa_megatron.operators.enclosure import AffineForm, dual_norm


@dataclass
class Deviations:
    """Where dx = x - c of some vectors may lie, the same for all rows.

    Shapes: [*lead, d]; v [R, *lead, d].
    """

    middle: torch.Tensor
    """Of the box of dx."""
    half: torch.Tensor
    """Half of its width, rounded up."""
    form: AffineForm | None
    off: torch.Tensor | None
    """The form's center less c."""

    @classmethod
    def of(
        cls, dl: torch.Tensor, du: torch.Tensor, c: torch.Tensor, form: AffineForm | None
    ) -> Deviations:
        """Of the box [dl, du] and a form of c + dx."""
        noise = torch.finfo(dl.dtype).eps * (dl.abs() + du.abs())
        off = None if form is None else form.center - c
        return cls((dl + du) / 2, (du - dl) / 2 + noise, form, off)

    def box(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(least, most) <v, dx> over the box, [R, *lead]."""
        middle, half = dot(v, self.middle), dot(v.abs(), self.half)
        return middle - half, middle + half

    def through(self, v: torch.Tensor) -> torch.Tensor | None:
        """v A [R, *lead, N], A the form's coefficients; None without a form."""
        return None if self.form is None else self.form.through(v)

    def reach(self, through: torch.Tensor | None) -> torch.Tensor | None:
        """The largest of `through` over the unit ball, [R, *lead]."""
        return None if self.form is None else dual_norm(through, self.form.norm)

    def range(
        self, v: torch.Tensor, reach: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(least, most) <v, dx> over the box and the form.

        Args:
            v: [R, *lead, d].
            reach: `reach(through(v))`.
        """
        least, most = self.box(v)
        if self.form is None:
            return least, most
        middle, radius = dot(v, self.off), self.form.radius(v, reach)
        least = torch.maximum(least, middle - radius)
        return least, torch.maximum(least, torch.minimum(most, middle + radius))


def dot(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """<v, x>: [R, *lead, d] and [*lead, d] -> [R, *lead]."""
    return (v * x).sum(-1)
