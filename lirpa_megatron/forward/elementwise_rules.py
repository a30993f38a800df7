"""Rules of elementwise functions and gates.

**Functions** y = f(x), x in [l, u]. Degree 1 takes one line for both sides: with the lines
kl x + bl <= f(x) <= ku x + bu of CROWN (`tangent_lines`), for every slope k

    f(x) - k x  lies in  [min over the ends of (kl - k) x + bl, max of (ku - k) x + bu],

so y = k P + middle + (k R + e) with |e| at most half of that range. Of k = kl, ku, their mean and
f' at the centre the one with the shortest range is taken (by a tenth), neuron by neuron. This holds
for all of P + R, so R passes through k alone. Where [l, u] is a point the value is exact.

Where errors are symbols, a position may have other lines instead, with all its errors in one ball
(`squares`).

Higher degrees have Taylor's polynomial as well (`jets`), where that is better: with S the bound of
P's deviation, and R within [-r, r],

    f(P + R) = T(P) + f'(c) R + D + B,  |D| <= rest of Taylor's formula,
    |B| <= min(sup |f''| (S + r), sup |f'| + |f'(c)|) r.

**Gates** y = a b: the product of the polynomials; what it has beyond degree p is bounded by the
parts' sizes, or for affine forms by the range of the quadratic form (`elementwise_range`, or
`product_range` where errors are symbols), and
R_y = a0 R_b + b0 R_a + e with |e| <= da r_b + db r_a + r_a r_b, da and db the deviations of P.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lirpa_megatron.forward import jets, squares
from lirpa_megatron.forward.error_symbols import as_symbols, product_range
from lirpa_megatron.forward.form import Form, Fresh, Inputs, Outcome, times
from lirpa_megatron.forward.polynomials import compose, excess, padded, plus
from lirpa_megatron.forward.rules import by_intervals, reading_shares, rule_for
from lirpa_megatron.operators.affine.form import AffineForm
from lirpa_megatron.operators.affine.products import elementwise_range
from lirpa_megatron.operators.elementwise.activations import BoundCurve
from lirpa_megatron.operators.elementwise.curves import Curve
from lirpa_megatron.operators.elementwise.extremes import BoundMaximum
from lirpa_megatron.operators.elementwise.functions import FUNCTIONS
from lirpa_megatron.operators.elementwise.prelu import BoundPRelu
from lirpa_megatron.operators.elementwise.product import BoundProduct
from lirpa_megatron.operators.elementwise.tangent_lines import Relaxation

_HOST = {"BoundRelu": "Relu", "BoundTanh": "Tanh", "BoundSigmoid": "Sigmoid"}


def one_line(
    curve: Curve, lower: torch.Tensor, upper: torch.Tensor, centre: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(slope, middle, half): |f(x) - slope x - middle| <= half on [lower, upper].

    Args:
        curve: f.
        lower, upper: [B, ...].
        centre: a point of the interval, for the slope there.

    Returns:
        [B, ...] each; half is infinite, and the rest 0, where there is no line.
    """
    lines = Relaxation(curve, lower, upper)
    (kl, bl), (ku, bu) = lines.line(lines.lower), lines.line(lines.upper)
    inside = torch.where(centre.isfinite(), centre, 0.0)
    if curve.limited:
        inside = torch.where(curve.outside(inside, inside), curve.safe, inside)
    own = torch.nan_to_num(curve.slope(inside), nan=0.0, posinf=0.0, neginf=0.0)
    best = None
    for k in (kl / 2 + ku / 2, kl, ku, own):
        low = torch.minimum(_at(kl - k, lower), _at(kl - k, upper)) + bl
        high = torch.maximum(_at(ku - k, lower), _at(ku - k, upper)) + bu
        half = (high - low) / 2
        half = torch.where(half.isnan(), torch.inf, half)
        if best is None:
            best = [k, low / 2 + high / 2, half]
            continue
        # By a tenth: which of equal ones is the shortest would be left to rounding.
        shorter = half < 0.9 * best[2]
        best = [
            torch.where(shorter, new, old)
            for new, old in zip((k, low / 2 + high / 2, half), best, strict=True)
        ]
    slope, middle, half = best
    none = ~(half.isfinite() & middle.isfinite())
    noise = 4 * torch.finfo(half.dtype).eps * (middle.abs() + (slope * inside).abs())
    half = torch.where(none, torch.inf, half.clamp(min=0) + noise.detach())
    return torch.where(none, 0.0, slope), torch.where(none, 0.0, middle), half


def _at(k: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """k x, where 0 times infinity is 0."""
    return torch.where(k == 0, 0.0, k * x)


def _curve_of(node: Any) -> Curve:
    if isinstance(node, BoundCurve):
        return node.curve
    name = _HOST[next(c.__name__ for c in type(node).__mro__ if c.__name__ in _HOST)]
    return BoundMaximum.function.curve() if name == "Relu" else FUNCTIONS[name].curve()


@rule_for(BoundCurve, "Relu", "Tanh", "Sigmoid")
@reading_shares
def curve(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """y = f(x). See above."""
    return through(run, node, _curve_of(node), inputs[0])


def through(run: Any, node: Any, function: Curve, x: Form) -> Outcome:
    """f of a form."""
    lower, upper = run.range(x)
    slope, middle, error = one_line(function, lower, upper, x.c[0])
    taylor = jets.of(function)
    if taylor is not None:
        slope, middle, error = _tangent(taylor, x.c[0], lower, upper, (slope, middle, error))
    point = lower == upper
    middle = torch.where(point, function.run(x.c[0]) - slope * x.c[0], middle)
    error = torch.where(point, 0.0, error)
    if taylor is None or run.order == 1:
        found = None
        if taylor is not None and run.errors is not None and len(x.c) > 1:
            reach = torch.maximum(upper - x.c[0], x.c[0] - lower)
            value, tangent, kappa, h = squares.parabola(taylor, x.c[0], reach)
            found = squares.of_curve(run, node, x, (kappa, h), reach, error)
        if found is None:
            c = plus(run.domain_of(x).algebra.scaled(x.c, slope), middle)
            return line(run, node, x, slope, c, error)
        most = kappa.abs() * reach.square() + h
        left = torch.where(found[0], 0.0, error)
        there = found[0] & ~point
        slope, error = torch.where(there, tangent, slope), torch.where(there, most, error)
        middle = torch.where(there, value - tangent * x.c[0], middle)
        c = plus(run.domain_of(x).algebra.scaled(x.c, slope), middle)
        rest = times(slope.abs(), x.box) + left
        return replace(line(run, node, x, slope, c, error), balls=found[1], rest=rest)
    return _taylor(run, node, x, taylor, (slope, slope * x.c[0] + middle, error, point))


def _tangent(
    g: jets.Jets, centre: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, line: tuple
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A line as `one_line` finds it, or the tangent at the centre where that leaves less.

    The tangent is off by at most sup |f''| / 2 times the square of the distance: twice what the
    best line leaves, but without the rounding of differences, which is more in tiny intervals.
    """
    reach = torch.maximum(upper - centre, centre - lower)
    value, slope = g.jet(centre, 1)
    error = g.largest(2, centre, reach) * reach.square()
    better = error < 0.9 * line[2]
    found = slope, value - slope * centre, error
    return tuple(torch.where(better, new, old) for new, old in zip(found, line, strict=True))


def line(
    run: Any, node: Any, x: Form, slope: torch.Tensor, c: torch.Tensor, error: torch.Tensor
) -> Outcome:
    """The outcome of y = slope x + ... with a fresh error; symbols for errors, if there are some
    to give."""
    centre, start = c[0].clone(), x.c[0].clone()  # which outlive the other coefficients
    c, rest = as_symbols(run, node, c, error, x.shared)
    box = times(slope.abs(), x.box) + rest
    steepest = run.ranks(node).most(slope.abs().amax()) if slope.numel() else slope.new_zeros(())
    ball = times(steepest, x.plain_ball()) + run.length(rest, node)
    form = Form(c, box, torch.minimum(ball, run.length(box, node)), shared=x.shared)

    def linear(value: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return slope * (value - start) + centre

    return Outcome(form, [Fresh(box=rest)], linear)


def _taylor(run: Any, node: Any, x: Form, g: jets.Jets, other: tuple) -> Outcome:
    """Taylor's polynomial, or neuron by neuron the line, whichever leaves less."""
    p, (slope, centre, error, point) = run.order, other
    taylor = g.jet(x.c[0], p)
    sizes = run.domain.sizes(x.c)
    c, rest = compose(
        run.algebra, x.c, sizes, taylor, lambda S: g.largest(p + 1, x.c[0], S)
    )
    S = sum(sizes[1:])
    turn = 2 * g.largest(2, x.c[0], S + x.box) * (S + x.box)
    turn = torch.minimum(turn, g.largest(1, x.c[0], S + x.box) + taylor[1].abs())
    bent = times(turn, x.box)
    straight = ~(rest + bent < error) & ~point
    lines = torch.cat((centre.unsqueeze(0), slope * x.c[1:]))
    c = torch.where(straight, lines, c)
    rest = torch.where(point, 0.0, torch.where(straight, error, rest))
    through = torch.where(straight, slope, taylor[1])
    turn, bent = (torch.where(straight, 0.0, t) for t in (turn, bent))
    most = run.ranks(node).most
    steepest, turned = most(through.abs().amax()), most(turn.amax())
    box = times(through.abs(), x.box) + rest + bent
    bent_ball = torch.minimum(times(turned, x.plain_ball()), run.length(bent, node))
    ball = times(steepest, x.plain_ball()) + run.length(rest, node) + bent_ball
    form = Form(c, box, torch.minimum(ball, run.length(box, node)))
    fresh = [Fresh(box=rest), Fresh(box=bent, ball=x.plain_ball(), stretch=turn)]
    start, value0 = x.c[0].clone(), c[0].clone()

    def linear(value: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return through * (value - start) + value0

    return Outcome(form, fresh, linear)


@rule_for(BoundMaximum)
def extreme(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """max(a, b) = b + relu(d), min(a, b) = a - relu(d), d = a - b the first input."""
    d, a, b = inputs
    if not isinstance(d, Form):
        return by_intervals(run, node, inputs)
    made = through(run, node, node.curve, d)
    kept, sign = (b, 1.0) if node.sign > 0 else (a, -1.0)
    inner = made.linear
    if isinstance(kept, Form):
        c = sum(padded(kept.c, sign * made.form.c))
        box, ball = kept.box + made.form.box, kept.plain_ball() + made.form.ball
    else:
        c = sign * made.form.c
        c = torch.cat((c[:1] + kept, c[1:]))
        box, ball = made.form.box, made.form.ball

    def linear(d: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (b if node.sign > 0 else a) + sign * inner(d)

    return Outcome(Form(c, box, ball), made.fresh, linear)


@rule_for(BoundPRelu)
@reading_shares
def prelu(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """w x + (1 - w) relu(x)."""
    x, w = inputs
    if isinstance(w, Form):
        return by_intervals(run, node, inputs)
    w = node._slopes(w, x.c.ndim - 1)
    lower, upper = run.range(x)
    slope, middle, error = one_line(node.curve, lower, upper, x.c[0])
    slope, middle, error = w + (1 - w) * slope, (1 - w) * middle, (1 - w).abs() * error
    c = plus(run.domain_of(x).algebra.scaled(x.c, slope), middle)
    return line(run, node, x, slope, c, error)


@rule_for(BoundProduct, "Mul")
@reading_shares
def product(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """y = a b. See above."""
    if not all(isinstance(x, Form) for x in inputs):
        return _scaled(run, node, inputs)
    a, b = run.whole(inputs)
    ca, cb = padded(a.c, b.c)
    if ca.shape != cb.shape:
        return by_intervals(run, node, inputs)
    c = run.algebra.multiply(ca, cb)
    na, nb = run.domain.sizes(ca), run.domain.sizes(cb)
    beyond = excess(na, nb, run.order)
    groups = run.domain.groups
    if run.order == 1 and len(ca) > 1 and len({g.kind for g in groups}) == 1 and (
        groups[0].kind == "box"
    ):
        forms = [
            AffineForm(f[0], f[1:].movedim(0, -1), torch.zeros_like(f[0]), float("inf"))
            for f in (ca, cb)
        ]
        low, high = elementwise_range(*forms)
        low, high = torch.maximum(low, -beyond), torch.minimum(high, beyond)
        c = torch.cat((c[:1] + (low + high) / 2, c[1:]))
        beyond = (high - low) / 2
    elif run.errors is not None and len(ca) > 1:
        half, middle = product_range(run.domain, ca[1:], cb[1:])
        c, beyond = torch.cat((c[:1] + middle, c[1:])), half
    da, db = sum(na[1:]), sum(nb[1:])
    bent = times(da, b.box) + times(db, a.box) + times(a.box, b.box)
    box = beyond + bent + times(na[0], b.box) + times(nb[0], a.box)
    most = run.ranks(node).most
    ra, rb = a.plain_ball(), b.plain_ball()
    wide_a, wide_b = most((na[0] + da + a.box).amax()), most((nb[0] + db).amax())
    ball = run.length(beyond, node) + times(wide_a, rb) + times(wide_b, ra)
    shift = (c[0] - ca[0] * cb[0]).detach()
    form = Form(c, box, torch.minimum(ball, run.length(box, node)))
    return Outcome(
        form, [Fresh(box=beyond), Fresh(box=bent)], lambda a, b: a * b + shift
    )


def _scaled(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """A product with a constant."""
    x, w = inputs if isinstance(inputs[0], Form) else reversed(inputs)
    c = run.domain_of(x).algebra.scaled(x.c, w)
    if c.shape[1:] != x.shape:
        return by_intervals(run, node, inputs)
    box = times(x.box, w.abs().expand_as(x.box))
    ball = torch.minimum(
        times(x.plain_ball(), run.ranks(node).most(w.abs().amax())), run.length(box, node)
    )
    return Outcome(Form(c, box, ball, shared=x.shared))
