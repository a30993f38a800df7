"""Errors in input files, the same on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from lirpa_megatron.errors import RemoteRankError, UserError
from lirpa_megatron.parallel import spmd


@contextlib.contextmanager
def agreed(group: dist.ProcessGroup | None, what: str) -> Iterator[None]:
    """A guard for reading input: what one rank cannot read is a UserError on all of them.

    Ranks read different parts of a checkpoint, so a bad weight may be seen by one of them only.
    """
    try:
        with spmd.guard(group, what):
            yield
    except RemoteRankError as error:
        raise UserError(str(error)) from None
