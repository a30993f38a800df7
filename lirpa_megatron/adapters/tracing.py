"""What facades need to know of torch's tracer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """What is computed inside becomes a constant of a graph that is being traced."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def sizes_of(value: Any) -> list[int | None] | None:
    """The shape of a value of a graph, None for a size that is not known (0.7.1's batch)."""
    kind = value.type()
    return kind.varyingSizes() if kind.kind() == "TensorType" else None


def shape_of(x: torch.Tensor) -> tuple[int, ...]:
    """The shape of a traced value, in numbers that are not traced."""
    with untraced():
        return tuple(x.shape)
