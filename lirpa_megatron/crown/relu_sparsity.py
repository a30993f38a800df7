"""What ReLUs make unnecessary: rows of neurons that they do not cut, columns that they cut off.

CROWN's lines of y = relu(x) for x in [l, u] (Zhang et al. 2018, eq. 7) are y = x where l >= 0 and
y = 0 where u <= 0, whatever l and u are beyond that:

- a neuron that cheaper bounds show to be stable needs no row of its own (auto_LiRPA's
  `sparse_intermediate_bounds`): its bounds are the cheaper ones, interval arithmetic from what is
  known of the layer before;
- a neuron with u <= 0 for the whole batch has 0 in its column of A below the ReLU, exactly, so the
  products on both sides of the ReLU leave the column out.

Which they are is decided by values, and how many by the rank that has them. So the ranks agree: on
the largest number of rows, to which the others fill up, and on which columns of a replicated node.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.parallel.collectives import Collectives

_WORTH = 1 / 16
"""Part of the columns to leave out that is worth picking the others."""


@dataclass(frozen=True)
class UnstableRows:
    """Which rows of a start node are to be bounded."""

    own: torch.Tensor
    """Indices of the rank's neurons, or of a replicated node's (the same on every rank): [k]."""
    filled: torch.Tensor
    """The same, filled up with 0 to the largest k that any rank has."""
    share: float
    """Their part of all neurons of all ranks."""


def relus_decide(readers: Sequence[auto_lirpa.Bound]) -> bool:
    """Whether nothing but ReLUs makes use of the bounds of a node with these readers.

    As for auto_LiRPA, a ReLU has to be the first of them.
    """
    return bool(readers) and type(readers[0]) is auto_lirpa.BoundRelu and all(
        type(reader) is auto_lirpa.BoundRelu or not auto_lirpa.reads_bounds(reader)
        for reader in readers
    )


def between_linears(nodes: Iterable[auto_lirpa.Bound]) -> dict[str, auto_lirpa.Bound]:
    """Name of a linear layer -> the ReLU that alone reads it, itself read by linear layers alone.

    Args:
        nodes: of the bound graph.
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
    """Where a replicated mask is set; one and the same on all ranks whatever they had."""
    return tp.largest(mask.to(torch.uint8)).bool()


def live_columns(upper: torch.Tensor, shared_by: Collectives | None = None) -> torch.Tensor | None:
    """Features that a ReLU does not cut off for the whole batch.

    Args:
        upper: [B, ..., features], of the ReLU's input.
        shared_by: the ranks that are to agree on them, where they are replicated.

    Returns:
        Their indices, or None for all.
    """
    live = (~(upper.detach() <= 0)).flatten(0, -2).any(0)  # NaN cuts nothing off
    if shared_by is not None:
        live = _on_any_rank(shared_by, live)
    columns = live.nonzero().flatten()
    return columns if len(columns) < (1 - _WORTH) * len(live) else None


def unstable_rows(
    tp: Collectives, known: tuple[torch.Tensor, torch.Tensor], sharded: bool,
    skip: torch.Tensor | None = None,
) -> UnstableRows:
    """The neurons that bounds leave unstable, for some sample of the batch.

    Args:
        tp: the ranks that are to agree.
        known: bounds (lower, upper) of a node, each [B, *node shape].
        sharded: whether they are of the rank's own features.
        skip: neurons that do not count, [k], as `UnstableRows.own`.
    """
    lower, upper = (bound.detach().flatten(1) for bound in known)
    some = (~((lower >= 0) | (upper <= 0))).any(0)  # of NaN nothing is known
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
    """Bounds of which some rows are replaced by computed ones.

    Args:
        known: (lower, upper), each [B, *node shape].
        rows: which rows of the flattened node, [k].
        lower, upper: computed, [k or more, B]; what is beyond k filled up.
    """
    def replaced(bound: torch.Tensor, computed: torch.Tensor) -> torch.Tensor:
        found = bound.flatten(1).index_copy(1, rows, computed[: len(rows)].t())
        return found.view_as(bound)

    return replaced(known[0], lower), replaced(known[1], upper)
