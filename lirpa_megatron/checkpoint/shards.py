"""A rank's part of a parameter, read from the stored tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lirpa_megatron.checkpoint.description import ModelDescription, ParameterDescription
from lirpa_megatron.checkpoint.source import Weights


def read_shard(
    weights: Weights, description: ModelDescription, name: str, parameter: ParameterDescription,
    rank: int, size: int, dtype: torch.dtype,
) -> torch.Tensor:
    """A rank's part of a parameter."""
    shape = list(parameter.shape)
    if parameter.vocabulary:
        shape[0] = description.vocabulary_rows(size)
    pieces = []
    for start, length in _intervals(parameter, shape, rank, size):
        offsets, sizes = [0] * len(shape), list(shape)
        if parameter.partition_dim is not None:
            offsets[parameter.partition_dim], sizes[parameter.partition_dim] = start, length
        if parameter.vocabulary:
            stored = min(description.stored.vocabulary_rows, description.padded_vocab_size)
            pieces.append(_read_padded(weights, name, parameter, offsets, sizes, stored, dtype))
        else:
            pieces.append(weights.read(name, parameter, offsets, sizes, dtype))
    value = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    if parameter.norm_weight and description.zero_centered_gamma:
        value = value + 1
    return value


def _intervals(
    parameter: ParameterDescription, shape: list[int], rank: int, size: int
) -> Iterator[tuple[int, int]]:
    """(start, length) along the sharded dimension of what a rank holds: gate and up, or one."""
    if parameter.partition_dim is None:
        yield 0, 0
        return
    total = shape[parameter.partition_dim]
    halves = 2 if parameter.gated else 1
    length = total // halves // size
    for half in range(halves):
        yield half * (total // halves) + rank * length, length


def _read_padded(
    weights: Weights, name: str, parameter: ParameterDescription, offsets: list[int],
    sizes: list[int], stored: int, dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of the vocabulary; those from `stored` on are zeros."""
    value = torch.zeros(sizes, dtype=dtype)
    rows = max(0, min(stored - offsets[0], sizes[0]))
    if rows:
        value[:rows] = weights.read(name, parameter, offsets, [rows, *sizes[1:]], dtype)
    return value
