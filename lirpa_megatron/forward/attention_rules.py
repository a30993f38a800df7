"""The rules of attention: scores s = scale q k^T, and softmax(s) v.

**Scores.** The product of the polynomials. Beyond degree p: by the norms of the parts; the parts of
lowest excess degree, and all of a single symbol, by the products themselves (`pair_excess`). For a
shift of all scores of a query the softmax is the same, so keys are counted from their mean. With
R_q = a, R_k = b,

    R_s = scale (<a, k0> + <q0, b>) + e,   |e| <= scale (|a| dk + dq |b| + |a| |b|) + excess,

dq and dk the norms of the polynomials' deviations. The reader of the scores is told of these parts
(`ScoreRemainder`): a ball of all queries' errors does less to a softmax than boxes of all scores.

**Softmax.** With p0 the softmax of the scores' centres and t = s - sum_k p0_k s_k without its
centre, p = p0 e^t / sum_k p0_k e^t_k, and the sum is at least 1 (Jensen). e^t and the reciprocal of
the sum are expanded by Taylor's formula, the product of the two is truncated; D_p bounds what is
left out, and p <= 1 in any case. R_s moves the weights by J R_s + bent, J the Jacobian at p0:

    J(x) differs from J(p0), measured by |x|_w^2 = sum p0 (x/p0)^2, by at most theta (2 + theta),
    theta = max |p/p0 - 1| over the set.

**Values.** y = sum_j p_j v_j; with v'_j = v0_j - sum_k p0_k v0_k and sum (p - p0) = 0

    R_y = sum p0 R_v + sum (J R_s)_j v'_j            (linear in R)
        + D + sum D_p v' + ...                       (fresh)

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

from lirpa_megatron.forward.form import Form, Fresh, Inputs, Outcome, ScoreRemainder, times
from lirpa_megatron.forward.polynomials import compose, excess, padded
from lirpa_megatron.forward.rules import by_intervals, rule_for
from lirpa_megatron.operators.affine.products import largest_eigenvalue
from lirpa_megatron.operators.attention.scores import BoundScores
from lirpa_megatron.operators.attention.softmax_values import BoundSoftmaxValues
from lirpa_megatron.operators.attention.softmax_weights import masked_softmax
from lirpa_megatron.operators.numerics import ROUNDING, safe_root

_FAR = 80.0


def _length(x: torch.Tensor) -> torch.Tensor:
    return safe_root(x.square().sum(-1))


def _outer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return times(a.unsqueeze(-1), b.unsqueeze(-2))


def _turned(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2)


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of numbers from 0 to infinity."""
    if bool(a.isfinite().all()) and bool(b.isfinite().all()):
        return a @ b
    infinite = (a.isinf().to(a) @ (b > 0).to(b)) + ((a > 0).to(a) @ b.isinf().to(b))
    finite = torch.where(a.isfinite(), a, 0.0) @ torch.where(b.isfinite(), b, 0.0)
    return torch.where(infinite > 0, torch.inf, finite)


def _singular(x: torch.Tensor) -> torch.Tensor:
    """The largest singular value of [..., m, n], rounded up."""
    gram = x @ _turned(x) if x.shape[-2] <= x.shape[-1] else _turned(x) @ x
    return safe_root(largest_eigenvalue(gram)) * (1 + 10 * ROUNDING[x.dtype])


def _head_balls(run: Any, node: Any, x: Form, box: torch.Tensor) -> torch.Tensor:
    """The ball of each head, [B, n, T].

    Args:
        run, node: of the operator that reads x.
        x: [.., T, n d].
        box: its box by heads, [B, n, T, d].
    """
    whole = run.ranks(node).enter(x.plain_ball()).unsqueeze(1)  # [B, 1, T]
    found = torch.minimum(_length(box), whole.expand(box.shape[:-1]))
    if x.heads is not None and x.heads.shape[-1] == found.shape[1]:
        found = torch.minimum(found, _turned(x.heads))
    return found


def pair_excess(
    run: Any, q: torch.Tensor, k: torch.Tensor, nq: list[torch.Tensor], nk: list[torch.Tensor]
) -> torch.Tensor:
    """Bound of what <q_i, k_j> has beyond degree p.

    Args:
        q, k: [M, B, n, Q or S, d].
        nq, nk: norms of their parts, [B, n, Q or S].

    Returns:
        [B, n, Q, S].
    """
    p, domain, algebra = run.order, run.domain, run.algebra
    if domain.is_interval:
        total: Any = 0
        for t in range(p + 1, 2 * p + 1):
            terms = [q[m] @ _turned(k[t - m]) for m in range(t - p, p + 1)]
            total = total + sum(terms[1:], terms[0]).abs()
        return total
    total = 0
    for m in range(1, p + 1):
        for n in range(p + 1 - m, p + 1):
            bound = _outer(nq[m], nk[n])
            if m + n == p + 1 and p > 1:
                f, g = algebra.part(q, m), algebra.part(k, n)
                at_corners = domain.is_simplex
                if at_corners:
                    f, g = domain.controls(f, m), domain.controls(g, n)
                exact = None
                for each in f:
                    values = (each @ _turned(g)).abs()
                    values = values.amax(0) if at_corners else values.sum(0)
                    if exact is None:
                        exact = values
                    else:
                        exact = torch.maximum(exact, values) if at_corners else exact + values
                bound = torch.minimum(bound, exact)
            total = total + bound
    return total


@rule_for(BoundScores)
def scores(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """q [.., Q, n d], k [.., S, g d] -> s [.., n, Q, S]. See above."""
    if not all(isinstance(x, Form) for x in inputs):
        inputs = [x if isinstance(x, Form) else run.constant(x, y)
                  for x, y in zip(inputs, node.inputs, strict=True)]
    xq, xk = inputs
    groups = xk.shape[-1] // node.head_dim

    def queries(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, node.head_dim)).transpose(-2, -3)

    heads = xq.shape[-1] // node.head_dim

    def keys(x: torch.Tensor) -> torch.Tensor:
        return queries(x).repeat_interleave(heads // groups, dim=-3)

    cq, ck = padded(xq.c, xk.c)
    q, k = queries(cq), keys(ck)
    mean = k[0].mean(-2, keepdim=True)
    k = torch.cat((k[:1] - mean, k[1:]))
    a = _head_balls(run, node, xq, queries(xq.box))
    b = _head_balls(run, node, xk, queries(xk.box)).repeat_interleave(heads // groups, dim=1)
    scale = abs(node.scale)
    s = run.algebra.multiply(q, k, lambda f, g: f @ _turned(g)) * node.scale
    nq, nk = run.domain.norms(q), run.domain.norms(k)
    e = pair_excess(run, q, k, nq, nk) * scale
    dq, dk = sum(nq[1:]), sum(nk[1:])
    e = e + scale * (_outer(a, dk) + _outer(dq, b) + _outer(a, b))
    box = e + scale * (_outer(a, nk[0]) + _outer(nq[0], b))
    # The scores themselves: the mean of the keys' centres belongs to them.
    s = s + (q @ _turned(mean)) * node.scale
    box = box + scale * _outer(a, _length(mean).expand_as(b))
    remainder = ScoreRemainder(a, b, k[0], nq[0], e, node.scale)
    form = Form(s, box, run.length(box, node, features=False), scores=remainder)
    return Outcome(form, [Fresh(box=e)])


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
    return _Attention(run, node, xs, xv, s, cv, mask[0] if mask else None).outcome()


class _Attention:
    """The rule of softmax(s) v, in steps. Shapes: [B, n, Q, S] for pairs, [B, n, Q] for queries."""

    def __init__(
        self, run: Any, node: Any, xs: Form, xv: Form, s: torch.Tensor, cv: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> None:
        self.run, self.node, self.xs, self.xv = run, node, xs, xv
        self.algebra, self.domain, self.p = run.algebra, run.domain, run.order
        self.heads = s.shape[2]
        self.s = s
        self.V = self._by_heads(cv)  # [M, B, n, S, d]
        self.rv = self._by_heads(xv.box)
        shared = self.heads // (cv.shape[-1] // node.head_dim)
        own = xv.box.unflatten(-1, (-1, node.head_dim)).transpose(-2, -3)
        self.bv = _head_balls(run, node, xv, own).repeat_interleave(shared, dim=1)
        self._masks(mask)

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
            k0 = torch.zeros_like(self.V[0])
            remainder = ScoreRemainder(n, keys, k0, n, self.xs.box, 1.0)
        scale, k0 = abs(remainder.scale), remainder.k0
        self.a, self.b, self.q_size = remainder.queries, remainder.keys, remainder.q_size
        self.scale = scale
        self.e_s = remainder.fresh.masked_fill(self.still, 0.0)
        k_size = _length(k0)
        R = self.e_s + scale * (_outer(self.a, k_size) + _outer(self.q_size, self.b))
        self.R_s = R.masked_fill(self.still, 0.0)
        root = safe_root(p0).unsqueeze(-1)
        v0 = self.V[0]
        self.centred = v0.unsqueeze(-3) - (p0 @ v0).unsqueeze(-2)  # [B, n, Q, S, d]
        values = root * self.centred
        keys = root * (k0.unsqueeze(-3) - (p0 @ k0).unsqueeze(-2)) * scale
        self.kV, self.kK = _singular(values), _singular(keys)
        self.M = _singular(_turned(values) @ keys)
        none = self.empty  # their weights do not move
        self.kK, self.M = (x.masked_fill(none, 0.0) for x in (self.kK, self.M))
        self.q_size = self.q_size.masked_fill(none, 0.0)
        self.es_p = self._weighted(self.e_s)
        keyed = self.q_size * scale * self._mean_square(self.b)
        self.Rs_p = times(self.kK, self.a) + keyed + self.es_p

    def _weighted(self, x: torch.Tensor) -> torch.Tensor:
        """(sum p0 x^2)^(1/2)."""
        return safe_root(times(self.p0, x.square()).sum(-1))

    def _mean_square(self, ball: torch.Tensor) -> torch.Tensor:
        """(sum_j p0_ij ball_j^2)^(1/2) of keys' balls [B, n, S]: [B, n, Q]."""
        return safe_root(_matmul(self.p0, ball.square().unsqueeze(-1)).squeeze(-1))

    # -------------------------------------------------------------------------- weights

    def _weights(self) -> None:
        """The weights' polynomial w, what it leaves out, and how far the weights move."""
        p, p0, domain = self.p, self.p0, self.domain
        s = torch.cat((torch.zeros_like(self.s[:1]), self.s[1:]))
        t = (s - (p0 * s).sum(-1, keepdim=True)).masked_fill(self.still, 0.0)
        at = domain.sizes(t)
        S = sum(at[1:], torch.zeros_like(at[0]))
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
        self.w = self.algebra.multiply(inverse, e, lambda f, g: f.unsqueeze(-1) * g)
        self.aw = domain.sizes(self.w)
        D_p = excess(ae, ai, p) + times(sum(ae), left.unsqueeze(-1)) + rest
        far = S > _FAR
        D_p = torch.where(far.any(-1, keepdim=True), torch.inf, D_p)
        self.D_p = torch.minimum(D_p, sum(self.aw) + one).masked_fill(self.still, 0.0)
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
        self.R_p = (self.D_p + J_p).masked_fill(self.still, 0.0)
        some = self.D_p > 0  # then p0 is not 0
        root = torch.where(some & (p0 > 0), p0, 1.0).sqrt()
        self.dp = _length(torch.where(some, self.D_p / root, 0.0))
        self.dp = torch.where((some & (p0 == 0)).any(-1), torch.inf, self.dp)

    # --------------------------------------------------------------------------- values

    def outcome(self) -> Outcome:
        self._scores()
        self._weights()
        p, p0, domain = self.p, self.p0, self.domain
        out = self.algebra.multiply(self.w, self.V, torch.matmul)
        aV, NV = domain.sizes(self.V), domain.norms(self.V)
        pairs = [(m, j) for m in range(1, p + 1) for j in range(p + 1 - m, p + 1)]
        D_head = sum((self.aw[m] @ NV[j].unsqueeze(-1)).squeeze(-1) for m, j in pairs)
        D = sum(self.aw[m] @ aV[j] for m, j in pairs)
        D_head = torch.minimum(D_head, _length(D))
        D = torch.minimum(D, D_head.unsqueeze(-1))
        # each coordinate
        dev = sum(aV[1:]) + self.rv
        box = D + _matmul(self.top, self.rv) + _matmul(self.R_p, dev)
        far = self.centred.abs()
        box = box + _matmul(self.R_p.unsqueeze(-2), far).squeeze(-2)
        # each token's vector, all heads together
        bv, dv = self.bv, sum(NV[1:])
        moved_v = self._mean_square(dv + bv)
        own = self._heads(times((1 + self.more) * moved_v, self.kK) * self.a)
        through_q = self._heads(times(self.M, self.a))
        through_k = self._heads(times(self.kV * self.q_size * self.scale,
                                         self._mean_square(self.b)))
        turn_v = _matmul(torch.minimum(times(self.theta.unsqueeze(-1), p0), self.top + p0),
                        bv.unsqueeze(-1)).squeeze(-1)
        es = times(1 + self.more, self.es_p)
        rest_v = times(moved_v, es + self.dp)
        rest_k = times((1 + self.more) * moved_v * self.q_size * self.scale,
                          self._mean_square(self.b))
        mean_v = self._heads(_matmul(p0, bv.unsqueeze(-1)).squeeze(-1))
        moved = self._heads(turn_v) + own + self._heads(rest_v + rest_k)
        turned = self._heads(times(self.kV * self.more,
                                      times(self.kK, self.a) + self.q_size * self.scale
                                      * self._mean_square(self.b)))
        direct = torch.minimum(
            _matmul(self.D_p.unsqueeze(-2), _length(self.centred).unsqueeze(-1)).flatten(-2)
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
        pull = partial(_pull, self.node, self.V[0].clone(), p0, self.still)
        unsure_box = torch.where(unsure.unsqueeze(-1), torch.inf, 0.0).expand_as(D)
        fresh = [
            Fresh(box=self._merge(D + unsure_box)),
            Fresh(box=None, ball=moved),
            Fresh(box=self.D_p, pull=pull),
            Fresh(ball=self.bent, weights=p0, pull=pull),
        ]
        return Outcome(form, fresh)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """Root of the sum of squares over all heads: [B, n, Q] -> [B, Q], replicated."""
        return safe_root(self.run.ranks(self.node).total(x.square().sum(1)))

    def _merge(self, x: torch.Tensor) -> torch.Tensor:
        return self.node._merge(x)

def _pull(
    node: Any, v0: torch.Tensor, p0: torch.Tensor, still: torch.Tensor, g: torch.Tensor
) -> torch.Tensor:
    """A row g at the output [B, Q, n d] -> at the weights [B, n, Q, S]; their errors sum to 0, and
    a key without weight has none."""
    g = node._heads(g) @ _turned(v0)
    return torch.where(still, 0.0, g - (p0 * g).sum(-1, keepdim=True))
