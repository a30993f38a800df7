"""Which block of a full parameter a rank holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Block:
    """A rank's part of a full tensor."""

    # shape of the full tensor
    full: tuple[int, ...]
    # where the rank's part begins
    offsets: tuple[int, ...]
    # shape of the rank's part
    sizes: tuple[int, ...]
    # the dimension that is split over the tensor-parallel ranks; None: replicated
    partition_dim: int | None


def block_of(parameter: torch.Tensor, tp_rank: int, tp_size: int) -> Block:
    """The block that Megatron's attributes on a parameter (also a meta one) declare."""
    sizes = tuple(parameter.shape)
    if not getattr(parameter, "tensor_model_parallel", False):
        return Block(sizes, (0,) * len(sizes), sizes, None)
    dim = parameter.partition_dim
    full = sizes[:dim] + (sizes[dim] * tp_size,) + sizes[dim + 1 :]
    offsets = tuple(tp_rank * n if d == dim else 0 for d, n in enumerate(sizes))
    return Block(full, offsets, sizes, dim)
