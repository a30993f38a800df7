"""The second half of attention: masked softmax of the scores, times the values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from lirpa_megatron.arithmetic.near import Near, chosen, exact, maybe_nonzero, most
from lirpa_megatron.operators.affine.products import Pairs
from lirpa_megatron.operators.attention.softmax_weights import (
    masked_softmax,
    phi,
    quotient,
    weight_box,
    weight_interval,
)
from lirpa_megatron.operators.context import CallState, InputView, OperatorInputs
from lirpa_megatron.operators.numerics import clamp_through, mask_overflow
from lirpa_megatron.operators.relaxed import RowRelaxed

_LARGEST = 1e15
_FAR = 40.0
"""If scores can move further than this, weights are only bounded by [0, 1]."""


@dataclass
class _Rows:
    """What all rows of A share about weights p_ij and values v_j."""

    s0: torch.Tensor
    """Clean scores, [B, n, T, T]; 0 where masked."""
    p0: torch.Tensor
    """Softmax of the clean scores."""
    dl: torch.Tensor
    """t_ij - t0_ij >= dl, t = s - sum_k p0_ik s_k; 0 where masked."""
    du: torch.Tensor
    down: torch.Tensor
    """p0 - min p."""
    up: torch.Tensor
    loose: torch.Tensor
    """[B, n, T], queries whose weights are unrestricted: dl and du must not be used."""
    fixed: torch.Tensor
    """[B, n, T], queries whose keys are all masked: their weights do not depend on s."""
    undefined: torch.Tensor
    """[B, n, T], queries with all keys at -inf: NaN."""
    v0: torch.Tensor
    """[B, n, T, d]."""
    dv: torch.Tensor
    wild: torch.Tensor
    """Where dv is infinite or NaN."""
    pairs: Pairs | None
    score_reach: torch.Tensor | None
    """max |A u| of the scores' form, [B, n, T, T]."""
    score_rest: torch.Tensor | None
    """The form's slack plus the distance of its center from t0."""
    shared: int
    """Number of query heads that share a key/value group."""
    seen: list[int]
    """For each query, how many of the first keys it may see."""


class BoundSoftmaxValues(RowRelaxed):
    """y_i = sum_j p_ij v_j, p = softmax of s over the keys j that are not masked.

    (The shapes below are for T queries. With the attribute `query` there is only the query at that
    position: s is [B, n, 1, T], y is [B, 1, n d], and only this row of the mask is used.)

    ======  ====================  ================================================
    tensor  shape                 on the ranks
    ======  ====================  ================================================
    s       [B, n, T, T]          sharded: the rank's n query heads
    v       [B, T, g d]           sharded: their g groups, n a multiple of g
    mask    [B or 1, 1 or n, T, T]  replicated, nonzero where masked; unperturbed
    y       [B, T, n d]           sharded
    A_y     [R, B, T, n d]        REPLICATED, GATHERED or BLOCK (`crown.placement`)
    ======  ====================  ================================================

    **Masks.** Masked scores are replaced by `fill`. With -inf, masked keys are left out exactly; a
    query whose keys are all masked is NaN in the model and has bounds -inf..inf here. With
    Megatron's -10000, such a query has the constant weights 1/T. For all other queries masked keys
    are left out: their weight is below e^-200 if some score is at least fill + 200. This is checked
    against the bounds; if it fails, the weights are unrestricted.

    **CROWN.** For head and query i let a be A_y's part, p0 the softmax of the clean scores s0,
    delta_j = (s_j - s0_j) - sum_k p0_k (s_k - s0_k), and v_j = v0_j + dv_j. A common shift of s
    changes neither softmax nor delta, and sum p0 delta = 0. With

        c_j = <a, v0_j> - sum_k p0_k <a, v0_k>          w_j = <a, dv_j> - sum_k p0_k <a, dv_k>
        phi_j = e^delta_j - 1 - delta_j >= 0            Phi = sum_j p0_j phi_j

    p_j = p0_j e^delta_j / (1 + Phi), and since sum_j p0_j (c_j + w_j) = 0, exactly

        <a, y> = sum_j p0_j <a, v_j> + G + sum_j p0_j phi_j (c_j + w_j - G) / (1 + Phi),
        G = sum_j p0_j delta_j (c_j + w_j).

    The first sum is linear in v, and sum_j p0_j c_j delta_j is linear in s; these make the plane.
    The rest is bounded from below:

    - sum_j p0_j delta_j w_j: by the range of delta_j times the range of w_j, or by the product of
      their affine forms in the model's input (`affine.products.Pairs`), which is about half of it;
    - the quotient: phi_j lies in [0, phi(ends)], so it is at least minus
      max sum P_j f_j H_j / (1 + sum P_j f_j) over 0 <= f_j <= 1, with H_j an upper bound of
      G - c_j - w_j (`softmax.quotient`). The denominator keeps it bounded for wide scores.

    If it is better, a plane that does not depend on s is used: p - p0 lies in [-down, up] and sums
    to 0, so sum_j (p_j - p0_j)(c_j + w_j) >= -sum_j max(up_j [mu - c_j]+, down_j [c_j - mu]+)
    - sum_j |p_j - p0_j| |w_j| for every mu. The weights' box comes from the scores' intervals and
    the simplex. This bounds y by the hull of the values, however wide the scores are.

    **Alpha** [B, n, T], for each row, head and query, mixes the two planes, starting from the one
    that is used without alpha: w times one plane plus 1 - w times the other.

    delta's range comes from a separate pass with the rows e_ij - sum_k p0_ik e_ik (BoundedModule
    bounds the scores with them), or from the scores' box if there is no such pass.

    **IBP.** The weights' intervals follow from those of the scores, and sum p = 1 is used once:
    y = v* + sum p_j (v_j - v*), where v* is the mean of the values' midpoints over the keys that
    some query sees.

    **Degenerate.** One key: y = v, exactly. Zero-width scores: linear in v with the right weights.
    Infinite or NaN bounds: the plane without s; infinite values give -inf where A is not 0.
    """

    reads_form = frozenset({1})
    reads_centered = 0
    takes_positions = True
    reads_all_positions = frozenset({1})
    feature_dim = 1

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.head_dim = attr["head_dim"]
        self.fill = attr["fill"] if attr["finite_fill"] else float("-inf")
        self.query = attr["query"]
        self.requires_input_bounds = [0, 1]

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[..., T, n d] -> [..., n, T, d]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(-2, -3)

    def _values(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """[..., T, g d] -> [..., n, T, d], each group repeated for the queries that share it."""
        x = self._heads(x)
        groups = x.shape[-3]
        return x if groups == heads else x.repeat_interleave(heads // groups, dim=-3)

    @staticmethod
    def _merge(x: torch.Tensor) -> torch.Tensor:
        """[..., n, T, d] -> [..., T, n d]."""
        return x.transpose(-2, -3).flatten(-2)

    def _masks(self, mask: torch.Tensor) -> torch.Tensor:
        """The mask, restricted to the queries that exist."""
        return (mask if self.query < 0 else mask[:, :, self.query : self.query + 1]) != 0

    def forward(self, s: torch.Tensor, v: torch.Tensor, mask: Any = None) -> torch.Tensor:
        if mask is not None:
            s = s.masked_fill(self._masks(mask), self.fill)
        return self._merge(torch.softmax(s, -1) @ self._values(v, s.shape[1]))

    def masked(self) -> torch.Tensor:
        """[B, n, T, T], True where a score is replaced by `fill`."""
        s = self.value_of(0)
        if len(self.inputs) < 3:
            return torch.zeros_like(s, dtype=torch.bool)
        return self._masks(self.value_of(2)).expand(s.shape)

    def clean_weights(self) -> torch.Tensor:
        """p0 [B, n, T, T]: softmax of the clean scores over unmasked keys."""
        return masked_softmax(self.value_of(0), self.masked())

    # --------------------------------------------------------------------- CROWN

    def relaxation(self, inputs: OperatorInputs) -> _Rows:
        """See `_Rows`."""
        s, v = inputs[0], inputs[1]
        masked, s0, p0 = self.masked(), self.value_of(0), self.clean_weights()
        empty = masked.all(-1)
        dl, du = self._deviations(s, s0, p0, masked)
        dl, du, wild = mask_overflow(dl, du, _FAR)
        loose = (wild & ~masked).any(-1) & ~empty
        if self.fill != float("-inf"):
            best = s.lower.masked_fill(masked, -float("inf")).amax(-1)
            unsure = ~empty & ~(best >= self.fill + 200)
            loose = loose | unsure
            masked = masked & ~unsure.unsqueeze(-1)  # their masked keys may have weight
        still = masked | (empty | loose).unsqueeze(-1)
        dl = dl.clamp(max=0).masked_fill(still, 0)
        du = du.clamp(min=0).masked_fill(still, 0)
        least, highest = weight_box(p0, dl, du)
        anywhere = loose.unsqueeze(-1) & ~masked
        least, highest = least.masked_fill(anywhere, 0), highest.masked_fill(anywhere, 1)
        heads, scores = s0.shape[1], s.centered
        shared = heads // (v.lower.shape[-1] // self.head_dim)
        form, (vl, vu, wild) = v.form, mask_overflow(v.lower, v.upper, _LARGEST)
        v0, pairs, reach, rest = chosen((vl + vu) / 2), None, None, None
        if form is not None and self.affords(s0.numel() * self.head_dim**2, inputs.call):
            v0 = torch.where(wild, 0.0, form.center)
            alpha = None if scores is None else scores.form
            of_interest = maybe_nonzero(p0) | (least < p0) | (highest > p0)
            values = form.view(lambda x: self._values(x, heads))
            pairs = Pairs.of(
                values, p0, alpha, self._keys_of_interest(of_interest),
                self.context.tuning.pairs_at_once(values.A),
            )
            if alpha is not None:
                p = scores.rows if isinstance(s0, Near) else p0
                shift = (alpha.center - s0 + (p * s0).sum(-1, keepdim=True)).abs()
                reach, rest = alpha.reach(), alpha.slack + shift + _of_other_rows(s, s0, p0)
        dv = torch.where(wild, 0.0, torch.maximum(vu - v0, v0 - vl))
        return _Rows(
            s0.masked_fill(masked, 0), p0, dl, du, p0 - least, highest - p0, loose,
            empty, empty & (self.fill == float("-inf")),
            *(self._values(x, heads) for x in (v0, dv, wild.to(v0.dtype))),
            pairs, reach, rest, shared, self._keys_of_interest(~masked | maybe_nonzero(p0)),
        )

    def at_positions(self, shared: _Rows, first: int, end: int) -> _Rows:
        """Of these queries, and of the keys that they may see."""
        keys = max(shared.seen[first:end])

        def both(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x[..., first:end, :keys]

        def queries(x: torch.Tensor) -> torch.Tensor:
            return x[..., first:end]

        x, pairs = shared, shared.pairs
        return _Rows(
            both(x.s0), both(x.p0), both(x.dl), both(x.du), both(x.down), both(x.up),
            queries(x.loose), queries(x.fixed), queries(x.undefined),
            *(y[..., :keys, :] for y in (x.v0, x.dv, x.wild)),
            None if pairs is None else pairs.at(first, end, keys),
            both(x.score_reach), both(x.score_rest), x.shared, x.seen[first:end],
        )

    def _keys_of_interest(self, pairs: torch.Tensor) -> list[int]:
        """For each query, how many of the first keys matter; the same on every rank.

        Args:
            pairs: [B, n, T, U], whether a query's key matters.
        """
        places = torch.arange(1, pairs.shape[-1] + 1, device=pairs.device)
        keys = (pairs * places).amax((0, 1, 3)).clamp(min=1)
        return self.context.collectives.largest(keys).tolist()

    @staticmethod
    def _deviations(
        s: InputView, s0: torch.Tensor, p0: torch.Tensor, masked: torch.Tensor
    ) -> tuple:
        """Range of delta, [B, n, T, T]; of no meaning where masked."""
        if s.centered is not None:
            p = s.centered.rows if isinstance(s0, Near) else p0
            t0 = s0 - (p * s0).sum(-1, keepdim=True)
            other = _of_other_rows(s, s0, p0)
            return s.centered.lower - t0 - other, s.centered.upper - t0 + other
        # infinite ones would give gradients of 0 times infinity
        l, u = ((x - s0).masked_fill(masked, 0.0) for x in (s.lower, s.upper))
        pl, pu = (torch.where(maybe_nonzero(p0), p0 * x, 0.0) for x in (l, u))
        rest = 1 - p0
        some = maybe_nonzero(rest)
        low = torch.where(some, rest * l, 0.0) - (pu.sum(-1, keepdim=True) - pu)
        high = torch.where(some, rest * u, 0.0) - (pl.sum(-1, keepdim=True) - pl)
        return low, high

    def numbers_at_once(self, batch: int, form_columns: int | None, call: CallState) -> int:
        numel = math.prod(self.inputs[0].output_shape[1:]) * self.head_dim
        return numel if self.affords(batch * numel * self.head_dim, call) else 0

    def alpha_shape(self) -> tuple[int, ...]:
        return tuple(self.inputs[0].lower.shape[:-1])

    def lower_plane(
        self, A: torch.Tensor, x: _Rows, move: torch.Tensor | None = None, known: Any = None
    ) -> tuple[tuple, torch.Tensor]:
        """A_y -> (A_s [R, B, n, T, T], A_v [R, B, T, g d]), bias [R, B]."""
        a, p0 = self._heads(A), x.p0
        means = a @ x.v0.transpose(-1, -2)
        c = means - (p0 * means).sum(-1, keepdim=True)
        g = p0 * c
        W, first = self._reach(a, x)
        rest = self._tangent_rest(c, g, W, first, x)
        flat_rest = self._flat_rest(c, W, x)
        # The plane with s is preferred unless it is clearly worse: it depends on the input.
        gain = (g.clamp(min=0) * x.du + g.clamp(max=0) * x.dl).sum(-1)
        flat = ~(rest + gain / 2 <= flat_rest) | x.loose
        share = exact((~flat).to(g.dtype))  # share of the plane with s
        if move is not None:
            share = clamp_through(share + move, 0, 1)
            share = torch.where(x.loose | ~(rest < float("inf")), 0.0, share)
        rest = torch.where(share > 0, share * rest, 0.0)
        rest = rest + torch.where(share < 1, (1 - share) * flat_rest, 0.0)
        g = torch.where(x.fixed.unsqueeze(-1), 0.0, g) * share.unsqueeze(-1)
        reads = (a != 0).any(-1)
        rest = torch.where(reads & x.undefined, float("inf"), rest)
        rest = torch.where(reads, rest, 0.0)
        A_v = p0.transpose(-1, -2) @ a
        A_v = A_v.unflatten(-3, (-1, x.shared)).sum(-3)
        bias = -(g * x.s0).flatten(2).sum(-1) - rest.flatten(2).sum(-1)
        return (g, self._merge(A_v)), bias

    def _reach(self, a: torch.Tensor, x: _Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """(bound of |w_j|, lower bound of sum_j p0_j delta_j w_j): [R, B, n, T, T], [..., T]."""
        size = a.abs()
        box = size @ x.dv.transpose(-1, -2)
        own = x.p0 * box
        W = box - 2 * own + own.sum(-1, keepdim=True)
        furthest = torch.maximum(x.du, -x.dl)
        if x.pairs is None:
            return self._with_wild(size, W, x), -(x.p0 * furthest * W).sum(-1)
        affine, slack, cross = x.pairs.reaches(a)
        W = torch.where(affine + slack < W, affine + slack, W)
        first = -furthest * W
        if x.score_reach is not None:
            joint = (cross - affine * x.pairs.size) / 2 - x.score_reach * slack
            joint = joint - x.score_rest * W
            first = torch.where(joint > first, joint, first)
        return self._with_wild(size, W, x), (x.p0 * first).sum(-1)

    @staticmethod
    def _with_wild(size: torch.Tensor, W: torch.Tensor, x: _Rows) -> torch.Tensor:
        return torch.where(size @ x.wild.transpose(-1, -2) > 0, float("inf"), W)

    @staticmethod
    def _tangent_rest(
        c: torch.Tensor, g: torch.Tensor, W: torch.Tensor, first: torch.Tensor, x: _Rows
    ) -> torch.Tensor:
        """How far <a, y> can be below the tangent plane, [R, B, n, T]."""
        furthest = torch.maximum(x.du, -x.dl)
        G = (g.clamp(min=0) * x.du + g.clamp(max=0) * x.dl).sum(-1, keepdim=True)
        G = G + (x.p0 * furthest * W).sum(-1, keepdim=True)
        P = x.p0 * torch.maximum(phi(x.dl), phi(x.du))
        return quotient(G + W - c, P) - first

    @staticmethod
    def _flat_rest(c: torch.Tensor, W: torch.Tensor, x: _Rows) -> torch.Tensor:
        """How far <a, y> can be below the plane that does not depend on s, [R, B, n, T]."""
        move = x.up + x.down
        total = move.sum(-1, keepdim=True).clamp(min=1e-12)
        furthest = torch.maximum(x.up, x.down)
        values = torch.where(maybe_nonzero(furthest), furthest * W, 0.0).sum(-1)
        # sum (p - p0) w >= -sum max(up (W - k), down (W + k)) for every k.
        k = torch.where(x.up != x.down, W * (x.up - x.down), 0.0).sum(-1, keepdim=True) / total
        shifted = torch.maximum(
            torch.where(maybe_nonzero(x.up), x.up * (W - k), 0.0),
            torch.where(maybe_nonzero(x.down), x.down * (W + k), 0.0),
        ).clamp(min=0).sum(-1)
        values = torch.where(shifted < values, shifted, values)
        mu = (c * move).sum(-1, keepdim=True) / total
        scores = [torch.maximum(x.up * (m - c), x.down * (c - m)).sum(-1) for m in (0.0, mu)]
        return values + torch.minimum(*scores)

    # ----------------------------------------------------------------------- IBP

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Interval bounds of y, [B, T, n d]."""
        l, u = v[0][0], v[0][1]
        masked = self._masks(v[2][0]).expand(l.shape) if len(v) > 2 else torch.zeros_like(l).bool()
        least, highest = weight_interval(l, u, masked, self.fill)
        low, high = (self._values(end, l.shape[1]) for end in v[1][:2])
        vl, vu, wild = mask_overflow(low, high, _LARGEST)
        middle, half = (vl + vu) / 2, (vu - vl) / 2
        # Keys masked for every query contribute nothing.
        seen = exact((~masked.all(-2)).to(middle.dtype).unsqueeze(-1))
        center = (middle * seen).sum(-2, keepdim=True) / seen.sum(-2, keepdim=True).clamp(min=1)
        mean = ((least + highest) / 2) @ (middle - center) + center
        around = ((highest - least) / 2) @ (middle - center).abs() + highest @ half
        if wild.any():
            reads = (maybe_nonzero(highest).unsqueeze(-1) & wild.unsqueeze(-3)).any(-2)
            around = torch.where(reads, float("inf"), around)
        undefined = masked.all(-1, keepdim=True) & (self.fill == float("-inf"))
        around = torch.where(undefined, float("inf"), around)
        return self._merge(mean - around), self._merge(mean + around)


def _of_other_rows(s: InputView, s0: torch.Tensor, p0: torch.Tensor) -> torch.Tensor | float:
    """Error of delta if the pass for t used weights p that differ from p0 by rounding:
    sum |p - p0| |s - s0|, and the rounding of 1 - p for its own key. 0 without outward rounding."""
    if not isinstance(s0, Near):
        return 0.0
    reach = most(torch.maximum(s.upper - s0, s0 - s.lower))
    return (most(p0 - s.centered.rows) * reach).sum(-1, keepdim=True) + reach * 2.0**-53
