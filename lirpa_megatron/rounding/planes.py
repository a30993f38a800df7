"""Operators whose planes are computed in numbers with a limit on their error (`arithmetic.near`).

Products, norms, scores and attention: their code in `operators` runs in `Near`. What is exact there
are the bounds of the inputs, their affine forms (whose slacks hold what the pass that made them is
off: `rounding.forms`), clean values (any number would do), weights, A and alpha.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from lirpa_megatron.arithmetic import near_moves  # noqa: F401  (enters the rules)
from lirpa_megatron.arithmetic.floating import TINY, gamma
from lirpa_megatron.arithmetic.near import Near, exact, numbers, plainly, strict
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.affine.form import AffineForm, LinearFormBounds
from lirpa_megatron.operators.coefficients import LowerUpper, Propagated, dense
from lirpa_megatron.operators.context import InputView, OperatorInputs
from lirpa_megatron.rounding.rules import Known, Rule, Visit

Tensor = torch.Tensor


class PlaneRule(Rule):
    """y = f(x_1, ...): planes that are sound in real arithmetic, whichever branch is taken.

    Pass: let A* and bias* be what real arithmetic makes of the operator's formulas, a sound plane,
    and A and bias what was computed, off by E and e at most. Then the bound is off by

        <E, mag(x)> + e,

    summed over inputs. IBP: the ends, likewise.
    """

    moves = False
    same_sides = False

    def attach(self, node: Any) -> None:
        """Makes the operator compute in `Near`; what it returns are tensors as before."""
        relaxation, move = node.relaxation, node.move

        def in_near(inputs: OperatorInputs) -> Any:
            with strict():
                return relaxation(_near_inputs(inputs))

        def moved(visit: Any, side: int) -> Any:
            with plainly():
                return _exact(move(visit, side))

        own = {
            "relaxation": in_near, "move": moved,
            "bound_backward": self._backward(node, node.bound_backward),
            "interval_propagate": self._interval(node, node.interval_propagate),
        }
        for name, function in own.items():
            object.__setattr__(node, name, function)
        if hasattr(node, "value_of"):
            object.__setattr__(node, "value_of", _counted(node.value_of))
        if node.asks_rows:
            object.__setattr__(node, "wanted_rows", _as_numbers(node.wanted_rows))

    def _backward(self, node: Any, inner: Callable) -> Callable:
        def bound_backward(A: LowerUpper, visit: Any) -> Propagated:
            A = LowerUpper(*(None if side is None else Near(dense(side)) for side in A))
            answers = tuple(None if x is None else x.mapped(Near) for x in visit.answers)
            with strict():
                found = inner(A, dataclasses.replace(visit, answers=answers))
            errors = [tuple(map(_off, pair)) for pair in found.A], tuple(map(_off, found.bias))
            object.__setattr__(node, "errors_of_pass", errors)
            return Propagated(
                tuple(LowerUpper(*map(numbers, pair)) for pair in found.A),
                LowerUpper(*map(numbers, found.bias)),
            )

        return bound_backward

    def _interval(self, node: Any, inner: Callable) -> Callable:
        def interval_propagate(*v: Any, **kwargs: Any) -> Any:
            with strict():
                ends = inner(*(_interval_near(part) for part in v), **kwargs)
            offs = [_off(end) for end in ends[:2]]
            object.__setattr__(node, "errors_of_ends", torch.maximum(*offs))
            return tuple(map(numbers, ends[:2]))

        return interval_propagate

    def magnitude(self, node: auto_lirpa.Bound, known: Known) -> Tensor:
        v = [
            (x.lower, x.upper) if x.perturbed else (known.value(x),) * 2 for x in node.inputs
        ]
        lower, upper = (end.detach() for end in node.interval_propagate(*v))
        return torch.maximum(lower.abs(), upper.abs())

    def of_interval(
        self, node: auto_lirpa.Bound, v: tuple, ends: tuple[Tensor, Tensor], C: Any, known: Known
    ) -> Tensor:
        return node.errors_of_ends

    def of_visit(self, node: auto_lirpa.Bound, visit: Visit, known: Known) -> Tensor:
        side = 0 if visit.sign > 0 else 1
        offs, bias = node.errors_of_pass
        error = torch.zeros(visit.A.shape[:2], dtype=visit.A.dtype, device=visit.A.device)
        for x, pair, A in zip(node.inputs, offs, visit.A_inputs, strict=False):
            if pair[side] is not None:
                error = error + _reach(pair[side], known.magnitude(x))
            if A is not None and not x.perturbed:  # the pass multiplies it with the constant
                n = math.prod(A.shape[2:]) + 2
                error = error + gamma(n) * _reach(A.detach().abs(), known.magnitude(x)) + n * TINY
        if bias[side] is not None:
            error = error + bias[side]
        return error + self.beside(node, visit, known)

    def beside(self, node: auto_lirpa.Bound, visit: Visit, known: Known) -> Tensor | float:
        """What the operator's formulas leave out."""
        return 0.0


class SoftmaxValuesRule(PlaneRule):
    """Softmax times values.

    With a finite fill the operator leaves masked keys out: their weight is below e^-200 < 2^-288,
    if any score is at least fill + 200 (else the weights may be anything). So y is off by no more
    than 2 T 2^-288 max |v|, T the keys. Rows of delta: `BoundSoftmaxValues._other_rows`.
    """

    def beside(self, node: Any, visit: Visit, known: Known) -> Tensor | float:
        if node.fill == -math.inf or len(node.inputs) < 3:
            return 0.0
        v = known.magnitude(node.inputs[1])
        return visit.A.abs().flatten(2).sum(-1) * (2.0**-280 * v.shape[1] * v.max())


def _counted(value_of: Callable) -> Callable:
    """Values as exact numbers, while the operator computes."""

    def value(index: int) -> Any:
        with plainly():
            found = value_of(index)
        return exact(found) if found.is_floating_point() else found

    return value


def _as_numbers(wanted_rows: Callable) -> Callable:
    def numbers_of(*args: Any) -> list:
        return [numbers(rows) for rows in wanted_rows(*args)]

    return numbers_of


def _exact(x: Any) -> Any:
    if isinstance(x, (AffineForm, LinearFormBounds)):
        return x.mapped(Near)
    if isinstance(x, Tensor) and x.is_floating_point():
        return Near(x)
    return x


def _near_inputs(inputs: OperatorInputs) -> OperatorInputs:
    def view(x: InputView) -> InputView:
        def value(node: Any, read: Callable = x.read_value) -> Any:
            with plainly():
                return _exact(read(node))

        parts = {name: _exact(getattr(x, name)) for name in ("lower", "upper", "form", "centered")}
        return dataclasses.replace(x, **parts, read_value=value)

    directions = _exact(inputs.directions)
    return dataclasses.replace(inputs, views=tuple(map(view, inputs.views)), directions=directions)


def _interval_near(v: Any) -> tuple:
    return tuple(map(_exact, v))


def _off(x: Any) -> Tensor | None:
    if not isinstance(x, Near):
        return None
    return None if x.off is None else x.off.expand(x.value.shape)


def _reach(E: Tensor, m: Tensor) -> Tensor:
    """sum E m, [R, B]; where E is 0 nothing, even of an infinite m."""
    if m.isfinite().all():
        return torch.einsum("rbf,bf->rb", E.flatten(2), m.flatten(1))
    return torch.where(E == 0, 0.0, E * m).flatten(2).sum(-1)
