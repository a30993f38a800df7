"""The planes of LayerNorm and RMSNorm: <w, z> r, where r depends on the length of z.

The derivation and its notation are in the docstring of `norm.BoundNorm`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch

from lirpa_megatron.arithmetic.near import chosen, doubt, surely_positive
from lirpa_megatron.operators.affine.form import AffineForm, LinearFormBounds
from lirpa_megatron.operators.affine.ranges import Deviations, Line, off_clean
from lirpa_megatron.operators.numerics import dot, intersect, mask_overflow, safe_root

LARGEST = 1e15
"""Larger coordinates are not squared (float32 would overflow); only |z r| <= sqrt(d) is used
then."""


@dataclass
class Vectors:
    """What all rows share about the vectors x = c + dx: [*lead] or [*lead, d]."""

    c: torch.Tensor
    """The clean value (any point would be sound)."""
    dx: Deviations
    z0: torch.Tensor
    r0: torch.Tensor
    r_least: torch.Tensor
    r_most: torch.Tensor
    below: tuple[torch.Tensor, torch.Tensor]
    """(slope, intercept) of a line in t below r - r0: the tangent of f(q1 + 2 t) - r0 at t = 0."""
    q1: torch.Tensor
    tl: torch.Tensor
    tu: torch.Tensor
    above: tuple[torch.Tensor, torch.Tensor]
    t_mid: torch.Tensor
    t_half: torch.Tensor
    rho_mid: torch.Tensor
    """r - r0 - (slope below) t."""
    rho_half: torch.Tensor
    wild: torch.Tensor
    """Where a bound is so large that the values above are invalid."""
    t_line: Line | None = None
    """t as a function of the model's input, [1, *lead]."""

    def at(self, first: int, end: int) -> Vectors:
        """Of some positions, the second dimension of *lead."""
        form, line = self.dx.form, self.t_line

        def some(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(some(y) for y in x)
            return x[:, first:end] if isinstance(x, torch.Tensor) else x

        found = Vectors(*(some(getattr(self, f.name)) for f in fields(self)))
        off = None if self.dx.off is None else some(self.dx.off)
        form = None if form is None else form.mapped(some)
        found.dx = Deviations(some(self.dx.middle), some(self.dx.half), form, off)
        if line is not None:
            found.t_line = Line(  # with or without a dimension before *lead
                line.through[..., first:end, :, :], line.center[..., first:end, :],
                line.slack[..., first:end, :], line.norm,
            )
        return found


class NormPlanes:
    """Mixin for an operator with `eps`, `rms` (the mean is not subtracted) and vector length
    `_d`."""

    eps: float
    rms: bool
    _d: int

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.rms else x - x.mean(-1, keepdim=True)

    def _r(self, q: torch.Tensor) -> torch.Tensor:
        return (q / self._d + self.eps).rsqrt()

    def _vectors(
        self, l: torch.Tensor, u: torch.Tensor, c: torch.Tensor, form: AffineForm | None,
        known: LinearFormBounds | None = None,
    ) -> Vectors:
        """Everything about r that rows share: [..., groups, d] -> [..., groups].

        `known` bounds <z0, x>.
        """
        l, u, wild = mask_overflow(l, u, LARGEST)
        wild = wild.any(-1)
        c = chosen(torch.where(wild.unsqueeze(-1), (l + u) / 2, c))
        z0, dl, du = self._project(c), l - c, u - c
        q0 = z0.square().sum(-1)
        N = torch.maximum(dl.square(), du.square()).sum(-1)
        nothing = torch.zeros_like(q0)
        dx = Deviations.of(dl, du, c, form)
        found = Vectors(c, dx, z0, *(nothing,) * 3, (nothing,) * 2, *(nothing,) * 3,
                        (nothing,) * 2, *(nothing,) * 4, wild)
        row = z0.unsqueeze(0)
        found.t_line = dx.line(row)
        t = dx.range(row, found.t_line)
        if known is not None:
            own, line = off_clean(known, row, c, dx.reach)
            t, found.t_line = intersect(t, own), line or found.t_line
        tl, tu = (x[0] for x in t)

        length, reach = torch.linalg.vector_norm(z0, dim=-1), safe_root(N)
        least = torch.maximum((q0 + 2 * tl).clamp(min=0), (length - reach).clamp(min=0).square())
        most = torch.minimum((q0 + 2 * tu).clamp(min=0) + N, (length + reach).square())
        found.r0 = r0 = self._r(q0)
        found.r_most, found.r_least = self._r(least), self._r(torch.maximum(least, most))
        found.q1, found.tl, found.tu = q0 + N, tl, tu
        found.below = slope, _ = self._tangent(found, nothing)
        # Above: the chord of f(q0 + 2t), starting where it crosses r_most.
        start = torch.minimum(torch.maximum(tl, (least - q0) / 2), tu)
        f_start = torch.minimum(self._r((q0 + 2 * start).clamp(min=0)), found.r_most)
        f_end = self._r((q0 + 2 * tu).clamp(min=0))
        wide = tu - start > 1e-6 * (1e-6 + q0)
        run = torch.where(wide, tu - start, 1.0)
        tangent = -r0 / (q0 + self._d * self.eps)
        chord = chosen(torch.where(wide, (f_end - f_start) / run, tangent)).clamp(max=0)

        def highest(k: torch.Tensor) -> torch.Tensor:
            return torch.maximum(f_start - k * start, f_end - k * tu) - r0

        found.above = chord, highest(chord)
        low, high = found.below[1], highest(slope)
        found.rho_mid, found.rho_half = (low + high) / 2, ((high - low) / 2).clamp(min=0)
        found.t_mid, found.t_half = (tl + tu) / 2, (tu - tl) / 2
        return found

    def _tangent(self, x: Vectors, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(slope, intercept) in t of the tangent of f(q1 + 2 t) - r0 at a given t."""
        q = (x.q1 + 2 * t).clamp(min=0)
        f = self._r(q)
        slope = -f / (q + self._d * self.eps)
        return slope, f - x.r0 + slope * (x.q1 - q) / 2

    def _plane(
        self, w: torch.Tensor, x: Vectors, move: torch.Tensor | None, known: LinearFormBounds | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The plane below <w, x> r for w [R, *lead, d]: coefficients of x, constant [R, *lead].

        `known` bounds <w, x>.
        """
        s0 = dot(w, x.z0)
        line = x.dx.line(w)
        least, most = x.dx.range(w, line)
        if known is not None:
            own, better = off_clean(known, w, x.c, x.dx.reach)
            (least, most), line = intersect((least, most), own), better or line
        m_s, S = (least + most) / 2, ((most - least) / 2).clamp(min=0)
        kappa, rho, half, error = self._product(w, line, x, m_s, S)
        m, k, slope, const, below = kappa * x.t_mid + rho, s0 + m_s, 0, -error, x.below
        if move is not None:
            mix, at = move.unbind(-1)
            m, k = m - mix * half, k - mix * S
            slope, const = mix * S * kappa, const + mix * S * rho
            below = self._tangent(x, torch.where(at > 0, at * x.tu, -at * x.tl))
        slope = slope + torch.where(k >= 0, k * below[0], k * x.above[0])
        const = const + torch.where(k >= 0, k * below[1], k * x.above[1]) - m * m_s + x.r0 * s0
        unsure = doubt(k)
        if unsure is not None:  # the rounded k may have the wrong sign
            apart = below[1].abs() + x.above[1].abs()
            reach = torch.maximum(x.tl.abs(), x.tu.abs())
            const = const - unsure * (apart + (below[0].abs() + x.above[0].abs()) * reach)
        coef = (x.r0 + m).unsqueeze(-1) * w + slope.unsqueeze(-1) * x.z0

        worst = const + x.dx.box(coef)[0]
        # A row's result must not depend on other rows.
        positive = surely_positive(s0 + least)
        if torch.is_grad_enabled() or positive.any():
            k, turn, offset, straight = self._one_sided(s0, least, line, x)
            likely = worst
            if line is not None and x.t_line is not None:
                lowest = line.times(x.r0 + m).plus(slope, x.t_line).range()[0]
                likely = torch.maximum(likely, const + lowest)
            better = positive & (straight > likely)
            other = k.unsqueeze(-1) * w + turn.unsqueeze(-1) * x.z0
            coef = torch.where(better.unsqueeze(-1), other, coef)
            const, worst = torch.where(better, offset, const), torch.where(better, straight, worst)
        floor = -math.nextafter(self._d**0.5, math.inf) * torch.linalg.vector_norm(w, dim=-1)
        flat = ~(worst > floor) | x.wild
        coef = torch.where(flat.unsqueeze(-1), 0.0, coef)
        return coef, torch.where(flat, floor, const - dot(coef, x.c))

    def _one_sided(
        self, s0: torch.Tensor, least: torch.Tensor, line: Line | None, x: Vectors
    ) -> tuple[torch.Tensor, ...]:
        """The plane r_least s + ... below s r for s > 0 (see `norm.BoundNorm`).

        Args:
            s0: [R, *lead].
            least: minimum of ds.
            line: line of ds in the model's input.

        Returns:
            (coefficient of ds, of t, constant, minimum of the plane), each [R, *lead].
        """
        above, r = (s0 + least).clamp(min=0), x.r_least
        slope, intercept = self._tangent(x, x.tu)
        short = slope * x.tu + intercept + x.r0 - r  # below 0 by rounding, or by |z| <= |z0| + ...
        turns = short >= -1e-6 * r
        turn, short = torch.where(turns, above * slope, 0.0), torch.where(turns, above * short, 0.0)
        offset = r * s0 - turn * x.tu + short.clamp(max=0)
        straight = r * least + turn * x.tu + offset
        if line is not None and x.t_line is not None:
            lowest = line.times(r.expand_as(s0)).plus(turn, x.t_line).range()[0]
            straight = torch.maximum(straight, offset + lowest)
        return r, turn, offset, straight

    def _product(
        self, w: torch.Tensor, line: Line | None, x: Vectors, m_s: torch.Tensor, S: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """dr = kappa t + rho', |rho' - rho| <= half: ds' dr >= (kappa t_mid + rho) ds' - error.

        Returns:
            (kappa, rho, half, error), each [R, *lead].
        """
        low, high = x.r_least - x.r0, x.r_most - x.r0
        rho, half = (low + high) / 2, (high - low) / 2
        ratio = (x.t_half + 1e-30) / (S.detach() + 1e-30)
        square = chosen(ratio.detach().clamp(1e-12, 1e12))
        inverse = square.reciprocal()
        line = None if line is None or x.t_line is None else line.plus(inverse, x.t_line)
        joint = torch.addcmul(w, x.z0, inverse.unsqueeze(-1))
        least, most = x.dx.range(joint, line)
        off = m_s + x.t_mid * inverse
        joint = square * torch.maximum((most - off).abs(), (least - off).abs()).square() / 4
        joint = torch.minimum(joint, S * x.t_half)
        error, with_t = S * half, S * x.rho_half - x.below[0] * joint
        better = with_t < error
        return (
            torch.where(better, x.below[0], 0.0), torch.where(better, x.rho_mid, rho),
            torch.where(better, x.rho_half, half), torch.where(better, with_t, error),
        )
