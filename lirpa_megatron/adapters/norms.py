"""LayerNorm and RMSNorm of torch, Megatron, apex and TransformerEngine as one operator."""

from __future__ import annotations

import torch
from torch import nn

from lirpa_megatron.adapters import refusals, traced_ops
from lirpa_megatron.adapters.tracing import untraced

_TORCH = (nn.LayerNorm, nn.RMSNorm)
_LAYER_NORMS = {"LayerNorm", "FusedLayerNorm", "MixedFusedLayerNorm", "FastLayerNorm"}
_RMS_NORMS = {"RMSNorm", "FusedRMSNorm", "MixedFusedRMSNorm", "L2Norm"}
_PACKAGES = {"megatron", "apex", "transformer_engine"}


def is_norm(module: nn.Module) -> bool:
    """Whether `NormFacade` knows what the module computes.

    torch's norms are known by class. Those of the other packages may not be installed: they are
    known by package and class name (a class of that name from elsewhere may compute anything).
    """
    if isinstance(module, _TORCH):
        return any(type(module).forward is cls.forward for cls in _TORCH)
    known = type(module).__name__ in _LAYER_NORMS | _RMS_NORMS
    return known and refusals.package(module) in _PACKAGES and hasattr(module, "eps")


class NormFacade(nn.Module):
    """A norm over the last dimension, or over each of `groups` equal parts of it.

    x [B, S, groups * d] -> the same shape; weight and bias [d], replicated. Megatron's L2Norm is an
    RMSNorm without a weight (in float64 it still computes in float32, this does not).
    """

    def __init__(self, norm: nn.Module, name: str) -> None:
        super().__init__()
        shape = getattr(norm, "normalized_shape", None)
        if isinstance(shape, (tuple, list, torch.Size)) and len(shape) != 1:
            raise refusals.refusal(norm, name, f"a norm over the dimensions {tuple(shape)}")
        weight = getattr(norm, "weight", None)
        refusals.check_weight(norm, name, weight)
        self.register_parameter("weight", weight)
        self.register_parameter("bias", getattr(norm, "bias", None))
        self.eps = norm.eps
        self.rms = isinstance(norm, nn.RMSNorm) or type(norm).__name__ in _RMS_NORMS
        self.zero_centered_gamma = bool(getattr(norm, "zero_centered_gamma", False))
        self.train(norm.training)

    def forward(self, x: torch.Tensor, groups: int = 1) -> torch.Tensor:
        weight = self.weight
        if weight is None:
            with untraced():
                weight = torch.ones(x.shape[-1] // groups, dtype=x.dtype, device=x.device)
        elif self.zero_centered_gamma:
            weight = weight + 1
        # torch's RMSNorm without an eps takes the smallest one of its input's type.
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return traced_ops.norm(x, weight, self.bias, eps, self.rms, groups)
