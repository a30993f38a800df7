"""Rules of linear operators: their linear part goes over all coefficients.

With y = L z + b the polynomial is L P + b, exactly, and R becomes L R:

- box: |L| box, and never more than (norm of the row of L) ball;
- ball: (largest singular value of L) ball, and never more than the norm of the new box.

Singular values come from the Gram matrix of all of the weight, summed over the ranks' shards, and
are rounded up; `weights.Weights` keeps them from call to call as long as the weights are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.forward.form import Form, Inputs, Outcome, times
from lirpa_megatron.forward.polynomials import padded, plus
from lirpa_megatron.forward.ranks import Ranks, sum_twice_differentiable
from lirpa_megatron.forward.rules import by_intervals, reading_shares, rule_for
from lirpa_megatron.forward.shares import ROOM
from lirpa_megatron.forward.weights import lost_length
from lirpa_megatron.operators.functional import margins
from lirpa_megatron.operators.linear.borders import (
    BoundGatherFromRegion,
    BoundScatterToRegion,
    BoundSelectFromRegion,
)
from lirpa_megatron.operators.linear.column import BoundColumnParallelLinear
from lirpa_megatron.operators.linear.columns import COLUMN_OPS
from lirpa_megatron.operators.linear.local import LocalLinear
from lirpa_megatron.operators.linear.positions import BoundRotary, BoundSelectPosition
from lirpa_megatron.operators.linear.row import BoundRowParallelLinear
from lirpa_megatron.operators.linear.structure import BoundConcat, BoundRearrange, BoundSum
from lirpa_megatron.operators.linear.sums import BoundCombine, BoundScale
from lirpa_megatron.operators.linear.vocabulary_margins import Margins
from lirpa_megatron.operators.numerics import safe_root


@rule_for(LocalLinear, "Linear")
@reading_shares
def matrix(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """y = x W^T + b: Column, Row, and plain linear layers.

    Coefficients of a rank's own symbols are gathered before a Column layer, some symbols at a time,
    and a Row layer reduce-scatters them. Where all ranks have all symbols, a Row layer sums
    coefficients and boxes in one all-reduce.
    """
    x, *constants = inputs
    if not isinstance(x, Form) or any(isinstance(y, Form) for y in constants):
        return by_intervals(run, node, inputs)
    splits = isinstance(node, BoundColumnParallelLinear)
    joins = isinstance(node, BoundRowParallelLinear)
    if splits:
        w, b = node._own(constants[0], constants[1:])
    else:
        w, b = (*constants, None)[:2]
        w = w if getattr(node, "transB", 1) else w.t()
    ranks = run.ranks(node) if splits else run.ranks(node.inputs[0])
    box, ball = x.box, x.ball
    ball_in = ball
    box = _boxed(ranks.enter(box) if splits else box, w.abs())
    c, box = _coefficients(run, x, w, box, splits, joins, ranks)
    if b is not None:
        c = plus(c, b)
    stretch = x.stretch
    if stretch is not None and splits:
        stretch = ranks.enter(stretch)
    scaled = w if stretch is None else w * stretch
    rows = scaled.square().sum(-1)
    rows = safe_root(ranks.total(rows) if joins else rows)
    rows = rows + lost_length(w.dtype, w.shape[1])
    grown = times(run.weights.largest_singular(node, scaled, splits, joins, ranks), ball)
    own = ranks.enter(ball) if splits else ball
    box = torch.minimum(box, times(own.unsqueeze(-1), rows))
    heads = _heads(run, node, scaled, own, box)
    ball = torch.minimum(grown, run.length(box, node))
    source = (scaled, ball_in) if splits and run.is_gathered(node) else None
    return Outcome(
        Form(c, box, ball, heads=heads, source=source, shared=_stays_shared(run, x, splits, joins)),
        linear=_row(run, w, b) if joins else None,
    )


def _boxed(box: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """box w^T of numbers >= 0, without a gradient where it is not finite."""
    found = F.linear(box, w)
    if not found.requires_grad or bool(found.isfinite().all()):
        return found
    inner = F.linear(torch.where(box.isfinite(), box, 0.0), w)
    return torch.where(found.isfinite(), inner, found.detach())


def _stays_shared(run: Any, x: Form, splits: bool, joins: bool) -> bool:
    return run.shares is not None if joins else x.shared and not splits


def _coefficients(
    run: Any, x: Form, w: torch.Tensor, box: torch.Tensor, splits: bool, joins: bool, ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor]:
    """(coefficients of W z, box): after a Row layer the ranks' boxes are added up, too."""

    def product(c: torch.Tensor) -> torch.Tensor:
        return F.linear(c, w)

    if splits:
        if x.shared:
            return run.shares.into_region(x.c, product), box
        return product(ranks.enter(x.c)), box
    if joins:
        if run.shares is None:
            both = ranks.total(torch.cat((product(x.c), box.unsqueeze(0))))
            return both[:-1], both[-1]
        centre, box = ranks.total(torch.stack((product(x.c[0]), box)))
        return run.shares.out_of_region(centre, x.c[1:], product), box
    if x.shared:
        own = F.linear(x.c[1:], run.shares.enter(w))
        return torch.cat((product(x.c[:1]), own)), box
    return product(x.c), box


def _row(run: Any, w: torch.Tensor, b: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    """A Row layer's forward, for gradients of gradients."""

    def linear(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        y = sum_twice_differentiable(F.linear(x, w), run.context.collectives)
        return y if b is None else y + b

    return linear


def _heads(
    run: Any, node: Any, w: torch.Tensor, ball: torch.Tensor, box: torch.Tensor
) -> torch.Tensor | None:
    """The ball of each head's part of W R', |R'|_2 <= ball, if attention reads the node."""
    size = run.head_dim(node)
    if not size:
        return None
    norms = run.weights.head_norms(node, w, size)
    boxed = safe_root(box.unflatten(-1, (-1, size)).square().sum(-1))
    return torch.minimum(times(ball.unsqueeze(-1), norms), boxed)


@rule_for(BoundSelectFromRegion)
@reading_shares
def selected(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """A rank's query heads and their keys and values, of the gathered features."""
    x, index = inputs
    ranks = run.ranks(node)
    box = ranks.enter(x.box).index_select(-1, index)
    if x.shared:
        c = run.shares.into_region(x.c, lambda c: c.index_select(-1, index))
    else:
        c = ranks.enter(x.c).index_select(-1, index)
    heads = None
    if x.source is not None:
        w, ball = x.source
        heads = _heads(run, node, ranks.enter(w)[index], ranks.enter(ball), box)
    elif x.heads is not None:  # of normalised keys
        size = run.head_dim(node)
        heads = ranks.enter(x.heads).index_select(-1, index[::size] // size)
    return Outcome(Form(c, box, run.length(box, node), heads=heads))


@rule_for(BoundGatherFromRegion)
def gathered(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """[x_1 ... x_p]: all features on every rank, of its own symbols if these are shared out."""
    (x,) = inputs
    if run.context.collectives.size == 1:
        return Outcome(x)
    gather, shares = run.context.collectives.gather_features, run.shares
    shown = x.c if shares is None else x.c[:1]
    both = gather(torch.cat((shown, x.box.unsqueeze(0))))
    c = both[:-1] if shares is None else shares.gathered(both[0], x.c[1:])
    source = x.source and (gather(x.source[0].t()).t(), x.source[1])
    heads = source and _heads(run, node, *source, both[-1])
    return Outcome(Form(
        c, both[-1], x.plain_ball(), heads=heads, source=source, shared=shares is not None
    ))


@rule_for("MatMul")
@reading_shares
def product_with_matrix(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """y = x W, W a constant."""
    if isinstance(inputs[0], Form) and not isinstance(inputs[1], Form) and inputs[1].ndim == 2:
        return affine(run, node, inputs)
    return by_intervals(run, node, inputs)


@rule_for(
    "Add", "Sub", "Neg", "Identity", "Conv", BoundCombine, BoundScale, BoundRotary,
    BoundRearrange, BoundSum, BoundConcat, BoundScatterToRegion, *COLUMN_OPS.values(),
)
@reading_shares
def affine(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """Any operator that is affine in all its perturbed inputs together.

    Its own forward is run on coefficients, as a batch, and on zeros, which gives what it adds. The
    box is half of its interval bounds around 0.
    """
    inputs = run.alike(node, inputs)
    forms = [x for x in inputs if isinstance(x, Form)]
    shared = forms[0].shared
    c = _each(node, inputs, padded(*(x.c for x in forms)), run.shares.enter if shared else None)
    lower, upper = node.interval_propagate(*(
        (-x.box, x.box) if isinstance(x, Form) else (x, x) for x in inputs
    ))
    box = torch.where(lower.isinf() | upper.isinf(), torch.inf, (upper - lower) / 2)
    ball, stretch, heads = _moved_ball(node, inputs, forms, box.shape)
    length = run.length(box, node)
    ball = length if ball is None else torch.minimum(ball, length) if stretch is None else ball
    return Outcome(Form(c, box, ball, stretch, heads, shared=shared))


def _each(
    node: Any, inputs: Inputs, many: list[torch.Tensor], enter: Callable | None
) -> torch.Tensor:
    """Coefficients of an affine operator's output.

    Args:
        node, inputs: the operator and its inputs.
        many: coefficients of those that are forms, [M, B, ...] each.
        enter: what constants pass that meet the coefficients of a rank's own symbols.
    """
    M, B = many[0].shape[:2]

    def run_on(rows: list[torch.Tensor], enter: Callable | None) -> torch.Tensor:
        each = iter(rows)
        batch = [
            next(each).flatten(0, 1) if isinstance(x, Form)
            else _repeated(source, x if enter is None else enter(x), B, len(rows[0]))
            for x, source in zip(inputs, node.inputs, strict=True)
        ]
        return node.forward(*batch).unflatten(0, (-1, B))

    centre = run_on([c[:1] for c in many], None)
    zero = run_on([torch.zeros_like(c[:1]) for c in many], enter)
    out = centre.new_empty(M, *centre.shape[1:])
    out[:1] = centre
    most = max(centre.numel(), *(c[:1].numel() for c in many))
    step = M if torch.is_grad_enabled() else max(1, ROOM // max(most, 1))
    for first in range(1, M, step):
        rows = [c[first : first + step] for c in many]
        out[first : first + len(rows[0])] = run_on(rows, enter) - zero
    return out


def _repeated(source: Any, x: torch.Tensor, batch: int, count: int) -> torch.Tensor:
    """A constant, once for each coefficient if it has a batch."""
    if source.from_input and x.ndim and x.shape[0] == batch:
        return x.repeat(count, *[1] * (x.ndim - 1))
    return x


def _moved_ball(node: Any, inputs: Inputs, forms: list[Form], shape: torch.Size) -> tuple:
    """(ball, stretch, heads) of a node of a shape [B, T..., F] where they follow from the inputs'
    balls; None where they do not."""
    first = forms[0]
    if isinstance(node, BoundCombine) or type(node).__name__ in ("BoundAdd", "BoundSub"):
        factors = getattr(node, "factors", (1.0, 1.0))
        parts = [
            abs(f) * x.plain_ball() for f, x in zip(factors, inputs, strict=True)
            if isinstance(x, Form)
        ]
        if any(part.shape != parts[0].shape for part in parts):
            return None, None, None
        ball = sum(parts[1:], parts[0])
        return (ball if ball.shape == shape[:-1] else None), None, None
    if type(node).__name__ in ("BoundNeg", "BoundIdentity"):
        return first.ball, first.stretch, first.heads
    if isinstance(node, BoundScatterToRegion):
        return first.plain_ball(), None, None
    if isinstance(node, BoundRotary):
        cos, sin = inputs[1], inputs[2]
        turn = float(safe_root(cos.square() + sin.square()).amax())
        grows = max(1.0, turn) * (1 + 8 * torch.finfo(cos.dtype).eps)
        heads = None if first.heads is None else first.heads * grows
        return first.plain_ball() * grows, None, heads
    if getattr(node, "keeps_features", False) and getattr(node, "batched", True):
        single = len(forms) == 1
        values = [
            (x.ball if single else x.plain_ball()).unsqueeze(-1) if isinstance(x, Form)
            else x[..., :1] if isinstance(node, BoundConcat) else x
            for x in inputs
        ]
        zeros = [
            torch.zeros_like(v) if isinstance(x, Form) else v
            for v, x in zip(values, inputs, strict=True)
        ]
        ball = (node.forward(*values) - node.forward(*zeros)).squeeze(-1)
        return ball, first.stretch if single else None, None
    return None, None, None


@rule_for(BoundSelectPosition)
@reading_shares
def selected_position(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """y = x[:, position], of the positions that move (`windows`)."""
    (x,) = inputs
    place = node.position if run.window is None else run.window.place(node)

    def select(value: torch.Tensor) -> torch.Tensor:
        y = value[:, place]
        return y.unsqueeze(1) if node.keep else y

    c = x.c[:, :, place]
    form = Form(
        (c.unsqueeze(2) if node.keep else c).clone(), select(x.box), select(x.ball), x.stretch,
        None if x.heads is None else select(x.heads), shared=x.shared,
    )
    return Outcome(form, linear=select)


@rule_for("Div")
@reading_shares
def quotient(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """A quotient by a constant is linear."""
    if isinstance(inputs[0], Form) and not isinstance(inputs[1], Form):
        return affine(run, node, inputs)
    return by_intervals(run, node, inputs)


@rule_for(Margins)
def margins_of_tokens(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """y = (w_t - w_j) x + b_t - b_j, some coefficients at a time."""
    x, *tables = inputs
    first = node.forward(x.c[0], *tables)
    (wt, w), _ = node._tables(*tables)
    many = node._enter(x.c)[1:]

    def product(some: torch.Tensor) -> torch.Tensor:
        return margins(some, wt, None, F.linear(some, w), node.shared)

    if torch.is_grad_enabled():
        c = torch.cat((first.unsqueeze(0), product(many)))
    else:  # without a second copy of all
        c = first.new_empty(len(x.c), *first.shape)
        c[0] = first
        some = max(1, ROOM // max(1, first.numel()))
        for out, own in zip(c[1:].split(some), many.split(some), strict=True):
            out.copy_(product(own))
    lower, upper = node.interval_propagate(
        (-x.box, x.box), *((table, table) for table in tables)
    )
    box = (upper - lower) / 2
    ball = node._enter(x.ball)
    stretch = 1.0 if x.stretch is None else node._enter(x.stretch)
    rows = []
    some = max(1, ROOM // w.shape[1])
    for t in range(len(wt)):
        size = torch.cat([  # the differences of one target are as large as W
            safe_root(((wt[t] - part) * stretch).square().sum(-1)) for part in w.split(some)
        ])
        rows.append(times(ball.unsqueeze(-1) if node.shared else ball[t].unsqueeze(-1), size))
    box = torch.minimum(box, torch.stack(rows, 1 if node.shared else 0))
    return Outcome(Form(c, box, run.length(box, node)))
