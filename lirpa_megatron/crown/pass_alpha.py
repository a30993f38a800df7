"""The rows of alpha that a backward pass carries."""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.placement import RowPlacement


def alpha_at(run: Any, node: auto_lirpa.Bound) -> tuple[Any, torch.Tensor | None]:
    """The rows of alpha that a pass carries at a node, and which they are of the rank's (None:
    all, or one that they share).

    Alpha shared by all rows is a replicated value used on each rank's own rows.

    Args:
        run: the `BackwardPass`.
        node: where.
    """
    if not auto_lirpa.is_optimized(node, run.start):
        return None, None
    alpha, dim = node.alpha[run.start.name], auto_lirpa.alpha_spec_dim(node)
    index, columns = None, run.columns_at(node)
    if alpha.shape[dim] == 1 and run.rows_at(node) != 1:
        if run.plan.spec_sharded and not run.sharded[node.name]:
            alpha = run.tp.copy_to(alpha)
    elif run.alpha_rows is not None:
        index = _index(run, node)
        alpha = alpha.index_select(dim, index)
    if columns is not None:
        alpha, index = alpha.index_select(-1, columns), None
    return alpha, index


def keep_clipped(
    run: Any, node: auto_lirpa.Bound, alpha: Any, index: torch.Tensor | None
) -> None:
    """The host's S-shaped activations clip the alpha that they are shown: a copy of rows."""
    if index is not None:
        own, dim = node.alpha[run.start.name], auto_lirpa.alpha_spec_dim(node)
        own.data.index_copy_(dim, index, alpha.data)


def _index(run: Any, node: auto_lirpa.Bound) -> torch.Tensor:
    rows, in_all = run.alpha_rows
    if run.plan.rows[node.name] is not RowPlacement.GATHERED:
        return rows
    return torch.cat([rows + rank * in_all for rank in range(run.tp.size)])
