"""Megatron's parallel linear layers as modules that the host can trace.

The host traces a model on one process, where collectives make no sense, and Megatron's layers carry
an `_extra_state` that tracing cannot take. So the model's module tree is copied shallowly (the
model itself is not touched) with each parallel layer replaced by a facade that holds the same
Parameters under the same names, and appears in the graph as one operator.

Facades take and return full, replicated, batch-first tensors where Megatron's layer has replicated
ones, also when the layer was built with sequence_parallel: there Megatron splits the sequence of
the same function over ranks to save activation memory, which a bound does not change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from lirpa_megatron.adapters.parallelize import ColumnLinear, RowLinear
from lirpa_megatron.parallel import runtime
from lirpa_megatron.parallel.collectives import Collectives


def collectives_of(model: nn.Module) -> Collectives:
    """The collectives of the tensor-parallel group that the model's parallel layers name.

    Raises:
        NotImplementedError: layers of different tensor-parallel groups.
    """
    groups = {
        name: _group_of(layer)
        for name, layer in model.named_modules()
        if isinstance(layer, (ColumnParallelLinear, RowParallelLinear))
    }
    distinct = {id(group): group for group in groups.values()}
    if len(distinct) > 1:
        raise NotImplementedError(
            "the model's layers belong to different tensor-parallel groups: " + ", ".join(groups)
        )
    return Collectives(next(iter(distinct.values())) if distinct else None)


def traceable(model: nn.Module, collectives: Collectives | None = None) -> nn.Module:
    """A shallow copy of the model with its parallel layers replaced by facades.

    Args:
        model: any module; its ColumnParallelLinear and RowParallelLinear are recognised by class.
        collectives: what the facades communicate with; `collectives_of(model)` by default.

    Raises:
        NotImplementedError: an expert layer, or layers of different tensor-parallel groups.
    """
    return _copy(model, "", collectives or collectives_of(model), {})


def _group_of(layer: nn.Module) -> dist.ProcessGroup | None:
    # Layers know their group since megatron-core 0.13; before, there was only the global one.
    group = getattr(layer, "tp_group", None)
    return runtime.tp_group() if group is None else group


def _copy(module: nn.Module, name: str, tp: Collectives, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in done:  # a module that is used twice stays one module
        if isinstance(module, ColumnParallelLinear):
            done[id(module)] = ColumnFacade(module, name, tp)
        elif isinstance(module, RowParallelLinear):
            done[id(module)] = RowFacade(module, name, tp)
        elif type(module) is nn.Linear and module.bias is None:
            done[id(module)] = ReplicatedFacade(module)
        else:
            copied = copy.copy(module)
            done[id(module)] = copied
            prefix = f"{name}." if name else ""
            copied._modules = {
                child_name: None if child is None else _copy(child, prefix + child_name, tp, done)
                for child_name, child in module._modules.items()
            }
    return done[id(module)]


class _Facade(nn.Module):
    """Shares weight and bias with a parallel layer."""

    def __init__(self, layer: nn.Module, name: str, tp: Collectives) -> None:
        super().__init__()
        if layer.is_expert:
            raise NotImplementedError(
                f"{name}: expert layers (is_expert=True) are not supported, their tokens are "
                "routed by values"
            )
        self.register_parameter("weight", layer.weight)
        self.register_parameter("bias", layer.bias)
        self.name, self.tp = name, tp
        self.skip_bias_add = layer.skip_bias_add
        self.output_alone = isinstance(layer, (ColumnLinear, RowLinear))
        self.train(layer.training)
        object.__setattr__(self, "_layer", layer)  # not a submodule: names stay as they are

    def __getattr__(self, name: str) -> Any:
        """Whatever else a model asks of its layer (sizes, config), it asks of the layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_layer" not in self.__dict__:  # still being built
                raise
            return getattr(self.__dict__["_layer"], name)

    def _result(self, y: torch.Tensor) -> Any:
        """What the layer returns: Megatron's come with the bias that they did not add."""
        if self.output_alone:
            return y
        return y, self.bias if self.skip_bias_add else None

    def _inside(self) -> torch.Tensor | None:
        return None if self.skip_bias_add else self.bias


class ColumnFacade(_Facade):
    """ColumnParallelLinear: x [B, ..., h] -> [B, ..., n/p] (or [B, ..., n] with gather_output)."""

    def __init__(self, layer: ColumnParallelLinear, name: str, tp: Collectives) -> None:
        super().__init__(layer, name, tp)
        self.gather_output = layer.gather_output

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Any:
        weight = self.weight if weight is None else weight
        if weight is None:
            raise RuntimeError(f"{self.name}: built without a weight and called without one")
        gather = self.gather_output if runtime_gather_output is None else runtime_gather_output
        if torch.jit.is_tracing():
            y = _traced(_ColumnSymbol, input_, weight, self._inside())
            return self._result(_GatherSymbol.apply(y, self.tp.size) if gather else y)
        y = F.linear(self.tp.copy_to(input_), weight, self._inside())
        return self._result(self.tp.gather_features(y) if gather else y)


class RowFacade(_Facade):
    """RowParallelLinear: x [B, ..., n/p] (or n, input_is_parallel=False) -> [B, ..., h]."""

    def __init__(self, layer: RowParallelLinear, name: str, tp: Collectives) -> None:
        super().__init__(layer, name, tp)
        self.input_is_parallel = layer.input_is_parallel

    def forward(self, input_: torch.Tensor) -> Any:
        bias = self._inside()
        if torch.jit.is_tracing():
            x = input_
            if not self.input_is_parallel:
                x = _ScatterSymbol.apply(x, self.tp.size)
            return self._result(_traced(_RowSymbol, x, self.weight, bias))
        x = input_ if self.input_is_parallel else self.tp.split_features(input_)
        y = self.tp.reduce_from(F.linear(x, self.weight))
        return self._result(y if bias is None else y + bias)


class ReplicatedFacade(nn.Module):
    """nn.Linear without a bias, as one operator (see `BoundReplicatedLinear`)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        self.train(layer.training)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():
            return _ReplicatedSymbol.apply(input_, self.weight)
        return F.linear(input_, self.weight)


def _traced(symbol: type, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
    return symbol.apply(x, weight) if bias is None else symbol.apply(x, weight, bias)


def _typed(out: Any, x: Any, last: Callable[[int], int]) -> Any:
    """Gives the traced value its shape, which later operators of the export look at."""
    sizes = x.type().sizes() if x.type().kind() == "TensorType" else None
    if sizes is not None:
        out.setType(x.type().with_sizes([*sizes[:-1], last(sizes[-1])]))
    return out


class _LinearSymbol(torch.autograd.Function):
    """A parallel linear layer as one node of the traced graph (no collective while tracing)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, b: Any = None) -> torch.Tensor:
        return F.linear(x, w, b)


class _ColumnSymbol(_LinearSymbol):
    @staticmethod
    def symbolic(g: Any, x: Any, w: Any, *b: Any) -> Any:
        rows = w.type().sizes()[0]
        return _typed(g.op("lirpa_megatron::ColumnParallelLinear", x, w, *b), x, lambda _: rows)


class _RowSymbol(_LinearSymbol):
    @staticmethod
    def symbolic(g: Any, x: Any, w: Any, *b: Any) -> Any:
        rows = w.type().sizes()[0]
        return _typed(g.op("lirpa_megatron::RowParallelLinear", x, w, *b), x, lambda _: rows)


class _ReplicatedSymbol(_LinearSymbol):
    @staticmethod
    def symbolic(g: Any, x: Any, w: Any) -> Any:
        rows = w.type().sizes()[0]
        return _typed(g.op("lirpa_megatron::ReplicatedLinear", x, w), x, lambda _: rows)


class _GatherSymbol(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, x: Any, ranks: int) -> Any:
        return _typed(g.op("lirpa_megatron::GatherFromRegion", x), x, lambda n: n * ranks)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: int) -> torch.Tensor:
        return x.repeat(*[1] * (x.ndim - 1), ranks)


class _ScatterSymbol(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, x: Any, ranks: int) -> Any:
        return _typed(g.op("lirpa_megatron::ScatterToRegion", x), x, lambda n: n // ranks)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: int) -> torch.Tensor:
        return x[..., : x.shape[-1] // ranks].clone()
