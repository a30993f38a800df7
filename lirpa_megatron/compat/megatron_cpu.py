"""megatron-core on a machine without CUDA: installed explicitly, and reversible.

megatron-core asks `torch.cuda.current_device()` where to allocate, and forks a CUDA random state
when it initialises sharded weights; embeddings that two pipeline stages share are moved by
`.cuda()`. The shim answers the first with the CPU, replaces the second by a tracker of the CPU's
generator, and leaves tensors where they are. Nothing is patched where CUDA is available.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

_saved: list[tuple[Any, str, Any]] = []


class CPURNGStatesTracker:
    """Megatron's `CudaRNGStatesTracker` for the CPU's generator.

    `fork(name)` switches to the named state for a block; an unknown name changes nothing.
    """

    use_cudagraphable_rng = False
    is_inference_rng_tracker = False

    def __init__(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def is_initialized(self) -> bool:
        return True

    def reset(self) -> None:
        self.states_, self.seeds_ = {}, set()

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.states_[name] = torch.get_rng_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        if name not in self.states_:
            yield
            return
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()


def _causal_mask(size: int) -> torch.Tensor:
    return torch.triu(torch.ones(size, size), diagonal=1).bool()


def _idle_stream(*_: Any, **__: Any) -> SimpleNamespace:
    def nothing(*_: Any, **__: Any) -> None:
        return None

    return SimpleNamespace(
        wait_event=nothing, wait_stream=nothing, synchronize=nothing, record_event=nothing
    )


def is_installed() -> bool:
    """Whether the shim is in place in this process."""
    return bool(_saved)


def install() -> Callable[[], None]:
    """Puts the shim in place; does nothing where CUDA is available or the shim already is.

    Returns:
        `uninstall`.
    """
    if torch.cuda.is_available() or is_installed():
        return uninstall
    import megatron.core.fusions.fused_softmax as fused_softmax
    import megatron.core.tensor_parallel.random as random

    def patch(owner: Any, name: str, value: Any) -> None:
        _saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    patch(torch.cuda, "current_device", lambda: torch.device("cpu"))
    patch(torch.cuda, "synchronize", lambda *args, **kwargs: None)
    patch(torch.cuda, "current_stream", _idle_stream)
    patch(torch.Tensor, "cuda", lambda x, *args, **kwargs: x)
    patch(random, "_CUDA_RNG_STATE_TRACKER", CPURNGStatesTracker())
    patch(random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True)
    if hasattr(fused_softmax, "get_default_causal_mask"):
        patch(fused_softmax, "get_default_causal_mask", _causal_mask)
    return uninstall


def uninstall() -> None:
    """Puts back everything that `install` replaced."""
    while _saved:
        owner, name, value = _saved.pop()
        setattr(owner, name, value)
