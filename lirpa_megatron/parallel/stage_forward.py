"""The forward pass of a model whose layers lie on several pipeline stages, and its gradient.

Every rank calls it with the same (replicated) input and gets the same output. The value goes up the
stages and the output down again; gradients take the way back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lirpa_megatron.parallel.pipeline import DOWN, UP, Pipeline, guard


class StagedForward(nn.Module):
    """hidden [N, ...] -> the model's output, on every rank.

    Args:
        net: this stage, differentiable in its input: the model's input on the first stage, the
            output of the stage below on the others.
        pipeline: of this rank.
        group: its tensor-parallel group.
    """

    def __init__(
        self, net: nn.Module, pipeline: Pipeline, group: dist.ProcessGroup | None
    ) -> None:
        super().__init__()
        self.net, self.pipeline, self.group = net, pipeline, group

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with guard(self.pipeline, self.group, "the forward pass of all stages"):
            return _Through.apply(self, hidden)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, staged: StagedForward, hidden: torch.Tensor) -> torch.Tensor:
        pipeline, needs = staged.pipeline, hidden.requires_grad
        (x,) = (hidden,) if pipeline.is_first else pipeline.receive(DOWN, "hidden").tensors
        with torch.set_grad_enabled(needs):
            x = x.detach().requires_grad_(needs)
            y = staged.net(x)
        ctx.staged, ctx.ends = staged, (x, y)
        if pipeline.is_last:
            output = y.detach()
        else:
            pipeline.send(UP, "hidden", tensors=[y])
            (output,) = pipeline.receive(UP, "the output").tensors
        if not pipeline.is_first:
            pipeline.send(DOWN, "the output", tensors=[output])
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        staged, (x, y) = ctx.staged, ctx.ends
        pipeline = staged.pipeline
        with guard(pipeline, staged.group, "the gradient of all stages"):
            if not pipeline.is_last:
                (grad,) = pipeline.receive(UP, "its gradient").tensors
            (found,) = torch.autograd.grad(y, x, grad)
            if not pipeline.is_first:
                pipeline.send(DOWN, "its gradient", tensors=[found])
                (found,) = pipeline.receive(DOWN, "the input's gradient").tensors
            if not pipeline.is_last:
                pipeline.send(UP, "the input's gradient", tensors=[found])
        return None, found


def from_first_stage(
    pipeline: Pipeline | None, what: str, value: torch.Tensor | None
) -> torch.Tensor:
    """The first stage's tensor on every stage; gradients stay on the first.

    Args:
        pipeline: of this rank; None: one stage.
        what: for messages.
        value: on the first stage.
    """
    if pipeline is None:
        return value
    if not pipeline.is_first:
        (value,) = pipeline.receive(DOWN, what).tensors
    if not pipeline.is_last:
        pipeline.send(UP, what, tensors=[value])
    return value
