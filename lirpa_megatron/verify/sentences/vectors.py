"""Vectors [d, hidden] of a file, along which hidden states may move.

    .npy           one array of numbers [d, hidden], or [hidden]
    .json          a list of numbers, or of such lists
    .safetensors   the tensors [d, hidden] or [hidden] that it holds, in the order of their names

The file may come from a stranger: nothing in it runs, no pickle is read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from lirpa_megatron.checkpoint.plain_files import read_json
from lirpa_megatron.complete.pieces import MOST_DIMENSIONS
from lirpa_megatron.errors import UserError
from lirpa_megatron.forward.inputs import most_symbols
from lirpa_megatron.verify.sentences.options import SentenceOptions

_LARGEST = 2**28
"""Bytes; a thousand vectors of the largest models have a tenth of it."""


def read_vectors(path: Path, hidden: int) -> torch.Tensor:
    """The vectors, float64 [d, hidden].

    Args:
        path: see above.
        hidden: hidden size of the model.

    Raises:
        UserError: a file of another kind or size, or that is none; numbers that are not finite;
            vectors of another length, or zero.
    """
    what = f"vectors {path}"
    found = _read(path, what)
    if found.ndim == 1:
        found = found.unsqueeze(0)
    if found.ndim != 2 or not found.numel():
        raise UserError(f"{what} have shape {tuple(found.shape)}: give [d, hidden]")
    if found.shape[1] != hidden:
        raise UserError(
            f"{what} have {found.shape[1]} numbers each, but the model's hidden size is {hidden}"
        )
    for i, vector in enumerate(found):
        if not bool(vector.isfinite().all()):
            raise UserError(f"{what}: vector {i} has numbers that are not finite")
        if not bool(vector.any()):
            raise UserError(f"{what}: vector {i} is zero, which is no direction")
    return found


def check_dimensions(count: int, options: SentenceOptions) -> None:
    """Raises UserError for more vectors than splits, or polynomials of a degree, are made for."""
    if options.splits and count > MOST_DIMENSIONS:
        raise UserError(
            f"--vectors has {count} vectors, but --splits is for at most {MOST_DIMENSIONS}: leave "
            "one of them out"
        )
    most = most_symbols(options.order)
    if options.method.startswith("forward") and most is not None and count > most:
        raise UserError(
            f"--vectors has {count} vectors, but --order {options.order} is for at most {most}: "
            "choose a smaller one"
        )


def said_of(path: Path) -> str:
    """What a result says of the file: its name, and the beginning of its SHA-256."""
    return f"{path.name} (sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:12]})"


def _read(path: Path, what: str) -> torch.Tensor:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}") from None
    if size > _LARGEST:
        raise UserError(f"{what} have more than {_LARGEST} bytes, which is not believable")
    readers = {".npy": _numpy, ".json": _json, ".safetensors": _safetensors}
    if path.suffix not in readers:
        raise UserError(f"{what}: give a file {', '.join(readers)}")
    return readers[path.suffix](path, what)


def _numpy(path: Path, what: str) -> torch.Tensor:
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        raise UserError(f"{what} are not an array of numbers that numpy.save has written") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise UserError(f"{what} are not an array of real numbers")
    return torch.from_numpy(array.astype("float64"))


def _json(path: Path, what: str) -> torch.Tensor:
    content = read_json(path, what)
    rows = content if isinstance(content, list) and content and isinstance(
        content[0], list) else [content]
    for row in rows:
        if not isinstance(row, list) or not all(type(number) in (int, float) for number in row):
            raise UserError(f"{what} are not a list of numbers, or of such lists")
        if len(row) != len(rows[0]):
            raise UserError(f"{what} have different lengths, {len(rows[0])} and {len(row)}")
    try:
        return torch.tensor(rows, dtype=torch.float64)
    except (OverflowError, RuntimeError):
        raise UserError(f"{what} have numbers that are not finite") from None


def _safetensors(path: Path, what: str) -> torch.Tensor:
    from lirpa_megatron.checkpoint.safetensors_folder import SafetensorsFile

    file = SafetensorsFile(path)
    rows = []
    for name in sorted(file.names()):
        tensor = file.read(name)
        if not tensor.is_floating_point() or tensor.ndim not in (1, 2):
            raise UserError(
                f"{what}: {name[:80]!r} is {tensor.dtype} of shape {tuple(tensor.shape)}: give "
                "floating-point vectors [d, hidden] or [hidden]"
            )
        rows += tensor.double().reshape(-1, tensor.shape[-1]).unbind(0)
    if len({len(row) for row in rows}) > 1:
        raise UserError(f"{what} have different lengths")
    return torch.stack(rows) if rows else torch.empty(0, 0)
