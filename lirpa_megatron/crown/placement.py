"""How the rows and features of A lie on the ranks, and the plan of one backward pass.

Words: p ranks; S rows of A (specifications); n = ceil(S/p) rows per rank, the last rank's padded;
B batch. A *node* of the bound graph is **sharded** (each rank holds its features: between a
ColumnParallelLinear and the RowParallelLinear that follows) or **replicated**. A backward pass is
**whole** (every rank carries all S rows at replicated nodes) or **spec-sharded** (its own n).

==================  =======================  =============================================
`RowPlacement`      A's shape on each rank   when
==================  =======================  =============================================
REPLICATED          [S, B, features]         whole pass; at a sharded node own features
SPEC_SHARDED        [n, B, all features]     spec-sharded pass, replicated node; a sharded one
                                             to which weights move
GATHERED            [p n, B, own features]   spec-sharded pass, sharded node
BLOCK               [n, B, own features]     sharded start node and what leads straight to it:
                                             the blocks of other ranks are zero
==================  =======================  =============================================

Where A passes from one to the other, for |A| bytes of p·n rows of h features:

=============================================  =============================  ===============
edge (backward)                                communication                  bytes a rank
=============================================  =============================  ===============
sharded REPLICATED -> replicated               all-reduce (sum over features) 2 (p-1)/p |A|
replicated -> sharded, REPLICATED              none (copy_to)                 0
sharded GATHERED -> replicated SPEC_SHARDED    reduce-scatter over rows       (p-1)/p |A|
replicated SPEC_SHARDED -> sharded GATHERED    all-gather over rows           (p-1)/p |A|
sharded BLOCK -> replicated SPEC_SHARDED       none                           0
sharded BLOCK -> sharded GATHERED              none (other rows are zero)     0
replicated <-> sharded, both SPEC_SHARDED      none of A; all-gather of the   (p-1) |shard|
                                               weights and relaxations
=============================================  =============================  ===============

Biases that arise at sharded nodes with REPLICATED or GATHERED rows are partial sums over features.
They are summed up locally and reduced once at the end of the pass ([S, B], or [p n, B] -> [n, B]);
biases at other nodes are complete. All of this follows from the graph alone, never from values.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class RowPlacement(enum.Enum):
    """Layout of A at a node (see the module's table)."""

    REPLICATED = enum.auto()
    SPEC_SHARDED = enum.auto()
    GATHERED = enum.auto()
    BLOCK = enum.auto()


@dataclass(frozen=True)
class Region:
    """Sharded nodes that hang together, and what reads them."""

    names: frozenset[str]
    """Of the sharded nodes."""
    readers: frozenset[str]
    """Of the replicated nodes that read them: RowParallelLinear, gathered features."""


@dataclass(frozen=True)
class PassPlan:
    """The course of a backward pass from one start node, the same on every rank."""

    start: Any
    """Where A begins."""
    order: tuple[Any, ...]
    """Nodes to go through, each after all its consumers, the start node first."""
    leaves: tuple[Any, ...]
    """Perturbed input nodes where the pass ends."""
    rows: dict[str, RowPlacement]
    """Layout of A at each of them, by node name."""
    spec_sharded: bool
    """Whether ranks carry their own rows."""
    has_partial_bias: bool
    """Whether any bias is a partial sum over ranks."""
    moved: tuple[tuple[Any, ...], ...] = ()
    """Nodes whose features are gathered together, where weights move, in the order of the pass."""


@dataclass(frozen=True)
class StartRows:
    """The rows of a start node on the ranks, before they are cut into chunks.

    What passes carry, the shapes of alpha and memory all follow from it.
    """

    plan: PassPlan
    """Of the passes, in which A moves. They begin at `plan.start`: the start node, or what it
    gathers."""
    total: int
    """S, rows in all (of a sharded start node: on each rank)."""
    split: bool
    """Whether the ranks share them out."""
    ranks: int

    @property
    def own(self) -> int:
        """n, rows that each rank carries."""
        return -(-self.total // self.ranks) if self.split else self.total

    def at(self, node: Any) -> int:
        """Rows of A that a rank has at a node when all its rows go at once."""
        gathered = self.plan.rows[node.name] is RowPlacement.GATHERED
        return self.own * self.ranks if gathered else self.own


def plan_pass(
    start: Any, sharded: dict[str, bool], spec_sharded: bool, ranks: int,
    regions: Iterable[Region] = (),
) -> PassPlan:
    """Plans the backward pass from `start` over its perturbed ancestors.

    Args:
        start: the start node (a host operator with `inputs`, `name`, `perturbed`).
        sharded: node name -> whether its value is feature-sharded.
        spec_sharded: whether ranks carry their own rows; a sharded start node whose rows are the
            ranks' own neurons is `spec_sharded` too.
        ranks: tensor-parallel size.
        regions: to which weights move; all of their nodes in the pass would have GATHERED rows.
    """
    order, leaves = _topological(start)
    rows: dict[str, RowPlacement] = {}
    for node in (*order, *leaves):
        rows[node.name] = RowPlacement.SPEC_SHARDED if spec_sharded else RowPlacement.REPLICATED
        if spec_sharded and sharded[node.name]:
            rows[node.name] = RowPlacement.BLOCK if sharded[start.name] else RowPlacement.GATHERED
    if spec_sharded and sharded[start.name]:
        # BLOCK holds only where every path from the start stays sharded: one pass in the order of
        # the traversal, so that each node is settled before its inputs are.
        for node in order:
            leads_straight = sharded[node.name] and rows[node.name] is RowPlacement.BLOCK
            for x in node.inputs:
                if x.name in rows and sharded[x.name] and not leads_straight:
                    rows[x.name] = RowPlacement.GATHERED
    moved = []
    for region in regions:
        inside = [x for x in order if x.name in region.names]
        rows |= {x.name: RowPlacement.SPEC_SHARDED for x in inside}
        moved.append([x for x in order if x in inside or x.name in region.readers])
    moved.sort(key=lambda nodes: order.index(nodes[0]))
    partial = ranks > 1 and any(
        sharded[node.name] and rows[node.name] in (RowPlacement.REPLICATED, RowPlacement.GATHERED)
        for node in order
    )
    together = tuple(tuple(nodes) for nodes in moved)
    return PassPlan(start, tuple(order), tuple(leaves), rows, spec_sharded, partial, together)


def _topological(start: Any) -> tuple[list[Any], list[Any]]:
    consumers: dict[str, int] = {start.name: 0}
    seen, queue = [start], deque([start])
    while queue:
        node = queue.popleft()
        for x in node.inputs:
            if not x.perturbed:
                continue
            if x.name not in consumers:
                consumers[x.name] = 0
                seen.append(x)
                queue.append(x)
            consumers[x.name] += 1
    order, leaves, queue = [], [], deque([start])
    while queue:
        node = queue.popleft()
        (order if node.inputs else leaves).append(node)
        for x in node.inputs:
            if x.name in consumers:
                consumers[x.name] -= 1
                if consumers[x.name] == 0:
                    queue.append(x)
    return order, leaves
