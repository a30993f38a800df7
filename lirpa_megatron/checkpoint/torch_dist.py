"""The weights of a model in a torch_dist checkpoint, under the names of the local layer spec.

`fsdp_dtensor`, what Megatron-FSDP writes, is the same without `metadata.json`: layers have an index
each, keys begin with `model.`, and the arguments are a byte item `args`. NeMo's keys begin with
`module.`.

Layers are stacked ([L, ...] under one name) or have an index each; [gate; up] is one tensor, or two
whose names end in `_w` and `_v`. Every block of every parameter can be read alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from lirpa_megatron.checkpoint import names
from lirpa_megatron.checkpoint.description import ParameterDescription
from lirpa_megatron.checkpoint.layout import COMMON
from lirpa_megatron.checkpoint.plain_files import parse_json
from lirpa_megatron.checkpoint.safe_unpickle import read_inert
from lirpa_megatron.checkpoint.tensors import TensorFile
from lirpa_megatron.errors import UserError

FORMAT = "torch_dist"
FSDP_FORMAT = "fsdp_dtensor"
_PREFIX = re.compile(r"((?:model\.)?(?:module\.)*)(embedding|decoder|encoder)\.")
_COMMON_ITEM = "common_state/shard_0_1"
_NOT_THE_MODEL = re.compile(
    r"(optimizer|chained_\d+|rng_state|rerun_state_machine_state|common_state|opt_param_scheduler"
    r"|content_metadata|dataloader_state|async_checkpoint)\b.*|.*_extra_state(/.*)?"
    r"|args|checkpoint_version|iteration|num_floating_point_operations_so_far|train_state\b.*"
)
_LARGEST_COMMON = 2**28
_MOST_LAYERS = 100_000


@dataclass(frozen=True)
class _Place:
    """Where a parameter is stored."""

    # names in the checkpoint: one, or those of gate and up
    keys: tuple[str, ...]
    # index in a stack of layers; None: not stacked
    layer: int | None


class TorchDistWeights:
    """The model's tensors in one directory (`release` or `iter_*`)."""

    format = FORMAT

    def __init__(self, directory: Path) -> None:
        """Raises UserError if the directory is damaged, hostile, or of an unknown layout."""
        self.directory = directory
        if not (directory / "metadata.json").exists() and (directory / ".metadata").exists():
            self._file = TensorFile(directory)
            keys = self._file.metadata.state_dict_metadata
            if "args" in keys or any(key.startswith("model.") for key in keys):
                self.format = FSDP_FORMAT
        if self.format == FORMAT:
            _check_backend(directory)
            self._file = TensorFile(directory)
        self._places = self._find_places()

    def names(self) -> set[str]:
        """The parameters that are stored."""
        return set(self._places)

    def shape(self, name: str, parameter: ParameterDescription | None = None) -> tuple[int, ...]:
        """Full shape of a stored parameter."""
        place = self._places[name]
        first = self._file.shape(place.keys[0])
        shape = first if place.layer is None else first[1:]
        if len(place.keys) == 2:
            second = self._file.shape(place.keys[1])
            if second != first:
                raise UserError(
                    f"tensors {' and '.join(place.keys)} of {self.directory} have shapes "
                    f"{list(first)} and {list(second)}, not the same"
                )
            shape = (2 * shape[0], *shape[1:])
        return shape

    def dtypes(self) -> set[torch.dtype]:
        """What the parameters are stored in."""
        entries = self._file.metadata.state_dict_metadata
        return {
            entries[key].properties.dtype for place in self._places.values() for key in place.keys
        }

    def read(
        self, name: str, parameter: ParameterDescription, offsets: Sequence[int],
        sizes: Sequence[int], dtype: torch.dtype,
    ) -> torch.Tensor:
        """The block [offsets, offsets + sizes) of a parameter's full tensor, on the CPU.

        Raises:
            UserError: unreadable or incomplete data, NaN or infinite values.
        """
        place = self._places[name]
        offsets, sizes, key = list(offsets), list(sizes), place.keys[0]
        if len(place.keys) == 2:
            half = self.shape(name)[0] // 2
            second = offsets[0] >= half
            if not second and offsets[0] + sizes[0] > half:
                raise ValueError(f"a block of {name} lies in both halves")
            key, offsets[0] = place.keys[second], offsets[0] - (half if second else 0)
        if place.layer is None:
            return self._file.read(key, offsets, sizes, dtype)
        return self._file.read(key, (place.layer, *offsets), (1, *sizes), dtype)[0]

    def common(self) -> dict[str, Any]:
        """What is not a tensor: `common.pt`, or the byte item that 0.19 and later write.

        Raises:
            UserError: missing, damaged, or hostile (nothing of it has run).
        """
        path = self.directory / COMMON
        if self.format == FSDP_FORMAT:
            data = self._file.read_bytes("args", _LARGEST_COMMON)
            where = f"{self.directory}, item args"
            return {} if data is None else {"args": read_inert(io.BytesIO(data), where)}
        if path.exists():
            common = read_inert(path, str(path))
        else:
            where = f"{self.directory}, item {_COMMON_ITEM}"
            data = self._file.read_bytes(_COMMON_ITEM, _LARGEST_COMMON)
            if data is None:
                raise UserError(
                    f"checkpoint file {path} does not exist, nor does the item {_COMMON_ITEM} that "
                    "newer releases write"
                )
            common = read_inert(io.BytesIO(data), where)
            # Megatron stores the objects of a key as a list.
            common = common[0] if isinstance(common, list) and len(common) == 1 else common
        if not isinstance(common, dict):
            raise UserError(f"checkpoint file {path} is corrupt (it holds no dictionary)")
        return common

    def parallel_sizes(self) -> tuple[int | None, int | None]:
        """(tensor-, pipeline-parallel) sizes, which this format does not depend on."""
        return None, None

    def drop_copy_of_embeddings(self) -> None:
        """Nothing to do: tied word embeddings are stored once."""

    def _find_places(self) -> dict[str, _Place]:
        whole: dict[str, _Place] = {}
        halves: dict[str, dict[str, _Place]] = {}
        entries = self._file.metadata.state_dict_metadata
        prefix = next((m[1] for m in map(_PREFIX.match, entries) if m and m[1]), "")
        for key, entry in entries.items():
            if _NOT_THE_MODEL.fullmatch(key.removeprefix(prefix)):
                continue
            if isinstance(entry, BytesStorageMetadata):
                raise UserError(f"checkpoint {self.directory} has an item {key} that is not known")
            bare = key.removeprefix(prefix)
            split = re.fullmatch(r"(.*\.linear_fc1\.(?:weight|bias))_([wv])", bare)
            for name, layer in self._names_of(split[1] if split else bare, key):
                place = _Place((key,), layer)
                stored = halves.setdefault(name, {}) if split else whole
                if (split[2] if split else name) in stored:
                    raise UserError(f"checkpoint {self.directory} stores {name} twice")
                stored[split[2] if split else name] = place
        for name, parts in halves.items():
            if set(parts) != {"w", "v"} or name in whole:
                raise UserError(f"checkpoint {self.directory}: {name} is not stored as _w and _v")
            whole[name] = _Place(parts["w"].keys + parts["v"].keys, parts["w"].layer)
        return whole

    def _names_of(self, name: str, key: str) -> list[tuple[str, int | None]]:
        """Name and index in its stack of every parameter that a key holds."""
        stacked = names.split_stacked(name)
        if stacked is None:
            return [(names.local_name(name), None)]
        shape = self._file.shape(key)
        if not shape or shape[0] > _MOST_LAYERS:
            raise UserError(f"tensor {key} of {self.directory} has shape {list(shape)}: no stack")
        block, rest = stacked[0], names.local_name(stacked[1])
        return [(names.layer_name(block, i, rest), i) for i in range(shape[0])]


def _check_backend(directory: Path) -> None:
    """Refuses what `metadata.json` says is another layout, or a newer one."""
    path = directory / "metadata.json"
    try:
        said = parse_json(path.read_text(encoding="utf-8"))
        backend, version = said["sharded_backend"], said.get("sharded_backend_version", 1)
    except FileNotFoundError:
        raise UserError(
            f"checkpoint file {path} does not exist: only torch_dist checkpoints and Megatron's "
            "mp_rank_* files are supported"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint file {path} is corrupt ({type(error).__name__})") from None
    if backend != FORMAT:
        raise UserError(f"checkpoint {directory} has the format {backend!r}, not {FORMAT}")
    if version != 1:
        raise UserError(
            f"checkpoint {directory} has version {version!r} of the format {FORMAT}, which is "
            "newer than the known version 1"
        )
