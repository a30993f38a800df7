"""A proof by cuts of a box as a tree, and what makes it one: its leaves cover the whole box.

A cut at v in input i makes of a part [l, u] the parts with x_i in [l_i, v] and [v, u_i]. Both are
closed and have the same number as end, so that every point of the part is in one of them. A goal is
proved in the whole box if on each way from the root to a leaf there is a part where it is proved.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cut:
    """A part of a box that is cut in two."""

    input: int
    at: float
    proved: tuple[int, ...] = ()
    """Goals that hold in all of it."""


@dataclass(frozen=True)
class Piece:
    """A part that is not cut."""

    proved: tuple[int, ...]
    bound: float | None = None
    """Smallest lower bound of the margins of `proved`."""


@dataclass(frozen=True)
class CutTree:
    """The parts of one box, each in front of those that it is cut into, the lower one first."""

    box: int
    nodes: tuple[Cut | Piece, ...]


@dataclass(frozen=True)
class Claimed:
    """Goals that hold in a part of a box, by what a tree says."""

    node: int
    low: tuple[float, ...]
    high: tuple[float, ...]
    goals: tuple[int, ...]


def claimed(
    tree: CutTree, low: Sequence[float], high: Sequence[float], goals: Collection[int]
) -> Iterator[Claimed]:
    """What has to be shown for goals to hold in the whole of a box; no goal twice on one way.

    Args:
        tree: of the box.
        low, high: the box.
        goals: that the tree is of.

    Raises:
        ValueError: the tree's parts do not cover the box, or a goal lacks a part; says which.
    """
    waiting = [(tuple(low), tuple(high), frozenset(goals))]
    for i, node in enumerate(tree.nodes):
        if not waiting:
            raise ValueError(f"node {i} is of no part of the box")
        low, high, left = waiting.pop()
        proved = left.intersection(node.proved)
        if proved:
            yield Claimed(i, low, high, tuple(sorted(proved)))
        left -= proved
        if isinstance(node, Piece):
            if left:
                raise ValueError(f"the part of node {i} has no bound of goal {min(left)}")
            continue
        k, at = node.input, node.at
        if not 0 <= k < len(low):
            raise ValueError(f"node {i} cuts input {k} of {len(low)}")
        if not low[k] <= at <= high[k]:
            raise ValueError(f"node {i} cuts input {k} at {at}, outside of its part "
                             f"[{low[k]}, {high[k]}]")
        waiting.append(((*low[:k], at, *low[k + 1 :]), high, left))
        waiting.append((low, (*high[:k], at, *high[k + 1 :]), left))
    if waiting:
        raise ValueError(f"{len(waiting)} parts of the box are in no leaf")


@dataclass
class Growing:
    """The trees of some boxes while parts are cut."""

    boxes: int
    _cuts: dict[int, tuple[int, float, int]] = field(default_factory=dict)
    _proved: dict[int, list[int]] = field(default_factory=dict)
    _bounds: dict[int, float] = field(default_factory=dict)
    _count: int = 0

    def __post_init__(self) -> None:
        self._count = self.boxes  # the first ones are the boxes themselves

    def cut(self, node: int, which: int, at: float) -> tuple[int, int]:
        """Cuts a part; returns the numbers of the lower and the upper one."""
        self._cuts[node] = which, at, self._count
        self._count += 2
        return self._count - 2, self._count - 1

    def prove(self, node: int, goal: int, bound: float) -> None:
        """Notes that a goal holds in a part."""
        self._proved.setdefault(node, []).append(goal)
        self._bounds[node] = min(bound, self._bounds.get(node, bound))

    def trees(self) -> list[CutTree]:
        """Of each box."""
        return [CutTree(box, tuple(self._in_order(box))) for box in range(self.boxes)]

    def _in_order(self, root: int) -> Iterator[Cut | Piece]:
        for node in self.numbers(root):
            proved = tuple(self._proved.get(node, ()))
            where = self.cut_of(node)
            if where is not None:
                yield Cut(*where, proved)
            else:
                yield Piece(proved, self._bounds.get(node))

    def numbers(self, root: int) -> Iterator[int]:
        """Of the parts of a box, each in front of those that it is cut into."""
        waiting = [root]
        while waiting:
            node = waiting.pop()
            if node in self._cuts:
                first = self._cuts[node][2]
                waiting += [first + 1, first]
            yield node

    def cut_of(self, node: int) -> tuple[int, float] | None:
        """The input and the value that a part is cut at; None: it is not cut."""
        return self._cuts[node][:2] if node in self._cuts else None
