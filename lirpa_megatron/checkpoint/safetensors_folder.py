"""The tensors of a Hugging Face folder: `model.safetensors`, or several files and their index.

    FOLDER/model.safetensors
    FOLDER/model.safetensors.index.json  model-00001-of-00002.safetensors  ...

A file is eight bytes with the length of its header, the header (JSON: name -> dtype, shape, offsets
of the data), and the data. What the header says is checked here against the file, before the
safetensors library opens it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lirpa_megatron.checkpoint.plain_files import parse_json, read_json
from lirpa_megatron.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "U8": torch.uint8, "BOOL": torch.bool, "I64": torch.int64, "I32": torch.int32,
}
_LONGEST_HEADER = 2**25
"""Bytes: a header of 100 kB describes a thousand tensors."""


@dataclass(frozen=True)
class _Entry:
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class SafetensorsFolder:
    """Names, shapes and types of the tensors; the values are read when they are asked for."""

    def __init__(self, directory: Path) -> None:
        """Raises UserError for missing or malformed files, and an index that leaves the folder."""
        self.directory = directory
        self._entries: dict[str, _Entry] = {}
        paths, listed = _files(directory)
        for path in paths:
            for name, entry in _read_header(path).items():
                if name in self._entries:
                    raise UserError(f"folder {directory} stores the tensor {name[:80]} twice")
                self._entries[name] = entry
        for name, path in listed.items():
            if name not in self._entries or self._entries[name].path != path:
                raise UserError(
                    f"index {directory / INDEX} has the tensor {name[:80]} in {path.name}, which "
                    "does not hold it"
                )
        if listed and set(listed) != set(self._entries):
            extra = min(set(self._entries) - set(listed))
            raise UserError(f"index {directory / INDEX} does not list the tensor {extra[:80]}")

    def names(self) -> set[str]:
        """The tensors that are stored."""
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Number type of a stored tensor."""
        return self._entries[name].dtype

    def read(self, name: str, *slices: slice) -> torch.Tensor:
        """A part of a tensor, as it is stored, on the CPU; no slices: all of it."""
        try:
            from safetensors import safe_open
        except ImportError:
            raise UserError(
                "safetensors is not installed: run `pip install safetensors`"
            ) from None
        entry = self._entries[name]
        try:
            with safe_open(str(entry.path), framework="pt", device="cpu") as file:
                part = file.get_slice(name)
                value = part[slices] if slices else file.get_tensor(name)
        except Exception as error:  # the library's own, or the system's
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"tensor {name} of {entry.path} cannot be read ({reason})") from None
        return value


class SafetensorsFile(SafetensorsFolder):
    """The same of one file, whatever its name."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a malformed file."""
        self.directory, self._entries = path.parent, _read_header(path)


def _files(directory: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files, and what the index says where each tensor is (nothing without an index)."""
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            hint = ""
            if any(directory.glob("*.bin")):
                hint = ": weights in pickles (*.bin) are not read, save them as safetensors"
            raise UserError(f"folder {directory} has neither {SINGLE} nor {INDEX}{hint}")
        return [directory / SINGLE], {}
    content = read_json(index, f"index {index}")
    places = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(places, Mapping) or not places:
        raise UserError(f"index {index} has no weight_map")
    listed = {}
    for name, file in places.items():
        if not isinstance(file, str) or not file or Path(file).name != file or "\\" in file:
            raise UserError(f"index {index} names {str(file)[:80]!r}, which is no file's name")
        if not file.endswith(".safetensors"):
            raise UserError(f"index {index} names {file[:80]!r}, which is not safetensors")
        listed[name] = directory / file
    paths = sorted(set(listed.values()))
    for path in paths:
        if not path.is_file():
            raise UserError(f"index {index} names {path.name}, which does not exist")
    return paths, listed


def _read_header(path: Path) -> dict[str, _Entry]:
    with _told(path):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError("its header is longer than the file")
            if length > _LONGEST_HEADER:
                raise ValueError(f"its header of {length} bytes is not believable")
            header = parse_json(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("its header is not a mapping")
        header.pop("__metadata__", None)
        places = []
        entries = {}
        for name, said in header.items():
            entries[name], begin, end = _entry(path, name, said)
            places.append((begin, end))
        reached = 0
        for begin, end in sorted(places):
            if begin != reached:
                raise ValueError("its tensors overlap, or leave gaps")
            reached = end
        if reached != size - 8 - length:
            raise ValueError("its data is not as long as its header says")
    return entries


def _entry(path: Path, name: str, said: Any) -> tuple[_Entry, int, int]:
    if not isinstance(said, dict) or set(said) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its entry of {name[:80]!r} is malformed")
    if said["dtype"] not in _DTYPES:
        raise ValueError(f"the number type {str(said['dtype'])[:20]!r} is not supported")
    shape, offsets = said["shape"], said["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or any(
            type(n) is not int or not 0 <= n < 2**48 for n in numbers
        ):
            raise ValueError(f"its entry of {name[:80]!r} is malformed")
    if len(shape) > 8 or len(offsets) != 2:
        raise ValueError(f"its entry of {name[:80]!r} is malformed")
    dtype = _DTYPES[said["dtype"]]
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the offsets of {name[:80]!r} do not fit its shape")
    return _Entry(path, dtype, tuple(shape)), offsets[0], offsets[1]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in its header twice")
    return found


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        known = type(error) is ValueError
        reason = str(error) if known else "its header is not JSON"
        raise UserError(f"{path} is corrupt ({reason})") from None
