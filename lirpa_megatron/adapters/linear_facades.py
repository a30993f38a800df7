"""Linear layers as modules that the host can trace: Megatron's, TransformerEngine's, nn.Linear.

Each holds its layer's own Parameters under the same names and appears in the graph as one operator.
They take and return full, replicated, batch-first tensors where Megatron's layer has replicated
ones, also when the layer was built with sequence_parallel: there Megatron splits the sequence of
the same function over ranks to save activation memory, which a bound does not change.

TransformerEngine's layers (`megatron.core.extensions.transformer_engine`) are recognised by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from lirpa_megatron.adapters import refusals, traced_ops
from lirpa_megatron.adapters.parallelize import ColumnLinear, RowLinear
from lirpa_megatron.adapters.tracing import shape_of
from lirpa_megatron.parallel.collectives import Collectives

_TE_COLUMNS = {"TEColumnParallelLinear", "TELayerNormColumnParallelLinear"}


def is_column(module: nn.Module) -> bool:
    """Whether `ColumnFacade` stands for the module."""
    return isinstance(module, ColumnParallelLinear) or _named(module, _TE_COLUMNS)


def is_row(module: nn.Module) -> bool:
    """Whether `RowFacade` stands for the module."""
    return isinstance(module, RowParallelLinear) or _named(module, {"TERowParallelLinear"})


def _named(module: nn.Module, names: set[str]) -> bool:
    return type(module).__name__ in names and refusals.package(module) == "megatron"


class _LinearFacade(nn.Module):
    """Shares its parameters with a parallel layer."""

    shared: tuple[str, ...] = ("weight", "bias")

    def __init__(self, layer: nn.Module, name: str, tp: Collectives) -> None:
        super().__init__()
        if getattr(layer, "is_expert", False):
            raise NotImplementedError(
                f"{name}: expert layers (is_expert=True) are not supported, their tokens are "
                "routed by values"
            )
        for cls, ours in ((ColumnParallelLinear, ColumnLinear), (RowParallelLinear, RowLinear)):
            if isinstance(layer, cls):
                refusals.check_methods(layer, name, ours if isinstance(layer, ours) else cls)
        refusals.check_weight(layer, name, layer.weight)
        for attribute in self.shared:
            parameter = getattr(layer, attribute)
            if parameter is not None and parameter.numel() == 0:  # TransformerEngine's 'no bias'
                parameter = None
            self.register_parameter(attribute, parameter)
        self.name, self.tp = name, tp
        self.skip_bias_add = getattr(layer, "te_return_bias", getattr(layer, "skip_bias_add", None))
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


class ColumnFacade(_LinearFacade):
    """ColumnParallelLinear: x [B, ..., h] -> [B, ..., n/p] (or [B, ..., n] with gather_output)."""

    def __init__(self, layer: nn.Module, name: str, tp: Collectives) -> None:
        super().__init__(layer, name, tp)
        self.gather_output = getattr(layer, "gather_output", False)

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
        y = column_rows(self.normalized(input_), weight, self._inside(), None, self.tp)
        return self._result(gather_features(y, self.tp) if gather else y)

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        """What the product is taken of: x itself, [B, ..., h]."""
        return x

    def rows(self, x: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Features `rows` of this rank (all by default), with their bias.

        Args:
            x: [B, ..., h], `normalized`.
            rows: indices into the rank's n/p output features, [m].

        Returns:
            [B, ..., m], sharded.
        """
        return column_rows(x, self.weight, self.bias, rows, self.tp)

    def selections(self, x: torch.Tensor, *rows: torch.Tensor) -> list[torch.Tensor]:
        """`rows` for each of several selections.

        In the graph of bounds each is an operator. Run as a module they are one product: x then
        has one gradient to be summed over the ranks, not several.
        """
        if torch.jit.is_tracing():
            return [self.rows(x, chosen) for chosen in rows]
        y = self.rows(x)
        return [y[..., chosen] for chosen in rows]


class LayerNormColumnFacade(ColumnFacade):
    """TELayerNormColumnParallelLinear: a norm and the ColumnParallelLinear that follows it."""

    shared = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")

    def __init__(self, layer: nn.Module, name: str, tp: Collectives) -> None:
        super().__init__(layer, name, tp)
        self.eps, self.rms = layer.eps, layer.normalization == "RMSNorm"
        self.zero_centered_gamma = bool(layer.zero_centered_gamma)

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.layer_norm_weight + 1 if self.zero_centered_gamma else self.layer_norm_weight
        return traced_ops.norm(x, weight, self.layer_norm_bias, self.eps, self.rms)


class RowFacade(_LinearFacade):
    """RowParallelLinear: x [B, ..., n/p] (or n, input_is_parallel=False) -> [B, ..., h]."""

    def __init__(self, layer: nn.Module, name: str, tp: Collectives) -> None:
        super().__init__(layer, name, tp)
        self.input_is_parallel = getattr(layer, "input_is_parallel", True)

    def forward(self, input_: torch.Tensor) -> Any:
        return self._result(self._product(input_, self._inside()))

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """The output with its bias, also where the layer leaves that to its caller."""
        return self._product(x, self.bias)

    def _product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if torch.jit.is_tracing():
            if not self.input_is_parallel:
                x = _ScatterSymbol.apply(x, self.tp.size)
            return _traced(_RowSymbol, x, self.weight, bias)
        x = x if self.input_is_parallel else self.tp.split_features(x)
        y = self.tp.reduce_from(F.linear(x, self.weight))
        return y if bias is None else y + bias


class ReplicatedFacade(nn.Module):
    """nn.Linear as one operator where the host would make several (`BoundReplicatedLinear`)."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        return replicated_linear(input_, self.weight, self.bias)


def linear_facade(module: nn.Module, name: str, tp: Collectives) -> nn.Module | None:
    """The facade of a linear layer; None for any other module."""
    if is_column(module):
        fused = hasattr(module, "layer_norm_weight")
        return (LayerNormColumnFacade if fused else ColumnFacade)(module, name, tp)
    if is_row(module):
        return RowFacade(module, name, tp)
    if type(module) is nn.Linear:
        return ReplicatedFacade(module)
    return None


# ------------------------------------------------------------- on values of any layer


def replicated_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """F.linear of replicated values, as one operator.

    Args:
        x: [B, ..., i].
        weight: [o, i].
        bias: [o] or None.

    Raises:
        NotImplementedError: x without a batch dimension.
    """
    if not torch.jit.is_tracing():
        return F.linear(x, weight, bias)
    if x.ndim < 2:
        raise NotImplementedError(
            f"a linear layer reads {shape_of(x)}, which has no batch dimension: give inputs of "
            "shape [B, features], for one sample x.unsqueeze(0)"
        )
    if bias is None or x.ndim > 2:
        return _traced(_ReplicatedSymbol, x, weight, bias)
    return F.linear(x, weight, bias)


def column_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor | None,
    tp: Collectives,
) -> torch.Tensor:
    """x W_r^T + b_r, for a selection of this rank's output features (q, k, v; gate, up).

    Args:
        x: [B, ..., h], replicated.
        weight: [n/p, h].
        bias: [n/p] or None.
        rows: indices [m] of the output features, or None for all.
        tp: the layer's collectives.

    Returns:
        [B, ..., m], sharded.
    """
    if torch.jit.is_tracing():
        if rows is None:
            return _traced(_ColumnSymbol, x, weight, bias)
        biases = () if bias is None else (bias,)
        return _ColumnRowsSymbol.apply(x, weight, *biases, rows)
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    return F.linear(tp.copy_to(x), weight, bias)


def gather_features(x: torch.Tensor, tp: Collectives) -> torch.Tensor:
    """[B, ..., n/p] of each rank -> [B, ..., n], replicated."""
    if torch.jit.is_tracing():
        return _GatherSymbol.apply(x, tp.size)
    return tp.gather_features(x)


def select_from_region(x: torch.Tensor, features: torch.Tensor, tp: Collectives) -> torch.Tensor:
    """This rank's own choice of features: x [B, ..., n] replicated -> [B, ..., m] sharded.

    Args:
        x: replicated.
        features: indices [m], other ones on each rank (several ranks may take the same one).
        tp: the collectives.
    """
    if torch.jit.is_tracing():
        return _SelectSymbol.apply(x, features)
    return tp.copy_to(x)[..., features]


# ------------------------------------------------------------------ the graph's nodes


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


class _ColumnRowsSymbol(torch.autograd.Function):
    """Inputs x, weight, the bias if there is one, rows; attributes say which are there."""

    @staticmethod
    def symbolic(g: Any, x: Any, w: Any, *rest: Any) -> Any:
        count = rest[-1].type().sizes()[0]
        out = g.op(
            "lirpa_megatron::ColumnParallelLinear", x, w, *rest, has_bias_i=len(rest) - 1,
            has_rows_i=1,
        )
        return _typed(out, x, lambda _: count)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        *bias, rows = rest
        return F.linear(x, w[rows], *(b[rows] for b in bias))


class _RowSymbol(_LinearSymbol):
    @staticmethod
    def symbolic(g: Any, x: Any, w: Any, *b: Any) -> Any:
        rows = w.type().sizes()[0]
        return _typed(g.op("lirpa_megatron::RowParallelLinear", x, w, *b), x, lambda _: rows)


class _ReplicatedSymbol(_LinearSymbol):
    @staticmethod
    def symbolic(g: Any, x: Any, w: Any, *b: Any) -> Any:
        rows = w.type().sizes()[0]
        return _typed(g.op("lirpa_megatron::ReplicatedLinear", x, w, *b), x, lambda _: rows)


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


class _SelectSymbol(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, x: Any, features: Any) -> Any:
        count = features.type().sizes()[0]
        return _typed(g.op("lirpa_megatron::SelectFromRegion", x, features), x, lambda _: count)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return x[..., features]
