"""Slices of the tensors of a torch_dist checkpoint, through torch.distributed.checkpoint.

No collectives: every rank reads what it needs from the files. Reading tensors is safe (torch.load
with weights_only=True inside torch's reader); reading byte items is not, and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from lirpa_megatron.checkpoint.metadata import read_metadata
from lirpa_megatron.checkpoint.safe_unpickle import nothing_else_allowed
from lirpa_megatron.errors import UserError


class TensorFile:
    """The tensors of one checkpoint directory (`release` or `iter_*`)."""

    def __init__(self, directory: Path):
        """Raises UserError if the metadata is missing, corrupt or hostile."""
        self.directory = directory
        self.metadata = read_metadata(directory)
        self._reader = _Reader(directory, self.metadata)

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Full shape of a tensor; None if the checkpoint has no tensor of this name."""
        entry = self.metadata.state_dict_metadata.get(key)
        return tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None

    def read(
        self, key: str, offsets: Sequence[int], sizes: Sequence[int], dtype: torch.dtype
    ) -> torch.Tensor:
        """The block [offsets, offsets + sizes) of a tensor, on the CPU.

        Whole saved chunks are read one at a time and cut: besides the block, the largest chunk is
        held in memory.

        Raises:
            UserError: unreadable or incomplete data, NaN or infinite values.
        """
        entry = self.metadata.state_dict_metadata[key]
        block = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [block])
        if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
            raise UserError(f"tensor {key} in {self.directory} is incomplete: parts are not stored")
        # NaN, so that a part which overlapping chunks leave out is noticed below.
        target = torch.full(tuple(sizes), math.nan, dtype=dtype)
        try:
            with nothing_else_allowed():
                self._reader.read_data(LoadPlan(items), _Planner(target)).wait()
        except UserError:
            raise
        except Exception as error:  # a damaged data file can raise anything
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"tensor {key} in {self.directory} cannot be read ({reason})") from None
        if not torch.isfinite(target).all():
            raise UserError(f"tensor {key} in {self.directory} has NaN or infinite values")
        return target

    def read_bytes(self, key: str, limit: int) -> bytes | None:
        """The content of a byte item, as it is; None if the checkpoint has no such item.

        Raises:
            UserError: more than `limit` bytes, or not all there.
        """
        places = [
            info for index, info in self.metadata.storage_data.items() if index.fqn == key
        ]
        if not places:
            return None
        (place, *others) = places
        if others or not 0 <= place.length <= limit:
            raise UserError(f"item {key} in {self.directory} is malformed")
        try:
            with (self.directory / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                data = file.read(place.length)
        except OSError as error:
            raise UserError(
                f"item {key} in {self.directory} cannot be read ({error.strerror})"
            ) from None
        if len(data) != place.length:
            raise UserError(f"item {key} in {self.directory} is incomplete")
        return data


class _Reader(FileSystemReader):
    """torch's reader with the metadata already there, so that it never unpickles any."""

    def __init__(self, directory: Path, metadata: Metadata):
        super().__init__(directory)
        self._metadata = metadata
        self.set_up_storage_reader(metadata, is_coordinator=False)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _Planner(LoadPlanner):
    """Puts the pieces that are read into one tensor."""

    def __init__(self, target: torch.Tensor):
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        piece = self._target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            piece = piece.narrow(dim, start, length)
        return piece

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        pass  # resolve_tensor gave a view: the values are in place

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise UserError(f"checkpoint item {read_item.dest_index.fqn} is a pickle and is not read")

    # The plan is made by TensorFile.read, without collectives.

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError
