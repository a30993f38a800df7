"""Attention scores: the product of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from lirpa_megatron.arithmetic.near import chosen
from lirpa_megatron.operators.affine.products import product_range
from lirpa_megatron.operators.context import OperatorInputs
from lirpa_megatron.operators.mccormick import mixed, turned
from lirpa_megatron.operators.numerics import least_product, mask_overflow
from lirpa_megatron.operators.relaxed import RowRelaxed

_LARGEST = 1e15


@dataclass(frozen=True)
class _Products:
    """What all rows of A share about queries and keys, split into heads."""

    q0: torch.Tensor
    """Centers of queries, [B, g, n/g, T, d]."""
    k0: torch.Tensor
    """Centers of keys, [B, g, 1, T, d]."""
    rq: torch.Tensor | None
    """Largest deviations from the centers; None for rows without alpha."""
    rk: torch.Tensor | None
    low: torch.Tensor
    """Range of <dq, dk>, [B, g, n/g, T, T]."""
    high: torch.Tensor
    box: torch.Tensor | None
    """<rq, rk>, the largest |<dq, dk>| on the boxes."""


class BoundScores(RowRelaxed):
    """s = scale * q k^T, head by head.

    ======  ====================  ================================================
    tensor  shape                 on the ranks
    ======  ====================  ================================================
    q       [B, T, n d]           sharded: the rank's n query heads
    k       [B, T, g d]           sharded: their g key groups, n a multiple of g
    s       [B, n, T, T]          sharded
    A_s     [R, B, n, T, T]       REPLICATED, GATHERED or BLOCK (`crown.placement`)
    ======  ====================  ================================================

    **CROWN.** With q = q0 + dq, k = k0 + dk, exactly

        <q, k> = <q0, k> + <q, k0> - <q0, k0> + <dq, dk>.

    The first three are linear. For each pair of positions <dq, dk> lies in [low, high], the
    intersection of two ranges: -+ sum_d |dq_d| |dk_d| from the boxes, and the range from the affine
    forms of q and k, whose deviations come from one input (`product_range`). q0 and k0 are the
    forms' centers if the forms are known, otherwise the boxes' midpoints. (The planes through the
    midpoints are the mean of McCormick's planes.)

    **Alpha** [B, n, T, T], a number m in [-1, 1] for each row and pair, mixes this plane with
    McCormick's two (`mccormick`) of the boxes |dq| <= rq, |dk| <= rk, each below <dq, dk>:

        (1 - |m|) low - |m| <rq, rk> - m (<rq, dk> + <rk, dq>)

    and above it (1 - |m|) high + |m| <rq, rk> + m (<rk, dq> - <rq, dk>).

    **IBP.** The same with boxes. Zero-width boxes give the exact plane. Bounds that are NaN or
    beyond 1e15 give an infinite remainder where A is not 0.
    """

    reads_form = frozenset({0, 1})
    takes_positions = True
    reads_all_positions = frozenset({1})
    feature_dim = 1
    sharded_dim = 1

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.head_dim, self.scale = attr["head_dim"], attr["scale"]
        self.requires_input_bounds = [0, 1]

    # q [..., T, n d] -> [..., g, n/g, T, d] and k [..., T, g d] -> [..., g, 1, T, d].

    def _queries(self, x: torch.Tensor, groups: int) -> torch.Tensor:
        return x.unflatten(-1, (groups, -1, self.head_dim)).movedim(-4, -2)

    def _keys(self, x: torch.Tensor) -> torch.Tensor:
        return self._queries(x, x.shape[-1] // self.head_dim)

    def _split(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._queries(q, k.shape[-1] // self.head_dim), self._keys(k)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        q, k = self._split(q, k)
        return (q @ k.transpose(-1, -2)).flatten(-4, -3) * self.scale

    def relaxation(self, inputs: OperatorInputs) -> _Products:
        """See `_Products`."""
        boxes = [mask_overflow(x.lower, x.upper, _LARGEST) for x in inputs.views]
        forms = [x.form for x in inputs.views]
        if None in forms:
            centers = [chosen((l + u) / 2) for l, u, _ in boxes]
        else:
            centers = [torch.where(b[2], 0.0, f.center) for f, b in zip(forms, boxes, strict=True)]
        deviations = [
            torch.where(wild, float("inf"), torch.maximum(u - c, c - l))
            for (l, u, wild), c in zip(boxes, centers, strict=True)
        ]
        q0, k0 = self._split(*centers)
        dq, dk = self._split(*deviations)
        high = torch.nan_to_num(dq @ dk.transpose(-1, -2), nan=float("inf"), posinf=float("inf"))
        box, low = high, -high
        if None not in forms and self.affords(high.numel() * self.head_dim**2, inputs.call):
            groups = k0.shape[-4]
            a = forms[0].view(lambda x: self._queries(x, groups))
            b = forms[1].view(lambda x: self._keys(x).expand(*x.shape[:-2], *dq.shape[-4:-2],
                                                             *dk.shape[-2:]))
            least, most = product_range(a, b, self.context.tuning.pairs_at_once(b.A))
            low = torch.where(least > low, least, low)  # also where `least` is NaN
            high = torch.where(most < high, most, high)
        return _Products(q0, k0, dq, dk, low, high, box)

    def sharded_relaxation(self, inputs: OperatorInputs) -> _Products:
        return replace(self.shared_relaxation(inputs), rq=None, rk=None, box=None)

    def at_positions(self, shared: _Products, first: int, end: int) -> _Products:
        low, high = (x[..., first:end, :end] for x in (shared.low, shared.high))
        q0, k0 = shared.q0[..., first:end, :], shared.k0[..., :end, :]
        return _Products(q0, k0, None, None, low, high, None)

    def alpha_shape(self) -> tuple[int, ...]:
        return self.inputs[0].lower.shape[0], *self.output_shape[1:]

    def lower_plane(
        self, A: torch.Tensor, x: _Products, move: torch.Tensor | None = None, known: Any = None
    ) -> tuple[tuple, torch.Tensor]:
        """A_s -> (A_q [R, B, T, n d], A_k [R, B, T, g d]), bias [R, B]."""
        q0, k0, low, high = x.q0, x.k0, x.low, x.high
        A = A.unflatten(-3, (k0.shape[-4], -1)) * self.scale  # [R, B, g, n/g, T, T]
        A_q, A_k = A @ k0, A.transpose(-1, -2) @ q0
        rest = -A * (q0 @ k0.transpose(-1, -2))
        bias = 0
        if move is not None:
            m = torch.where(x.box.isfinite(), move.unflatten(-3, (k0.shape[-4], -1)), 0.0)
            rq, rk, box = (torch.where(r.isfinite(), r, 0.0) for r in (x.rq, x.rk, x.box))
            to_q, to_k, bias = turned(
                A, A.abs(), m, q0, k0, lambda x: x @ rk, lambda x: x.transpose(-1, -2) @ rq
            )
            A_q, A_k = A_q - to_q, A_k - to_k
            low, high = mixed(m, low, high, box)
        bias = bias + (rest + least_product(A, low, high)).flatten(2).sum(-1)
        A_q = A_q.movedim(-2, -4).flatten(-3)
        A_k = A_k.sum(-3).movedim(-2, -3).flatten(-2)
        return (A_q, A_k), bias

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Interval bounds of s, [B, n, T, T]."""
        (ql, kl), (qu, ku) = (self._split(v[0][i], v[1][i]) for i in (0, 1))
        q0, dq, k0, dk = (ql + qu) / 2, (qu - ql) / 2, (kl + ku) / 2, (ku - kl) / 2
        center = q0 @ k0.transpose(-1, -2) * self.scale
        around = q0.abs() @ dk.transpose(-1, -2) + dq @ (k0.abs() + dk).transpose(-1, -2)
        around = around * abs(self.scale)
        unknown = ~(torch.isfinite(center) & torch.isfinite(around))
        lower = torch.where(unknown, -float("inf"), center - around)
        upper = torch.where(unknown, float("inf"), center + around)
        return lower.flatten(-4, -3), upper.flatten(-4, -3)
