"""Collectives of other libraries, agreed on between ranks one by one.

The caller's own model communicates as Megatron does: without asking whether the other ranks do the
same. A rank that raises inside of it, or whose model has a hook that communicates, would leave the
others waiting. torch hands every collective to the dispatcher, and there the handshake of `spmd`
comes before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lirpa_megatron.parallel import spmd

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


@contextlib.contextmanager
def agreed_collectives(group: dist.ProcessGroup | None) -> Iterator[None]:
    """A part of a guarded block (`spmd.guard`) whose collectives are another library's.

    Args:
        group: the tensor-parallel group, all of whose ranks enter the block.

    Raises:
        RemoteRankError: another rank failed in the block.
        SPMDError: the ranks are about to do different things.
    """
    if group is None or group.size() == 1:
        yield
        return
    with _Handshakes(group):
        yield


class _Handshakes(TorchDispatchMode):
    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in _NAMESPACES and not spmd.is_talking():
            tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in tensors)
            spmd.handshake(self.group, f"{func} of {shapes} in the model's own forward")
        return func(*args, **(kwargs or {}))
