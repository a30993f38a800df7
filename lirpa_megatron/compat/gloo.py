"""One device of gloo's for many process groups.

torch gives each group a device of its own, whose thread looks for messages a hundred times a
second, also when there is nothing to do. Megatron-core makes 20 groups: 2% of a core for every
process, of which nothing is left when they share a device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """A block in which the groups that gloo makes share a device.

    It ends with the last of them. Where GLOO_SOCKET_IFNAME names network interfaces, or torch has
    no gloo, nothing changes.
    """
    if not dist.is_gloo_available() or "GLOO_SOCKET_IFNAME" in os.environ:
        yield
        return
    Gloo = dist.ProcessGroupGloo
    own_init, device = Gloo.__init__, Gloo.create_default_device()

    def init(self: Any, store: Any, rank: int, size: int, *given: Any, **kwargs: Any) -> None:
        timeout = given[0] if given else kwargs.get("timeout", dist.default_pg_timeout)
        if isinstance(timeout, timedelta):  # else they are options
            options = Gloo._Options()
            options._devices, options._timeout = [device], timeout
            given, kwargs = (options,), {}
        own_init(self, store, rank, size, *given, **kwargs)

    Gloo.__init__ = init
    try:
        yield
    finally:
        Gloo.__init__ = own_init


def timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds that a rank of a group of gloo's waits for another one."""
    options = getattr(group._get_backend(torch.device("cpu")), "options", None)
    return getattr(options, "_timeout", dist.default_pg_timeout).total_seconds()
