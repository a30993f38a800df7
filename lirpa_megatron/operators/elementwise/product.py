"""Bounds of a gate: y = a b, elementwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lirpa_megatron.arithmetic.near import chosen
from lirpa_megatron.operators.affine.form import AffineForm
from lirpa_megatron.operators.affine.products import elementwise_range
from lirpa_megatron.operators.coefficients import LowerUpper, Propagated, dense
from lirpa_megatron.operators.context import OperatorInputs, Visit
from lirpa_megatron.operators.mccormick import mixed, turned
from lirpa_megatron.operators.numerics import clamp_through, row_sum
from lirpa_megatron.operators.operator import boxed
from lirpa_megatron.operators.optimizable import OptimizableOperator


@dataclass(frozen=True)
class _Box:
    """The boxes [a0 - ra, a0 + ra] x [b0 - rb, b0 + rb], and bounds of a b on them.

    Attributes:
        a0, ra, b0, rb: [B, *shape]; all 0 where `infinite`.
        gap: ra rb, rounded up.
        low, high: bounds of (a - a0)(b - b0), at least as tight as -+ gap.
        infinite: where no plane exists; there `least` <= a b <= `most`.
        corner: whether d = 1 without alpha (otherwise 0).
    """

    a0: torch.Tensor
    ra: torch.Tensor
    b0: torch.Tensor
    rb: torch.Tensor
    gap: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    infinite: torch.Tensor
    least: torch.Tensor
    most: torch.Tensor
    corner: bool


class BoundProduct(OptimizableOperator):
    """y = a b for each element, a and b of equal shapes.

    ==============  ===================  =================================
    tensor          shape                on the ranks
    ==============  ===================  =================================
    a, b, y         [B, *shape]          replicated or sharded, alike
    A_y, A_a, A_b   [R, B, *shape]       in the layout of the node
    ==============  ===================  =================================

    One input perturbed: linear, A_a = A b.

    Both: with midpoints a0, b0 and half-widths ra, rb, the lower planes of `mccormick` are

        (b0 - d rb) a + (a0 - d ra) b - (a0 b0 + ra rb) + d (a0 rb + b0 ra),     d in [-1, 1]

    and its upper ones (b0 + d rb) a + (a0 - d ra) b - (a0 b0 - ra rb) - d (a0 rb - b0 ra).

    At the midpoint, and so on average over the box, all planes are ra rb away. Without alpha d = 1,
    auto_LiRPA's, which leaves a gate that falls to 0 only the plane in a. Alpha m in [-1, 1] gives
    each entry of A its own d = 1 + 2 m, at most 1.

    With s = +1 for lower and -1 for upper bounds, one formula gives both planes:

        A_a = A b0 - s |A| d rb        A_b = A (a0 - d ra)
        bias = sum - A a0 b0 - s |A| ra rb + d (s |A| a0 rb + A b0 ra)

    If the affine forms of a and b in the model's input are known (`affine.form`), a0 and b0 are
    their centers, and without alpha d = 0: the plane is the linear part of a b. Its remainder da db
    lies in [low, high] instead of -+ ra rb, because both deviations come from one input. Alpha is d
    and mixes this plane with McCormick's: the remainder's range becomes (1 - |d|) low - |d| ra rb
    to (1 - |d|) high + |d| ra rb.

    IBP: smallest and largest of the four corner products. Infinite or overflowing ends leave only
    IBP's constants; 0 times an infinite end is 0. Zero width: exact up to the rounding margin of 4
    units in the last place.
    """

    reads_form = frozenset({0, 1})
    elementwise = True
    feature_dim = -1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requires_input_bounds = [0, 1]

    def update_requires_input_bounds(self) -> None:
        """0.7.1 asks when it knows which inputs are perturbed; 0.3 always bounds both."""
        self.is_linear_op = not self._both_perturbed
        self.requires_input_bounds = [] if self.is_linear_op else [0, 1]

    @property
    def _both_perturbed(self) -> bool:
        return all(x.perturbed for x in self.inputs)

    def infer_batch_dim(self, batch_size: int, *x: int) -> int:
        return max(x)

    def init_opt_parameters(self, start_nodes: list[tuple]) -> None:
        super().init_opt_parameters(start_nodes if self._both_perturbed else [])

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a * b

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The range of a b; a ball at the model's input becomes the box around it."""
        a, b = (boxed(interval) for interval in v)
        return _corners(*a, *b)

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A at a and b and the bias [R, B]. Shapes: see the class."""
        if not self._both_perturbed:
            return self._linear(A, visit.inputs)
        box = self.relaxation_at(visit)
        any_infinite = bool(box.infinite.any())

        def through(last_A: Any, side: int) -> tuple[Any, Any, Any]:
            if last_A is None:
                return None, None, 0
            A = dense(last_A)
            d = _mixture(self.move(visit, side), box)
            A_a, A_b, bias = A * box.b0, A * box.a0, -row_sum(A, box.a0 * box.b0)
            low, high = box.low, box.high
            if d is not None:
                size = A.abs() if side == 0 else -A.abs()
                to_a, to_b, more = turned(
                    A, size, d, box.a0, box.b0, lambda x: x * box.rb, lambda x: x * box.ra
                )
                A_a, A_b, bias = A_a - to_a, A_b - to_b, bias + more
                low, high = mixed(d, low, high, box.gap)
            bias = bias + _extreme(A, low, high, side)
            if any_infinite:
                bias = bias + _extreme(A, box.least, box.most, side)
            return A_a, A_b, bias

        A_a, A_b, bias = (
            LowerUpper(*sides)
            for sides in zip(through(A.lower, 0), through(A.upper, 1), strict=True)
        )
        return Propagated((A_a, A_b), bias)

    def relaxation(self, inputs: OperatorInputs) -> _Box:
        """The box of two nodes' bounds, and bounds from their forms if these are known."""
        forms = [x.form for x in inputs.views]
        return _box(*inputs.views, None if None in forms else forms)

    @staticmethod
    def _linear(A: LowerUpper, inputs: OperatorInputs) -> Propagated:
        return Propagated(tuple(
            A.map(lambda A, c=other.lower: dense(A) * c) if x.perturbed else LowerUpper()
            for x, other in zip(inputs.views, reversed(inputs.views), strict=True)
        ))


def _corners(
    al: torch.Tensor, au: torch.Tensor, bl: torch.Tensor, bu: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest of the four products; 0 times infinity is 0."""
    products = []
    for a in (al, au):
        for b in (bl, bu):
            zero = (a == 0) | (b == 0)
            products.append(torch.where(zero, 0.0, a) * torch.where(zero, 0.0, b))
    least = torch.minimum(torch.minimum(*products[:2]), torch.minimum(*products[2:]))
    return least, torch.maximum(torch.maximum(*products[:2]), torch.maximum(*products[2:]))


def _mixture(move: torch.Tensor | None, box: _Box) -> torch.Tensor | None:
    """d from alpha; None for 0."""
    if not box.corner:
        return move
    if move is None:
        return box.a0.new_ones(())
    moved = 1 + 2 * move
    return clamp_through(moved, -1, 1)


def _extreme(A: torch.Tensor, low: torch.Tensor, high: torch.Tensor, side: int) -> torch.Tensor:
    """The least (side 0) or largest sum of A times numbers in [low, high], [R, B]."""
    up, down = (low, high) if side == 0 else (high, low)
    return row_sum(A.clamp(min=0), up) + row_sum(A.clamp(max=0), down)


def _box(a: Any, b: Any, forms: list[AffineForm] | None) -> _Box:
    """The box of two nodes' bounds; `forms` are their affine forms, if known."""
    al, au, bl, bu = a.lower, a.upper, b.lower, b.upper
    info = torch.finfo(al.dtype)
    limit = info.max**0.5 / 16
    infinite = ~((al >= -limit) & (au <= limit) & (bl >= -limit) & (bu <= limit))
    least, most = _corners(*(torch.where(infinite, x, 0.0) for x in (al, au, bl, bu)))
    al, au, bl, bu = (torch.where(infinite, 0.0, x) for x in (al, au, bl, bu))
    if forms is None:
        a0, b0 = chosen(al / 2 + au / 2), chosen(bl / 2 + bu / 2)
    else:
        a0, b0 = (torch.where(infinite, 0.0, form.center) for form in forms)
    ra, rb = torch.maximum(au - a0, a0 - al), torch.maximum(bu - b0, b0 - bl)
    noise = chosen(4 * info.eps * ((a0.abs() + ra) * (b0.abs() + rb)).detach())
    gap = ra * rb + noise
    low, high = -gap, gap
    if forms is not None:
        inside = elementwise_range(*forms)
        low, high = (torch.where(infinite, 0.0, x) for x in inside)
        low = torch.where(low - noise > -gap, low - noise, -gap)  # also where low is NaN
        high = torch.where(high + noise < gap, high + noise, gap)
    return _Box(a0, ra, b0, rb, gap, low, high, infinite, least, most, forms is None)
