"""Pieces of a set that are cut until all of it is proved, whatever the pieces are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar


class _HasShare(Protocol):
    sample: int
    share: float


T = TypeVar("T", bound=_HasShare)


@dataclass
class Leaf(Generic[T]):
    """A piece with its bounds."""

    piece: T
    margin: float
    """Lower bound; above 0: proved."""
    bounds: Any = None

    @property
    def is_proved(self) -> bool:
        return 0 < self.margin < math.inf


@dataclass
class Cover(Generic[T]):
    """The pieces that a search ended with.

    Attributes:
        leaves: they cover the sets.
        cuts: sample -> how many cuts.
        is_over: the time ended before the search did.
    """

    leaves: list[Leaf[T]]
    cuts: dict[int, int]
    is_over: bool = False

    def of(self, sample: int) -> list[Leaf[T]]:
        """A sample's."""
        return [leaf for leaf in self.leaves if leaf.piece.sample == sample]

    def share(self, sample: int) -> float:
        """How much of its set is proved: exact, a sum of powers of 1/2."""
        return math.fsum(leaf.piece.share for leaf in self.of(sample) if leaf.is_proved)


def cover(
    leaves: Sequence[Leaf[T]], bound: Callable[[list[tuple[T, Leaf[T]]]], list[Leaf[T]]],
    cut: Callable[[list[Leaf[T]]], list[tuple[T, T] | None]], splits: int, at_once: int,
    is_over: Callable[[], bool] = lambda: False,
) -> Cover[T]:
    """Cuts what is not proved, the largest pieces first, of these the closest to a proof.

    Args:
        leaves: the sets as a whole, with their bounds.
        bound: bounds new pieces, each with the leaf that it was cut from.
        cut: the halves of each piece; None: nothing is to be gained by cutting it.
        splits: most cuts of each sample's set.
        at_once: pieces that `bound` is given, about.
        is_over: whether to stop, asked before each batch; the same on every rank.
    """
    done: list[Leaf[T]] = []
    waiting = list(leaves)
    cuts = {leaf.piece.sample: 0 for leaf in leaves}
    while True:
        done += [leaf for leaf in waiting if leaf.is_proved]
        waiting = [leaf for leaf in waiting if not leaf.is_proved]
        waiting.sort(key=lambda leaf: (-leaf.piece.share, -_ordered(leaf.margin)))
        chosen: list[Leaf[T]] = []
        for leaf in waiting:
            sample = leaf.piece.sample
            if len(chosen) < max(1, at_once // 2) and cuts[sample] < splits:
                cuts[sample] += 1
                chosen.append(leaf)
        if not chosen:
            return Cover(done + waiting, cuts)
        if is_over():
            return Cover(done + waiting, cuts, is_over=True)
        taken = {id(leaf) for leaf in chosen}
        waiting = [leaf for leaf in waiting if id(leaf) not in taken]
        halves = []
        for leaf, both in zip(chosen, cut(chosen), strict=True):
            if both is None:
                done.append(leaf)
            else:
                halves += [(half, leaf) for half in both]
        if halves:
            waiting += bound(halves)


def _ordered(margin: float) -> float:
    return -math.inf if math.isnan(margin) else margin
