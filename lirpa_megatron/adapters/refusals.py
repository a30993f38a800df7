"""What the facades do not model, refused with the module's name and the reason.

A facade states what a module computes. So whatever would make the module compute something else
(a flag, a subclass with its own forward, another kind of submodule) must be refused here, or the
bounds would be of another function.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import megatron.core
import torch
from torch import nn

from lirpa_megatron.adapters import config_fields

RELEASE: str = megatron.core.__version__

_CLASSES = {
    "BaseMoELayer": "MoE layers are not supported, their tokens are routed by values",
    "GroupedMLP": "expert layers are not supported, their tokens are routed by values",
    "TEGroupedMLP": "expert layers are not supported, their tokens are routed by values",
    "SequentialMLP": "expert layers are not supported, their tokens are routed by values",
    "TEFusedMLP": "TEFusedMLP is not supported: set use_transformer_engine_op_fuser=False",
    "MultiLatentAttention": "multi-latent attention is not supported",
    "CrossAttention": "cross attention is not supported",
    "MultiTokenPredictionBlock": "multi-token prediction is not supported",
    "MambaLayer": "Mamba layers are not supported",
    "T5Model": "T5 models (cross attention) are not supported",
}
"""Class, or base class, by name: it need not be importable in every release of megatron-core."""

_HARMLESS_METHODS = ("__init__", "__repr__", "extra_repr", "set_input_tensor", "backward_dw")
_HARMLESS_PARTS = ("state_dict", "extra_state", "checkpoint_without")
"""Methods that a forward does not call, and parts of such methods' names."""


def refusal(module: nn.Module, name: str, why: str) -> NotImplementedError:
    """The error that names a module and says why it is refused."""
    return NotImplementedError(f"{name or type(module).__name__}: {why}")


def joined(name: str, attribute: str) -> str:
    """The name of a submodule in the model; `name` is "" for the model itself."""
    return f"{name}.{attribute}" if name else attribute


def package(module: nn.Module) -> str:
    """The top-level package of the module's class."""
    return type(module).__module__.partition(".")[0]


def check_class(module: nn.Module, name: str) -> None:
    """Refuses classes of megatron-core that have no facade."""
    for cls in type(module).__mro__:
        if cls.__name__ in _CLASSES and cls.__module__.startswith("megatron."):
            raise refusal(module, name, _CLASSES[cls.__name__])


def check_methods(module: nn.Module, name: str, cls: type) -> None:
    """Refuses a subclass of `cls` that computes something else.

    Args:
        module: an instance of `cls`, or of anything.
        name: of the module in its model.
        cls: the class that the facade models; a subclass may add methods to it, and have others
            that a forward does not call.
    """
    if not isinstance(module, cls):
        raise refusal(module, name, f"{type(module).__name__} is not supported, only "
                      f"{cls.__module__}.{cls.__name__}")
    own = type(module)
    for method in () if own is cls else _methods(cls):
        if inspect.getattr_static(own, method, None) is not inspect.getattr_static(
            cls, method, None
        ):
            raise refusal(
                module, name,
                f"{type(module).__name__} overrides {cls.__name__}.{method}, and what it computes "
                "is unknown",
            )


@functools.lru_cache(maxsize=64)
def _methods(cls: type) -> tuple[str, ...]:
    """Names of all methods that an instance's forward may come to."""
    found = {"forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__"}
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        found |= {name for name, value in vars(base).items() if inspect.isroutine(value)}
    return tuple(sorted(
        name for name in found
        if name not in _HARMLESS_METHODS and not any(part in name for part in _HARMLESS_PARTS)
    ))


def check_table(table: nn.Module, name: str) -> None:
    """Refuses anything but a plain table of embeddings."""
    check_methods(table, name, nn.Embedding)
    if table.max_norm is not None:
        raise refusal(table, name, f"max_norm={table.max_norm} is not supported")


def check_config(module: nn.Module, name: str) -> None:
    """Refuses what the module's TransformerConfig says that no facade computes.

    A field that is on none of the lists (`config_fields`) is refused as soon as it differs from its
    default, with the release of megatron-core.
    """
    config: Any = module.config
    for field in dataclasses.fields(config):
        if field.name in config_fields.KNOWN or not hasattr(config, field.name):
            continue
        value = getattr(config, field.name)
        if _is_default(value, field) or value in config_fields.ALLOWED.get(field.name, ()):
            continue
        if field.name in config_fields.REFUSED:
            why = f"{config_fields.REFUSED[field.name]} not supported"
        else:
            why = (
                f"a field of {type(config).__name__} whose effect on the function is unknown "
                f"(megatron-core {RELEASE}): leave it at its default"
            )
        raise refusal(module, name, f"{field.name}={_shown(value)}: {why}")


def _is_default(value: Any, field: dataclasses.Field) -> bool:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if value is default or (not value and not default):
        return True
    return type(value) is type(default) and bool(value == default)


def _shown(value: Any) -> str:
    return getattr(value, "__qualname__", None) or repr(value).split(" at 0x")[0][:80]


def check_dropout(module: nn.Module, name: str, **probabilities: float) -> None:
    """Refuses dropout that is active: its output is random.

    Args:
        module: whose mode decides.
        name: of the module in its model.
        **probabilities: the configuration's name for a dropout -> its probability.
    """
    for what, p in probabilities.items():
        if module.training and p > 0:
            raise refusal(
                module, name, f"active dropout ({what}={p}): call model.eval() or set it to 0"
            )


def check_weight(module: nn.Module, name: str, weight: torch.Tensor | None) -> None:
    """Refuses quantised weights: what they stand for depends on their kernels."""
    if weight is not None and "Float8" in type(weight).__name__:
        raise refusal(module, name, "fp8 weights are not supported")
