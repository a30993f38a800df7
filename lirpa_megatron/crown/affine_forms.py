"""Affine forms of nodes in the model's input, from the rows of a backward pass.

`operators.affine.form` says what they are; here they are made: from the coefficients of one rank's
rows, for the perturbations that have a box or a ball.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.affine.form import AffineForm, Known, dual_norm
from lirpa_megatron.operators.attention.softmax_values import BoundAttend
from lirpa_megatron.operators.coefficients import RowBounds


class InputSet:
    """The perturbed coordinates of a model's inputs as center + radii * u, u in a unit ball.

    Args:
        leaves: all perturbed input nodes of the model, in one order for all start nodes: the same
            column of two forms is the same coordinate.

    Attributes:
        norm: of the ball: inf for boxes (and what lies in them), its own for one L1 or L2 ball.
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
        """How many coordinates move: the columns of a form."""
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
            shared: gives a replicated value for use on this rank's rows.
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

    They are written into one tensor, unless gradients flow: a chunk's own does not outlive it then.

    Args:
        total: of the rank's rows.
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


class CenteredRows:
    """The rows e_ij - sum_k p_ik e_ik of an attention's scores, built when they are asked for.

    Args:
        weights: p [B, n, T, T], clean softmax weights.
        keep: [n, T, T], the pairs that some sample of the batch does not mask.
    """

    def __init__(self, weights: torch.Tensor, keep: torch.Tensor) -> None:
        self.weights = weights
        self.pairs = keep.nonzero(as_tuple=True)
        self.shape = (len(self.pairs[0]), *weights.shape)

    def index_select(self, dim: int, rows: torch.Tensor) -> torch.Tensor:
        """Some of the rows, [R, B, n, T, T]."""
        h, i, j = (index[rows] for index in self.pairs)
        C = self.weights.new_zeros(len(rows), *self.shape[1:])
        each = torch.arange(len(rows), device=C.device)
        C[each, :, h, i] = -self.weights[:, h, i].transpose(0, 1)
        C[each, :, h, i, j] += 1
        return C

    def place(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the rows, [..., R] -> [..., n, T, T], 0 elsewhere."""
        placed = values.new_zeros(*values.shape[:-1], *self.weights.shape[1:])
        placed[(..., *self.pairs)] = values
        return placed


def bound_centered(passes: Any, node: auto_lirpa.Bound, attend: Any) -> Known:
    """Bounds the scores as an attention reads them: t_ij = s_ij - sum_k p_ik s_k; 0 where masked.

    Softmax does not see what all scores of a query have in common, which is most of their range.
    The rows are those of the rank's heads; a head's masked pairs are left out.

    Args:
        passes: of the bound module.
        node: the scores.
        attend: the operator that reads them.
    """
    p = attend.clean_weights()
    rows = CenteredRows(p, (~attend.masked()).any(0))
    found = passes.run(node, rows, passes.tp.size > 1, form=True)
    lower, upper = without_nan(rows.place(found.lower.t()), rows.place(found.upper.t()))
    form = None if found.form is None else found.form.view(rows.place)
    return Known(lower, upper, form)


def readers_of_form(node: auto_lirpa.Bound, readers: Sequence[Any]) -> set[str]:
    """Names of the operators among a node's readers that make use of its form."""
    return {
        reader.name for reader in readers
        if any(reader.inputs[i] is node for i in getattr(reader, "reads_form", ()))
    }


def reader_of_scores(node: auto_lirpa.Bound, readers: Sequence[Any]) -> Any:
    """The attention that reads the node as its scores; None if anything else reads it too."""
    alone = len(readers) == 1 and isinstance(readers[0], BoundAttend)
    return readers[0] if alone and readers[0].inputs[0] is node else None


def without_nan(lower: Any, upper: Any) -> tuple[Any, Any]:
    """Bounds that say nothing where arithmetic gave NaN: -inf and inf."""
    inf = float("inf")
    return (
        None if lower is None else torch.where(lower.isnan(), -inf, lower),
        None if upper is None else torch.where(upper.isnan(), inf, upper),
    )
