"""Skips work that ReLUs make unnecessary: rows of stable neurons, columns of inactive ones.

CROWN's lines of y = relu(x) for x in [l, u] (Zhang et al. 2018, eq. 7) are y = x where l >= 0 and
y = 0 where u <= 0, whatever l and u are beyond that:

- a neuron that cheaper bounds prove stable needs no row of its own (auto_LiRPA's
  `sparse_intermediate_bounds`): it keeps the cheaper bounds, which are interval arithmetic from the
  bounds of the previous layer;
- a neuron with u <= 0 for the whole batch has exactly 0 in its column of A below the ReLU, so the
  products on both sides of the ReLU skip that column.

Both depend on values that differ between ranks. Therefore the ranks agree on the largest number of
rows, to which the others pad, and on the columns of a replicated node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.parallel.collectives import Collectives

_WORTH = 1 / 16
"""Minimum share of columns to skip; below it, selecting the others does not pay."""


@dataclass(frozen=True)
class UnstableRows:
    """The rows of a start node that need bounds."""

    own: torch.Tensor
    """Indices of the rank's neurons, or of a replicated node's (equal on every rank): [k]."""
    filled: torch.Tensor
    """The same, padded with 0 to the largest k of all ranks."""
    share: float
    """Their share of all neurons on all ranks."""


def relus_decide(readers: Sequence[auto_lirpa.Bound]) -> bool:
    """Whether only ReLUs use the bounds of a node that has these readers.

    As in auto_LiRPA, the first reader has to be a ReLU.
    """
    return bool(readers) and type(readers[0]) is auto_lirpa.BoundRelu and all(
        type(reader) is auto_lirpa.BoundRelu or not auto_lirpa.reads_bounds(reader)
        for reader in readers
    )


def between_linears(nodes: Iterable[auto_lirpa.Bound]) -> dict[str, auto_lirpa.Bound]:
    """Maps a linear layer's name to the ReLU after it, if that ReLU is its only reader and is
    itself read only by linear layers.

    Args:
        nodes: the nodes of the bound graph.
    """
    readers: dict[str, list[auto_lirpa.Bound]] = {}
    for node in nodes:
        for x in node.inputs:
            readers.setdefault(x.name, []).append(node)
    found = {}
    for name, read_by in readers.items():
        relu, linear = read_by[0], read_by[0].inputs[0]
        alone = len(read_by) == 1 and type(relu) is auto_lirpa.BoundRelu
        if alone and _leaves_out_columns(linear):
            after = readers.get(relu.name, ())
            if after and all(_leaves_out_columns(r) and r.inputs[0] is relu for r in after):
                found[name] = relu
    return found


def _leaves_out_columns(node: auto_lirpa.Bound) -> bool:
    return getattr(node, "leaves_out_columns", False)


def _on_any_rank(tp: Collectives, mask: torch.Tensor) -> torch.Tensor:
    """Where a replicated mask is set; equal on all ranks even if their masks differ."""
    return tp.largest(mask.to(torch.uint8)).bool()


def live_columns(upper: torch.Tensor, shared_by: Collectives | None = None) -> torch.Tensor | None:
    """Features that are not inactive for the whole batch.

    Args:
        upper: upper bounds of the ReLU's input, [B, ..., features].
        shared_by: for replicated features, the ranks that have to agree.

    Returns:
        Their indices, or None for all features.
    """
    live = (~(upper.detach() <= 0)).flatten(0, -2).any(0)  # with NaN nothing is inactive
    if shared_by is not None:
        live = _on_any_rank(shared_by, live)
    columns = live.nonzero().flatten()
    return columns if len(columns) < (1 - _WORTH) * len(live) else None


def unstable_rows(
    tp: Collectives, known: tuple[torch.Tensor, torch.Tensor], sharded: bool,
    skip: torch.Tensor | None = None,
) -> UnstableRows:
    """The neurons that bounds do not prove stable for every sample of the batch.

    Args:
        tp: the ranks that have to agree.
        known: bounds (lower, upper) of a node, each [B, *node shape].
        sharded: whether they belong to the rank's own features.
        skip: neurons to ignore, [k], as in `UnstableRows.own`.
    """
    lower, upper = (bound.detach().flatten(1) for bound in known)
    some = (~((lower >= 0) | (upper <= 0))).any(0)  # NaN proves nothing
    if skip is not None:
        some[skip] = False
    if not sharded:
        some = _on_any_rank(tp, some)
    own = some.nonzero().flatten()
    counts = torch.tensor([len(own)], device=own.device)
    if sharded:
        counts = tp.gather_results(counts)
    share = int(counts.sum()) / (len(counts) * len(some))
    filled = torch.cat((own, own.new_zeros(int(counts.max()) - len(own))))
    return UnstableRows(own, filled, share)


def with_rows(
    known: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor, lower: Any, upper: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replaces some rows of bounds by computed ones.

    Args:
        known: (lower, upper), each [B, *node shape].
        rows: indices of the rows in the flattened node, [k].
        lower, upper: computed bounds, [k or more, B]; rows beyond k are padding.
    """
    def replaced(bound: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
        found = bound.flatten(1).index_copy(1, rows, computed[: len(rows)].t())
        return found.view_as(bound)

    return replaced(known[0], lower), replaced(known[1], upper)
