"""The value of a node in a forward pass, and the errors that its operator makes.

A node's value is z = P(s) + R for some s in the domain, the same for all nodes. Shapes: M monomials
(`polynomials`), B batch, F the last dimension (features), T... the dimensions between.

==========  ======================  ==============================================================
tensor      shape                   on the ranks
==========  ======================  ==============================================================
c           [M, B, T..., F]         sharded nodes: all monomials, the rank's own features;
                                    replicated: all, or of the rank's own symbols (`shares`)
box         [B, T..., F]            as the node
ball        [B, T...]               replicated: of all features, also at a sharded node
heads       [B, T..., n]            sharded nodes: the rank's own heads
==========  ======================  ==============================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lirpa_megatron.forward.ranks import Ranks


@dataclass(frozen=True)
class ScoreRemainder:
    """R of attention scores, for the operator that reads them: for query i and key j

        R_ij = scale (<a_i, k_j> + <q_i, b_j>) + e_ij.
    """

    queries: torch.Tensor
    """|a_i|_2 is at most this, [B, n, Q]."""
    keys: torch.Tensor
    """|b_j|_2, [B, n, S]."""
    k0: torch.Tensor
    """Centres of the keys k_j, [B, n, S, d]."""
    q_size: torch.Tensor
    """|q_i|_2 at the centre, [B, n, Q]."""
    fresh: torch.Tensor
    """|e_ij|, [B, n, Q, S]."""
    scale: float


@dataclass(frozen=True)
class Form:
    """P and what bounds R."""

    c: torch.Tensor
    """Coefficients of P. c[0] is the centre."""
    box: torch.Tensor
    """|R_i| is at most this."""
    ball: torch.Tensor
    """R = stretch * R' elementwise, and |R'|_2 over the last dimension is at most this."""
    stretch: torch.Tensor | None = None
    """[F]; None: ones."""
    heads: torch.Tensor | None = None
    """The ball of each head's part of the last dimension (without `stretch`), if known."""
    scores: ScoreRemainder | None = None
    source: tuple[torch.Tensor, torch.Tensor] | None = None
    """(W, b): R = W R' for some |R'|_2 <= b; W as the features lie, [F, i], b [B, T...]. Where
    heads are formed later."""
    limits: tuple[torch.Tensor, torch.Tensor] | None = None
    """Bounds of the value from elsewhere."""
    shared: bool = False
    """Whether c has the rank's own symbols alone (`shares`)."""

    @property
    def shape(self) -> torch.Size:
        """[B, T..., F]."""
        return self.c.shape[1:]

    def plain_ball(self) -> torch.Tensor:
        """The ball without `stretch`."""
        return self.ball if self.stretch is None else self.ball * self.stretch.abs().amax()

    def safe(self, ranks: Ranks) -> tuple[Form, Fresh | None]:
        """NaN in a remainder becomes infinity; coefficients that are not finite become 0 with an
        infinite remainder, which is an error of its own.

        Args:
            ranks: those that share the features, or the symbols.

        Returns:
            the form and that error, if there is one.
        """
        least, most = self.c.detach().aminmax()  # NaN if one is
        box, ball, heads = _no_nan(self.box), _no_nan(self.ball), self.heads
        heads = None if heads is None else _no_nan(heads)
        if not ranks.any(~(least.isfinite() & most.isfinite())):
            return replace(self, box=box, ball=ball, heads=heads), None
        bad = ~self.c.isfinite()
        lost = bad.any(0)
        lost = ranks.most(lost.to(box)) > 0 if self.shared else lost
        wild = torch.where(lost, torch.inf, torch.zeros_like(box))
        ball = torch.full_like(ball, torch.inf)
        found = replace(self, c=torch.where(bad, 0.0, self.c), box=torch.maximum(box, wild),
                        ball=ball, heads=None, scores=None)
        return found, Fresh(box=wild)


def squared(x: torch.Tensor) -> torch.Tensor:
    """x^2, without a gradient where it is not finite, which would be 0 times infinity."""
    if not x.requires_grad:
        return x.square()
    finite = x.isfinite()
    return torch.where(finite, torch.where(finite, x, 0.0).square(), x.detach().square())


def times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b, where 0 times infinity is 0; without a gradient where one is 0 or infinite."""
    zero = (a == 0) | (b == 0)
    if not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return torch.where(zero, 0.0, a * b)
    wild = ~(a.isfinite() & b.isfinite())  # their gradients would be 0 times infinity
    product = torch.where(zero | wild, 0.0, a) * torch.where(zero | wild, 0.0, b)
    return torch.where(wild & ~zero, (a * b).detach(), product)


def _no_nan(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), torch.inf, x)


@dataclass(frozen=True)
class Fresh:
    """One error e that an operator adds at its output, beyond its linear map of the incoming R.

    For a row g (of a margin, through the linearised network) |<g, e>| is at most the least of what
    `box` and `ball` give. Both bound the same error; None bounds nothing.
    """

    box: torch.Tensor | None = None
    """|e_i|, [B, T..., F]."""
    ball: torch.Tensor | None = None
    """e = stretch * e', |e'|_2 over the last dimension, [B, T...]."""
    stretch: torch.Tensor | None = None
    """Broadcasts to [B, T..., F]."""
    pull: Callable[[torch.Tensor], torch.Tensor] | None = None
    """The error is at an inner value of the operator: maps g at the output to g there."""
    weights: torch.Tensor | None = None
    """e = weights * e' and sum weights e'^2 <= ball^2 over the last dimension."""
    grouped: bool = False
    """The last dimension is one of groups, each with a ball of its own: `ball` [B, T..., groups],
    at a sharded node of the rank's own groups."""


@dataclass
class Outcome:
    """What a rule finds of an operator."""

    form: Form
    fresh: list[Fresh] = field(default_factory=list)
    linear: Callable[..., torch.Tensor] | None = None
    """The operator, linearised: maps the inputs' values to the output's; R goes through its
    Jacobian at the centre. None: the operator's own forward."""
    columns: Callable[[], torch.Tensor] | None = None
    """() -> directions [N, B, T..., F], for `error_symbols`: R = sum_i columns_i e_i + R' with
    |e_i| <= 1 and |R'| <= `rest`; at a sharded node of as many errors on each rank."""
    balls: torch.Tensor | None = None
    """Directions of further errors in L2 balls, for `error_symbols`, [P, n, B, T..., F]: in R
    sum_i balls_pi u_pi for each p of P, |u_p|_2 <= 1; the same errors on all ranks."""
    rest: torch.Tensor | None = None
    """None: the form's box."""


Inputs = list[Any]
"""A `Form` of each input that depends on the perturbation, a tensor of each other."""
