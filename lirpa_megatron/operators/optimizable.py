"""Base of the operators with alpha, for both versions of the host.

Alpha of a start node is [2, R, B, *alpha shape] (with 1 instead of R if rows share it): index 0 is
used for lower bounds, 1 for upper bounds. For elementwise operators the alpha shape is the node's
shape: one number for each entry suffices, because the sign of A decides which of the two lines is
used. Alpha lies in [-`alpha_range`, `alpha_range`]: every value is sound, 0 gives the line without
alpha, and values outside are clamped when they are used.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.context import GraphContext, OperatorInputs, Visit
from lirpa_megatron.operators.operator import Operator


class OptimizableOperator(Operator, auto_lirpa.BoundOptimizableActivation):
    """An operator whose lines or planes depend on alpha.

    A subclass defines `relaxation(inputs)`: what all rows of A share at this operator.
    """

    alpha_range = 2.0
    """The largest |alpha|. With auto_LiRPA's learning rate of 0.5, Adam takes four steps from the
    middle to an end. (With a range of 1 it oscillated: after 20 steps, bounds of GELU networks were
    up to 10% wider.)"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context: GraphContext = self.options["context"]
        self.alpha_batch_dim = 2
        self.splittable = False

    def init_opt_parameters(self, start_nodes: list[tuple]) -> None:
        """Creates alpha for each start node (name, shape of its rows, ...)."""
        like = self.inputs[0].lower
        self.alpha = {
            entry[0]: torch.zeros(
                2, math.prod(entry[1]), *self.alpha_shape(), dtype=like.dtype, device=like.device
            )
            for entry in start_nodes
        }

    def alpha_shape(self) -> tuple[int, ...]:
        """Shape of one row's alpha, [B, *alpha shape]; by default the shape of the first input."""
        return tuple(self.inputs[0].lower.shape)

    def clip_alpha(self) -> None:
        for alpha in self.alpha.values():
            alpha.data.clamp_(-self.alpha_range, self.alpha_range)

    clip_alpha_ = clip_alpha  # 0.3's name

    def dump_optimized_params(self) -> dict[str, Any]:
        """Alpha, under the name that auto_LiRPA 0.3 uses (0.7.1: `dump_alpha`)."""
        return {"alpha": self.alpha}

    def restore_optimized_params(self, saved: dict[str, Any]) -> None:
        self.alpha = saved["alpha"]

    def move(self, visit: Visit, side: int) -> torch.Tensor | None:
        """Alpha [R or 1, B, *alpha shape] of one side, scaled to [-1, 1]; None if not in use."""
        if visit.alpha is None:
            return None
        return (visit.alpha[side] / self.alpha_range).clamp(-1, 1)

    def relaxation(self, inputs: OperatorInputs) -> Any:
        """What all rows share, computed from the inputs' bounds."""
        raise NotImplementedError

    def sharded_relaxation(self, inputs: OperatorInputs) -> Any:
        """The part of `relaxation` that rows without alpha need, for the rank's features."""
        return self.shared_relaxation(inputs)

    def relaxation_at(self, visit: Visit) -> Any:
        """What all rows share in a visit; for the features of all ranks if weights move."""
        shared = visit.gathered
        if shared is None:
            shared = self.shared_relaxation(visit.inputs)
        return shared if visit.positions is None else self.at_positions(shared, *visit.positions)

    def at_positions(self, shared: Any, first: int, end: int) -> Any:
        """The part of a relaxation that rows of some positions need (`takes_positions`)."""
        raise NotImplementedError

    def shared_relaxation(self, inputs: OperatorInputs) -> Any:
        """`relaxation(inputs)`, computed once for the same inputs.

        Every chunk of every pass through the operator needs it. With gradients it is computed each
        time, because its autograd graph belongs to one pass.
        """
        call = inputs.call
        reads: list[Any] = [torch.is_grad_enabled(), inputs.directions]
        for x in inputs.views:
            reads += [x.lower, x.upper, x.form, x.centered]
        known = call.shared_relaxations.get(self.name)
        if known is not None and all(a is b for a, b in zip(known[0], reads, strict=True)):
            return known[1]
        found = self.relaxation(inputs)
        if not _requires_grad(found):
            call.shared_relaxations[self.name] = reads, found
            call.has_read(self.name, [x.name for x in inputs.views])
        return found

    def bound_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} does not offer forward mode (use IBP, CROWN-IBP, CROWN or "
            "CROWN-Optimized)"
        )

    def bound_dynamic_forward(self, *args: Any, **kwargs: Any) -> Any:
        self.bound_forward()

    def build_solver(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not offer a solver model")


def _requires_grad(value: Any) -> bool:
    """Whether any tensor in it requires a gradient."""
    if isinstance(value, torch.Tensor):
        return value.requires_grad
    parts = value if isinstance(value, (tuple, list)) else getattr(value, "__dict__", {}).values()
    return any(_requires_grad(part) for part in parts)

