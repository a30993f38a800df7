"""Layers of megatron-core with this rank's part of full weights, and stacks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from models import Net
from torch import nn

from lirpa_megatron import BoundedTensor, PerturbationLpNorm
from lirpa_megatron.parallel import runtime

FEATURES = Net(inputs=6)


def shard(
    kind: str, n_in: int, n_out: int, full_weight: torch.Tensor, full_bias: torch.Tensor | None,
    **flags: Any,
) -> nn.Module:
    """A Megatron layer that holds this rank's part of a full weight [out, in]."""
    config = ModelParallelConfig(
        tensor_model_parallel_size=runtime.tp_size(), params_dtype=full_weight.dtype,
        use_cpu_initialization=True, gradient_accumulation_fusion=False,
        sequence_parallel=flags.pop("sequence_parallel", False),
    )
    column = kind == "column"
    if column:
        flags = {"gather_output": False, **flags}
    else:
        flags = {"input_is_parallel": True, "skip_bias_add": False, **flags}
    cls = ColumnParallelLinear if column else RowParallelLinear
    layer = cls(n_in, n_out, config=config, init_method=nn.init.zeros_,
                bias=full_bias is not None, **flags)
    size, rank = runtime.tp_size(), runtime.tp_rank()
    with torch.no_grad():
        if layer.weight is not None:
            layer.weight.copy_(full_weight.chunk(size, 0 if column else 1)[rank])
        if full_bias is not None:
            layer.bias.copy_(full_bias.chunk(size)[rank] if column else full_bias)
    return layer


def drawn_weights(*sizes: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight [out, in], bias [out]) of layers of these widths, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(o, i, generator=generator, dtype=torch.float64),
         torch.randn(o, generator=generator, dtype=torch.float64))
        for i, o in zip(sizes, sizes[1:], strict=False)
    ]


def drawn_input(batch: int = 3, features: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, features, generator=generator, dtype=torch.float64)


def around(x: torch.Tensor, eps: float = 0.2, norm: float = float("inf")) -> BoundedTensor:
    return BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=eps))


class Layers(nn.Module):
    """Megatron's layers one after the other, with an activation between them (or also first)."""

    def __init__(self, layers: list[nn.Module], activation: Callable, first: bool = False) -> None:
        super().__init__()
        self.layers, self.activation, self.first = nn.ModuleList(layers), activation, first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            y = layer(self.activation(x) if i or self.first else x)
            x = y[0] if isinstance(y, tuple) else y
        return x


# Kind of layer, width, and whether its border moves features (gather_output=True for Column,
# input_is_parallel=False for Row).
OPERATORS = {
    "gathering column": [("column", 8, True)],
    "scattering row": [("row", 5, True)],
    "column, row": [("column", 8, False), ("row", 5, False)],
    "gathering column, scattering row": [("column", 8, True), ("row", 5, True)],
    "scattering row, gathering column": [("row", 6, True), ("column", 8, True)],
    "column, row, gathering column":
        [("column", 8, False), ("row", 6, False), ("column", 10, True)],
}


def linears(kinds: list, dtype: torch.dtype) -> list[nn.Linear]:
    """The unsharded layers."""
    generator = torch.Generator().manual_seed(11)
    made, width = [], FEATURES.inputs
    for _, out, _ in kinds:
        layer = nn.Linear(width, out).to(dtype)
        for parameter in layer.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = (0.6 * drawn).to(dtype)
        made.append(layer)
        width = out
    return made


def megatron_layer(kind: str, border: bool, full: nn.Linear) -> nn.Module:
    """The layer as a Megatron model has it, with the rank's part of the full weights."""
    flag = {"gather_output": border} if kind == "column" else {"input_is_parallel": not border}
    return shard(kind, full.in_features, full.out_features, full.weight, full.bias, **flag)
