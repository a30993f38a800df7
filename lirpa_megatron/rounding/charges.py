"""The error of each row's bound, gathered while a backward pass runs."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from lirpa_megatron.arithmetic.floating import UNIT, dot, gamma, margin
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.coefficients import (
    IdentityRows,
    LowerUpper,
    Propagated,
    RowBounds,
    dense,
)
from lirpa_megatron.rounding.rules import Known, Visit

_BOTH = ("lower", "upper")


class NoCharges:
    """Bounds as they are rounded (`rounding="nearest"`)."""

    def visited(self, node: Any, entered: tuple, left: Propagated) -> None:
        """After an operator's turn: A that entered, what leaves to its inputs."""

    def added(self, x: Any, sums: LowerUpper, partial: bool) -> None:
        """After A was added to what node x had already."""

    def reducing(self, x: Any, parts: LowerUpper) -> None:
        """Before the ranks' A at x are summed."""

    def grew(self, biases: LowerUpper, partial: bool) -> None:
        """After a term was added to a running bias."""

    def summed(self, parts: LowerUpper) -> None:
        """Before the ranks' parts of the biases are summed."""

    def concretized(self, leaf: Any, sides: tuple, result: RowBounds) -> None:
        """Before the least <A, x> over an input is added to the bounds so far."""

    def widen(self, result: RowBounds) -> Generator[None, None, None]:
        """At the end: takes the errors into account."""
        yield from ()


class Charges(NoCharges):
    """Sums up by how much the bounds of a pass may be off, and widens them.

    Errors lie as biases do (`crown.placement`): those of what a rank computes as its part of a sum
    over features are parts of a sum over ranks themselves, [S, B] or [p n, B]; others are complete,
    [rows, B]. Both are sums of numbers above 0. What is charged besides the operators' own rules:

    - A + A' at a node that several read: u |A + A'| mag(x);
    - the sum over p ranks of A: gamma_p times the sum of |A_r| mag(x); of a bias alike;
    - a bias + b: u |bias + b|;
    - the end, over [l, u] with m = max(|l|, |u|) = |midpoint| + half-width: gamma_{n+3} <|A|, m>
      for the products with both (each off by u), their sum and that with the bias (u |bound|);
      over an L2 or L1 ball gamma_{n+6} <|A|, |x| + eps>, which is at least |A| |x| + ||A||_q eps,
      and sqrt(n) 2^-511 eps where squares underflow; over balls at positions and hulls of vertices
      likewise gamma_{n+8} <|A|, m>, m of the box around them.

    Args:
        run: the pass.
        known: of the graph.
    """

    def __init__(self, run: Any, known: Known) -> None:
        self.run, self.known = run, known
        self.whole, self.partial = LowerUpper(), LowerUpper()

    @torch.no_grad()
    def visited(self, node: Any, entered: tuple, left: Propagated) -> None:
        rule = self.known.rule_of(node)
        self.known.check_constants(node)
        errors: list[Any] = []
        for side, A in enumerate(entered):
            if A is None:
                errors.append(None)
            elif side == 1 and rule.same_sides and A is entered[0]:
                errors.append(errors[0])
            else:
                to_inputs = [getattr(A_x, _BOTH[side]) for A_x in left.A]
                to_inputs += [None] * (len(node.inputs) - len(to_inputs))
                bias = getattr(left.bias, _BOTH[side])
                visit = Visit(
                    _plain(A), tuple(to_inputs), 0 if bias is None else bias, (1, -1)[side],
                    self.run.columns_at(node),
                )
                errors.append(rule.of_visit(node, visit, self.known))
        self._charge(self.run.is_partial(node), *errors)

    @torch.no_grad()
    def added(self, x: Any, sums: LowerUpper, partial: bool) -> None:
        def error(A: Any) -> Any:
            return UNIT * self._largest(x, A)

        self._charge(partial, *_each(error, sums.lower, sums.upper))

    @torch.no_grad()
    def reducing(self, x: Any, parts: LowerUpper) -> None:
        def error(A: Any) -> Any:
            return gamma(self.run.tp.size) * self._largest(x, A)

        self._charge(True, *_each(error, parts.lower, parts.upper))

    @torch.no_grad()
    def grew(self, biases: LowerUpper, partial: bool) -> None:
        self._charge(partial, *_each(lambda b: UNIT * b.abs(), biases.lower, biases.upper))

    @torch.no_grad()
    def summed(self, parts: LowerUpper) -> None:
        p = self.run.tp.size

        def error(b: Any) -> Any:
            return gamma(p) * b.abs()

        self._charge(True, *_each(error, parts.lower, parts.upper))

    @torch.no_grad()
    def concretized(self, leaf: Any, sides: tuple, result: RowBounds) -> None:
        self.grew(LowerUpper(result.lower, result.upper), False)
        ptb = leaf.perturbation
        if auto_lirpa.is_ball(ptb):
            eps = torch.as_tensor(ptb.eps, dtype=leaf.center.dtype).abs().max().item()
            m, least = leaf.center.abs() + eps, 2.0**-500 * eps * leaf.center[0].numel()
        else:
            m, least = torch.maximum(leaf.lower.abs(), leaf.upper.abs()), 0.0
            if hasattr(ptb, "radii"):  # balls at positions
                least = 2.0**-500 * ptb.radii.sum() * leaf.center[0].numel()
        n = m[0].numel() + 8
        least += n * 2.0**-1022 * (1 + m.sum())

        def error(A: Any) -> Any:
            return gamma(n) * dot(dense(A).reshape(*A.shape[:2], *m.shape[1:]), m) + least

        self._charge(False, *_each(error, *sides))

    def widen(self, result: RowBounds) -> Generator[None, None, None]:
        with torch.no_grad():
            if self.run.plan.has_partial_bias:
                zeros = self.run.zeros_of_partial()
                zeros.add(self.partial.lower, self.partial.upper)
                self.whole.add(*(yield from self.run.reduce(zeros)))
        for name, sign in zip(_BOTH, (-1, 1), strict=True):
            bound = getattr(result, name)
            if bound is not None:
                error = getattr(self.whole, name)
                off = margin(bound, 0.0 if error is None else error)
                result.off[name] = off
                setattr(result, name, bound + sign * off)

    def _largest(self, x: Any, A: Any) -> torch.Tensor:
        """Most that |A| |x| can be, for each row."""
        columns = self.run.columns_at(x)
        m = self.known.magnitude(x)
        return dot(dense(A), m if columns is None else m.index_select(-1, columns))

    def _charge(self, partial: bool, lower: Any, upper: Any) -> None:
        (self.partial if partial else self.whole).add(lower, upper)


def charges_of(run: Any, rounding: Any) -> NoCharges:
    """What gathers the errors of a backward pass; `rounding` is None where they are not counted."""
    return NoCharges() if rounding is None else Charges(run, rounding.known)


def _plain(A: Any) -> Any:
    """A as a tensor, unless its rows are only picked."""
    picked = isinstance(A, (IdentityRows, auto_lirpa.OneHotC, auto_lirpa.eyeC))
    return A if picked else dense(A).detach()


def _each(function: Any, lower: Any, upper: Any) -> tuple[Any, Any]:
    """`function` of both sides, once where they are one object."""
    first = None if lower is None else function(lower)
    if upper is lower:
        return first, first
    return first, None if upper is None else function(upper)
