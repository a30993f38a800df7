"""Tensor-parallel ranks for tests: processes that stay alive and run functions by name.

One pool per number of processes serves the whole test run. A function that ends with an error on
some rank is reported with every rank's outcome; a pool that does not answer in time is killed.
"""

from __future__ import annotations

import atexit
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from forks import fork

TIMEOUT = 240.0
"""Seconds after which a call counts as hung."""


@dataclass
class Outcome:
    """What one rank did."""

    value: Any = None
    """The function's result."""
    error: str | None = None
    """Class name of the error that ended it; 'Hang' and 'Died' where it did not answer."""
    message: str = ""
    """Of the error."""
    trace: str = ""
    """Its traceback."""


def _serve(pipe: Any, rank: int, size: int, tp: int, pp: int, store: str) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    from lirpa_megatron.compat import gloo, megatron_cpu

    torch.set_num_threads(1)
    megatron_cpu.install()
    with gloo.one_device():
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size,
            timeout=timedelta(seconds=TIMEOUT),
        )
        parallel_state.initialize_model_parallel(tp, pp)
    while True:
        torch.set_default_dtype(torch.float32)  # also while a task's module is imported
        task = pipe.recv()
        if task is None:
            return
        function, args, kwargs = task
        torch.manual_seed(0)
        torch.set_grad_enabled(True)
        try:
            pipe.send(Outcome(value=function(*args, **kwargs)))
        except BaseException as error:  # every outcome is reported
            pipe.send(Outcome(error=type(error).__name__, message=str(error),
                              trace=traceback.format_exc()))


class RankPool:
    """`size` processes in groups of `tp` tensor-parallel ranks, and of `pp` pipeline stages."""

    def __init__(self, size: int, tp: int | None = None, pp: int = 1) -> None:
        self.folder = tempfile.TemporaryDirectory()
        store = str(Path(self.folder.name) / "store")
        self.children = [
            fork(rank, _serve, rank, size, tp or size, pp, store) for rank in range(size)
        ]
        self.pipes = [child.pipe for child in self.children]

    def outcomes(self, function: Callable, *args: Any, timeout: float = TIMEOUT, **kwargs: Any
                 ) -> list[Outcome]:
        """Runs `function(*args, **kwargs)` on every rank; errors are outcomes too."""
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        end = time.monotonic() + timeout
        results = []
        for rank, pipe in enumerate(self.pipes):
            try:
                answered = pipe.poll(max(0.0, end - time.monotonic()))
                results.append(pipe.recv() if answered else Outcome(error="Hang"))
            except EOFError:
                results.append(Outcome(error="Died", message=f"rank {rank} died"))
        if any(r.error in ("Hang", "Died") for r in results):
            self.close()
        return results

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> list[Any]:
        """Results in rank order; fails the test when a rank fails."""
        results = self.outcomes(function, *args, **kwargs)
        for rank, outcome in enumerate(results):
            assert outcome.error is None, (
                f"rank {rank}: {outcome.error}: {outcome.message}\n{outcome.trace}"
            )
        return [outcome.value for outcome in results]

    @property
    def alive(self) -> bool:
        return all(child.alive for child in self.children)

    def close(self) -> None:
        for child in self.children:
            child.kill()


_pools: dict[tuple[int, int, int], RankPool] = {}


def pool(size: int, tp: int | None = None, pp: int = 1) -> RankPool:
    """The pool of `size` processes (started on first use, restarted after a hang)."""
    key = (size, tp or size, pp)
    if key not in _pools or not _pools[key].alive:
        _pools[key] = RankPool(*key)
    return _pools[key]


@atexit.register
def _close_all() -> None:
    for started in _pools.values():
        started.close()
