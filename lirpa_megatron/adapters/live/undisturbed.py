"""Running the caller's own module without leaving a trace of it."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.tensor_parallel import random
from torch import nn

_PLAIN = (bool, int, float, str, type(None))


@contextlib.contextmanager
def undisturbed(model: nn.Module, modes: Mapping[nn.Module, bool] | None = None) -> Iterator[None]:
    """A block that runs a module's forward, without gradients; afterwards all is as before.

    Restored are buffers (their values, and which tensors they are), numbers and texts kept on
    modules, training modes, and the states of torch's and Megatron's random generators. A forward
    that remembers its results (Megatron's rotary tables) computes them anew, before and after.

    Args:
        model: what is run.
        modes: training mode of each module while the block runs; None: as they are.
    """
    modules = list(model.modules())
    before = [(m, m.training, dict(m._buffers), dict(vars(m))) for m in modules]
    values = {b: b.clone() for _, _, own, _ in before for b in own.values() if b is not None}
    tracker, states = _tracker_states()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        for module, training in (modes or {}).items():
            if module.training is not training:
                module.training = training
        _forget_results(modules)
        with torch.random.fork_rng(devices), torch.no_grad(), _softmax_unrounded(modules):
            yield
    finally:
        _forget_results(modules)
        for module, *kept in before:
            _put_back(module, *kept)
        with torch.no_grad():
            for buffer, value in values.items():
                buffer.copy_(value)
        if tracker is not None:
            tracker.set_states(states)


def _put_back(
    module: nn.Module, training: bool, buffers: dict[str, Any], attributes: dict[str, Any]
) -> None:
    if module.training is not training:
        module.training = training
    if buffers or module._buffers:
        module._buffers.clear()
        module._buffers.update(buffers)
    own = vars(module)
    same = own.keys() == attributes.keys()
    if same and not any(map(operator.is_not, own.values(), attributes.values())):
        return
    numbers = _numbers(attributes)
    for name in [n for n in _numbers(own) if n not in numbers]:
        delattr(module, name)
    for name, value in numbers.items():
        if own.get(name) is not value:
            own[name] = value


def _forget_results(modules: list[nn.Module]) -> None:
    for cls in {type(module) for module in modules}:
        if hasattr(cls.forward, "cache_clear"):
            cls.forward.cache_clear()


def _numbers(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in attributes.items()
        if isinstance(value, _PLAIN) and name != "training"
    }


def _tracker_states() -> tuple[Any, Any]:
    tracker = getattr(random, "_CUDA_RNG_STATE_TRACKER", None)
    if tracker is None or not getattr(random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", False):
        return None, None
    return tracker, tracker.get_states()


@contextlib.contextmanager
def _softmax_unrounded(modules: list[nn.Module]) -> Iterator[None]:
    """Megatron's softmax rounds to half precision where its config says that scores are.

    They are float32 here: bounds are of the float32 function of the stored weights.
    """
    flags = ("input_in_fp16", "input_in_bf16", "input_in_float16")
    kept = [
        (module, flag, getattr(module, flag))
        for module in modules if type(module).__name__ == "FusedScaleMaskSoftmax"
        for flag in flags
    ]
    try:
        for module, flag, _ in kept:
            setattr(module, flag, False)
        yield
    finally:
        for module, flag, value in kept:
            setattr(module, flag, value)
