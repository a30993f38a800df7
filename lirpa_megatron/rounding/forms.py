"""Affine forms (`operators.affine.form`) that hold in real arithmetic."""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.arithmetic.floating import UNIT
from lirpa_megatron.arithmetic.near import Near
from lirpa_megatron.operators.coefficients import RowBounds
from lirpa_megatron.operators.numerics import dual_norm


@torch.no_grad()
def _slack(inputs: Any, found: RowBounds, rows: torch.Tensor) -> torch.Tensor:
    """The least slack with which the computed center and A hold: [R, B].

    A pass leaves lA x + lb - e <= z (e: what it is off, `charges`), with x = m + rho u, m the
    computed midpoint, rho at least |x - m| and u in the unit ball. For any A and c

        z - A u >= lA m + lb - e - |lA rho - A|_dual,        and from above alike,

    so that z lies in c + A u -+ max(c - that, the other - c). Computed in `Near`.
    """
    A, center = rows[..., :-2], Near(rows[..., -2])
    low, high = Near(found.lbias.detach()), Near(found.ubias.detach())
    below, above, first = [], [], 0
    for leaf in inputs.leaves:
        m, radii = (x.detach().flatten(1) for x in inputs.box(leaf))
        moved = (radii > 0).any(0)
        if inputs.norm == float("inf"):
            l, u = leaf.lower.detach().flatten(1), leaf.upper.detach().flatten(1)
            rho = torch.where(l < u, radii + 4 * UNIT * (l.abs() + u.abs()) + 2.0**-1000, 0.0)
        else:
            rho = radii
        own = torch.zeros(*A.shape[:2], len(moved), dtype=A.dtype, device=A.device)
        n = int(moved.sum())
        own[..., moved] = A[..., first : first + n]
        first += n
        for side, rest in ((found.lA, below), (found.uA, above)):
            lines = side.get(leaf.name)
            lines = torch.zeros_like(own) if lines is None else lines.detach().flatten(2)
            rest.append(Near(lines) * rho - own)
            at_m = (Near(lines) * m).sum(-1)
            low, high = (low + at_m, high) if rest is below else (low, high + at_m)
    low = low - found.off["lower"] - dual_norm(torch.cat(below, -1), inputs.norm)
    high = high + found.off["upper"] + dual_norm(torch.cat(above, -1), inputs.norm)
    slack = torch.maximum(center - low, high - center)
    return (slack.value + slack.limit).clamp(min=0) * (1 + 2.0**-40)


def with_errors(inputs: Any, found: RowBounds, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a form (`forms.InputSet.rows`) whose slacks hold what is off in them.

    Args:
        inputs: the InputSet.
        found: what the pass left.
        rows: [R, B, N + 2].
    """
    slack = rows[..., -1:]
    more = (_slack(inputs, found, rows).unsqueeze(-1) - slack.detach()).clamp(min=0)
    return torch.cat((rows[..., :-1], slack + more * (1 + 2.0**-40)), -1)


@torch.no_grad()
def with_further(inputs: Any, found: RowBounds, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a form that the pipeline stage below made of rows of A, as exact numbers.

    What the pass was off before it sent them is added to the slacks, rounded up.

    Args:
        inputs: not read.
        found: what the pass left: what is off in it is of this stage.
        rows: [R, B, N + 2].
    """
    off = torch.maximum(found.off["lower"], found.off["upper"])
    return torch.cat((rows[..., :-1], (rows[..., -1:] + off.unsqueeze(-1)) * (1 + 2.0**-40)), -1)
