"""What facades need to know of torch's tracer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
