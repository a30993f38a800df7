"""ReLU in a backward pass over domains: lines with alpha, and split constraints with beta.

A domain is a box of inputs and splits: for some neurons j the sign s_j of the pre-activation z_j
(s_j = +1: z_j >= 0; s_j = -1: z_j <= 0). For y = relu(z), z in [l, u] of the domain:

    stable or split on    y = z
    stable or split off   y = 0
    unstable              alpha z <= y <= u / (u - l) (z - l),  any alpha in [0, 1]

**Beta** (Wang et al. 2021, beta-CROWN). A lower bound of <A, y> over the domain has to hold only
where s_j z_j >= 0 for every split. With multipliers beta_j >= 0, there

    <A, y> >= <A, y> - sum_j beta_j s_j z_j,

because each term that is subtracted is at least 0. So the lower bound goes on with

    A_z[j] = slope A[j] - s_j beta_j,

and so does an upper bound with + s_j beta_j. Every beta_j >= 0 is sound; the largest bound over
alpha and beta is that of the linear program with the triangle relaxation and the split constraints
(strong duality), or more where bounds of inner neurons are fixed. Where the splits contradict each
other the program is infeasible, and the bound grows beyond any number: such a domain counts as
proved by the bound, like any other.

Degenerate intervals: l >= 0 is "on" (l = u = 0 too), u <= 0 is "off". An infinite end gives an
infinite or NaN line, and a bound that proves nothing.

Shapes: R rows of A, D domains, n neurons of one ReLU on this rank. At a sharded node everything is
the rank's own: a neuron's alpha and beta are on the rank that has the neuron.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lirpa_megatron.operators.coefficients import LowerUpper, Propagated


@dataclass(frozen=True)
class Lines:
    """What a ReLU is relaxed with in some domains, [D, n] each."""

    on: torch.Tensor
    """1 where y = z; else 0."""
    unstable: torch.Tensor
    """Whether there are two lines."""
    upper_slope: torch.Tensor
    """u / (u - l) where unstable, else as `on`."""
    intercept: torch.Tensor
    """-l u / (u - l) where unstable, else 0."""

    @classmethod
    def of(cls, lower: torch.Tensor, upper: torch.Tensor, signs: torch.Tensor) -> Lines:
        """Lines from bounds [D, n] and the splits' signs [D, n] (0: not split)."""
        off = (signs < 0) | ((upper <= 0) & (signs <= 0))
        on = ((signs > 0) | (lower >= 0)) & ~off
        unstable = ~(on | off)
        slope = torch.where(unstable, upper / (upper - lower), on.to(lower))
        return cls(on.to(lower), unstable, slope, torch.where(unstable, -lower * slope, 0.0))

    def map(self, function: Any) -> Lines:
        """With `function` applied to each tensor."""
        return Lines(*map(function, (self.on, self.unstable, self.upper_slope, self.intercept)))

    def split(self, sizes: list[int]) -> list[Lines]:
        """Those of each ReLU, from those of all."""
        parts = (t.split(sizes, -1) for t in
                 (self.on, self.unstable, self.upper_slope, self.intercept))
        return [Lines(*each) for each in zip(*parts, strict=True)]

    def adaptive(self) -> torch.Tensor:
        """CROWN's alpha: 1 where the upper line is steeper than 1/2, else 0."""
        return ((self.upper_slope > 0.5) & self.unstable).to(self.on)


@dataclass(frozen=True)
class SplitRelu:
    """What one visit of a pass to a ReLU is given: a value, nothing is kept on the node."""

    lines: Lines
    alpha: torch.Tensor
    """[R, D, n], in [0, 1]."""
    pull: torch.Tensor
    """s_j beta_j of split neurons, 0 elsewhere: [R, D, n]."""

    def bound_backward(self, A: LowerUpper) -> Propagated:
        """A [R, D, *node shape] of each side -> A at the input, and the bias [R, D]."""
        lower = self._lower(A.lower, self.pull)
        upper = self._lower(None if A.upper is None else -A.upper, self.pull)
        if A.upper is not None:  # a lower bound of <-A, y> is minus an upper bound of <A, y>
            upper = -upper[0], -upper[1]
        sides = LowerUpper(lower[0], upper[0]), LowerUpper(lower[1], upper[1])
        return Propagated((sides[0],), sides[1])

    def _lower(self, A: torch.Tensor | None, pull: torch.Tensor) -> tuple[Any, Any]:
        if A is None:
            return None, None
        lines = self.lines
        A_z, bias = _LowerSide.apply(
            A.flatten(2), self.alpha, pull, lines.on, lines.unstable, lines.upper_slope,
            lines.intercept,
        )
        return A_z.view(A.shape), bias


class _LowerSide(torch.autograd.Function):
    """A_z = A slope - pull and bias = sum min(A, 0) intercept: the lower line where A > 0, the
    upper line elsewhere.

    One function, because as a dozen of torch's it takes longer than the matrix products between
    ReLUs of a few hundred neurons.
    """

    @staticmethod
    def forward(
        ctx: Any, A: torch.Tensor, alpha: torch.Tensor, pull: torch.Tensor, on: torch.Tensor,
        unstable: torch.Tensor, upper_slope: torch.Tensor, intercept: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positive = A > 0
        slope = torch.where(positive, torch.where(unstable, alpha, on), upper_slope)
        ctx.save_for_backward(A, positive, slope, unstable, intercept)
        return A * slope - pull, (A.clamp(max=0) * intercept).sum(-1)

    @staticmethod
    def backward(ctx: Any, g_A: torch.Tensor, g_bias: torch.Tensor) -> tuple:
        A, positive, slope, unstable, intercept = ctx.saved_tensors
        to_A = to_alpha = None
        if ctx.needs_input_grad[0]:
            to_A = g_A * slope + torch.where(positive, 0.0, g_bias.unsqueeze(-1) * intercept)
        if ctx.needs_input_grad[1]:
            to_alpha = torch.where(positive & unstable, g_A * A, 0.0)
        return to_A, to_alpha, -g_A if ctx.needs_input_grad[2] else None, None, None, None, None


class LeastOverBox(torch.autograd.Function):
    """min <A, x> over boxes: the sum of A_i l_i where A_i > 0, A_i u_i elsewhere.

    A [R, D, m], low and high [D, m] -> values [R, D]; minimisers x [R, D, m], which are the
    gradient, too; and the sum of the terms' sizes [R, D], for the rounding error.
    """

    @staticmethod
    def forward(
        ctx: Any, A: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.where(A > 0, low, high)
        ctx.save_for_backward(x)
        terms = A * x
        size = terms.abs().sum(-1)
        ctx.mark_non_differentiable(x, size)
        return terms.sum(-1), x, size

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return g.unsqueeze(-1) * x, None, None
