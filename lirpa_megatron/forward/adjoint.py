"""The errors of all relaxations in a margin, by its row through the linearised network.

Every operator maps what came in by its linearisation L and adds a fresh error e (`form.Fresh`), so
the remainder of the output is exactly the sum over the operators of (the L of all later operators)
e. For a row c of the output this is sum <g, e>, g the row taken back to the operator: the gradient
of <c, y> at the operator's output, with every operator replaced by its linearisation at the centre.
That knows how errors cancel, which balls and boxes carried forward do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.forward.form import Fresh, times
from lirpa_megatron.forward.propagation import Run, in_order
from lirpa_megatron.operators.affine.products import above_largest_eigenvalue
from lirpa_megatron.operators.numerics import ROUNDING, safe_root

_BORDER = "the input of the stage"


class Adjoint:
    """The linearised network of a run.

    Args:
        run: after its pass.
        final: the node that it went to.
    """

    def __init__(self, run: Run, final: auto_lirpa.Bound) -> None:
        self.run, self.final = run, final
        self.keeps = torch.is_grad_enabled()
        self.taps: dict[str, torch.Tensor] = {}
        self.border: torch.Tensor | None = None
        with torch.enable_grad():
            self.value = self._evaluate(final)

    def _evaluate(self, final: auto_lirpa.Bound) -> torch.Tensor:
        values = {
            name: self.run.window.of(self.run.nodes[name], x) if self.run.window else x
            for name, x in self.run.centres.items()
        }
        if self.run.below is not None:
            ((name, centre),) = values.items()
            self.border = torch.zeros_like(centre, requires_grad=True)
            values[name] = centre + self.border
        for node in in_order(final):
            step = self.run.steps.get(node.name)
            if step is None:
                continue
            inputs = [
                values[x.name] if x.name in values else self.run.constant_of(x)
                for x in node.inputs
            ]
            value = (step.linear or node.forward)(*self.run.read(node, inputs))
            if step.fresh:
                self.taps[node.name] = tap = torch.zeros_like(value, requires_grad=True)
                value = value + tap
            values[node.name] = value
        return values[final.name]

    def errors(self, row: torch.Tensor) -> torch.Tensor:
        """Bound of what a row has from all errors.

        Args:
            row: [B, *output shape]; of a sharded output the rank's own features.

        Returns:
            [B], replicated.
        """
        names, taps = list(self.taps), list(self.taps.values())
        taps += [] if self.border is None else [self.border]
        if not taps:
            return row.flatten(1)[:, 0] * 0
        grads = torch.autograd.grad(
            self.value, taps, row, retain_graph=True, create_graph=self.keeps, allow_unused=True,
        )
        total: Any = row.flatten(1)[:, 0] * 0
        for name, g in zip(names, grads, strict=False):
            if g is not None:
                total = total + self._at(name, g.unsqueeze(0))[0]
        if self.border is not None:  # a stage is never without a way from its input
            total = total + self.run.below.errors(grads[-1])
        return total

    def every_error(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds of the errors of each number of the output, and of each position's vector.

        The rows of one position go back together; over several ranks one by one. With Phi the
        rows of a position at an error e within a ball, |Phi e| is at most the largest singular
        value of Phi times the ball; of an error in a box it is at most the length of what the
        rows give one by one.

        Args:
            features: whose errors are asked for, of a sharded output of all ranks' features, the
                same on every rank.

        Returns:
            (box [B, T..., F], infinite at other features; of a sharded output the rank's own. Ball
            [B, T...] of these features, replicated).
        """
        value = self.value
        width, positions = value.shape[-1], value[0, ..., 0].numel()
        first = self.run.ranks(self.final).rank * width
        own = features - first
        here = ((own >= 0) & (own < width)).nonzero().flatten()
        boxes, balls = [], []
        for position in range(positions):
            rows = value.new_zeros(len(features), positions, width)
            rows[here, position, own[here]] = 1.0
            rows = rows.reshape(len(features), 1, *value.shape[1:]).expand(-1, *value.shape)
            found, ball = self.together(rows)
            box = found.new_full((found.shape[1], width), torch.inf)
            boxes.append(box.index_copy(1, own[here], found[here].transpose(0, 1)))
            balls.append(ball)
        return torch.stack(boxes, 1).reshape(value.shape), torch.stack(balls, 1).reshape(
            value.shape[:-1]
        )

    def together(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bounds of what some rows have from all errors, those of lower pipeline stages included.

        Args:
            rows: [R, B, *output shape].

        Returns:
            (of each row [R, B], of the L2 norm over all rows [B]).
        """
        back = self._back(rows)
        border = back.pop(_BORDER, None)
        found = [
            self._together(fresh, g, name) for name, g in back.items()
            for fresh in self.run.steps[name].fresh
        ]
        if border is not None:
            found.append(self.run.below.together(border))
        none = rows.flatten(2)[..., 0] * 0
        return sum((box for box, _ in found), none), sum((ball for _, ball in found), none[0])

    def _back(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows [R, B, *output shape] taken back to all errors: name -> [R, B, ...]; to the input of
        a stage under `_BORDER`."""
        names, taps = list(self.taps), list(self.taps.values())
        if self.border is not None:
            names, taps = [*names, _BORDER], [*taps, self.border]
        if not taps:
            return {}
        words: dict[str, Any] = {
            "retain_graph": True, "create_graph": self.keeps, "allow_unused": True
        }
        if self.run.context.collectives.size == 1:
            grads = torch.autograd.grad(self.value, taps, rows, is_grads_batched=True, **words)
            return {name: g for name, g in zip(names, grads, strict=True) if g is not None}
        each = [torch.autograd.grad(self.value, taps, row, **words) for row in rows]
        return {
            name: torch.stack(g) for name, g in zip(names, zip(*each, strict=True), strict=True)
            if g[0] is not None
        }

    def _together(
        self, fresh: Fresh, g: torch.Tensor, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(|<g, e>| [R, B] row by row, the L2 norm over all rows [B])."""
        one = self._of(fresh, g, name)
        length = safe_root(one.square().sum(0))
        if fresh.ball is None:
            return one, length
        g = g if fresh.pull is None else fresh.pull(g)
        if fresh.weights is not None:
            g = g * safe_root(fresh.weights)
        elif fresh.stretch is not None:
            g = g * fresh.stretch
        ranks, inner = self.run.ranks(self.run.nodes[name]), fresh.weights is not None
        if fresh.grouped:
            g, inner = _by_group(fresh, g), True
        matrices = g.movedim(0, -2)  # [B, T..., R, F]
        ball = fresh.ball.expand(matrices.shape[:-2])
        some = (ball != 0).flatten()  # tokens before the perturbed ones have no errors
        some = (some if inner else ranks.most(some.to(ball)) > 0).nonzero().flatten()
        matrices = matrices.flatten(0, -3)[some]
        gram = matrices @ matrices.transpose(-1, -2)
        gram = gram if inner else ranks.total(gram)
        finite = gram.isfinite().flatten(1).all(1)
        largest = above_largest_eigenvalue(torch.where(finite[:, None, None], gram, 0.0), 2)
        found = torch.where(finite, safe_root(largest), torch.inf)
        size = ball.new_zeros(ball.numel()).index_put((some,), found).reshape(ball.shape)
        ball = times(size * (1 + 10 * ROUNDING[g.dtype]), ball)
        ball = ball.flatten(1).sum(-1) if ball.ndim > 1 else ball  # of nodes without positions
        return one, torch.minimum(length, ranks.total(ball) if inner else ball)

    def _at(self, name: str, g: torch.Tensor) -> torch.Tensor:
        found = [self._of(fresh, g, name) for fresh in self.run.steps[name].fresh]
        return sum(found[1:], found[0])

    def _of(self, fresh: Fresh, g: torch.Tensor, name: str) -> torch.Tensor:
        """|<g, e>|, [R, B], for rows g [R, B, ...]."""
        ranks = self.run.ranks(self.run.nodes[name])
        g = g if fresh.pull is None else fresh.pull(g)
        both: list[torch.Tensor] = []
        if fresh.box is not None:
            part = times(g.abs(), fresh.box)
            both.append(ranks.total(_flat(part)))
        if fresh.weights is not None:
            size = safe_root((fresh.weights * g.square()).sum(-1))
            return ranks.total(_flat(times(size, fresh.ball)))
        if fresh.grouped:
            size = safe_root(_by_group(fresh, g * fresh.stretch).square().sum(-1))
            both.append(ranks.total(_flat(times(size, fresh.ball))))
        elif fresh.ball is not None:
            scaled = g if fresh.stretch is None else g * fresh.stretch
            square = scaled.square().sum(-1)
            size = safe_root(ranks.total(square))
            both.append(_flat(times(size, fresh.ball)))
        return both[0] if len(both) == 1 else torch.minimum(*both)


def _by_group(fresh: Fresh, g: torch.Tensor) -> torch.Tensor:
    """Rows [..., groups d] -> [..., groups, d]."""
    return g.unflatten(-1, (fresh.ball.shape[-1], -1))


def _flat(x: torch.Tensor) -> torch.Tensor:
    """Summed over all but rows and batch."""
    return x.flatten(2).sum(-1) if x.ndim > 2 else x


def smallest_rows(low: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
    """For each sample the places of the least numbers of [B, S], one [B] after the other."""
    return list(low.topk(min(count, low.shape[1]), dim=1, largest=False).indices.unbind(1))
