"""Values of the graph's nodes at the clean input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa


def clean_value(module: auto_lirpa.HostBoundedModule, node: auto_lirpa.Bound) -> torch.Tensor:
    """A node's value at the clean input; the values of other nodes computed for it are not kept.

    Args:
        module: a BoundedModule whose inputs are set.
        node: of its graph.
    """
    known = {name for name, n in module._modules.items() if _has_value(n)}
    y = module.get_forward_value(node)
    _forget(module, known)
    return y


def value_at(module: auto_lirpa.HostBoundedModule, inputs: Sequence[Any]) -> torch.Tensor:
    """The graph's output at inputs, without gradients."""
    with torch.no_grad():
        y = auto_lirpa.HostBoundedModule.forward(module, *inputs)
    _forget(module, set())
    return y


def _forget(module: auto_lirpa.HostBoundedModule, known: set[str]) -> None:
    for name, node in module._modules.items():
        if _has_value(node) and name not in known:
            del node.forward_value


def _has_value(node: auto_lirpa.Bound) -> bool:
    return getattr(node, "forward_value", None) is not None
