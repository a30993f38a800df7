"""Operators that only move or rotate coordinates: rotary embedding, selecting one position."""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.coefficients import LowerUpper, Propagated, dense
from lirpa_megatron.operators.context import Visit
from lirpa_megatron.operators.functional import rotate
from lirpa_megatron.operators.operator import Operator, boxed


class _Exact(Operator, auto_lirpa.Bound):
    """Base: linear in its first input, so CROWN is exact. All features are treated in the same way,
    sharded or not."""

    feature_dim = 0

    def bound_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not offer forward mode")


class BoundSelectPosition(_Exact):
    """y = x[:, position]: x [B, S, h] -> y [B, h], or [B, 1, h]; both replicated or both sharded.

    A_x is A_y at that position and zero elsewhere. All bounds are exact.
    """

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.position, self.keep = attr["position"], bool(attr["keep"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x[:, self.position]
        return y.unsqueeze(1) if self.keep else y

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Interval bounds of y; an L1 or L2 ball becomes the box around it."""
        lower, upper = boxed(v[0])
        return self.forward(lower), self.forward(upper)

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, (1,) h] -> [R, B, S, h]."""
        length = self.inputs[0].output_shape[1]
        before = self.position % length

        def place(A: Any) -> torch.Tensor:
            A = dense(A) if self.keep else dense(A).unsqueeze(2)
            return torch.nn.functional.pad(A, (0, 0, before, length - 1 - before))

        return Propagated((A.map(place),))


class BoundRotary(_Exact):
    """y = x cos + J x sin for each head (Su et al., 2021): x, y [B, S, heads * d], sharded.

    cos and sin [S, r] rotate the first r coordinates of each head in r/2 planes: coordinates
    (i, i + r/2), or (2i, 2i + 1) with `interleaved`. J takes (a, b) to (-b, a); its transpose is
    -J, so A_x = A_y cos - J (A_y sin): with sin the same for both coordinates of a plane, the
    rotation by the opposite angle.

    IBP: |cos| and |sin| times the half-width, around the turned midpoint.
    """

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.heads, self.interleaved = attr["heads"], bool(attr["interleaved"])

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rotate(x, cos, sin, self.heads, self.interleaved)

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, S, heads * d] -> the same shape."""
        cos, sin = (x.value for x in visit.inputs.views[1:])
        head_dim = self.inputs[0].output_shape[-1] // self.heads

        def turn(A: Any) -> torch.Tensor:
            A = dense(A)
            return rotate(A, cos, -sin, A.shape[-1] // head_dim, self.interleaved)

        return Propagated((A.map(turn),))

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Interval bounds of y."""
        lower, upper, cos, sin = v[0][0], v[0][1], v[1][0], v[2][0]
        middle, half = (lower + upper) / 2, (upper - lower) / 2
        turned = self.forward(middle, cos, sin)
        # J only swaps coordinates and signs; with |sin|, both terms add up.
        swapped = self.forward(half, torch.zeros_like(cos), torch.ones_like(sin)).abs()
        kept = half.unflatten(-1, (self.heads, -1)).clone()
        r = cos.shape[-1]
        other = swapped.unflatten(-1, (self.heads, -1))[..., :r]
        spread = kept[..., :r] * cos.abs().unsqueeze(-2) + other * sin.abs().unsqueeze(-2)
        around = torch.cat((spread, kept[..., r:]), dim=-1).flatten(-2)
        return turned - around, turned + around

