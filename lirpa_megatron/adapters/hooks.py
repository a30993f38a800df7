"""Whatever stands between a module and its class's forward: unwrapped where exact, else refused.

A facade states what a module's class computes. A hook, a `forward` that is set on the instance, a
wrapper or a parametrization makes one module compute something else:

===========================================  ====================================================
torch.compile, DistributedDataParallel       the module inside (Megatron's Float16Module too:
                                             bounds are of the float32 function of its weights)
torch.nn.utils.parametrize (weight norm, …)  the computed weight, as a constant; in eval mode alone
forward hooks and pre-hooks, also global     refused: what they do to a value is not known
old weight_norm, spectral_norm, prune        refused: they are such hooks
methods set on the instance                  refused
backward and state-dict hooks                no effect on the output, allowed
===========================================  ====================================================
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from lirpa_megatron.adapters.refusals import refusal

_COMPILED = ("torch._dynamo.eval_frame", "OptimizedModule")
_WRAPPERS = {
    _COMPILED: "_orig_mod",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel"): "module",
    ("megatron.core.transformer.module", "Float16Module"): "module",
}
"""(module, class) of a wrapper whose function is its inner module's -> the attribute that has it:
the classes need not be importable."""

_HARMLESS = {
    # gathers the parameters' shards of the distributed optimizer before they are used
    ("megatron.core.distributed.distributed_data_parallel",
     "DistributedDataParallel._make_forward_pre_hook.<locals>.hook"),
}
"""(module, qualified name) of hooks that leave values as they are."""

_TRUSTED = ("torch.", "megatron.", "transformer_engine.", "apex.")
_DECORATORS = ("contextlib", "functools", "abc", "dataclasses", "typing")
_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__")
"""Of nn.Module itself, the methods that every forward goes through."""

_OLD_NORMS = {
    "WeightNorm": "weight_norm: call torch.nn.utils.remove_weight_norm, or use "
    "torch.nn.utils.parametrizations.weight_norm",
    "SpectralNorm": "spectral_norm: call torch.nn.utils.remove_spectral_norm, or use "
    "torch.nn.utils.parametrizations.spectral_norm",
}


def inner(module: nn.Module) -> tuple[nn.Module, str] | None:
    """What a wrapper wraps and the attribute's name; None for any other module."""
    attribute = _WRAPPERS.get(_class(module))
    return None if attribute is None else (getattr(module, attribute), attribute)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of all wrappers that leave its function as it is.

    Raises:
        NotImplementedError: a wrapper has hooks of its own.
    """
    while (found := inner(module)) is not None:
        check(module, "")
        module = found[0]
    return module


def check_all(model: nn.Module, prefix: str = "") -> None:
    """`check` of every module in the model, and of hooks that torch calls around any module.

    Args:
        model: a module with its submodules.
        prefix: its name, "" for a whole model.

    Raises:
        NotImplementedError: naming the module and the hook.
    """
    for kind in ("forward_hooks", "forward_pre_hooks"):
        for hook in getattr(torch_module, f"_global_{kind}").values():
            raise NotImplementedError(
                f"every module has the global {_words(kind)} {_named(hook)}, whose effect on "
                "values is unknown: remove it (call remove() on the handle that registering it "
                "returned)"
            )
    classes: set[type] = set()
    for name, module in model.named_modules(prefix=prefix):
        check(module, name)
        if type(module) not in classes:
            classes.add(type(module))
            _check_class(module, name)


def check(module: nn.Module, name: str) -> None:
    """Refuses hooks around a module's forward, and methods that are set on the instance.

    Args:
        module: of a model.
        name: there.

    Raises:
        NotImplementedError: naming the module, what was found, and what to do.
    """
    for kind in ("forward_pre_hooks", "forward_hooks"):
        for hook in getattr(module, f"_{kind}").values():
            old = type(hook).__name__
            if old in _OLD_NORMS and type(hook).__module__.startswith("torch.nn.utils."):
                raise refusal(module, name, f"its weight is made by a hook of {_OLD_NORMS[old]}")
            if _identity(hook) in _HARMLESS:
                continue
            raise refusal(
                module, name, f"it has the {_words(kind)} {_named(hook)}, whose effect on "
                "values is unknown: remove it (call remove() on the handle that registering it "
                "returned)",
            )
    if _class(module) == _COMPILED:
        return  # whose forward is torch's own, on every instance
    for attribute, value in vars(module).items():
        if callable(value) and _is_method(inspect.getattr_static(type(module), attribute, None)):
            raise refusal(
                module, name, f"its method {attribute} is replaced on the instance by "
                f"{_named(value)}, and what that computes is unknown: `del` it, or define it in "
                "the module's class",
            )


def with_computed_weights(module: nn.Module, name: str) -> nn.Module:
    """The module without its parametrizations: their values as constant parameters.

    Args:
        module: of a model; returned as it is if it has none.
        name: there.

    Raises:
        NotImplementedError: parametrizations in training mode, where gradients would be lost.
    """
    if not parametrize.is_parametrized(module):
        return module
    if module.training:
        raise refusal(
            module, name, "it is parametrized, and bounds treat its computed weight as a constant: "
            "call model.eval(), or torch.nn.utils.parametrize.remove_parametrizations"
        )
    cls = type(module).__bases__[0]  # parametrize makes a subclass for each module
    plain = cls.__new__(cls)
    plain.__dict__ = dict(module.__dict__)
    for part in ("_parameters", "_buffers", "_modules"):
        plain.__dict__[part] = dict(module.__dict__[part])
    parametrizations = plain._modules.pop("parametrizations")
    for tensor in parametrizations:
        value = getattr(module, tensor).detach()
        plain._parameters[tensor] = nn.Parameter(value, requires_grad=False)
    return plain


def without_compiling(copied: nn.Module) -> nn.Module:
    """A shallow copy of a module without what was compiled from it, and without backward hooks,
    which a trace would record; both leave its function as it is."""
    copied.__dict__["_compiled_call_impl"] = None
    for kind in ("_backward_hooks", "_backward_pre_hooks"):
        copied.__dict__[kind] = OrderedDict()
    return copied


def _check_class(module: nn.Module, name: str) -> None:
    """Refuses methods of torch's and Megatron's classes that another package has replaced.

    Where a replacement differs for some values alone, the comparison of outputs would not see it.
    """
    for cls in type(module).__mro__[:-1]:
        if not cls.__module__.startswith(_TRUSTED):
            continue
        for method, function in vars(cls).items():
            if cls is nn.Module and method not in _CALLS:
                continue
            made = _made_in(function)
            if made is not None and not made.startswith((*_TRUSTED, *_DECORATORS)):
                raise refusal(
                    module, name, f"the method {method} of {cls.__name__} was replaced by one of "
                    f"{made}, and what that computes is unknown: restore the original"
                )


def _made_in(function: Any) -> str | None:
    """The module that a method's code is of, also of what its decorators wrap."""
    if isinstance(function, (staticmethod, classmethod)):
        function = function.__func__
    while not inspect.isfunction(function) and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function.__globals__.get("__name__") if inspect.isfunction(function) else None


def _class(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def _is_method(attribute: Any) -> bool:
    return inspect.isroutine(attribute) or isinstance(attribute, (staticmethod, classmethod))


def _identity(hook: Any) -> tuple[str, str]:
    return getattr(hook, "__module__", "") or "", getattr(hook, "__qualname__", "")


def _words(kind: str) -> str:
    return kind.removesuffix("s").replace("pre_hook", "pre-hook").replace("_", " ")


def _named(function: Any) -> str:
    return getattr(function, "__qualname__", None) or repr(function).split(" at 0x")[0]


