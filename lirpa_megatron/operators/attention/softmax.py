"""Bounds of softmax and log-softmax outside attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lirpa_megatron.arithmetic.near import exact
from lirpa_megatron.operators.attention.softmax_weights import (
    phi,
    quotient,
    weight_box,
    weight_interval,
)
from lirpa_megatron.operators.context import OperatorInputs
from lirpa_megatron.operators.numerics import clamp_through, mask_overflow
from lirpa_megatron.operators.operator import boxed
from lirpa_megatron.operators.relaxed import RowRelaxed

_FAR = 500.0
"""Larger deviations of scores are treated as unbounded: e^(x - y) must not overflow float32."""


class _OverOneDimension(RowRelaxed):
    """Base: one input x [B, *shape], along the dimension `dim` (negative), which is not sharded."""

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.dim = int(attr["dim"])
        self.requires_input_bounds = [0]

    def check_sharded(self, sharded: Sequence[bool], where: str) -> None:
        if self.dim == -1:
            raise NotImplementedError(
                f"{self.name}: a softmax over features that are sharded; gather them first "
                "(gather_output=True)"
            )

    def _last(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(self.dim, -1)

    def _back(self, x: torch.Tensor) -> torch.Tensor:
        return x.movedim(-1, self.dim)

    def _box(self, interval: Any) -> tuple[torch.Tensor, torch.Tensor]:
        lower, upper = boxed(interval)
        return self._last(lower), self._last(upper)


@dataclass(frozen=True)
class _Weights:
    """What all rows of A share, along the last dimension of size n."""

    center: torch.Tensor
    p0: torch.Tensor
    """Softmax of the center."""
    dl: torch.Tensor
    du: torch.Tensor
    """Range of delta is [dl, du]; 0 where `loose`."""
    down: torch.Tensor
    up: torch.Tensor
    """The weights lie in [p0 - down, p0 + up]."""
    loose: torch.Tensor
    """Where the range of x is infinite or too wide: [..., 1]."""


class BoundSoftmax(_OverOneDimension):
    """y = softmax(x) along one dimension.

    ==========  ================  =========================================
    tensor      shape             on the ranks
    ==========  ================  =========================================
    x, y        [B, *shape]       replicated
    A_y, A_x    [R, B, *shape]    in the layout of the node
    ==========  ================  =========================================

    **CROWN.** As `BoundSoftmaxValues` with unit vectors as values: for a row a of A_y,
    m the center of x's box, p0 = softmax(m), delta_j = (x_j - m_j) - sum_k p0_k (x_k - m_k),

        c_j = a_j - sum_k p0_k a_k,     phi_j = e^delta_j - 1 - delta_j >= 0,

    exactly

        <a, y> = sum_j p0_j a_j + G + sum_j p0_j phi_j (c_j - G) / (1 + sum_j p0_j phi_j),
        G = sum_j p0_j c_j delta_j = sum_j p0_j c_j (x_j - m_j).

    The first two terms are the plane; the quotient is bounded from below with its denominator
    (`softmax.quotient`). A second plane is constant: p - p0 lies in [-down, up] (`weight_box`) and
    sums to 0, so <a, y> >= sum p0 a - sum_j max(up_j (mu - c_j), down_j (c_j - mu)) for every mu;
    and <a, y> >= min a. Without alpha, the plane that is better at the center is used; alpha
    [B, *shape without dim] mixes both, for each row. All coordinates are relaxed together for a
    given row, so these bounds respect sum y = 1 up to rounding (bounds for each coordinate, as in
    Wei et al., *Convex bounds on the softmax function*, AISTATS 2023, do not).

    **IBP**: the exact range of each weight over the box.

    **Degenerate.** Zero width: the value, up to rounding. Infinite or very wide: the constant
    plane; with an infinite range, weights lie in [0, 1].
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, self.dim)

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The range of each weight over the box."""
        l, u = self._box(v[0])
        none = torch.zeros_like(l, dtype=torch.bool)
        least, most = weight_interval(l, u, none, 0.0)
        return self._back(least), self._back(most)

    def alpha_shape(self) -> tuple[int, ...]:
        return tuple(self._last(self.inputs[0].lower).shape[:-1])

    def relaxation(self, inputs: OperatorInputs) -> _Weights:
        l, u = self._last(inputs[0].lower), self._last(inputs[0].upper)
        # Where bounds are not finite, p0 must still be valid weights.
        l, u, wild = mask_overflow(l, u, torch.finfo(l.dtype).max / 64)
        center = l / 2 + u / 2
        p0 = torch.softmax(center, -1)
        half = u / 2 - l / 2
        reach = (p0 * half).sum(-1, keepdim=True) - p0 * half + (1 - p0) * half
        eps = torch.finfo(l.dtype).eps
        reach = reach + (8 * eps * (center.abs() + reach).amax(-1, keepdim=True)).detach()
        loose = (wild | ~(reach <= min(_FAR, torch.finfo(l.dtype).max ** 0.125))).any(
            -1, keepdim=True
        )
        reach = torch.where(loose, 0.0, reach)
        least, most = weight_box(p0, -reach, reach)
        least, most = torch.where(loose, 0.0, least), torch.where(loose, 1.0, most)
        return _Weights(center, p0, -reach, reach, p0 - least, most - p0, loose)

    def lower_plane(
        self, A: torch.Tensor, x: _Weights, move: torch.Tensor | None = None, known: Any = None
    ) -> tuple[tuple, torch.Tensor]:
        """A_y -> (A_x [R, B, *shape],), bias [R, B]."""
        a, eps = self._last(A), 16 * torch.finfo(A.dtype).eps
        mean = (x.p0 * a).sum(-1, keepdim=True)
        c = a - mean
        g = x.p0 * c
        G = (g.clamp(min=0) * x.du + g.clamp(max=0) * x.dl).sum(-1, keepdim=True)
        P = x.p0 * torch.maximum(phi(x.dl), phi(x.du))
        curved = quotient(G - c, P)
        spread = x.up + x.down
        mu = (c * spread).sum(-1, keepdim=True) / spread.sum(-1, keepdim=True).clamp(min=1e-12)
        flat = torch.minimum(*(
            torch.maximum(x.up * (m - c), x.down * (c - m)).sum(-1) for m in (0.0, mu)
        ))
        flat = torch.minimum(flat, (mean - a.amin(-1, keepdim=True)).squeeze(-1))
        loose = x.loose.squeeze(-1)
        share = exact(((curved <= flat) & ~loose).to(a.dtype))
        if move is not None:
            share = clamp_through(share + move, 0, 1)
            share = torch.where(loose, 0.0, share)
        rest = share * curved + (1 - share) * flat
        noise = eps * (a.abs() * x.p0 + (g * x.center).abs() + c.abs() * x.p0).sum(-1).detach()
        g = g * share.unsqueeze(-1)
        bias = mean.squeeze(-1) - (g * x.center).sum(-1) - rest - noise
        return (self._back(g),), bias.flatten(2).sum(-1) if bias.ndim > 2 else bias


@dataclass(frozen=True)
class _Sums:
    """The relaxation of log sum exp along the last dimension."""

    center: torch.Tensor
    half: torch.Tensor
    """Half of the box's width; 0 where `wild`."""
    top: torch.Tensor
    """The largest upper end of x: [..., 1]."""
    k: torch.Tensor
    b: torch.Tensor
    """e^(x_j - top) <= k_j x_j + b_j."""
    most: torch.Tensor
    """Log sum exp of the upper ends, [..., 1]."""
    wild: torch.Tensor
    """Where a bound is not finite: [..., 1]."""


class BoundLogSoftmax(_OverOneDimension):
    """y_j = x_j - L(x), L = log sum_k e^x_k along one dimension. Shapes: as `BoundSoftmax`.

    **CROWN.** For a row a, <a, y> = <a, x> - S L(x) with S = sum_j a_j, exactly. L is convex: from
    below it has the tangent plane at any t of the box, L(t) + <softmax(t), x - t>. From above

        e^(x_j - M) <= k_j x_j + b_j (the chord, M the largest upper end),
        L <= M + log s + (sum_j (k_j x_j + b_j) - s) / s     for every s > 0,

    because the logarithm is concave (Wei et al., *Convex bounds on the softmax function*, AISTATS
    2023), with s the chords' sum at t; or the constant L(u), if that is smaller at the center. t is
    the center without alpha; alpha [B, *shape] moves it to the faces of the box.

    **IBP**: exact for each coordinate: smallest at its own lower end and the others' upper ends.

    **Degenerate.** Zero width: the value, up to rounding. Infinite bounds: -infinity where S reads
    them.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(x, self.dim)

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The range of each coordinate over the box."""
        l, u = self._box(v[0])
        eps, found = 8 * torch.finfo(l.dtype).eps, []
        for own, others, sign in ((l, u, -1), (u, l, 1)):
            total = torch.logaddexp(own, _others(others))
            size = (own.abs() + total.abs()).detach()
            y = own - total + sign * torch.where(l < u, eps * size, 0.0)
            vacuous = torch.full_like(y, 0.0 if sign > 0 else -float("inf"))
            found.append(torch.where(y.isnan(), vacuous, y.clamp(max=0)))
        return self._back(found[0]), self._back(found[1])

    def alpha_shape(self) -> tuple[int, ...]:
        return tuple(self._last(self.inputs[0].lower).shape)

    def relaxation(self, inputs: OperatorInputs) -> _Sums:
        l, u = self._last(inputs[0].lower), self._last(inputs[0].upper)
        l, u, wild = mask_overflow(l, u, torch.finfo(l.dtype).max ** 0.5)
        wild = wild.any(-1, keepdim=True)
        l, u = torch.where(wild, 0.0, l), torch.where(wild, 0.0, u)
        top = u.amax(-1, keepdim=True).detach()
        el, eu = (l - top).exp(), (u - top).exp()
        eps, width = torch.finfo(l.dtype).eps, u - l
        tiny = width <= eps**0.5
        k = torch.where(tiny, eu, (eu - el) / torch.where(tiny, 1.0, width))
        b = torch.maximum(el - k * l, eu - k * u)
        size = torch.maximum(l.abs(), u.abs())
        b = b + (8 * eps * (eu * (1 + top.abs() + size) + k * size)).detach()
        most = torch.logsumexp(u, -1, keepdim=True)
        return _Sums(l / 2 + u / 2, width / 2, top, k, b, most, wild)

    def lower_plane(
        self, A: torch.Tensor, x: _Sums, move: torch.Tensor | None = None, known: Any = None
    ) -> tuple[tuple, torch.Tensor]:
        """A_y -> (A_x [R, B, *shape],), bias [R, B]."""
        a, eps = self._last(A), 16 * torch.finfo(A.dtype).eps
        S = a.sum(-1, keepdim=True)
        t = x.center if move is None else x.center + move * x.half
        p, value = torch.softmax(t, -1), torch.logsumexp(t, -1, keepdim=True)
        below = value - (p * t).sum(-1, keepdim=True)
        s = (x.k * t + x.b).sum(-1, keepdim=True)
        above = x.top + s.log() - 1 + x.b.sum(-1, keepdim=True) / s
        slope = x.k / s
        at_center = above + (slope * x.center).sum(-1, keepdim=True)
        constant = ~(at_center <= x.most)
        above = torch.where(constant, x.most, above)
        slope = torch.where(constant, 0.0, slope)
        # -S L: uses the plane above L if S > 0, otherwise the one below.
        plane = torch.where(S > 0, slope, p)
        level = torch.where(S > 0, above, below)
        size = (plane * (x.center.abs() + x.half)).sum(-1, keepdim=True) + level.abs() + 1
        rest = S * level + (eps * S.abs() * size).detach()
        rest = torch.where(x.wild & (S != 0), float("inf"), rest).squeeze(-1)
        A_x = a - torch.where(x.wild, 0.0, S * plane)
        return (self._back(A_x),), -(rest.flatten(2).sum(-1) if rest.ndim > 2 else rest)


def _others(x: torch.Tensor) -> torch.Tensor:
    """Log sum exp of the other numbers along the last dimension; -infinity if there are none."""
    pad = torch.full_like(x[..., :1], -float("inf"))
    ahead = torch.cat((pad, torch.logcumsumexp(x, -1)[..., :-1]), -1)
    behind = torch.logcumsumexp(x.flip(-1), -1).flip(-1)
    behind = torch.cat((behind[..., 1:], pad), -1)
    return torch.logaddexp(ahead, behind)
