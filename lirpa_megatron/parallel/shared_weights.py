"""Replicas on one machine hold the weights of a model once.

Replicas whose ranks share cores fill each other's waiting (`crown.stage_below`). Each needs rows of
A of its own; the weights are the same.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lirpa_megatron.parallel import spmd

_ALIGNED = 64


def share_weights(model: nn.Module, group: dist.ProcessGroup) -> int:
    """Lets processes of one machine hold the equal tensors of a model in the same memory.

    The first process puts its parameters and buffers into memory without a name, the others map it,
    and take from there what is bitwise the same as their own. All processes of the group call it.
    Nothing changes for tensors on a GPU, on another machine, or where there is no such memory
    (Linux has it).

    Args:
        model: its weights stay as they are from now on: a change would be one for all.
        group: the replicas' processes that have this part of the model.

    Returns:
        bytes that this process does not hold any more, because the first one does.
    """
    tensors = {
        name: x for named in (model.named_parameters(), model.named_buffers()) for name, x in named
        if x.numel() and x.device.type == "cpu"
    }
    layout, size = {}, 0
    for name, x in tensors.items():
        layout[name] = size, str(x.dtype), tuple(x.shape)
        size += math.ceil(x.numel() * x.element_size() / _ALIGNED) * _ALIGNED
    first, descriptor, saved = group.rank() == 0, None, 0
    if first and size and hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):  # each has its own, as before
            descriptor = os.memfd_create("lirpa_megatron weights")
            os.ftruncate(descriptor, size)
            _take(tensors, layout, mmap.mmap(descriptor, size), fill=True)
    said = spmd.broadcast_object((_machine(), os.getpid(), descriptor, layout), group)
    if not first and said[0] == _machine() and said[2] is not None and said[3] == layout:
        with contextlib.suppress(OSError, ValueError):  # another user, or not filled
            with open(f"/proc/{said[1]}/fd/{said[2]}", "r+b") as file:
                shared = mmap.mmap(file.fileno(), size)
            saved = _take(tensors, layout, shared, fill=False)
    spmd.handshake(group, "the weights are shared")
    if descriptor is not None:
        os.close(descriptor)  # the memory stays for as long as somebody maps it
    return saved


def _take(
    tensors: dict[str, torch.Tensor], layout: dict[str, Any], memory: mmap.mmap, fill: bool
) -> int:
    """Tensors from the memory in place of those that are equal (all, with `fill`); their bytes."""
    taken = 0
    for name, x in tensors.items():
        shared = torch.frombuffer(
            memory, dtype=x.dtype, count=x.numel(), offset=layout[name][0]
        ).view(x.shape)
        if fill:
            shared.copy_(x.detach())
        elif not torch.equal(_bits(shared), _bits(x.detach())):
            continue
        x.data = shared
        taken += x.numel() * x.element_size()
    return taken


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8) if x.ndim else x.reshape(1).view(torch.uint8)


def _machine() -> tuple[str, ...]:
    """What processes of one machine, in one container, have in common."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return socket.gethostname(), file.read().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return ()
