"""Where a search was when it was ended, so that another one can go on from there.

A state says how boxes were split or cut, which of these domains were proved and which were open,
and which bounds of inner neurons they had. Nothing of it is believed: a search that goes on takes
what was open first, and proves all the rest again before it says that anything holds. So a wrong
state costs time, and nothing else.

A tree is a list of its nodes, each in front of those that it is split into:

    n, (n, p)     split at neuron n (n >= 0), at 0 or p, the half with z >= p first
    (input, at)   part of a box cut at a value of an input, the lower half first
    CLOSED, OPEN  a leaf, which was proved or not
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lirpa_megatron.complete.problem import Claim, Domain, Leaf, Split
from lirpa_megatron.complete.tree import Node, tree_of

if TYPE_CHECKING:
    from lirpa_megatron.complete.roots import Roots

CLOSED, OPEN = -1, -2
_DEEPEST = 400


class StateError(ValueError):
    """A state that is not one of the search that is to go on from it."""


@dataclass(frozen=True)
class InnerBound:
    """A bound of an inner neuron, as in `problem.Claim`, with the tree that it was found by."""

    box: int
    number: int
    sign: int
    bound: float
    tree: tuple[Any, ...]


@dataclass(frozen=True)
class SearchState:
    """What a search knows of how to go on.

    Attributes:
        trees: of goals whose neurons were split, by goal (or whatever stands for one).
        cuts: of boxes that were cut, by box.
        inner: bounds of inner neurons.
        rounds: of `Refinement` that were finished.
        refined: whether it was done.
        domains, inner_domains: how many were bounded so far.
    """

    trees: dict[Any, tuple[Any, ...]] = field(default_factory=dict)
    cuts: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    inner: tuple[InnerBound, ...] = ()
    rounds: int = 0
    refined: bool = False
    domains: int = 0
    inner_domains: int = 0

    @classmethod
    def of_splits(
        cls, goals: int, neurons: int, closed: Iterable[Leaf], left: Iterable[Domain],
        claims: Iterable[Claim], **known: Any,
    ) -> SearchState:
        """Of a search that splits neurons.

        Args:
            goals, neurons: how many there are.
            closed, left: leaves that were proved, and domains that were not, of all goals.
            claims: bounds of inner neurons.
            known: the other attributes.

        Raises:
            ValueError: a tree is too deep.
        """
        leaves: list[tuple[list, list]] = [([], []) for _ in range(goals)]
        for kind, some in enumerate((closed, left)):
            for leaf in some:
                leaves[leaf.goal][kind].append(leaf.splits)
        trees = {goal: split_tree(*both, neurons) for goal, both in enumerate(leaves)}
        inner = tuple(
            InnerBound(c.box, c.number, c.sign, c.bound, split_tree(c.leaves, (), neurons))
            for c in claims
        )
        return cls(trees, {}, inner, **known)


def split_tree(
    closed: Sequence[Sequence[Split]], left: Sequence[Sequence[Split]], neurons: int
) -> tuple[Any, ...]:
    """The tree of leaves that were proved and of those that are open.

    Args:
        closed, left: of each leaf the splits from the root on.
        neurons: how many there are.

    Raises:
        ValueError: they are not the leaves of one tree, or it is too deep.
    """
    nodes: list[Any] = []
    waiting: list[Node] = [tree_of([*closed, *left], neurons)]
    while waiting:
        node = waiting.pop()
        if node.leaf is None:
            nodes.append((node.neuron, node.point) if node.point else node.neuron)
            waiting += [node.off, node.on]
        else:
            nodes.append(CLOSED if node.leaf < len(closed) else OPEN)
    return tuple(nodes)


def split_leaves(
    nodes: Sequence[Any], neurons: int
) -> tuple[list[tuple[Split, ...]], list[tuple[Split, ...]]]:
    """The reverse of `split_tree`: leaves that were proved, and open ones.

    Raises:
        StateError: it is no tree of so many neurons; with what is wrong.
    """
    found: dict[int, list[tuple[Split, ...]]] = {CLOSED: [], OPEN: []}

    def below(node: Any, path: tuple[Split, ...]) -> Sequence[tuple[Split, ...]]:
        n, p = node if type(node) in (tuple, list) and len(node) == 2 else (node, 0.0)
        if type(n) is not int or type(p) is not float or not 0 <= n < neurons \
                or not math.isfinite(p) or len(path) >= _DEEPEST \
                or (n, p) in {(n, p) for n, _, p in path}:
            raise StateError(f"a domain with the splits {[list(s) for s in path]} cannot be split "
                             f"at {node!r}")
        return (*path, (n, 1, p)), (*path, (n, -1, p))

    for kind, path in _walked(nodes, (), below):
        found[kind].append(path)
    return found[CLOSED], found[OPEN]


def check_points(leaves: Iterable[Sequence[Split]], roots: Roots) -> None:
    """Raises StateError where neurons are split at points that they are not split at."""
    try:
        for number, point in {(n, p) for leaf in leaves for n, _, p in leaf}:
            roots.check_point(number, point)
    except ValueError as error:
        raise StateError(str(error)) from None


def _walked(
    nodes: Sequence[Any], root: Any, below: Callable[[Any, Any], Sequence[Any]]
) -> Iterator[tuple[int, Any]]:
    """The leaves of a tree: CLOSED or OPEN, and which part each is.

    Args:
        nodes: of the tree.
        root: the part that its first node is.
        below: a node that is no leaf, and its part -> its two parts.

    Raises:
        StateError: there are nodes of no part, or parts without a node.
    """
    waiting = [root]
    for i, node in enumerate(nodes):
        if not waiting:
            raise StateError(f"node {i} is of no part of the tree")
        part = waiting.pop()
        if type(node) is int and node in (CLOSED, OPEN):
            yield node, part
        else:
            first, second = below(node, part)
            waiting += [second, first]
    if waiting:
        raise StateError(f"{len(waiting)} parts of the tree have no node")


Box = tuple[tuple[float, ...], tuple[float, ...], int]
"""Lower and upper ends, and a number."""


def cut_leaves(
    nodes: Sequence[Any], box: Box, moving: Sequence[int], can_be: Callable[[float], bool],
    cut: Callable[[int, int, float], tuple[int, int]] = lambda number, k, at: (number, number),
) -> tuple[list[Box], list[Box]]:
    """The parts of a box that were proved, and open ones.

    Args:
        nodes: of the tree.
        box: the whole of it; ends of inputs that move alone.
        moving: these inputs.
        can_be: whether a number is one of the dtype.
        cut: told of each cut, in a part with this number; returns the numbers of its halves.

    Raises:
        StateError: it is no tree of the box; with what is wrong.
    """
    place = {k: i for i, k in enumerate(moving)}
    found: dict[int, list[Box]] = {CLOSED: [], OPEN: []}

    def below(node: Any, part: Box) -> Sequence[Box]:
        low, high, number = part
        k, at = node if type(node) in (tuple, list) and len(node) == 2 else (None, None)
        i = place.get(k) if type(k) is int else None
        if i is None or type(at) is not float or not low[i] < at < high[i] or not can_be(at):
            raise StateError(f"a part of a box cannot be cut at {node!r}")
        below, above = cut(number, k, at)
        return ((low, (*high[:i], at, *high[i + 1 :]), below),
                ((*low[:i], at, *low[i + 1 :]), high, above))

    for kind, part in _walked(nodes, box, below):
        found[kind].append(part)
    return found[CLOSED], found[OPEN]
