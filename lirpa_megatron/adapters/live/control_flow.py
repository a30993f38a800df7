"""Whether a forward decides anything by its input's values.

A trace records what was computed for one input. Where a number read from the input decides what is
computed (`if x.sum() > 0`, `x.max().item()`, a mask that selects entries), the graph is that of one
branch, and its bounds are of another function as soon as the set of inputs reaches the other one:
the comparison at the clean input would not see it. So the first run of the live model is followed
operator by operator: what depends on the input, and what of it becomes a number of Python's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

_PACKAGES = tuple(str(Path(m.__file__).parent) for m in (torch, sys.modules["contextlib"]))
_READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")
"""Operators that give Python a value, or have as many results as values say."""


class ReadsValues(Exception):  # noqa: N818, an internal message
    """A value of the input decides; the text says where."""


class FollowValues(TorchDispatchMode):
    """While it is active, values that depend on the given tensors must stay tensors.

    Args:
        inputs: floating-point tensors among them count.

    Raises:
        ReadsValues: naming the operator and the line that asked for it.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        super().__init__()
        self._known = WeakTensorKeyDictionary()
        for x in inputs:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self._known[x] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        depends = [x for x in tensors if x in self._known]
        name = getattr(func, "__name__", str(func)).partition(".")[0]
        masks = name in ("index", "index_put_") and any(
            x in self._known and x.dtype == torch.bool for x in tree_leaves(args[1:])
            if isinstance(x, torch.Tensor)
        )
        if depends and (name in _READS or masks):
            raise ReadsValues(f"{name} at {_line()}")
        found = func(*args, **kwargs)
        if depends:
            for y in tree_leaves(found):
                if isinstance(y, torch.Tensor):
                    self._known[y] = True
            if name.endswith("_") and tensors:  # in place, or into `out`
                self._known[tensors[0]] = True
        return found


def _line() -> str:
    """The innermost line outside of torch and of this file."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith(_PACKAGES) and not file.startswith("<"):
            return f"{Path(file).name}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "an unknown line"
