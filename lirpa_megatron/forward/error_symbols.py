"""Errors of relaxations as symbols of their own.

**In networks without tokens** the errors of a node become symbols all together (`as_symbols`), as
long as there are enough to give.

**In networks with tokens** they are symbols from layer to layer (`ErrorSymbols`). After an operator
that relaxes, the box of its remainder becomes symbols in [-1, 1], one for each number of the box:
R_i = box_i e_i; some rules know directions of their errors (`form.Outcome.columns`), or that many
errors together reach less than their ranges (`squares`). Behind it the errors go through the
network as the set's own symbols do, so that they cancel where they meet, which boxes and balls do
not.

    z = P(s) + E e + R,   |e_i| <= 1

They would be some thousand more after every layer. Where a norm reads a node, which is where layers
meet, a sample keeps the `most` errors with the largest sum of |coefficients|; an ellipsoid around
all others takes their place (`ellipsoids`), whose symbols, one for each number that moves, lie in
one L2 ball. Symbols may be left out and renumbered there because no other node that is still to be
read has coefficients of them. After the set's own come the ball's symbols, then the kept errors.

Errors are symbols for ranges alone: what a row of the specification has of them is also bounded by
`adjoint`, where none have been left out, and the better of the two bounds counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.forward.domains import Domain, Group
from lirpa_megatron.forward.ellipsoids import ellipsoid
from lirpa_megatron.forward.form import Form, Outcome, times
from lirpa_megatron.forward.sums import in_cache
from lirpa_megatron.operators.attention.scores import BoundScores
from lirpa_megatron.operators.attention.softmax_values import BoundSoftmaxValues
from lirpa_megatron.operators.elementwise.activations import BoundCurve
from lirpa_megatron.operators.norm.norm import BoundNorm
from lirpa_megatron.parallel import spmd

_RELAX = (BoundNorm, BoundScores, BoundSoftmaxValues, BoundCurve)
"""Operators whose errors become symbols."""


_KEPT, _NUMBERS, _MANY = 256, 2048, 64
"""How many errors are kept by default, where at most so many numbers of a norm's input move, and
the set has at least so many symbols: of a smaller set the pass itself costs far less."""


def errors_kept(run: Any, order: Sequence[Any], leaves: Sequence[Any], symbols: int) -> int:
    """How many errors a pass keeps: the option, or by default according to the sizes.

    None with gradients, of polynomials of degree 2 and more, in networks without norms of tokens,
    where nothing would end the growth of the number of symbols, and in those with norms of queries
    and keys.

    Args:
        run: the pass.
        order: its nodes.
        leaves: the perturbed inputs.
        symbols: of the set.
    """
    norms = [
        n for n in order
        if isinstance(n, BoundNorm) and len(n.output_shape) > 2 and not run.context.is_sharded(n)
    ]
    sharded = any(run.context.is_sharded(leaf) for leaf in leaves)
    # with fewer key groups than ranks each rank would have symbols of its own for the same errors
    other = any(isinstance(n, BoundNorm) and run.head_dim(n) for n in order)
    if run.order > 1 or not norms or sharded or other or torch.is_grad_enabled():
        return 0
    if run.options.kept_errors is not None:
        return run.options.kept_errors
    numbers = max(_moving(run, n) for n in norms)
    return _KEPT if numbers <= _NUMBERS and symbols >= _MANY else 0


def _moving(run: Any, node: Any) -> int:
    """How many numbers of a sample move."""
    _, positions, *features = node.output_shape
    cut = run.window is not None and node.name in run.window.cut
    return (positions - run.window.first if cut else positions) * math.prod(features)


class ErrorSymbols:
    """The symbols of errors of a run.

    Args:
        run: the pass.
        most: how many errors are kept from layer to layer, besides the ball of the others.
        groups: the set's, which come first.
    """

    def __init__(self, run: Any, most: int, groups: list[Group]) -> None:
        self.run, self.most, self.groups = run, most, list(groups)
        self.own = sum(group.symbols for group in groups)
        """How many symbols are the set's."""

    def after(self, node: Any, form: Form, outcome: Outcome | None) -> Form:
        """The form of an operator's output, with its errors as symbols.

        Args:
            outcome: of its rule; None where the form's remainder is not that of the rule.
        """
        if not isinstance(node, _RELAX):
            return form
        columns = None
        if outcome is not None and outcome.rest is not None:
            columns = None if outcome.columns is None else outcome.columns()
            form = replace(form, box=outcome.rest)
            if outcome.balls is not None:
                form = replace(form, c=self._with_balls(form.c, outcome.balls))
        return self._symbolized(node, form, columns)

    def _with_balls(self, c: torch.Tensor, balls: torch.Tensor) -> torch.Tensor:
        """Coefficients, with those of errors in balls behind all symbols so far."""
        domain = self.run.domain
        missing = c.new_zeros(1 + domain.symbols - len(c), *c.shape[1:])
        domain.extend(len(balls) * balls.shape[1], len(balls))
        return torch.cat((c, missing, balls.flatten(0, 1)))

    def reduced(self, node: Any, form: Form, others: list[Form]) -> Form:
        """The form of a norm's input, with at most `most` errors and one ball.

        Args:
            others: the forms of all other nodes that are still to be read.
        """
        run = self.run
        if any(len(x.c) > 1 + self.own for x in others):
            return form
        errors, own = form.c[1 + self.own:], 1 + self.own
        if len(errors) <= self.most:
            return form
        balls, boxes, first = [], [errors[:0]], 0
        for group in run.domain.groups[len(self.groups):]:
            found = errors[first: first + group.symbols]
            first += group.symbols
            if group.kind == "box":
                boxes.append(found)
            else:
                balls += found.split(group.size) if len(found) else []
        boxes = torch.cat(boxes)
        kept, left = self._largest(boxes)
        symbols = ellipsoid(left, balls, run.context.collectives)
        lost = ~symbols.isfinite().all(0)
        symbols = torch.where(lost, 0.0, symbols)
        form = replace(form, box=torch.where(lost, torch.inf, form.box))
        c = torch.cat((form.c[:own], symbols, kept))
        domain = run.domain = Domain(self.groups, 1)
        if len(symbols):
            domain.extend(len(symbols), 1)
        if len(kept):
            domain.extend(len(kept))
        return self._symbolized(node, replace(form, c=c))

    def _largest(self, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(the `most` largest errors of each sample, the others), of [N, B, ...]."""
        group = self.run.context.collectives
        sizes = torch.cat([
            some.abs().flatten(2).sum(2) for some in boxes.split(in_cache(boxes))
        ])
        if group.size > 1:  # the first rank's order
            sizes = spmd.broadcast_tensor(sizes, group.group)
        order = sizes.sort(dim=0, descending=True, stable=True)[1]
        parts = [
            [each.index_select(0, p) for p in (places[: self.most], places[self.most:])]
            for each, places in zip(boxes.unbind(1), order.unbind(1), strict=True)
        ]
        return tuple(
            own[0].unsqueeze(1) if len(own) == 1 else torch.stack(own, 1)
            for own in zip(*parts, strict=True)
        )

    def _symbolized(
        self, node: Any, form: Form, columns: torch.Tensor | None = None
    ) -> Form:
        """A form with the numbers of its box as symbols, after errors of given directions.

        Args:
            columns: of these, [N, B, T..., F], of a sharded node as many on each rank.
        """
        run, ranks, c = self.run, self.run.ranks(node), form.c
        box = torch.where(form.box.isfinite(), form.box, 0.0)
        moving = ranks.most((box != 0).any(0).to(box)).flatten().nonzero().flatten()
        if columns is None:
            if not len(moving):
                return form
            columns = c.new_zeros(0, *box.shape)
        start, place = 1 + run.domain.symbols, 1 + run.domain.symbols
        starts = []
        for count in (len(columns), len(moving)):
            starts.append(place + ranks.rank * count)
            place += count * ranks.size
            if count:  # a domain takes an empty group for the end of a form
                run.domain.extend(count * ranks.size)
        if place > start:
            out = c.new_empty(place, *c.shape[1:])
            out[: len(c)] = c
            out[len(c):] = 0.0
            out[starts[0]: starts[0] + len(columns)] = columns
            own = out[starts[1]: starts[1] + len(moving)].flatten(2)
            places = torch.arange(len(moving), device=box.device)
            own[places, :, moving] = box.flatten(1)[:, moving].t()
            c = out
        rest = torch.where(form.box.isfinite(), 0.0, torch.inf)
        return replace(form, c=c, box=rest, ball=run.length(rest, node), stretch=None, heads=None,
                       scores=None, source=None)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def product_range(
    domain: Any, a: torch.Tensor, b: torch.Tensor, of_a: Callable = _same, of_b: Callable = _same
) -> tuple[torch.Tensor, torch.Tensor]:
    """(half, middle): |a(s) b(s) - middle| <= half for two linear forms, elementwise.

    With |a| <= A, |b| <= B, u = a/A and v = b/B: 4 u v = (u + v)^2 - (u - v)^2, and both squares
    are those of linear forms. Forms in many symbols that have nothing to do with one another are in
    a disc rather than in a square: half of A B is left.

    Args:
        domain: of the symbols.
        a, b: [N, B, ...], of shapes that are broadcast to one another.
        of_a, of_b: select numbers of a and of b, [N, B, ...], that are multiplied; linear.
    """
    A, B = domain.size(a, 1), domain.size(b, 1)
    ra, rb = (torch.where(x > 0, 1 / torch.where(x > 0, x, 1.0), 0.0) for x in (A, B))
    A, B, ra, rb = (
        of(x.unsqueeze(0)) for of, x in zip((of_a, of_b) * 2, (A, B, ra, rb), strict=True)
    )
    both = times(A, B)[0]
    if not len(a):
        return torch.zeros_like(both), torch.zeros_like(both)

    def rows(i: int, j: int) -> tuple[torch.Tensor, torch.Tensor]:
        u, v = of_a(a[i:j]) * ra, of_b(b[i:j]) * rb
        return u + v, u - v

    if domain.is_sum:
        up, down = domain.supports(rows, len(a), in_cache(both.unsqueeze(0)))
    else:
        up, down = (domain.size(x, 1) for x in rows(0, len(a)))
    up, down = up.square(), down.square()
    return times(both, up + down) / 8, times(both, up - down) / 8


def as_symbols(
    run: Any, node: Any, c: torch.Tensor, error: torch.Tensor, shared: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(coefficients, what is left of the error): errors as symbols of their own, where there
    are enough to give.

    A node's errors become symbols all together or not at all, and only in networks without
    tokens: with tokens the errors of one operator are more than all symbols.
    """
    ranks = run.ranks(node)
    features = error[0].numel() * ranks.size
    if run.tokens or error.ndim != 2 or features > run.symbols_left:
        return c, error
    first = run.domain.symbols
    run.domain.extend(features)
    run.symbols_left -= features
    finite = torch.where(error.isfinite(), error, 0.0)
    if run.shares is not None:
        run.shares.blocks.append(features)
    if shared:
        return torch.cat((c, *_own_errors(run, c, finite, first))), error - finite
    own = torch.diag_embed(finite).movedim(1, 0)  # [F, B, F]
    before = own.new_zeros(ranks.rank * len(own), *own.shape[1:])
    after = own.new_zeros((ranks.size - 1 - ranks.rank) * len(own), *own.shape[1:])
    missing = c.new_zeros(1 + first - len(c), *c.shape[1:])
    return torch.cat((c, missing, before, own, after)), error - finite


def _own_errors(
    run: Any, c: torch.Tensor, error: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(coefficients of the symbols that c has none of, those of errors [B, F] as symbols from
    `first` on), of the rank's own symbols."""
    shares, width = run.shares, error.shape[-1]
    place = shares.own(first, width)
    features = shares.first(-1) + torch.arange(place.stop - place.start, device=c.device)
    own = F.one_hot(features, width).to(error).unsqueeze(1) * shares.enter(error)
    missing = c.new_zeros(1 + place.start - len(c), *c.shape[1:])
    padding = c.new_zeros(1 + shares.rows - len(c) - len(missing) - len(own), *c.shape[1:])
    return missing, torch.cat((own, padding))
