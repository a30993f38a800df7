"""Errors in input files, the same on every rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from lirpa_megatron.errors import RemoteRankError, StageError, UserError
from lirpa_megatron.parallel.pipeline import Pipeline, guard


@contextlib.contextmanager
def agreed(
    group: dist.ProcessGroup | None, what: str, pipeline: Pipeline | None = None
) -> Iterator[None]:
    """A guard for reading input: what one rank cannot read is a UserError on all of them.

    Ranks read different parts of a checkpoint, so a bad weight may be seen by one of them only.

    Args:
        group: of the ranks; with `pipeline`, the tensor-parallel one.
        what: name of the block, for messages.
        pipeline: where the block's ranks are those of several stages, which may wait for each
            other in it.
    """
    try:
        with guard(pipeline, group, what):
            yield
    except (RemoteRankError, StageError) as error:
        raise UserError(str(error)) from None
