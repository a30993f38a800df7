"""What the operators' own arithmetic may be off: rules for each of them, and for no other.

A rule answers three questions of an operator y = f(x):

- `magnitude`: how large |y| can be (where no bounds of y are known);
- `of_interval`: how far the ends that interval arithmetic computed may be off;
- `of_visit`: how far the bound may be off because of what a backward pass did here. A and the bias
  that it left are taken as exact numbers; the question is by how much

      <A_y, y>  >=  sum_i <A_i, x_i> + bias      (lower bounds; upper ones alike)

  may fail for x in what its bounds allow.

Every rule's derivation is in its docstring. u = UNIT, gamma = gamma_n (`arithmetic.floating`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lirpa_megatron.arithmetic.floating import TINY, UNIT, dot, gamma
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.errors import UserError
from lirpa_megatron.operators.coefficients import IdentityRows
from lirpa_megatron.operators.context import OperatorInputs

Tensor = torch.Tensor


@dataclass(frozen=True)
class Visit:
    """One side of a backward pass at one operator."""

    A: Tensor
    """What entered, [R, B, *shape of y]."""
    A_inputs: tuple[Tensor | None, ...]
    """What leaves to each input, [R, B, *shape of x]; None: nothing."""
    bias: Tensor | float
    """[R, B]."""
    sign: int
    """1 for lower bounds, -1 for upper ones."""
    columns: Tensor | None
    """Features of y that A has; None: all."""

    def shown(self, v: Tensor) -> Tensor:
        """Those features of v [B, ..., features]."""
        return v if self.columns is None else v.index_select(-1, self.columns)

    @property
    def terms(self) -> int:
        """Numbers in one row of A: as many as there are terms in a product with it."""
        return math.prod(self.A.shape[2:])


class Known:
    """What rules ask about a graph, found once for one call of `compute_bounds`.

    Args:
        module: the BoundedModule.
        rule_of: the rule of a node.
    """

    def __init__(
        self, module: auto_lirpa.HostBoundedModule, rule_of: Callable[[auto_lirpa.Bound], Rule]
    ) -> None:
        self.module, self.rule_of = module, rule_of
        self.tp = module.context.collectives
        self.kept: dict[tuple[str, str], Any] = {}

    def inputs(self, node: auto_lirpa.Bound) -> OperatorInputs:
        """What an operator's relaxation is made of."""
        return OperatorInputs.of(node, self.module.context, self.module.call)

    def value(self, x: auto_lirpa.Bound) -> Tensor:
        """The exact value of a parameter or constant (or of an input that is not perturbed)."""
        return self.module.get_forward_value(x).detach()

    def check_constants(self, node: auto_lirpa.Bound) -> None:
        """Refuses what the operator reads of inputs that are not perturbed, computed with rounding.

        Raises:
            UserError: naming the operator that computes it.
        """
        for x in node.inputs:
            if x.perturbed or not x.inputs:
                continue
            if not self.rule_of(x).moves:
                raise refused(x, "it is computed of inputs that are not perturbed, and rounded")
            self.check_constants(x)

    def magnitude(self, x: auto_lirpa.Bound) -> Tensor:
        """Most that |x| can be, [B, *shape] (the rank's features); from its bounds, if known."""
        if not x.perturbed:
            return self.value(x).abs()
        if auto_lirpa.has_bounds(x):
            return torch.maximum(x.lower.detach().abs(), x.upper.detach().abs())
        return self.once("magnitude", x, lambda: self.rule_of(x).magnitude(x, self))

    def once(self, what: str, node: auto_lirpa.Bound, compute: Callable[[], Any]) -> Any:
        """Something of a node that holds for the whole call."""
        key = what, node.name
        if key not in self.kept:
            self.kept[key] = compute()
        return self.kept[key]


class Rule:
    """Base: an operator that only moves numbers, each to one place: nothing is rounded."""

    moves = True
    """Whether constants that it is applied to stay exact."""
    same_sides = True
    """Whether `of_visit` depends on A alone."""

    def refusal(self, node: auto_lirpa.Bound) -> str | None:
        """Why this operator, as it is built, is not covered; None: it is."""
        return None

    def magnitude(self, node: auto_lirpa.Bound, known: Known) -> Tensor:
        x, *rest = node.inputs
        return node.forward(known.magnitude(x), *map(known.value, rest)).abs()

    def of_interval(
        self, node: auto_lirpa.Bound, v: tuple, ends: tuple[Tensor, Tensor], C: Any, known: Known
    ) -> Tensor | float:
        """Error of the interval's ends; `C` is what they were merged with, or None."""
        return 0.0

    def of_visit(self, node: auto_lirpa.Bound, visit: Visit, known: Known) -> Tensor | None:
        """Error of the rows' bounds, [R, B]; None: nothing."""
        return None


class LinearRule(Rule):
    """y = x W^T + b, whole, or the shard of a parallel layer.

    Pass: E = fl(A W) - A W has |E| <= gamma_o |A| |W|, o the terms of a product, and fl(<A, b>) is
    off by gamma_{oT} <|A|, |b|>, T tokens. So the bound is off by no more than

        sup |E x| + ...  <=  gamma_{oT} <|A|, |W| mag(x) + |b|>,

    one product with a vector `reach` that all rows share. Rows of the identity are picked, not
    multiplied. Of a ColumnParallelLinear each rank has its features' part of this (as of the bias);
    what the sum over ranks of A adds is charged where that is taken. Of a RowParallelLinear the
    sum over ranks of |W_r| mag(x_r) is taken once, and the rank has its own rows' error. What
    underflows is off by o TINY in each entry of A W.

    IBP: with m = max(|l|, |u|) = |midpoint| + half-width, midpoint and half-width are off by u of
    themselves, their products by gamma_i more, the sum with the bias by 2 u: gamma_{i+6} times
    reach(m) in all; merged with C, whose product with W is off by gamma_o, gamma_{i+o+8} |C|
    reach(m). Sums over p ranks count as further terms. For a ball straight from the input
    |W| (|x| + eps) is at least |W x| + ||W||_q eps; a norm of i numbers is off by gamma_{i+2} of
    itself (and an L2 norm by sqrt(i) 2^-511 if squares underflow).
    """

    moves = False

    def refusal(self, node: auto_lirpa.Bound) -> str | None:
        scale = getattr(node, "alpha_linear", None), getattr(node, "beta_linear", None)
        if None in scale:
            scale = node.alpha, node.beta
        if scale != (1.0, 1.0) or node.transA:
            return "a Gemm with transA, alpha or beta"
        weights = [x for x in node.inputs[1:] if x.inputs]
        return "weights that the graph computes" if weights else None

    def weight(self, node: auto_lirpa.Bound, known: Known) -> tuple[Tensor, Tensor | None]:
        """|W| [o, i] and |b| [o] or None."""
        if hasattr(node, "has_rows"):
            w, b = node.sharded_relaxation(known.inputs(node))
        else:
            w, *rest = (known.value(x) for x in node.inputs[1:])
            b = rest[0] if rest else None
            w = w if node.transB else w.t()
        return w.detach().abs(), None if b is None else b.detach().abs()

    def reach(
        self, node: auto_lirpa.Bound, m: Tensor, known: Known
    ) -> tuple[Tensor, Tensor | float]:
        """|W| m + |b| [B, ..., o], and what underflow is off for one term, [B].

        Args:
            node: the layer.
            m: [B, ..., i] >= 0.
            known: for the weights.
        """
        w, b = self.weight(node, known)
        y, spill = m.matmul(w.t()), m.flatten(1).sum(1)
        y, spill = self.over_ranks(y, known), self.over_ranks(spill, known)
        return (y if b is None else y + b), TINY * (spill + 1)

    def over_ranks(self, part: Tensor, known: Known) -> Tensor:
        """The sum over ranks, where the input is sharded."""
        return part

    def magnitude(self, node: auto_lirpa.Bound, known: Known) -> Tensor:
        return self._reach_of_input(node, known)[0]

    def _reach_of_input(self, node: auto_lirpa.Bound, known: Known) -> tuple:
        m = known.magnitude(node.inputs[0])
        return known.once("reach", node, lambda: self.reach(node, m, known))

    def of_interval(
        self, node: auto_lirpa.Bound, v: tuple, ends: tuple, C: Any, known: Known
    ) -> Tensor:
        lower, upper = (end.detach() for end in v[0])
        norm, eps = auto_lirpa.Interval.get_perturbation(v[0])[:2]
        ball = norm != float("inf")
        m = lower.abs() + eps if ball else torch.maximum(lower.abs(), upper.abs())
        reach, spill = self.reach(node, m, known)
        p = known.tp.size
        n = m.shape[-1] * p + p + 8
        least = 2.0**-500 * eps * m.shape[-1] if norm == 2 else 0.0
        if C is None:
            shape = (-1, *[1] * (reach.ndim - 1))
            return gamma(n) * reach + (n * spill).view(shape) + least
        applied = self.merged(torch.einsum("bsf,bf->bs", C.detach().abs(), reach), known)
        # C W is taken before; where it underflows it is off by TINY m for each of its terms.
        n += C.shape[-1] * p + 8
        return gamma(n) * applied + (n * spill).unsqueeze(1) + least

    def merged(self, part: Tensor, known: Known) -> Tensor:
        """|C| reach over all features of y, where they are sharded."""
        return part

    def of_visit(self, node: auto_lirpa.Bound, visit: Visit, known: Known) -> Tensor | None:
        if isinstance(visit.A, (IdentityRows, auto_lirpa.OneHotC, auto_lirpa.eyeC)):
            return None
        reach, spill = self._reach_of_input(node, known)
        n = visit.terms + 2
        return gamma(n) * dot(visit.A, visit.shown(reach)) + n * spill


class ColumnRule(LinearRule):
    """ColumnParallelLinear: what is merged with C is summed over ranks."""

    def merged(self, part: Tensor, known: Known) -> Tensor:
        return known.tp.reduce_from(part)


class RowRule(LinearRule):
    """RowParallelLinear: its input is sharded."""

    def over_ranks(self, part: Tensor, known: Known) -> Tensor:
        return known.tp.reduce_from(part)


class SumRule(Rule):
    """y = x_1 + x_2 or x_1 - x_2; one of them may be a constant, of any shape that broadcasts.

    IBP: u |end|. Pass: A is handed on as it is; with a constant c the sum <A, c>, of n terms (those
    over which c is repeated included), is off by gamma_n <|A|, |c|>.
    """

    moves = False

    def refusal(self, node: auto_lirpa.Bound) -> str | None:
        return _of_one_shape(node)

    def magnitude(self, node: auto_lirpa.Bound, known: Known) -> Tensor:
        x, y = (known.magnitude(part) for part in node.inputs)
        return x + y

    def of_interval(
        self, node: auto_lirpa.Bound, v: tuple, ends: tuple, C: Any, known: Known
    ) -> Tensor:
        return UNIT * torch.maximum(*(end.detach().abs() for end in ends))

    def of_visit(self, node: auto_lirpa.Bound, visit: Visit, known: Known) -> Tensor | None:
        constants = [x for x in node.inputs if not x.perturbed]
        if not constants:
            return None
        c = _as_batch(known.magnitude(constants[0]), node, visit)
        n = visit.terms + 2
        return gamma(n) * dot(visit.A, c) + n * TINY


class ScaleRule(Rule):
    """y = c x with a constant c.

    IBP: u |end|. Pass: fl(A c) is off by u |A| |c|, the bound by u <|A|, |c| mag(x)>.
    """

    moves = False

    def refusal(self, node: auto_lirpa.Bound) -> str | None:
        if not any(is_constant(x) for x in node.inputs):
            return "a product of two values that depend on the input"
        return _of_one_shape(node)

    def magnitude(self, node: auto_lirpa.Bound, known: Known) -> Tensor:
        x, y = (known.magnitude(part) for part in node.inputs)
        return x * y

    def of_interval(
        self, node: auto_lirpa.Bound, v: tuple, ends: tuple, C: Any, known: Known
    ) -> Tensor:
        return UNIT * torch.maximum(*(end.detach().abs() for end in ends)) + TINY

    def of_visit(self, node: auto_lirpa.Bound, visit: Visit, known: Known) -> Tensor:
        product = known.once("product", node, lambda: self.magnitude(node, known))
        product = visit.shown(_as_batch(product, node, visit))
        x = next(x for x in node.inputs if x.perturbed)
        spill = TINY * known.magnitude(x).flatten(1).sum(1)
        return UNIT * dot(visit.A, product) + spill


class ReluRule(Rule):
    """y = max(x, 0), whatever lines the host drew.

    IBP is exact. Pass: for a row with entry a of A_y that left c for A_x, the term
    a relu(x) - c x is linear on both sides of 0: its least value on [l, u] is that at l, at 0 or at
    u, and never below min(c max(-l, 0), (a - c) max(u, 0), 0), which is that value where l < 0 < u
    and 0 where the line is y = x or y = 0 on one side. Their sum S <= 0 is what the bias could be;
    what was put there in excess is the error. Each of the n values is computed to within 3 u of
    itself, S to within gamma_{n+4} |S|.
    """

    moves = False
    same_sides = False

    def refusal(self, node: auto_lirpa.Bound) -> str | None:
        return "a slope for negative values" if getattr(node, "leaky_alpha", 0) else None

    def magnitude(self, node: auto_lirpa.Bound, known: Known) -> Tensor:
        x = node.inputs[0]
        if auto_lirpa.has_bounds(x):
            return x.upper.detach().clamp(min=0)
        return known.magnitude(x)

    def of_visit(self, node: auto_lirpa.Bound, visit: Visit, known: Known) -> Tensor:
        x = node.inputs[0]
        l, u = (visit.shown(end.detach()) for end in (x.lower, x.upper))
        below, above = (-l).clamp(min=0), u.clamp(min=0)
        a, c = visit.A, visit.A_inputs[0]
        c = torch.zeros_like(a) if c is None else c.detach()
        at_l, at_u = c * below, (a - c).mul_(above)
        if visit.sign > 0:
            least = torch.minimum(at_l, at_u).clamp_(max=0)
        else:
            least = torch.maximum(at_l, at_u).clamp_(min=0)
        total = least.flatten(2).sum(-1)
        excess = (visit.sign * (visit.bias - total)).clamp(min=0)
        n = visit.terms + 6
        spill = n * TINY * (1 + below.sum() + above.sum())
        return excess + gamma(n) * total.abs() + 2 * UNIT * abs(visit.bias) + spill


def refused(node: auto_lirpa.Bound, reason: str) -> UserError:
    """The error that an operator without a limit on its rounding error ends in."""
    return UserError(
        f'{type(node).__name__} ({node.name.lstrip("/")}): {reason}; use rounding="nearest"'
    )


def is_constant(x: auto_lirpa.Bound) -> bool:
    """Whether a node is a parameter, a buffer or a constant of the graph."""
    return not x.inputs and type(x) is not auto_lirpa.BoundInput


def _of_one_shape(node: auto_lirpa.Bound) -> str | None:
    for x in node.inputs:
        if not is_constant(x) and tuple(x.output_shape) != tuple(node.output_shape):
            return f"values of shape {tuple(x.output_shape)} repeated to {tuple(node.output_shape)}"
    return None


def _as_batch(c: Tensor, node: auto_lirpa.Bound, visit: Visit) -> Tensor:
    """c repeated to [B, *shape of the node]."""
    return c.expand(visit.A.shape[1], *node.output_shape[1:])
