"""A model as the host can trace it.

The host traces a model on one process, where collectives make no sense, and Megatron's layers carry
an `_extra_state` that tracing cannot take. So the model's module tree is copied shallowly (the
model itself is not touched) with facades in it: for linear layers (`linear_facades`), norms and
activations, and for every class that is registered (`registry`): Megatron's transformer modules
(`transformer`), models (`language_models`), and views of them. They hold the same Parameters under
the same names.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lirpa_megatron.adapters import hooks, refusals
from lirpa_megatron.adapters.linear_facades import is_column, is_row, linear_facade
from lirpa_megatron.adapters.norms import NormFacade, is_norm
from lirpa_megatron.adapters.registry import adapter_of
from lirpa_megatron.parallel import runtime
from lirpa_megatron.parallel.collectives import Collectives

_DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)


def collectives_of(model: nn.Module) -> Collectives:
    """The collectives of the tensor-parallel group that the model's parallel layers name.

    Expert layers, which have groups of their own, are left to be refused by `traceable`.

    Raises:
        NotImplementedError: layers of different tensor-parallel groups.
    """
    groups = {
        name: _group_of(layer)
        for name, layer in model.named_modules()
        if (is_column(layer) or is_row(layer)) and not getattr(layer, "is_expert", False)
    }
    distinct = {id(group): group for group in groups.values()}
    if len(distinct) > 1:
        raise NotImplementedError(
            "the model's layers belong to different tensor-parallel groups: " + ", ".join(groups)
        )
    return Collectives(next(iter(distinct.values())) if distinct else None)


def device_of(model: nn.Module, inputs: Any) -> torch.device:
    """Where the model is, or its first input."""
    tensors = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    return next(iter([*model.parameters(), *tensors])).device


def traceable(model: nn.Module, collectives: Collectives | None = None) -> nn.Module:
    """A shallow copy of the model with facades in place of what the host cannot trace or bound.

    Args:
        model: any module; what it is built of is recognised by class. Of megatron-core's
            transformer modules the facades take hidden states batch first (see `transformer`).
        collectives: what the facades communicate with; `collectives_of(model)` by default.

    Raises:
        NotImplementedError: something that no facade models (see `refusals` and `hooks`), by its
            name, or layers of different tensor-parallel groups.
    """
    hooks.check_all(model)
    return _Copier(collectives or collectives_of(model))(model, "")


def _group_of(layer: nn.Module) -> dist.ProcessGroup | None:
    # Layers know their group since megatron-core 0.13; before, there was only the global one.
    group = getattr(layer, "tp_group", None)
    return runtime.tp_group() if group is None else group


class _Copier:
    """Copies a tree of modules; facades copy their submodules through it."""

    def __init__(self, tp: Collectives) -> None:
        self.tp = tp
        self.done: dict[int, nn.Module] = {}

    def __call__(self, module: nn.Module, name: str, **part: Any) -> nn.Module:
        """The facade of a module, or its copy; a module that is used twice stays one module.

        Args:
            module: of the original model.
            name: there.
            **part: which part of its function (`View`), for the facades that offer a choice.
        """
        if id(module) not in self.done:
            wrapped = hooks.inner(module)
            if wrapped is not None:
                made = self(wrapped[0], refusals.joined(name, wrapped[1]), **part)
            else:
                plain = hooks.with_computed_weights(module, name)
                made = self._facade(plain, name, part) or self._copy(module, plain, name)
            self.done[id(module)] = made
        return self.done[id(module)]

    def _facade(self, module: nn.Module, name: str, part: dict[str, Any]) -> nn.Module | None:
        refusals.check_class(module, name)
        adapter = adapter_of(module)
        if adapter is not None:
            return adapter.facade(module, name, self, **part)
        # Of torch's own classes alone: another one's forward may not be the identity in eval mode.
        if type(module) in _DROPOUTS and not module.training:
            return nn.Identity()  # also when the bounded module is trained later
        if is_norm(module):
            return NormFacade(module, name)
        return linear_facade(module, name, self.tp)

    def _copy(self, original: nn.Module, module: nn.Module, name: str) -> nn.Module:
        """A copy of `module`, which is the original without its parametrizations."""
        copied = hooks.without_compiling(copy.copy(module))
        self.done[id(original)] = copied
        copied._modules = {
            child_name: None if child is None else self(child, refusals.joined(name, child_name))
            for child_name, child in module._modules.items()
        }
        return copied
