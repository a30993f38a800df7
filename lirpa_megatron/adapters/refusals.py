"""What the facades do not model, refused with the module's name and the reason.

A facade states what a module computes. So whatever would make the module compute something else
(a flag, a subclass with its own forward, another kind of submodule) must be refused here, or the
bounds would be of another function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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
    "MambaModel": "Mamba models are not supported",
    "T5Model": "T5 models (cross attention) are not supported",
}
"""Class, or base class, by name: it need not be importable in every release of megatron-core."""

_FLAGS = {
    "fp8": "fp8 weights and activations are not supported",
    "fp4": "fp4 weights and activations are not supported",
    "multi_latent_attention": "multi-latent attention is not supported",
    "apply_residual_connection_post_layernorm": (
        "apply_residual_connection_post_layernorm=True is not supported (megatron-core ignores it)"
    ),
    "inference_fuse_tp_communication": "inference_fuse_tp_communication=True is not supported",
    "attention_output_gate": "attention_output_gate=True is not supported",
    "use_te_activation_func": "use_te_activation_func=True is not supported",
    "mtp_num_layers": "multi-token prediction (mtp_num_layers) is not supported",
    "enable_hyper_connections": "hyper connections are not supported",
}


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


def check_methods(module: nn.Module, name: str, cls: type, *methods: str) -> None:
    """Refuses a subclass of `cls` that computes something else.

    Args:
        module: an instance of `cls`.
        name: of the module in its model.
        cls: the class that the facade models.
        *methods: of `cls`, all that its forward consists of ('forward' is always looked at).
    """
    for method in ("forward", *methods):
        if getattr(type(module), method, None) is not getattr(cls, method, None):
            raise refusal(
                module, name,
                f"{type(module).__name__} overrides {cls.__name__}.{method}, and what it computes "
                "is not known",
            )


def check_config(module: nn.Module, name: str) -> None:
    """Refuses flags of the module's TransformerConfig that change what it computes."""
    config: Any = module.config
    for flag, why in _FLAGS.items():
        if getattr(config, flag, None):
            raise refusal(module, name, why)
    if getattr(config, "context_parallel_size", 1) > 1:
        raise refusal(module, name, "context parallelism is not supported")


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
