"""torch's functions while a plain module is traced: which of them become operators of our own.

A module that the project re-expresses (`traceable`) calls `traced_ops`; other modules call torch.
While the host traces such a module each call of a torch function on a value that depends on the
inputs goes through `TracedFunctions`: structure (`structure`), linear maps, norms and products of
two values become this package's operators, the same on both versions of the host; what mixes
samples, or cannot be bounded, is refused by the function's name, the submodule and the line that
calls it. What is left goes to the host's tracer, and `host_operators` decides on it. What is called
instead of which function is in `handlers` and `layer_handlers`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lirpa_megatron.adapters.plain import exported, handlers, layer_handlers, structure
from lirpa_megatron.adapters.plain.handlers import FREE, HANDLERS, plain, tensors_in
from lirpa_megatron.adapters.tracing import untraced
from lirpa_megatron.compat import host_operators
from lirpa_megatron.errors import UserError
from lirpa_megatron.operators.parameters import HALF

_RANDOM = {"rand", "randn", "randint", "randperm", "bernoulli", "normal", "multinomial"}
_OURS = (__name__, handlers.__name__, layer_handlers.__name__)
_TRAINED = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd
_IN_PLACE = ("__setitem__", "copy_", "fill_", "zero_", "index_fill_", "index_copy_", "scatter_")


@contextlib.contextmanager
def traced_functions(
    model: nn.Module, inputs: Any, known: Collection[str], calls: list[Callable]
) -> Iterator[None]:
    """While the host traces and converts `model`.

    Args:
        model: the module that is traced.
        inputs: the example input, or tuple of them.
        known: operators of the graph with a Bound class of this package or of the caller.
        calls: takes the functions of constants that the model calls (`Layout.calls`).

    Raises:
        NotImplementedError: a function or operator that cannot be bounded, by name.
    """
    inputs = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
    _check_modules(model)
    _check_inputs(model, inputs)
    moving = [i for i, x in enumerate(inputs) if x.is_floating_point()]
    functions = TracedFunctions(model, moving, calls)
    try:
        checked = host_operators.checked(functions.called, moving, known)
        with exported.own_operators(), checked, functions, _one_output(model):
            yield
    except RuntimeError as error:
        # 0.7.1 says only that tracing failed, whatever the model raised.
        failed = "Failed to get the trace" in str(error) and error.__context__ is not None
        cause = error.__context__ if failed else error
        if "observable data dependence" in str(cause):
            cause = UserError(
                "the model's output does not depend on an input that can be perturbed"
            )
        if cause is error:
            raise
        raise cause from None


class TracedFunctions(TorchFunctionMode):
    """Active while a model is traced.

    Args:
        model: the module that is traced, for the names of its submodules.
        inputs: the numbers of the inputs that may be perturbed: those of floating point.
        calls: takes the functions of constants that it calls (`Layout.calls`).
    """

    def __init__(self, model: nn.Module, inputs: list[int], calls: list[Callable]) -> None:
        super().__init__()
        self.calls = calls
        self.names = {id(module): name for name, module in model.named_modules()}
        self.held = {id(x) for x in [*model.parameters(), *model.buffers()]}
        self.inputs = inputs
        self.called: dict[tuple[str, int], tuple[str, str]] = {}
        """File and line -> the last torch function that was called there, and the submodule."""
        self._origins: dict[int, frozenset[str]] = {}
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._stale: dict[int, tuple[torch.Tensor, str]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.jit.is_tracing() or _called_by_us():
            return func(*args, **kwargs)
        name = _name_of(func)
        tensors = list(tensors_in((args, kwargs)))
        if name in FREE:
            return func(*args, **kwargs)
        for x in tensors:  # of these the tracer knows nothing, and asked about them it crashes
            foreign = isinstance(x, nn.Parameter) or (x.requires_grad and x.is_leaf)
            if foreign and id(x) not in self.held:
                with untraced():
                    shape = tuple(x.shape)
                raise self.refused(
                    name, f"reads a parameter of shape {shape} that the model does not "
                    "hold: make it, or the module that has it, an attribute of the model"
                )
        if not any(self.depends(x) for x in tensors):
            in_place = name.endswith("_") and not name.endswith("__")
            if in_place or name == "__setitem__":
                return func(*args, **kwargs)
            return self._of_constants(name, func, args, kwargs, tensors)
        self._note(name)
        for x in tensors:
            if id(x) in self._stale:
                raise self.refused(name, f"reads a value that {self._stale[id(x)][1]} changed in "
                                   "place through a view: use the function that returns a new one")
        if name in _IN_PLACE:
            raise self.refused(name, "writes in place: use torch.cat or torch.where")
        handler = HANDLERS.get(name)
        try:
            if handler is None:
                result = func(*args, **kwargs)
            else:
                result = handler(self, name, func, args, kwargs)
        except structure.MovesBatch as error:
            raise self.refused(
                name, f"{error}: the batch must stay at dimension 0, each sample by itself"
            ) from None
        if name.endswith("_") and not name.endswith("__") and tensors:
            self._changed(tensors[0], name)
        return result

    # ------------------------------------------------------------------------- values

    def depends(self, x: torch.Tensor) -> bool:
        """Whether a traced value depends on the values of the model's inputs."""
        return "input" in self.origins(x)

    def origins(self, x: torch.Tensor) -> frozenset[str]:
        """What a traced value is computed of: "input", "parameter" (or buffer), "batch" (size)."""
        try:
            value = torch._C._get_value_trace(x)
        except RuntimeError:
            return frozenset()
        todo = [value]
        while todo:
            last = todo[-1]
            key, node = last.unique(), last.node()
            if key in self._origins:
                todo.pop()
            elif node.kind() == "prim::Param":
                inputs = [x.unique() for x in node.outputs()]
                moves = any(key == inputs[i] for i in self.inputs)
                self._origins[key] = frozenset({"input" if moves else "parameter"})
            elif node.kind() == "aten::size":
                dim = list(node.inputs())[1].node()
                first = dim.kind() == "prim::Constant" and dim.i("value") == 0
                self._origins[key] = frozenset({"batch"} if first else ())
            else:
                known = [self._origins.get(x.unique()) for x in node.inputs()]
                if None in known:
                    todo += [x for x in node.inputs() if x.unique() not in self._origins]
                else:
                    self._origins[key] = frozenset().union(*known)
        return self._origins[value.unique()]

    def constant(self, function: Callable, *x: torch.Tensor) -> Any:
        """`structure.of_constants`."""
        return structure.of_constants(self.calls, function, *x)

    def _of_constants(
        self, name: str, func: Any, args: tuple, kwargs: dict, tensors: list
    ) -> Any:
        """A function of parameters and constants, which the host may lack."""
        if name in _RANDOM:
            raise self.refused(name, "draws random numbers: not supported")
        origins = frozenset().union(*(self.origins(x) for x in tensors))
        of_batch = "batch" in origins and bool(args) and not name.startswith("__")
        with untraced(), torch.no_grad():
            args, kwargs = (plain(args), plain(kwargs)) if of_batch else (args, kwargs)
            found = func(*args, **kwargs)
        if not isinstance(found, (torch.Tensor, tuple, list)):
            return found
        if "parameter" not in origins:
            return self._for_one(func, found) if of_batch else found
        several = isinstance(found, (tuple, list)) and found
        if not all(isinstance(y, torch.Tensor) for y in (found if several else [found])):
            return found
        parts = [x for x in tensors if "parameter" in self.origins(x)]
        others = {id(x): i for i, x in enumerate(parts)}

        def call(*values: torch.Tensor) -> Any:
            def put(tree: Any) -> Any:
                if isinstance(tree, torch.Tensor):
                    return values[others[id(tree)]] if id(tree) in others else tree
                if isinstance(tree, (tuple, list)):
                    return type(tree)(put(x) for x in tree)
                return {k: put(x) for k, x in tree.items()} if isinstance(tree, dict) else tree

            result = func(*put(args), **put(kwargs))
            return self._for_one(func, result) if of_batch else result

        return self.constant(call, *parts)

    def _for_one(self, func: Any, x: Any) -> Any:
        """A constant made for as many samples as there are, the same for all: for one."""
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        if x.ndim > 1 and bool((x == x[:1]).all()):
            return x[:1].contiguous()
        raise self.refused(
            _name_of(func), "computes numbers of the size of the batch: not supported"
        )

    def for_any_batch(self, x: torch.Tensor) -> torch.Tensor:
        """A constant whose samples are all the same, as one sample."""
        if "parameter" in self.origins(x):
            return x
        with untraced(), torch.no_grad():
            same = x.ndim > 1 and bool((x == x[:1]).all())
            return x[:1].clone() if same else x

    def moved(self, x: torch.Tensor, function: Callable, fill: float = 0.0) -> Any:
        """`structure.rearranged`; a result may be a view of x, so later writes are looked at."""
        result = structure.rearranged(x, function, self.depends(x), fill)
        for y in result if isinstance(result, tuple) else (result,):
            self._views.append((x, y))
        return result

    def _changed(self, x: torch.Tensor, name: str) -> None:
        """x was written in place: what shares its memory in the model does not do so here."""
        group, size = {id(x): x}, 0
        while len(group) > size:
            size = len(group)
            for pair in self._views:
                if any(id(y) in group for y in pair):
                    group.update((id(y), y) for y in pair)
        del group[id(x)]
        self._stale.update({key: (y, name) for key, y in group.items()})

    # ------------------------------------------------------------------------- errors

    def _note(self, name: str) -> None:
        file, line, module = self._caller()
        self.called[file, line] = name, module

    def refused(self, name: str, why: str) -> NotImplementedError:
        """The error that names a function, the submodule that calls it and the line."""
        file, line, module = self._caller()
        where = f"{module}: " if module else ""
        line_of = "" if _in_torch(file) else f" ({os.path.basename(file)}, line {line})"
        return NotImplementedError(f"{where}torch function {name}{line_of} {why}")

    def _caller(self) -> tuple[str, int, str]:
        """(file, line, submodule's name) of the model's code that is running."""
        found, frame = ("", 0), sys._getframe(1)
        while frame is not None:
            package = frame.f_globals.get("__name__", "")
            inside = package.startswith(
                (*_OURS, "torch.overrides", "torch.nn.functional", "torch._tensor")
            )
            if not inside and not found[0]:
                found = frame.f_code.co_filename, frame.f_lineno
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self.names:
                name = self.names[id(owner)]
                return *found, f"{name} ({type(owner).__name__})" if name else type(owner).__name__
            frame = frame.f_back
        return *found, ""


def _in_torch(file: str) -> bool:
    return file.startswith(os.path.dirname(torch.__file__) + os.sep)


@contextlib.contextmanager
def _one_output(model: nn.Module) -> Iterator[None]:
    """Refuses a model (a copy of the user's, made for tracing) that returns no single tensor."""
    forward = model.forward

    def checked(*args: Any, **kwargs: Any) -> Any:
        y = forward(*args, **kwargs)
        if not isinstance(y, torch.Tensor):
            raise UserError(
                f"the model returns a {type(y).__name__}, but only one tensor can be bounded: wrap "
                "it in a module that returns that tensor"
            )
        return y

    model.forward = checked
    try:
        yield
    finally:
        del model.forward


def _check_modules(model: nn.Module) -> None:
    """Refuses what is random or mixes samples in training mode (the host would trace eval mode)."""
    for name, module in model.named_modules():
        mean = getattr(module, "running_mean", None)
        if isinstance(module, _TRAINED) and mean is not None and mean.dtype in HALF:
            raise UserError(
                f"{name or 'the model'} ({type(module).__name__}): running statistics are "
                f"{mean.dtype}, and bounds are computed in float32: call model.float()"
            )
        if isinstance(module, _TRAINED) and module.training and getattr(module, "p", 1) > 0:
            what = "normalises by the batch's own statistics, so that samples depend on each other"
            if isinstance(module, nn.modules.dropout._DropoutNd):
                what = f"drops values at random (p={module.p})"
            raise NotImplementedError(
                f"{name or 'the model'} ({type(module).__name__}): in training mode it {what}: "
                "call model.eval() before"
            )


def _check_inputs(model: nn.Module, inputs: Sequence[Any]) -> None:
    """Refuses example inputs of number types that the model, or bounds, are not of."""
    types = {p.dtype: name for name, p in reversed(list(model.named_parameters()))
             if p.is_floating_point()}
    for i, x in enumerate(inputs):
        if not isinstance(x, torch.Tensor):
            raise UserError(f"input {i} is a {type(x).__name__}: give tensors")
        if x.ndim == 0 or x.shape[0] == 0:
            raise UserError(f"input {i} has shape {tuple(x.shape)}: give a batch of at least 1")
        if x.dtype in HALF:
            raise UserError(
                f"input {i} is {x.dtype}: bounds are computed in float32 or float64, with weights "
                "of half precision widened; give x.float()"
            )
        if x.is_floating_point() and types and x.dtype not in types:
            dtype, name = next(iter(types.items()))
            raise UserError(
                f"input {i} is {x.dtype}, parameter {name!r} is {dtype}: give both in one number "
                "type (x.to(...) or model.to(...))"
            )
    if not any(x.is_floating_point() for x in inputs):
        raise UserError(
            f"input 0 is {inputs[0].dtype}: a perturbed input must be floating point: "
            "give x.float(), or the embeddings of token ids"
        )


def _called_by_us() -> bool:
    """Whether the nearest code outside of torch is this package's: its operators are its own."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        package = name.partition(".")[0]
        if package != "torch":
            return package == "lirpa_megatron" and name != __name__  # `_one_output`
        frame = frame.f_back
    return False


def _name_of(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # a property's
        return getattr(getattr(func, "__self__", None), "__name__", name)
    return name
