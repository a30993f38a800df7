"""What a facade has taken from its module, to see later whether the module still says the same."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_PARTS = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
_OWN = ("lirpa_megatron.", "torch.nn.")

Signature = dict[str, dict[str, Any]]


def signature(facade: nn.Module, model: nn.Module) -> Signature:
    """Module's name -> its class, the numbers and texts it has, and which parameters.

    Args:
        facade: `traceable(model)`.
        model: what it was made of; parameters that are computed from its own do not count.
    """
    own = {id(p) for p in model.parameters()}
    found: Signature = {}
    for name, module in facade.named_modules(remove_duplicate=False):
        entry: dict[str, Any] = {"its class": f"{type(module).__module__}.{type(module).__name__}"}
        # Modules of other classes may count on their own; the comparison of values is for them.
        if type(module).__module__.startswith(_OWN):
            entry |= {
                key: repr(value) for key, value in vars(module).items()
                if isinstance(value, _PLAIN) and key != "training" and not key.startswith("_")
            }
        entry |= {
            key: id(p) for key, p in module._parameters.items() if p is None or id(p) in own
        }
        found[name] = entry
    return found


def objects_of(model: nn.Module) -> list[Any]:
    """What a model's modules, their classes and configurations hold: the very objects.

    While these are the same nothing was replaced, set or registered: there is no need to make
    another facade. (A list that was changed in place is left to the comparison of values.)
    """
    found: list[Any] = [
        *torch_module._global_forward_hooks.values(),
        *torch_module._global_forward_pre_hooks.values(),
    ]
    classes: dict[type, None] = {}
    configs: dict[int, Any] = {}
    for module in model.modules():
        own = module.__dict__
        found += (module, type(module), *own.values())
        for part in _PARTS:
            found += own[part].values()
        classes |= dict.fromkeys(type(module).__mro__[:-1])
        if (config := own.get("config")) is not None:
            configs[id(config)] = config
    for cls in classes:
        found += vars(cls).values()
    for config in configs.values():
        found += getattr(config, "__dict__", {}).values()
    return found


def same_objects(before: list[Any], after: list[Any]) -> bool:
    """Whether both are the same objects in the same order."""
    return len(before) == len(after) and all(map(operator.is_, before, after))


def changed(before: Signature, after: Signature) -> str | None:
    """The first difference in words; None if there is none."""
    for name in [*before, *(n for n in after if n not in before)]:
        old, new = before.get(name, {}), after.get(name, {})
        for key in [*old, *(k for k in new if k not in old)]:
            if old.get(key) != new.get(key):
                where = name or "the model"
                if isinstance(old.get(key), str) and isinstance(new.get(key), str):
                    return f"{where}: {key} changed from {old[key]} to {new[key]}"
                return f"{where}: {key} was replaced"
    return None
