"""Decides what a spec-sharded pass exchanges: rows of A, or weights and relaxations.

A region is a connected set of sharded nodes, between ColumnParallelLinear layers and the
RowParallelLinear that reads them. A pass in which each of p ranks carries n rows traverses it in
one of two ways (`crown.placement`), which give the same bounds:

- A moves: it is gathered where the pass enters, (p-1) |A| bytes for A [n, B, h], and
  reduce-scattered where the pass leaves, which costs the same again;
- weights move: each rank keeps its own rows with all features, and the region's weights and
  relaxations (`sharded_relaxation`) are gathered for each chunk of rows: (p-1) |shards| bytes.

The cheaper way is chosen before each pass, from shapes alone, so all ranks choose the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.graph import Call
from lirpa_megatron.crown.placement import PassPlan, Region, RowPlacement
from lirpa_megatron.operators.context import OperatorInputs
from lirpa_megatron.parallel.packed_gather import packed_bytes


def find_regions(nodes: Iterable[auto_lirpa.Bound], sharded: dict[str, bool]) -> tuple[Region, ...]:
    """The regions of a bound graph.

    Args:
        nodes: the graph's nodes.
        sharded: node name -> whether its value is feature-sharded.
    """
    computed = [node for node in nodes if node.inputs]
    region_of: dict[str, set[str]] = {}
    readers: dict[str, set[str]] = {}
    for node in computed:
        if sharded[node.name]:
            region_of[node.name] = {node.name}
    for node in computed:
        for x in node.inputs:
            if x.name not in region_of:
                continue
            if node.name not in region_of:
                readers.setdefault(x.name, set()).add(node.name)
            elif region_of[x.name] is not region_of[node.name]:
                region_of[x.name] |= region_of[node.name]
                for name in region_of[node.name]:
                    region_of[name] = region_of[x.name]
    regions = {id(names): names for names in region_of.values()}
    return tuple(
        Region(frozenset(names), frozenset().union(*(readers.get(n, ()) for n in names)))
        for names in regions.values()
    )


def features_of(node: auto_lirpa.Bound, inputs: OperatorInputs) -> tuple[Any, int]:
    """What other ranks need from this rank's features: a tree of tensors, and their feature dim."""
    if type(node) is auto_lirpa.BoundRelu:
        return (inputs[0].lower, inputs[0].upper), -1
    return node.sharded_relaxation(inputs), node.feature_dim


def _can_be_gathered(node: auto_lirpa.Bound) -> bool:
    if type(node) is auto_lirpa.BoundRelu:
        return True
    bounded = getattr(node, "requires_input_bounds", ())
    return getattr(node, "feature_dim", None) is not None and all(
        node.inputs[i].perturbed for i in bounded
    )


class CommunicationPlan:
    """Chooses what moves in each pass, and counts the bytes.

    Args:
        graph: the bound graph.

    Attributes:
        counted: bytes that a rank sends into, within and out of regions, in all passes since it was
            cleared: if A always moved ('A'), if weights moved wherever they can ('weights'), and
            as it was done ('chosen').
    """

    def __init__(self, graph: Call) -> None:
        self.graph, self.tp, self.sharded = graph, graph.context.collectives, graph.context.sharded
        self.regions = find_regions(graph.named_nodes().values(), self.sharded)
        self.counted: Counter[str] = Counter()

    def choose(
        self, plan: PassPlan, rows: int, chunks: int, sides: int, dtype: torch.dtype, identity: bool
    ) -> list[Region]:
        """The regions in which weights move, for a spec-sharded pass.

        Args:
            plan: the pass's plan with A moving everywhere.
            rows: number of rows of A on a rank, over all chunks.
            chunks: how often weights would be gathered.
            sides: 2 if lower and upper bounds are requested, otherwise 1.
            dtype: dtype of A.
            identity: whether the start node's rows are rows of the identity, which every rank can
                build without communication.
        """
        wanted, chosen = self.graph.own_options.moves, []
        for region in self.regions:
            inside = [x for x in plan.order if x.name in region.names]
            if not inside or any(plan.rows[x.name] is not RowPlacement.GATHERED for x in inside):
                continue
            readers = [x for x in plan.order if x.name in region.readers]
            cost = {"A": rows * sides * self._row_bytes(plan, inside, readers, dtype, identity)}
            members = (*inside, *readers)
            if all(_can_be_gathered(node) for node in members):
                cost["weights"] = chunks * sum(self._size(node, dtype) for node in members)
            weights = "weights" in cost and (
                wanted == "weights" or (wanted == "auto" and cost["weights"] < cost["A"])
            )
            if weights:
                chosen.append(region)
            cost["chosen"] = cost["weights" if weights else "A"]
            for name in ("A", "weights", "chosen"):
                self.counted[name] += (self.tp.size - 1) * cost.get(name, cost["A"])
        return chosen

    def _row_bytes(
        self, plan: PassPlan, inside: list, readers: list, dtype: torch.dtype, identity: bool
    ) -> int:
        """Bytes of one row of A at the places where the pass enters and leaves a region."""
        entered = [x for x in readers if not (identity and x is plan.start)]
        left = {
            x.name: x for node in inside for x in node.inputs
            if x.name in plan.rows and not self.sharded[x.name]
        }
        numbers = sum(math.prod(x.output_shape[1:]) for x in (*entered, *left.values()))
        return self.graph.batch_size * numbers * dtype.itemsize

    def _size(self, node: auto_lirpa.Bound, dtype: torch.dtype) -> int:
        """Bytes of one rank's features at a node."""
        context, call = self.graph.context, self.graph.call
        if node.name not in call.sizes:
            for x in node.inputs:  # clean values are kept, and later uses may need their gradient
                context.value_of(x)
            with torch.no_grad():
                own, _ = features_of(node, OperatorInputs.of(node, context, call))
            call.sizes[node.name] = packed_bytes(own, dtype)
        return call.sizes[node.name]
