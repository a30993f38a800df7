"""The rule of softmax(s) v: attention behind its scores (`score_rules`).

**Softmax.** With p0 the softmax of the scores' centres and t = s - sum_k p0_k s_k without its
centre, p = p0 e^t / Z, Z = sum_k p0_k e^t_k, and Z is at least 1 (Jensen).

Degree 1: p = p0 (1 + t) + d, sum d = 0. With |t| <= S, e^t - 1 - t lies in [0, rho],
rho = S^2 (1/2 + S e^S / 6), sum p0 t = 0, so Z lies in [1, 1 + zeta], zeta = sum p0 rho, and

    d + kappa p0 = p0 rho / 2 + D_p e,   |e| <= 1,  D_p = p0 (rho / 2 + zeta (S + rho)),

kappa = 1 - 1/Z in [0, zeta]. The left side and d do the same to v', whose mean under p0 is 0. To
the values' deviations d does at most D_v = p0 (rho + zeta (S + rho) + zeta), and d - shift, with
shift = p0 (rho - zeta) / 2 as a part of w, at most D_u = D_p + p0 zeta / 2. The errors that other
symbols or R put into the values meet p0 alone in the linearised network, so there D_v counts.

Higher degrees: e^t and 1/Z are expanded by Taylor's formula, the
product of the two is truncated; D_p = D_v bound what is left out. In any case |d| <= 1 + |w|, w the
polynomial. R_s moves the weights by J R_s + bent, J the Jacobian at p0:

    J(x) differs from J(p0), measured by |x|_w^2 = sum p0 (x/p0)^2, by at most theta (2 + theta),
    theta = max |p/p0 - 1| over the set.

**Values.** y = sum_j p_j v_j; with v'_j = v0_j - sum_k p0_k v0_k and sum (p - p0) = 0

    R_y = sum p0 R_v + sum (J R_s)_j v'_j            (linear in R)
        + D + sum D_p e v' + ...                     (fresh)

D bounds what the product w v has beyond degree p; where errors are symbols, those of a head's query
may be in one ball instead (`squares`). The errors e of single weights, each with its
direction v'_j, are `columns`.

The ball of sum_j p0_j x_j v'_j is at most kV |x|_p0, kV the largest singular value of the rows
p0_j^(1/2) v'_j, and |R_s|_p0 is at most kK |a| + |q0| (sum p0 |b|^2)^(1/2) + ..., kK that of the
rows scale p0_j^(1/2) k'_j; together the covariance of values and keys, M, is what |a| meets.

**Masks** as in `BoundSoftmaxValues`: masked keys are left out if some score is at least fill + 200
(else that query's output is unbounded); a query whose keys are all masked has the mean of all
values; with fill -inf it is undefined, and unbounded here.

Scores that may move further than e^_FAR leave weights in [0, 1] alone.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.forward import squares
from lirpa_megatron.forward.error_symbols import product_range
from lirpa_megatron.forward.form import Form, Fresh, Inputs, Outcome, ScoreRemainder, squared, times
from lirpa_megatron.forward.polynomials import compose, excess, padded, plus
from lirpa_megatron.forward.rules import by_intervals, rule_for
from lirpa_megatron.forward.score_rules import head_balls, length, matmul, outer, singular, turned
from lirpa_megatron.operators.attention.softmax_values import BoundSoftmaxValues
from lirpa_megatron.operators.attention.softmax_weights import masked_softmax
from lirpa_megatron.operators.numerics import safe_root

_FAR = 80.0


@rule_for(BoundSoftmaxValues)
def softmax_values(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """See above."""
    xs, xv, *mask = inputs
    if mask and isinstance(mask[0], Form):
        return by_intervals(run, node, inputs)
    if not isinstance(xs, Form):
        xs = run.constant(xs, node.inputs[0])
    if not isinstance(xv, Form):
        xv = run.constant(xv, node.inputs[1])
    s, cv = padded(xs.c, xv.c)
    first = 0
    if run.window is not None and node.inputs[1].name in run.window.cut:
        first = run.window.first if run.order == 1 and not torch.is_grad_enabled() else 0
    return _Attention(run, node, xs, xv, s, cv, mask[0] if mask else None, first).outcome()


class _Attention:
    """The rule of softmax(s) v, in steps. Shapes: [B, n, Q, S] for pairs, [B, n, Q] for queries.

    Args:
        first: of the keys whose values move (`windows`).
    """

    def __init__(
        self, run: Any, node: Any, xs: Form, xv: Form, s: torch.Tensor, cv: torch.Tensor,
        mask: torch.Tensor | None, first: int,
    ) -> None:
        self.first = first
        self.run, self.node, self.xs, self.xv = run, node, xs, xv
        self.algebra, self.domain, self.p = run.algebra, run.domain, run.order
        self.heads = s.shape[2]
        self.s = s
        self.v0 = self._by_heads(cv[0])  # [B, n, S, d]
        self.V = self._by_heads(cv[:, :, first:])  # [M, B, n, S - first, d]
        self.rv = self._by_heads(xv.box)
        shared = self.heads // (cv.shape[-1] // node.head_dim)
        own = xv.box.unflatten(-1, (-1, node.head_dim)).transpose(-2, -3)
        self.bv = head_balls(run, node, xv, own).repeat_interleave(shared, dim=1)
        self._masks(mask)
        self.balls: torch.Tensor | None = None

    def _by_heads(self, x: torch.Tensor) -> torch.Tensor:
        return self.node._values(x, self.heads)

    def _masks(self, mask: torch.Tensor | None) -> None:
        """`masked` keys, and queries that are `empty` or `unsure`."""
        s0 = self.s[0]
        if mask is None:
            self.masked = torch.zeros_like(s0, dtype=torch.bool)
        else:
            self.masked = self.node._masks(mask).expand(s0.shape)
        empty = self.masked.all(-1)
        fill = self.node.fill
        unsure = torch.zeros_like(empty)
        if fill != float("-inf") and bool(self.masked.any()):
            lower = self.run.range(self.xs)[0].masked_fill(self.masked, -math.inf).amax(-1)
            unsure = self.masked.any(-1) & ~empty & ~(lower >= fill + 200)
        else:
            unsure = unsure | (empty & (fill == float("-inf")))
        self.empty, self.unsure = empty, unsure
        self.p0 = masked_softmax(s0, self.masked)
        self.still = self.masked | empty.unsqueeze(-1)

    # ---------------------------------------------------------------- the remainder of scores

    def _scores(self) -> None:
        """Of s: bounds of each R_s, of its parts, and in the weighted norm."""
        remainder, p0 = self.xs.scores, self.p0
        if remainder is None:
            n = torch.zeros_like(p0[..., 0])
            keys = torch.zeros_like(p0[..., 0, :])
            k0 = torch.zeros_like(self.v0)
            remainder = ScoreRemainder(n, keys, k0, n, self.xs.box, 1.0)
        scale, k0 = abs(remainder.scale), remainder.k0
        self.a, self.b, self.q_size = remainder.queries, remainder.keys, remainder.q_size
        self.scale = scale
        self.e_s = remainder.fresh.masked_fill(self.still, 0.0)
        k_size = length(k0)
        R = self.e_s + scale * (outer(self.a, k_size) + outer(self.q_size, self.b))
        self.R_s = R.masked_fill(self.still, 0.0)
        root = safe_root(p0).unsqueeze(-1)
        v0 = self.v0
        self.centred = v0.unsqueeze(-3) - (p0 @ v0).unsqueeze(-2)  # [B, n, Q, S, d]
        values = root * self.centred
        keys = root * (k0.unsqueeze(-3) - (p0 @ k0).unsqueeze(-2)) * scale
        self.kV, self.kK = singular(values), singular(keys)
        self.M = singular(turned(values) @ keys)
        none = self.empty  # their weights do not move
        self.kK, self.M = (x.masked_fill(none, 0.0) for x in (self.kK, self.M))
        self.q_size = self.q_size.masked_fill(none, 0.0)
        self.es_p = self._weighted(self.e_s)
        keyed = times(self.q_size * scale, self._mean_square(self.b))
        self.Rs_p = times(self.kK, self.a) + keyed + self.es_p

    def _weighted(self, x: torch.Tensor) -> torch.Tensor:
        """(sum p0 x^2)^(1/2)."""
        return safe_root(times(self.p0, squared(x)).sum(-1))

    def _mean_square(self, ball: torch.Tensor) -> torch.Tensor:
        """(sum_j p0_ij ball_j^2)^(1/2) of keys' balls [B, n, S]: [B, n, Q]."""
        return safe_root(matmul(self.p0, squared(ball).unsqueeze(-1)).squeeze(-1))

    # -------------------------------------------------------------------------- weights

    def _weights(self) -> None:
        """The weights' polynomial w, what it leaves out, and how far the weights move."""
        p, p0, domain = self.p, self.p0, self.domain
        s = torch.cat((torch.zeros_like(self.s[:1]), self.s[1:]))
        t = (s - (p0 * s).sum(-1, keepdim=True)).masked_fill(self.still, 0.0)
        at = domain.sizes(t)
        S = sum(at[1:], torch.zeros_like(at[0]))
        one = torch.ones_like(p0)
        self.shift = torch.zeros_like(p0)
        if p == 1:
            self.w, D, D_v, D_u = self._first_order(t, S)
        else:
            self.w, D = self._higher_order(t, at)
            D_v = D_u = D
        self.aw = domain.sizes(self.w)
        far = (S > _FAR).any(-1, keepdim=True)
        D, D_v, D_u = (torch.where(far, torch.inf, d) for d in (D, D_v, D_u))
        most = sum(self.aw) + one
        known = (most >= D).all(-1, keepdim=True)
        self.shift = torch.where(known, self.shift, 0.0).masked_fill(self.still, 0.0)
        self.D_p = torch.where(known, D, most).masked_fill(self.still, 0.0)
        self.D_v = torch.minimum(D_v, most).masked_fill(self.still, 0.0)
        self.D_u = torch.where(known, D_u, self.D_v).masked_fill(self.still, 0.0)
        self.w = plus(self.w, self.shift) if p == 1 else self.w
        # anywhere between P and P + R
        reach = S + self.R_s + times(p0, self.R_s).sum(-1, keepdim=True)
        wide = (reach > _FAR).any(-1, keepdim=True)
        reach = reach.masked_fill(p0 == 0, 0.0).clamp(max=_FAR)
        up = reach.exp()
        fall = 1 - (-reach).exp() / (p0 * up).sum(-1, keepdim=True)
        self.theta = torch.where(wide, torch.inf, torch.maximum(up - 1, fall)).amax(-1)
        self.theta = self.theta.masked_fill(self.empty, 0.0)
        self.top = torch.minimum(torch.where(wide & (p0 > 0), 1.0, p0 * up), one)
        self.top = torch.where(self.empty.unsqueeze(-1), p0, self.top)
        self.more = times(self.theta, 2 + self.theta)
        self.bent = times(self.more, self.Rs_p)
        mean = times(self.top, self.R_s).sum(-1, keepdim=True)
        J_p = torch.minimum(times(self.top, self.R_s + mean), one)
        self.J_p = J_p.masked_fill(self.still, 0.0)
        self.dp, self.dp_v = self._relative(self.D_p), self._relative(self.D_v)

    def _relative(self, D: torch.Tensor) -> torch.Tensor:
        """(sum D^2 / p0)^(1/2)."""
        some, p0 = D > 0, self.p0  # then p0 is not 0
        root = torch.where(some & (p0 > 0), p0, 1.0).sqrt()
        size = torch.where(some, D / root, 0.0).detach()
        kept = size.isfinite() & (size / root).isfinite()  # else 0 times infinity in gradients
        found = torch.where(kept, torch.where(some & kept, D, 0.0) / torch.where(kept, root, 1.0),
                            size)
        return torch.where((some & (p0 == 0)).any(-1), torch.inf, length(found))

    def _first_order(self, t: torch.Tensor, S: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(w without `shift`, D_p, D_v, D_u) of affine t: see above."""
        p0 = self.p0
        rho = S.square() * (0.5 + S * S.clamp(max=_FAR).exp() / 6)
        zeta = times(p0, rho).sum(-1, keepdim=True)
        third = times(zeta, S + rho)
        self.shift = times(p0, rho - zeta) / 2
        w = torch.cat((p0.unsqueeze(0), p0 * t[1:]))
        D = times(p0, rho / 2 + third)
        return w, D, times(p0, rho + third + zeta), D + times(p0, zeta) / 2

    def _higher_order(self, t: torch.Tensor, at: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """(w, D) of t of degree 2 and more."""
        p, p0, domain = self.p, self.p0, self.domain
        one = torch.ones_like(p0)
        e, rest = compose(
            self.algebra, t, at, [one / math.factorial(j) for j in range(p + 1)],
            lambda S: S.clamp(max=_FAR).exp() / math.factorial(p + 1),
        )
        e, rest = e * p0, rest * p0
        Z, Z_rest = e.sum(-1), rest.sum(-1)
        aZ = domain.sizes(Z)
        away = sum(aZ[1:], torch.zeros_like(Z_rest))
        least = (1 - away).clamp(min=1e-3)  # of the polynomial; the true sum is at least 1
        unit = torch.ones_like(Z[0])
        inverse, left = compose(
            self.algebra, Z, aZ, [unit * (-1) ** j for j in range(p + 1)],
            lambda S: least ** (-2 - p),
        )
        left = torch.where(away >= 0.999, torch.inf, left + Z_rest / least)
        ae = domain.sizes(e)
        ai = [i.unsqueeze(-1) for i in domain.sizes(inverse)]
        w = self.algebra.multiply(inverse, e, lambda f, g: f.unsqueeze(-1) * g)
        return w, excess(ae, ai, p) + times(sum(ae), left.unsqueeze(-1)) + rest

    # --------------------------------------------------------------------------- values

    def outcome(self) -> Outcome:
        self._scores()
        self._weights()
        p, p0, domain = self.p, self.p0, self.domain
        if self.first:
            out = self.w @ self.v0
            out[1:] += self.w[0, ..., self.first :] @ self.V[1:]
        else:
            out = self.algebra.multiply(self.w, self.V, torch.matmul)
        moved_centre = self.shift @ self.v0
        still = [0, 0, self.first, 0]  # what is in front
        aV = [F.pad(x, still) for x in domain.sizes(self.V)]
        NV = [F.pad(x, still[2:]) for x in domain.norms(self.V)]
        pairs = [(m, j) for m in range(1, p + 1) for j in range(p + 1 - m, p + 1)]
        D_head = sum((self.aw[m] @ NV[j].unsqueeze(-1)).squeeze(-1) for m, j in pairs)
        inside = None
        if self.run.errors is None:
            D = sum(self.aw[m] @ aV[j] for m, j in pairs)
        else:
            D, more, inside = self._products()
            moved_centre = moved_centre + more
            out = plus(out, more)
            D_head = length(D)
        D_head = torch.minimum(D_head, length(D))
        D = torch.minimum(D, D_head.unsqueeze(-1))
        # each coordinate
        dev = sum(aV[1:]) + self.rv
        box = matmul(self.top, self.rv) + matmul(self.D_u + self.J_p, dev)
        far = self.centred.abs()
        box = box + matmul(self.J_p.unsqueeze(-2), far).squeeze(-2)
        rest = box + (D if inside is None else D.masked_fill(inside, 0.0))
        box = D + box + matmul(self.D_p.unsqueeze(-2), far).squeeze(-2)
        # each token's vector, all heads together
        bv, dv = self.bv, sum(NV[1:])
        moved_v = self._mean_square(dv + bv)
        grown = times(1 + self.more, moved_v)
        own = self._heads(times(times(grown, self.kK), self.a))
        through_q = self._heads(times(self.M, self.a))
        through_k = self._heads(times(self.kV * self.q_size * self.scale,
                                         self._mean_square(self.b)))
        turn_v = matmul(torch.minimum(times(self.theta.unsqueeze(-1), p0), self.top + p0),
                        bv.unsqueeze(-1)).squeeze(-1)
        es = times(1 + self.more, self.es_p)
        rest_v = times(moved_v, es + self.dp_v)
        keyed = times(self.q_size * self.scale, self._mean_square(self.b))
        rest_k = times(grown, keyed)
        mean_v = self._heads(matmul(p0, bv.unsqueeze(-1)).squeeze(-1))
        moved = self._heads(turn_v) + own + self._heads(rest_v + rest_k)
        turned = self._heads(times(times(self.kV, self.more), times(self.kK, self.a) + keyed))
        moved_box = matmul(torch.minimum(times(self.theta.unsqueeze(-1), p0), self.top + p0),
                            self.rv) + matmul(self.D_v + self.J_p, sum(aV[1:]))
        direct = torch.minimum(
            matmul(self.D_p.unsqueeze(-2), length(self.centred).unsqueeze(-1)).flatten(-2)
            .sum(-1), times(self.kV, self.dp),
        ) + times(self.kV, es) + D_head
        ball = moved + turned + self._heads(direct) + mean_v + through_q + through_k
        unsure = self.unsure
        box = torch.where(unsure.unsqueeze(-1), torch.inf, box)
        c = torch.where(unsure.unsqueeze(-1), 0.0, out)
        box, c = self._merge(box), self._merge(c)
        ball = torch.minimum(ball, self.run.length(box, self.node))
        lost = self.run.ranks(self.node).total(unsure.any(1).to(ball)) > 0
        ball = torch.where(lost, torch.inf, ball)
        form = Form(c, torch.where(box.isnan(), torch.inf, box), ball)
        node = self.node  # what outlives the pass does not hold the coefficients
        pull = partial(_pull, node, self.v0.clone(), p0, self.still)
        unsure_box = torch.where(unsure.unsqueeze(-1), torch.inf, 0.0).expand_as(D)
        fresh = [
            Fresh(box=self._merge(D + unsure_box)),
            Fresh(box=self._merge(moved_box), ball=moved),
            Fresh(box=self.D_p, pull=pull),
            Fresh(ball=self.bent, weights=p0, pull=pull),
        ]
        shift = self._merge(torch.where(unsure.unsqueeze(-1), 0.0, moved_centre)).detach()
        rest = self._merge(torch.where(unsure.unsqueeze(-1), torch.inf, rest))

        def linear(*values: torch.Tensor) -> torch.Tensor:
            return node.forward(*values) + shift

        rest = torch.where(rest.isnan(), torch.inf, rest)
        return Outcome(form, fresh, linear, self._columns, self.balls, rest)

    def _products(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(half, middle, inside) of the products of weights' and values' linear parts, [B, n, Q,
        d]: they are within `half` of `middle`, and those `inside` also in `balls`."""
        aw, V, w = self.aw[1][..., self.first :], self.V, self.w[1:, ..., self.first :]
        half = V.new_zeros(*aw.shape[:-1], V.shape[-1])
        middle = torch.zeros_like(half)
        moving = self.run.ranks(self.node).most((aw != 0).any(0).any(0).to(aw))
        q, j = moving.nonzero().unbind(1)
        step = max(1, 2**22 // V[:, :, :, 0].numel())
        step = max(1, len(q)) if self.domain.is_sum else step
        for rows, keys in zip(q.split(step), j.split(step), strict=True):

            def weight(w: torch.Tensor, rows: Any = rows, keys: Any = keys) -> torch.Tensor:
                return w[:, :, :, rows, keys].unsqueeze(-1)

            def value(v: torch.Tensor, keys: Any = keys) -> torch.Tensor:
                return v[:, :, :, keys]

            found = product_range(self.domain, w, V[1:], weight, value)
            half.index_add_(2, rows, found[0])
            middle.index_add_(2, rows, found[1])
        found = squares.of_products(self.run, self.node, w, V[1:], half)
        if found is None:
            return half, middle, torch.zeros_like(half, dtype=torch.bool)
        inside, balls = found[0].expand(half.shape), found[1]
        self.balls = self._merge(balls.flatten(0, 2)).unflatten(0, balls.shape[:3])
        half = torch.where(inside, half + middle.abs(), half)
        return half, middle.masked_fill(inside, 0.0), inside

    def _columns(self) -> torch.Tensor:
        """The errors of single weights as directions: [N, B, Q, n d]."""
        D = torch.where(self.D_p.isfinite(), self.D_p, 0.0)
        moving = self.run.ranks(self.node).most((D != 0).any(0).any(0).to(D))
        q, j = moving.nonzero().unbind(1)
        values = D[:, :, q, j].unsqueeze(-1) * self.centred[:, :, q, j]  # [B, n, P, d]
        B, n, P, d = values.shape
        if not P:
            return values.new_zeros(0, B, D.shape[2], n * d)
        out = values.new_zeros(n, P, B, n, D.shape[2], d)
        heads = torch.arange(n, device=D.device)
        pairs = torch.arange(P, device=D.device)
        out[heads[:, None], pairs, :, heads[:, None], q] = values.permute(1, 2, 0, 3)
        return self._merge(out.flatten(0, 2)).unflatten(0, (-1, B))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """Root of the sum of squares over all heads: [B, n, Q] -> [B, Q], replicated."""
        return safe_root(self.run.ranks(self.node).total(squared(x).sum(1)))

    def _merge(self, x: torch.Tensor) -> torch.Tensor:
        return self.node._merge(x)

def _pull(
    node: Any, v0: torch.Tensor, p0: torch.Tensor, still: torch.Tensor, g: torch.Tensor
) -> torch.Tensor:
    """A row g at the output [B, Q, n d] -> at the weights [B, n, Q, S]; their errors sum to 0, and
    a key without weight has none."""
    g = node._heads(g) @ turned(v0)
    return torch.where(still, 0.0, g - (p0 * g).sum(-1, keepdim=True))
