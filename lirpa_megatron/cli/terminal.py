"""Which process talks to the user, and the one line that bad input gets."""

from __future__ import annotations

import os
import sys


def launched_as_rank0() -> bool:
    """Whether this process talks to the user; known before process groups exist."""
    return os.environ.get("RANK", "0") == "0"


def print_error(message: str) -> None:
    """The one line that bad input gets, on rank 0."""
    if launched_as_rank0():
        line = " ".join(message.split())
        print(f"lirpa-megatron: error: {line}", file=sys.stderr, flush=True)
