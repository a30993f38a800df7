"""`parallelize`: an ordinary module's Linear layers on Megatron's parallel ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from torch import nn

from lirpa_megatron.adapters.parallel_plan import Decision, plan_layers
from lirpa_megatron.parallel import runtime, spmd


class _LikeLinear:
    """nn.Linear's names for the sizes of the full layer."""

    in_features = property(lambda self: self.input_size)
    out_features = property(lambda self: self.output_size)


class ColumnLinear(_LikeLinear, ColumnParallelLinear):
    """ColumnParallelLinear that returns its output alone, as nn.Linear does."""

    def forward(self, input_: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input_)[0]


class RowLinear(_LikeLinear, RowParallelLinear):
    """RowParallelLinear that returns its output alone, as nn.Linear does."""

    def forward(self, input_: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input_)[0]


def parallelize(module: nn.Module, tp_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Shards the Linear layers of a module over the tensor-parallel group.

    Every rank passes the same module and gets its part of it. Column/Row pairs are chosen from the
    graph (`explain` shows the choice); everything else is replicated. The function stays the same.
    Parameters keep their names. Sharded ones are copies of the rank's slice with Megatron's
    attributes (tensor_model_parallel, partition_dim); replicated ones are the given module's own.

    Args:
        module: Linear layers, activations, Flatten, residual sums, ...; its weights may be on the
            meta device (then the shards are too).
        tp_group: the group; Megatron's tensor-parallel group by default. Without one (nothing is
            initialised) there is one rank and the module is returned as it is.

    Raises:
        SPMDError: ranks passed different weights.
    """
    group = runtime.tp_group() if tp_group is None else tp_group
    if group is None:
        return module
    weights = {n: p for n, p in module.named_parameters() if not p.is_meta}
    with spmd.guard(group, "parallelize"):
        spmd.check_replicated(group, weights, "every rank must pass the same module")
    decisions = plan_layers(module, group.size())
    replaced = {
        name: _shard(module.get_submodule(name), decision.kind, group)
        for name, decision in decisions.items()
        if decision.kind != "replicated"
    }
    return _with_replaced(module, "", replaced)


def explain(module: nn.Module, size: int | None = None) -> str:
    """Says how `parallelize` treats each Linear of a plain module, and why, as a text table.

    Args:
        module: the module before `parallelize`.
        size: tensor-parallel size; the current one by default.
    """
    size = runtime.tp_size() if size is None else size
    decisions = plan_layers(module, size)
    rows = []
    for name, decision in decisions.items():
        layer = module.get_submodule(name)
        shape = f"{layer.in_features} -> {layer.out_features}"
        rows.append((name, shape, decision.kind, decision.reason))
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    return "\n".join(
        "  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in rows
    )


def _shard(layer: nn.Linear, kind: str, group: dist.ProcessGroup) -> nn.Module:
    dim = 0 if kind == "column" else 1
    config = ModelParallelConfig(
        tensor_model_parallel_size=group.size(),
        params_dtype=layer.weight.dtype,
        perform_initialization=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    common: dict[str, Any] = {
        "config": config, "init_method": lambda w: w, "bias": layer.bias is not None,
        "skip_bias_add": False, "tp_group": group,
    }
    with torch.device("meta"):  # the weights are the layer's: none are allocated here
        if kind == "column":
            made = ColumnLinear(
                layer.in_features, layer.out_features, gather_output=False, **common
            )
        else:
            made = RowLinear(
                layer.in_features, layer.out_features, input_is_parallel=True, **common
            )
    made.weight = _slice(layer.weight, dim, group)
    if layer.bias is not None:
        made.bias = _slice(layer.bias, 0, group) if kind == "column" else layer.bias
    return made.train(layer.training)


def _slice(full: nn.Parameter, dim: int, group: dist.ProcessGroup) -> nn.Parameter:
    part = full.detach().chunk(group.size(), dim)[group.rank()].clone()
    shard = nn.Parameter(part, requires_grad=full.requires_grad)
    set_tensor_model_parallel_attributes(shard, True, dim, 1)
    return shard


def _with_replaced(module: nn.Module, name: str, replaced: dict[str, nn.Module]) -> nn.Module:
    """A shallow copy of the module tree with some modules replaced by name."""
    if name in replaced:
        return replaced[name]
    copied = copy.copy(module)
    prefix = f"{name}." if name else ""
    copied._modules = {
        child_name: None if child is None else _with_replaced(child, prefix + child_name, replaced)
        for child_name, child in module._modules.items()
    }
    return copied


__all__ = ["ColumnLinear", "Decision", "RowLinear", "explain", "parallelize", "plan_layers"]
