"""The `.metadata` file of a torch_dist checkpoint, read without running what it says.

`.metadata` is a pickle, and a pickle may name any function and call it. The unpickler here knows
the classes that such a file needs, all of them plain data, and refuses every other name before it
is even imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from lirpa_megatron.errors import UserError

_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
}
# Megatron's own additions, which reading tensors does not need.
_IGNORED_MODULE = "megatron.core.dist_checkpointing.strategies.torch"
_FIELDS = {field.name for field in dataclasses.fields(Metadata)}
_DATA_FILE = re.compile(r"__\d+_\d+\.distcp")


class RefusedGlobal(Exception):
    """The pickle names something that is not on the list."""


class _Ignored:
    """Stands for a class whose content nobody reads."""

    def __setstate__(self, state: Any) -> None:
        pass


class _MegatronMetadata(Metadata):
    """What megatron-core 0.15 writes: torch's, with notes on flattened tensors that are ignored.

    Those tensors are the optimizer's; a parameter's shape is compared with the model's.
    """

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError("its state is malformed")
        vars(self).update({name: value for name, value in state.items() if name in _FIELDS})


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module == _IGNORED_MODULE and name == "MCoreMetadata":
            return _MegatronMetadata
        if module == _IGNORED_MODULE and name == "MCoreSavePlan":
            return _Ignored
        raise RefusedGlobal(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise RefusedGlobal("a persistent id")


def read_metadata(directory: Path) -> Metadata:
    """Reads and checks `directory/.metadata`.

    Raises:
        UserError: missing, corrupt, or a pickle that names anything but plain data (the name is
            given; nothing of it has run).
    """
    path = directory / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _RestrictedUnpickler(file).load()
        _check(metadata)
    except FileNotFoundError:
        raise UserError(f"checkpoint file {path} does not exist") from None
    except RefusedGlobal as error:
        raise UserError(
            f"checkpoint file {path} is refused: its pickle names {error}, which could run code"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"checkpoint file {path} is corrupt ({reason})") from None
    return metadata


def _check(metadata: Any) -> None:
    """Raises ValueError unless every entry is what the reader relies on."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise ValueError("it holds no tensor list")
    if not isinstance(metadata.storage_data, dict):
        raise ValueError("it holds no storage list")
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise ValueError("its tensor list is malformed")
        if isinstance(entry, TensorStorageMetadata):
            _check_tensor(key, entry)
        elif not isinstance(entry, BytesStorageMetadata):
            raise ValueError(f"the entry of {key} is malformed")
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex):
            raise ValueError("its storage list is malformed")
        # A path could lead out of the directory; a transform could decompress without limit.
        if not _DATA_FILE.fullmatch(info.relative_path) or info.transform_descriptors:
            raise ValueError(f"{info.relative_path!r} is not a data file of the checkpoint")
        if type(info.offset) is not int or type(info.length) is not int or info.offset < 0:
            raise ValueError(f"the place of {index.fqn} is malformed")


def _check_tensor(key: str, entry: TensorStorageMetadata) -> None:
    rank = len(entry.size)
    if not isinstance(entry.size, torch.Size) or not isinstance(
        entry.properties.dtype, torch.dtype
    ):
        raise ValueError(f"the entry of {key} is malformed")
    for chunk in entry.chunks:
        if len(chunk.offsets) != rank or len(chunk.sizes) != rank:
            raise ValueError(f"the chunks of {key} are malformed")
