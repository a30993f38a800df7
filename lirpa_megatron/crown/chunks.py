"""Chunks of rows: passes that go on in turns, and their results put together."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from typing import Any

import torch

from lirpa_megatron.operators.coefficients import RowBounds


def in_turns(steps: Iterable[Generator[None, None, Any]], at_once: int) -> list[Any]:
    """What the generators return, `at_once` of them going on in turns: all ranks do the same.

    A generator that takes the place of one that has ended begins before an older one goes on: that
    one may wait for a stage below, which may keep its rows until it has those of the next chunk.
    """
    waiting, found = enumerate(steps), {}
    active: deque = deque()

    def go_on(i: int, generator: Generator[None, None, Any]) -> None:
        try:
            next(generator)
            active.append((i, generator))
        except StopIteration as end:
            found[i] = end.value

    while True:
        while len(active) < at_once and (following := next(waiting, None)) is not None:
            go_on(*following)
        if not active:
            return [found[i] for i in range(len(found))]
        go_on(*active.popleft())


def concatenate(chunks: list[RowBounds]) -> RowBounds:
    """Chunks of rows, one after the other (dim 0)."""
    if len(chunks) == 1:
        return chunks[0]

    def joined(parts: list[Any]) -> Any:
        return None if parts[0] is None else torch.cat(parts)

    names = chunks[0].lA
    return RowBounds(
        *(joined([getattr(c, side) for c in chunks])
          for side in ("lower", "upper", "lbias", "ubias")),
        lA={name: joined([c.lA[name] for c in chunks]) for name in names},
        uA={name: joined([c.uA[name] for c in chunks]) for name in names},
    )
