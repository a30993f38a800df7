"""Affine forms of nodes in the model's input, from the rows of a backward pass.

`operators.affine.form` defines them. This module computes them from the coefficients of one rank's
rows, for perturbation sets that are boxes or balls, or lie in a box.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.affine.form import AffineForm
from lirpa_megatron.operators.coefficients import RowBounds
from lirpa_megatron.operators.numerics import dual_norm


class InputSet:
    """The perturbed coordinates of a model's inputs as center + radii * u, u in a unit ball.

    Args:
        leaves: all perturbed input nodes of the model, in the same order for every start node, so
            that a column means the same coordinate in all forms.

    Attributes:
        norm: norm of the unit ball: inf for boxes and sets inside boxes; 1 or 2 for a single L1 or
            L2 ball.
    """

    def __init__(self, leaves: Sequence[auto_lirpa.Bound]) -> None:
        self.leaves = leaves
        norms = {float(getattr(leaf.perturbation, "norm", "nan")) for leaf in leaves}
        self.norm = next(iter(norms)) if len(norms) == 1 else float("nan")

    def offers_form(self, numel: int, limit: int) -> bool:
        """Whether a node of `numel` numbers gets a form of at most `limit` numbers."""
        known = self.norm == float("inf") or (self.norm in (1.0, 2.0) and len(self.leaves) == 1)
        return known and 0 < numel * self.columns() <= limit

    def columns(self) -> int:
        """Number of perturbed coordinates: the columns of a form."""
        return sum(int((self.box(leaf)[1] > 0).flatten(1).any(0).sum()) for leaf in self.leaves)

    def box(self, leaf: auto_lirpa.Bound) -> tuple[torch.Tensor, torch.Tensor]:
        """(center, radii) of one input, [B, *input shape]."""
        if self.norm == float("inf"):
            lower, upper = leaf.lower, leaf.upper
            return (lower + upper) / 2, (upper - lower) / 2
        eps = torch.as_tensor(leaf.perturbation.eps, dtype=leaf.center.dtype)
        return leaf.center, eps.to(leaf.center.device).expand_as(leaf.center)

    def rows(
        self, bounds: RowBounds, shared: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Rows of the form: [rows, B, N + 2], the last two its center and slack.

        Args:
            bounds: with lA and uA [rows, B, *input shape] of every leaf that the pass reached.
            shared: maps a replicated value to the one that this rank's rows use (copy_to).
        """
        middle, half = [], []
        low, high = bounds.lbias, bounds.ubias
        for leaf in self.leaves:
            center, radii = (shared(value) for value in self.box(leaf))
            center, radii = center.flatten(1), radii.flatten(1)
            none = low.new_zeros(()).expand(*low.shape, center.shape[-1])
            lA, uA = (side.get(leaf.name, none).flatten(2) for side in (bounds.lA, bounds.uA))
            low = low + (lA * center).sum(-1)
            high = high + (uA * center).sum(-1)
            moved = (radii > 0).any(0)
            lA, uA, radii = lA[..., moved], uA[..., moved], radii[:, moved]
            middle.append((lA + uA) / 2 * radii)
            half.append((uA - lA) / 2 * radii)
        A, spread = torch.cat(middle, -1), torch.cat(half, -1)
        slack = ((high - low) / 2 + dual_norm(spread, self.norm)).clamp(min=0)
        return torch.cat((A, ((high + low) / 2).unsqueeze(-1), slack.unsqueeze(-1)), -1)

    def form(self, rows: torch.Tensor, shape: Sequence[int]) -> AffineForm:
        """All rows [S, B, N + 2] -> the form of a node of `shape` (without the batch)."""
        rows = rows.transpose(0, 1)
        A, center, slack = rows[..., :-2], rows[..., -2], rows[..., -1]
        batch = A.shape[0]
        return AffineForm(
            center.reshape(batch, *shape), A.reshape(batch, *shape, A.shape[-1]),
            slack.reshape(batch, *shape), self.norm,
        )


class FormRows:
    """A rank's rows of a form, chunk after chunk.

    Without gradients all chunks are written into one tensor, so that no chunk's own tensor outlives
    the chunk.

    Args:
        total: number of the rank's rows.
    """

    def __init__(self, total: int) -> None:
        self._total, self._filled = total, 0
        self._rows: torch.Tensor | None = None
        self._chunks: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor) -> None:
        """Takes the next rows, [R, B, N + 2]."""
        if rows.requires_grad:
            self._chunks.append(rows)
            return
        if self._rows is None:
            self._rows = rows.new_full((self._total, *rows.shape[1:]), float("nan"))
        self._rows[self._filled : self._filled + len(rows)] = rows
        self._filled += len(rows)

    def all(self) -> torch.Tensor:
        """[total, B, N + 2]."""
        return torch.cat(self._chunks) if self._rows is None else self._rows


def readers_of_form(node: auto_lirpa.Bound, readers: Sequence[Any]) -> set[str]:
    """Names of a node's readers that use its affine form."""
    return {
        reader.name for reader in readers
        if any(reader.inputs[i] is node for i in getattr(reader, "reads_form", ()))
    }

