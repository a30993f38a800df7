"""Values of parameters in the bound graph: shared with the model, float32 at least."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa

HALF = (torch.bfloat16, torch.float16)


def own_value(node: auto_lirpa.BoundParams, share: float = 1.0) -> Callable[[], torch.Tensor]:
    """The value of a parameter's node: the parameter itself, detached in evaluation mode.

    A half-precision parameter is converted to float32, in which bounds are computed.

    Args:
        node: the parameter's node.
        share: share of the gradient that reaches the parameter.
    """

    def forward() -> torch.Tensor:
        value = node.param if node.training else node.param.detach()
        if value.dtype in HALF:
            value = value.float()
        return value if share == 1 or not value.requires_grad else _Share.apply(value, share)

    return forward


class _Share(torch.autograd.Function):
    """The identity, which scales its gradient by a share."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, share: float) -> torch.Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.share, None


@contextlib.contextmanager
def widened(model: torch.nn.Module) -> Iterator[None]:
    """Holds half-precision parameters in float32 for a block: the host traces with float32.

    Half-precision buffers are not converted.
    """
    kept = {p: p.data for p in model.parameters() if p.dtype in HALF}
    try:
        for parameter, data in kept.items():
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data
