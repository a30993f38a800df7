"""Which facade stands for which class of modules; each adapter file registers its own.

A *facade* computes the same function as a module, on the same Parameters under the same names, from
replicated batch-first tensors, and can be traced. docs/extending.md shows how to write one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from lirpa_megatron.parallel.collectives import Collectives


class Copy(Protocol):
    """Makes the facade (or a copy) of a submodule; a submodule that is used twice stays one."""

    tp: Collectives
    """Of the model's tensor-parallel group."""

    def __call__(self, module: nn.Module, name: str, **part: Any) -> nn.Module: ...


@dataclass(frozen=True)
class Adapter:
    """How a class of modules is bounded."""

    facade: Callable[..., nn.Module]
    """(module, name, copy) -> the facade. `name` is the module's in its model, for messages;
    submodules are passed through `copy` (see `Copy`)."""
    live: Callable[..., torch.Tensor] | None = None
    """(module, collectives, *inputs) -> what the module itself computes, from the facade's inputs
    and in the facade's form; for the live check. None: the module is called as its facade is."""


_ADAPTERS: dict[type, Adapter] = {}


def register(
    cls: type, facade: Callable[..., nn.Module], live: Callable[..., torch.Tensor] | None = None
) -> None:
    """Lets a facade stand for the modules of a class, and of subclasses without one of their own.

    Args:
        cls: the class; the facade has to refuse subclasses that compute something else
            (`refusals.check_methods`).
        facade: see `Adapter.facade`.
        live: see `Adapter.live`.
    """
    _ADAPTERS[cls] = Adapter(facade, live)


def unregister(cls: type) -> None:
    """Takes back `register`."""
    del _ADAPTERS[cls]


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter of the module's class, or of the nearest base that has one."""
    return next((_ADAPTERS[c] for c in type(module).__mro__ if c in _ADAPTERS), None)
