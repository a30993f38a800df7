"""What Megatron's `finalize_model_grads` sums over tensor-parallel ranks, summed exactly once."""

from __future__ import annotations

from typing import Any

from torch import nn

from lirpa_megatron.bounded_module import BoundedModule
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.parameters import own_value


def leave_sums_to_megatron(bounded: BoundedModule, model: nn.Module) -> None:
    """Gives each rank 1/p of the gradients that Megatron sums over the p ranks after backward.

    The bounds are a function of the whole sequence and of all heads on every rank, and so is the
    gradient of a replicated parameter. Megatron's own forward has a part of it on each rank (a part
    of the sequence, or of the heads) and sums in `finalize_model_grads`. With the share, losses of
    both kinds can be added.
    """
    size = bounded.context.collectives.size
    if size == 1:
        return
    for node in bounded.named_nodes().values():
        parameter = isinstance(node, auto_lirpa.BoundParams)
        if parameter and _is_summed(node.ori_name, node.param, model):
            object.__setattr__(node, "forward", own_value(node, 1 / size))


def _is_summed(name: str, parameter: nn.Parameter, model: nn.Module) -> bool:
    """Megatron's conditions (`_allreduce_non_tensor_model_parallel_grads`)."""
    config = _config(model)
    if getattr(config, "sequence_parallel", False) and getattr(
        parameter, "sequence_parallel", False
    ):
        return True
    is_head_norm = "q_layernorm" in name or "k_layernorm" in name
    return bool(getattr(config, "qk_layernorm", False)) and is_head_norm


def _config(model: nn.Module) -> Any:
    found = (getattr(module, "config", None) for module in model.modules())
    return next((config for config in found if config is not None), None)
