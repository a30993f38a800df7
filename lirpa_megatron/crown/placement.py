"""How the rows and features of A lie on the ranks, and the plan of one backward pass.

Words: p ranks; S rows of A (specifications); n = ceil(S/p) rows per rank, the last rank's padded;
B batch. A *node* of the bound graph is **sharded** (each rank holds its features: between a
ColumnParallelLinear and the RowParallelLinear that follows) or **replicated**. A backward pass is
**whole** (every rank carries all S rows at replicated nodes) or **spec-sharded** (its own n).

==========================  =======================  ======================================
`Rows` of A at a node       shape on each rank       when
==========================  =======================  ======================================
WHOLE                       [S, B, features]         whole pass; at a sharded node own features
OWN                         [n, B, all features]     spec-sharded pass, replicated node; a sharded
                                                     one to which weights move
ALL                         [p n, B, own features]   spec-sharded pass, sharded node
BLOCK                       [n, B, own features]     sharded start node and what leads straight
                                                     to it: the blocks of other ranks are zero
==========================  =======================  ======================================

Where A passes from one to the other, for |A| bytes of p·n rows of h features:

===============================  =============================  ==========================
edge (backward)                  communication                  bytes sent per rank
===============================  =============================  ==========================
sharded WHOLE -> replicated      all-reduce (sum over features) 2 (p-1)/p |A|
replicated -> sharded, WHOLE     none (copy_to)                 0
sharded ALL -> replicated OWN    reduce-scatter over rows       (p-1)/p |A|
replicated OWN -> sharded ALL    all-gather over rows           (p-1)/p |A|
sharded BLOCK -> replicated OWN  none                           0
sharded BLOCK -> sharded ALL     none (other rows are zero)     0
replicated OWN <-> sharded OWN   none of A; all-gather of the   (p-1) |shard|
                                 weights and relaxations
===============================  =============================  ==========================

Biases that arise at sharded WHOLE and ALL nodes are partial sums over features. They are summed up
locally and reduced once at the end of the pass ([S, B], or [p n, B] -> [n, B]); biases at other
nodes are complete. All of this follows from the graph alone, never from values.
"""

from __future__ import annotations

import contextlib
import enum
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from lirpa_megatron.parallel.collectives import Collectives


class Rows(enum.Enum):
    """Layout of A at a node (see the module's table)."""

    WHOLE = enum.auto()
    OWN = enum.auto()
    ALL = enum.auto()
    BLOCK = enum.auto()


class Layout:
    """What a bound graph's operators know of their surroundings while a pass runs.

    One object per BoundedModule, handed to its operators through the host's `bound_opts`.

    Attributes:
        collectives: the guarded mappings of the model's tensor-parallel group.
        spec_sharded: whether the pass that is running is spec-sharded.
        sharded: node name -> whether its value is feature-sharded.
        value_of: a node's value at the clean input.
        form_limit: numbers that a table made of forms may have.
        form_room: bytes of replicated nodes' forms that operators may yet keep whole.
        forms: node name -> its affine form, found by a pass of the present call.
        centered: the same for the scores of an attention, relative to their weighted mean.
        directions: norm's name -> what is known of <z0, x>, z0 its clean vectors (`BoundNorm`).
        know: (node, rows of vectors) -> what a pass of their own finds of them, or None; while a
            pass is at a node that may ask for that.
        unread: node name -> the operators that have yet to read its form; when all have, it is let
            go. None where they may want to read it again: gradients, alpha.
        common: node name -> what all rows have in common there, and what it was made of.
        sizes: node name -> bytes of the rank's `features` there.
        whole: node name -> its `features` of all ranks, while a pass that moves weights is there.
        live: linear layer's name -> its features that the ReLU after it does not cut off.
        columns: node name -> the features that A has there in the pass that is running; all where
            there is no entry.
        entered: A of both sides as the rows of a sharded input are laid out, where a pass enters
            its features through the node that is visited; and a function that takes it apart.
        calls: functions of constants that the model calls, by their number in the graph.
    """

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives
        self.spec_sharded = False
        self.sharded: dict[str, bool] = {}
        self.value_of: Callable[[Any], Any] = _unknown
        self.form_limit = 0
        self.form_room = 0.0
        self.forms: dict[str, Any] = {}
        self.centered: dict[str, Any] = {}
        self.directions: dict[str, Any] = {}
        self.know: Callable[[Any, Any], Any] | None = None
        self.unread: dict[str, set[str]] | None = None
        self.common: dict[str, Any] = {}
        self.sizes: dict[str, int] = {}
        self.whole: dict[str, Any] = {}
        self.live: dict[str, Any] = {}
        self.columns: dict[str, Any] = {}
        self.calls: list[Callable[..., Any]] = []
        self.entered: Any = None

    def forget(self) -> None:
        """Leaves what holds for one call's bounds alone."""
        found = (self.forms, self.centered, self.directions, self.common, self.sizes, self.whole,
                 self.live)
        for known in found:
            known.clear()
        self.columns = {}
        self.unread = None

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """What belongs to the pass that is running, for the time of another one."""
        names = ("spec_sharded", "columns", "entered", "whole", "know")
        saved = {name: getattr(self, name) for name in names}
        self.columns, self.entered, self.whole, self.know = {}, None, {}, None
        try:
            yield
        finally:
            for name, value in saved.items():
                setattr(self, name, value)

    def to_be_read(self, node: str, operators: set[str]) -> None:
        """Notes which operators will read a node's form."""
        if self.unread is not None:
            self.unread[node] = operators

    def has_read(self, operator: str, nodes: Iterable[str]) -> None:
        """Notes that an operator has made of its inputs' forms what all rows have in common."""
        for name in nodes:
            if self.unread is None or operator not in self.unread.get(name, ()):
                continue
            self.unread[name].remove(operator)
            known = self.centered[name].form if name in self.centered else self.forms[name]
            if known is not None and not self.unread[name]:
                known.let_go()

    def __deepcopy__(self, memo: dict) -> Layout:
        return self  # process groups cannot be copied


def _unknown(node: Any) -> Any:
    raise RuntimeError(f"{node}: the graph is still being built")


@dataclass(frozen=True)
class Region:
    """Sharded nodes that hang together, and what reads them."""

    names: frozenset[str]
    """Of the sharded nodes."""
    readers: frozenset[str]
    """Of the replicated nodes that read them: RowParallelLinear, gathered features."""


@dataclass(frozen=True)
class Plan:
    """The course of a backward pass from one start node, the same on every rank."""

    start: Any
    """Where A begins."""
    order: tuple[Any, ...]
    """Nodes to go through, each after all its consumers, the start node first."""
    leaves: tuple[Any, ...]
    """Perturbed input nodes where the pass ends."""
    rows: dict[str, Rows]
    """Layout of A at each of them, by node name."""
    spec_sharded: bool
    """Whether ranks carry their own rows."""
    has_partial_bias: bool
    """Whether any bias is a partial sum over ranks."""
    moved: tuple[tuple[Any, ...], ...] = ()
    """Nodes whose features are gathered together, where weights move, in the order of the pass."""


def make_plan(
    start: Any, sharded: dict[str, bool], spec_sharded: bool, ranks: int,
    regions: Iterable[Region] = (),
) -> Plan:
    """Plans the backward pass from `start` over its perturbed ancestors.

    Args:
        start: the start node (a host operator with `inputs`, `name`, `perturbed`).
        sharded: node name -> whether its value is feature-sharded.
        spec_sharded: whether ranks carry their own rows; a sharded start node whose rows are the
            ranks' own neurons is `spec_sharded` too.
        ranks: tensor-parallel size.
        regions: to which weights move; all of their nodes in the pass would have ALL rows.
    """
    order, leaves = _topological(start)
    rows: dict[str, Rows] = {}
    for node in (*order, *leaves):
        rows[node.name] = Rows.OWN if spec_sharded else Rows.WHOLE
        if spec_sharded and sharded[node.name]:
            rows[node.name] = Rows.BLOCK if sharded[start.name] else Rows.ALL
    if spec_sharded and sharded[start.name]:
        # BLOCK holds only where every path from the start stays sharded: one pass in the order of
        # the traversal, so that each node is settled before its inputs are.
        for node in order:
            leads_straight = sharded[node.name] and rows[node.name] is Rows.BLOCK
            for x in node.inputs:
                if x.name in rows and sharded[x.name] and not leads_straight:
                    rows[x.name] = Rows.ALL
    moved = []
    for region in regions:
        inside = [x for x in order if x.name in region.names]
        rows |= {x.name: Rows.OWN for x in inside}
        moved.append([x for x in order if x in inside or x.name in region.readers])
    moved.sort(key=lambda nodes: order.index(nodes[0]))
    partial = ranks > 1 and any(
        sharded[node.name] and rows[node.name] in (Rows.WHOLE, Rows.ALL) for node in order
    )
    together = tuple(tuple(nodes) for nodes in moved)
    return Plan(start, tuple(order), tuple(leaves), rows, spec_sharded, partial, together)


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
