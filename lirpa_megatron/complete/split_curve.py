"""A function of one variable in a backward pass over domains: lines with alpha, ends with gamma.

A domain is a box of inputs and splits: for some neurons j, points p and signs s the pre-activation
z_j satisfies s (z_j - p) >= 0. A neuron may have several. For y = f(z) the interval of the domain
is

    [max(l, the p with s = 1), min(u, the p with s = -1)],    [l, u] of the box,

and f is relaxed on it as everywhere (`elementwise.tangent_lines`): with the lines that alpha
selects, k z + b below f where A > 0, above it where A < 0.

**Gamma** is beta of `split_relu`, where all p are 0, for both ends of the interval [l, u] of the
domain: a multiplier >= 0 of z - l >= 0 and one of u - z >= 0. That both are positive never pays, as
l <= u, so that gamma is the one minus the other, any number. Then for all z in [l, u]

    <A, y> >= A (k z + b) - gamma z + min(gamma l, gamma u) = (A k - gamma) z + A b + min(...).

Ends that are no splits count, too: they hold in the box, which the lines of earlier layers do not
know. So the coefficient of z is free, and a split alone changes no other neuron's (`fitted`).

Degenerate intervals: those of zero width and infinite ones as in `tangent_lines`; an infinite end
gives an infinite bound unless gamma is 0. Where splits and bounds leave no number (l > u; another
number type may find so where this one did not) the domain is empty and every line holds: it is that
of the single point l.

Shapes: R rows of A, D domains, n neurons of one operator on this rank, as in `split_relu`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lirpa_megatron.complete.roots import OperatorPlace, Roots
from lirpa_megatron.operators.coefficients import LowerUpper, Propagated
from lirpa_megatron.operators.elementwise.curves import Curve
from lirpa_megatron.operators.elementwise.tangent_lines import Relaxation, TangentFamily
from lirpa_megatron.operators.numerics import least_product, row_sum

_FAR = tuple(i / 8 for i in range(9))
_NEAR = tuple(tuple(i / n for i in range(-4, 5) if i) for n in (64, 512))
"""Alpha that is tried, and then around the best one, twice."""
_NOISE = 256
"""Units in the last place by which what is equal may differ between ranks' sums."""


@dataclass(frozen=True)
class CurveLines:
    """What one operator is relaxed with in some domains."""

    place: OperatorPlace
    lower: torch.Tensor
    """[D, n], of the pre-activations; so is `upper`."""
    upper: torch.Tensor
    every: Relaxation
    """All lines, of [D, n]."""

    @classmethod
    def of(cls, place: OperatorPlace, lower: torch.Tensor, upper: torch.Tensor) -> CurveLines:
        """Lines on intervals [D, n]."""
        with torch.no_grad():
            return cls(place, lower, upper, Relaxation(place.curve, lower, upper))

    def at(self, index: torch.Tensor) -> CurveLines:
        """Of some of the domains."""
        every = _mapped(lambda t: t[index], self.every)
        return CurveLines(self.place, self.lower[index], self.upper[index], every)

    def column(self, index: torch.Tensor) -> CurveLines:
        """Of one neuron of each domain, [D, 1]."""
        return CurveLines(
            self.place, self.lower.gather(1, index), self.upper.gather(1, index),
            _mapped(lambda t: t.gather(1, index), self.every),
        )

    def put(
        self, column: torch.Tensor, here: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor,
        every: Relaxation,
    ) -> CurveLines:
        """With other lines for one neuron of each domain.

        Args:
            column: which, [D, 1].
            here: whether this operator has it, [D, 1]; nothing changes where it has not.
            lower, upper, every: of that neuron, [D, 1].
        """
        def changed(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            return old.scatter(1, column, torch.where(here, new, old.gather(1, column)))

        own, new = _with_equal_parts(self.every, every)
        return CurveLines(
            self.place, changed(self.lower, lower), changed(self.upper, upper),
            _mapped(changed, own, new),
        )

    def used(self, A: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(slope, intercept) of the lines that a lower bound uses, for A and alpha in [0, 1] of
        [R, D, n] or [D, n]."""
        return self.every.line(self.every.lower.where(A > 0, self.every.upper), 2 * alpha - 1)


@dataclass(frozen=True)
class SplitCurve:
    """What one visit of a pass to such an operator is given: a value, nothing is kept on the node.
    """

    lines: CurveLines
    alpha: torch.Tensor
    """[R, D, n], in [0, 1]: 1/2 is the line without alpha."""
    pull: torch.Tensor
    """0, whose gradient is minus z where the bound is attained: [R, D, n]."""
    gamma: torch.Tensor
    """[R, D, n]"""

    def bound_backward(self, A: LowerUpper) -> Propagated:
        """A [R, D, *node shape] of the lower side -> A at the input, and the bias [R, D]."""
        given, lines = A.lower.flatten(2), self.lines
        slope, intercept = lines.used(given, self.alpha)
        A_z = (given * slope - self.gamma - self.pull).view(A.lower.shape)
        ends = least_product(self.gamma, lines.lower, lines.upper)
        bias = row_sum(given, intercept) + ends.sum(-1)
        return Propagated((LowerUpper(A_z, None),), LowerUpper(bias, None))


@dataclass(frozen=True)
class Refit:
    """A visit of a pass at which alpha and gamma are found for narrower intervals (`refitted`)."""

    before: CurveLines
    after: CurveLines
    alpha: torch.Tensor
    """[R, D, n], of `before`; so is gamma."""
    gamma: torch.Tensor
    found: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Operator's name -> alpha and gamma of `after`; filled by the visit."""

    def bound_backward(self, A: LowerUpper) -> Propagated:
        """As `SplitCurve.bound_backward`."""
        alpha, gamma = refitted(
            self.before, self.after, A.lower.flatten(2), self.alpha, self.gamma
        )
        self.found[self.after.place.name] = alpha, gamma
        return SplitCurve(self.after, alpha, torch.zeros_like(gamma), gamma).bound_backward(A)


def ends_of(
    roots: Roots, boxes: torch.Tensor, places: torch.Tensor, signs: torch.Tensor,
    points: torch.Tensor,
) -> torch.Tensor:
    """The boxes' intervals of all neurons, cut at domains' splits: [2, D, N].

    Args:
        roots: the boxes' bounds.
        boxes: of the domains, [D].
        places, signs, points: of their splits, [D, k]; sign 0 and place N for none of this rank's.
    """
    found = []
    for low, sign, how in ((roots.lower, 1, "amax"), (roots.upper, -1, "amin")):
        whole = torch.cat([low[boxes], low.new_zeros(len(boxes), 1)], 1)
        ends = torch.where(signs == sign, points, -sign * torch.inf).to(low)
        found.append(whole.scatter_reduce(1, places, ends, how)[:, :-1])
    lower, upper = found
    return torch.stack([lower, torch.maximum(lower, upper)])


def lines_of(roots: Roots, ends: torch.Tensor) -> tuple[CurveLines, ...]:
    """The lines of all such operators, from intervals [2, D, N]."""
    return tuple(CurveLines.of(r, *ends[..., r.at]) for r in roots.curves)


def cut_lines(
    curves: Sequence[CurveLines], place: torch.Tensor, sign: torch.Tensor, point: torch.Tensor
) -> tuple[CurveLines, ...]:
    """Lines with one more split in each domain, each [D, 1]."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor, Relaxation]] = {}
    owned = []
    for lines in curves:
        own = (place >= lines.place.first) & (place < lines.place.first + lines.place.size)
        column = (place - lines.place.first).clamp(0, lines.place.size - 1)
        owned.append((own, column))
    for lines in curves:
        curve = lines.place.curve
        if id(curve) not in made:
            same = [(o, c) for c, o in zip(curves, owned, strict=True) if c.place.curve is curve]
            made[id(curve)] = _narrowed(curve, same, sign, point)
    return tuple(
        lines.put(column, own, *made[id(lines.place.curve)])
        for lines, (own, column) in zip(curves, owned, strict=True)
    )


def _narrowed(
    curve: Curve, same: Sequence[tuple[tuple[torch.Tensor, torch.Tensor], CurveLines]],
    sign: torch.Tensor, point: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, Relaxation]:
    """The interval of each domain's neuron behind its split, and lines on it; of neurons of other
    curves anything."""
    lower = upper = torch.full_like(point, curve.safe)
    for (own, column), lines in same:
        lower = torch.where(own, lines.lower.gather(1, column), lower)
        upper = torch.where(own, lines.upper.gather(1, column), upper)
    lower = torch.where(sign > 0, torch.maximum(lower, point), lower)
    upper = torch.where(sign < 0, torch.minimum(upper, point), upper)
    upper = torch.maximum(lower, upper)
    with torch.no_grad():
        return lower, upper, Relaxation(curve, lower, upper)


def fitted(
    before: Sequence[CurveLines], after: Sequence[CurveLines], place: torch.Tensor,
    A: torch.Tensor, alpha: torch.Tensor, gamma: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Alpha and gamma with which a domain's bound is what it was before a split, or more.

    Args:
        before, after: lines of all operators, with and without the split.
        place: of the neuron that was split, [D, 1].
        A, alpha, gamma: [R, D, N].
    """
    for old, new in zip(before, after, strict=True):
        r = old.place
        own = (place >= r.first) & (place < r.first + r.size)
        index = place.clamp(r.first, r.first + r.size - 1)
        at = index.expand(len(A), -1, -1)
        A_y, *values = (t.gather(2, at) for t in (A, alpha, gamma))
        old, new = (lines.column(index - r.first) for lines in (old, new))
        found = refitted(old, new, A_y, *values)
        alpha, gamma = (
            whole.scatter(2, at, torch.where(own, *pair))
            for whole, *pair in zip((alpha, gamma), found, values, strict=True)
        )
    return alpha, gamma


def refitted(
    before: CurveLines, after: CurveLines, A: torch.Tensor, alpha: torch.Tensor,
    gamma: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Alpha and gamma on narrower intervals with which a bound is at least what it was, or nearly.

    The coefficients A k - gamma of z stay as they are: whichever lines are used now, gamma takes up
    the difference of slopes. Of some lines, those with the largest constant A b + min(gamma l,
    gamma u) are taken. (The line at the point of tangency of the former one, moved into the new
    interval, cannot be worse than that: it touches f there or at the new end. Those that are tried
    come close to it.)

    Args:
        before, after: lines on the former intervals and on narrower ones.
        A, alpha, gamma: [R, D, n].
    """
    slope, _ = before.used(A, alpha)
    best = alpha
    for steps in (_FAR, *_NEAR):
        around = torch.zeros_like(best) if steps is _FAR else best
        tried = torch.cat([best, *((around + step).clamp(0, 1) for step in steps)])
        count = len(steps) + 1
        A_all, gamma_all, slopes = (t.repeat(count, 1, 1) for t in (A, gamma, slope))
        k, b = after.used(A_all, tried)
        # 0 is to stay 0: which end counts, and so the gradient, depends on gamma's sign
        same = (k - slopes).abs() <= _NOISE * torch.finfo(k.dtype).eps * slopes.abs()
        gammas = gamma_all + torch.where(same, 0.0, A_all * (k - slopes))
        constants = A_all * b + least_product(gammas, after.lower, after.upper)
        constants, tried, gammas = (
            t.view(count, *A.shape) for t in (constants.nan_to_num(nan=-torch.inf), tried, gammas)
        )
        most = constants.amax(0)
        # of equal ones, up to rounding, the first
        enough = most - _NOISE * torch.finfo(most.dtype).eps * (1 + most.abs())
        which = (constants >= enough).to(torch.int8).argmax(0, keepdim=True)
        best = tried.gather(0, which)[0]
    return best, gammas.gather(0, which)[0]


def _mapped(function: Callable[..., torch.Tensor], *values: Any) -> Any:
    """With a function applied to all tensors of relaxations of the same curve."""
    first = values[0]
    if isinstance(first, torch.Tensor):
        return function(*values)
    if isinstance(first, tuple):
        return tuple(_mapped(function, *parts) for parts in zip(*values, strict=True))
    if not isinstance(first, (Relaxation, TangentFamily)):
        return first
    made = copy.copy(first)
    for name in vars(first):
        part = _mapped(function, *(getattr(value, name) for value in values))
        object.__setattr__(made, name, part)
    return made


def _with_equal_parts(*both: Relaxation) -> list[Relaxation]:
    """With lines for infinite intervals in both relaxations if one has some."""
    both = [copy.copy(every) for every in both]
    for name in ("lower", "upper"):
        sides = [getattr(every, name) for every in both]
        if len({side.far is None for side in sides}) > 1:
            for every, side in zip(both, sides, strict=True):
                if side.far is None:
                    none = torch.zeros_like(side.sign)
                    setattr(every, name, replace(side, far=(none.bool(), none, none)))
    return both
