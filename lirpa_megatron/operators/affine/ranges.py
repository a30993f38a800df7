"""Ranges of linear forms of vectors that lie in a box and, if given, in an affine form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lirpa_megatron.arithmetic.near import Near, most
from lirpa_megatron.operators.affine.form import AffineForm, LinearFormBounds
from lirpa_megatron.operators.numerics import ROUNDING, dot, dual_norm, intersect


@dataclass
class Deviations:
    """The set in which dx = x - c of some vectors lies, shared by all rows.

    Shapes: [*lead, d]; v [R, *lead, d].
    """

    middle: torch.Tensor
    """Center of the box of dx."""
    half: torch.Tensor
    """Half of the box's width, rounded up."""
    form: AffineForm | None
    off: torch.Tensor | None
    """The form's center minus c."""

    @classmethod
    def of(
        cls, dl: torch.Tensor, du: torch.Tensor, c: torch.Tensor, form: AffineForm | None
    ) -> Deviations:
        """From the box [dl, du] and a form of c + dx."""
        noise = torch.finfo(dl.dtype).eps * (dl.abs() + du.abs())
        off = None if form is None else form.center - c
        return cls((dl + du) / 2, (du - dl) / 2 + noise, form, off)

    @property
    def reach(self) -> torch.Tensor:
        """The largest |dx|."""
        return self.middle.abs() + self.half

    def box(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(least, most) of <v, dx> over the box, [R, *lead]."""
        middle, half = dot(v, self.middle), dot(v.abs(), self.half)
        return middle - half, middle + half

    def line(self, v: torch.Tensor) -> Line | None:
        """<v, dx> for rows v [R, *lead, d], from the form; None without a form."""
        if self.form is None:
            return None
        slack = dot(v.abs(), self.form.slack)
        return Line(self.form.through(v), dot(v, self.off), slack, self.form.norm)

    def range(
        self, v: torch.Tensor, line: Line | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(least, most) of <v, dx> over the box, intersected with `line`, which contains <v, dx>.

        Args:
            v: [R, *lead, d].
            line: [R, *lead].
        """
        box = self.box(v)
        return box if line is None else intersect(box, line.range())


@dataclass
class Line:
    """Numbers in center + through u +- slack for u in the unit ball of `norm`; [R, *lead]."""

    through: torch.Tensor
    """[R, *lead, N]."""
    center: torch.Tensor
    slack: torch.Tensor
    norm: float

    def range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(least, most)."""
        rounding = 1 + ROUNDING[self.through.dtype]
        radius = (dual_norm(self.through, self.norm) + self.slack) * rounding
        return self.center - radius, self.center + radius

    def plus(self, times: torch.Tensor, other: Line) -> Line:
        """These numbers plus `times` [R, *lead] other numbers."""
        short, long = sorted((self.through, other.through), key=lambda x: x.shape[-1])
        if short.shape[-1] < long.shape[-1]:  # trailing columns of zeros were dropped
            short = F.pad(short, (0, long.shape[-1] - short.shape[-1]))
        own, added = (short, long) if long is other.through else (long, short)
        return Line(
            torch.addcmul(own, added, times.unsqueeze(-1)), self.center + times * other.center,
            self.slack + times.abs() * other.slack, self.norm,
        )

    def times(self, factor: torch.Tensor) -> Line:
        """These numbers times `factor` [R, *lead]."""
        return Line(
            self.through * factor.unsqueeze(-1), self.center * factor, self.slack * factor.abs(),
            self.norm,
        )


def off_clean(
    known: LinearFormBounds, v: torch.Tensor, c: torch.Tensor, reach: torch.Tensor
) -> tuple[tuple, Line | None]:
    """Converts bounds of <v, x> to bounds of <v, x - c>, both [R, *lead].

    Args:
        known: bounds of <v, x>, [R, *lead].
        v: [R, *lead, d].
        c: [*lead, d].
        reach: the largest |x - c|, [*lead, d].

    Returns:
        ((least, most), line).
    """
    rows = v
    if isinstance(v, Near):  # a pass bounded rows that differ from v by rounding
        rows = known.rows
    at_c, noise = dot(rows, c), 4 * torch.finfo(c.dtype).eps * dot(rows.abs(), c.abs())
    if isinstance(v, Near):
        noise = noise + dot(most(v - rows), reach)
    form = known.form
    line = None
    if form is not None:
        line = Line(form.A, form.center - at_c, form.slack + noise, form.norm)
    return (known.lower - at_c - noise, known.upper - at_c + noise), line

