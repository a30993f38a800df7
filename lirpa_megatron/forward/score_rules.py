"""The rule of attention scores: s = scale q k^T.

The product of the polynomials. Beyond degree p: by the norms of the parts; the parts of lowest
excess degree, and all of a single symbol, by the products themselves (`pair_excess`). For a shift
of all scores of a query the softmax is the same, so keys are counted from their mean. With
R_q = a, R_k = b,

    R_s = scale (<a, k0> + <q0, b>) + e,   |e| <= scale (|a| dk + dq |b| + |a| |b|) + excess,

dq and dk the norms of the polynomials' deviations. The reader of the scores is told of these parts
(`ScoreRemainder`): a ball of all queries' errors does less to a softmax than boxes of all scores.
"""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.forward.form import Form, Fresh, Inputs, Outcome, ScoreRemainder, squared, times
from lirpa_megatron.forward.polynomials import padded
from lirpa_megatron.forward.rules import rule_for
from lirpa_megatron.operators.affine.products import largest_eigenvalue
from lirpa_megatron.operators.attention.scores import BoundScores
from lirpa_megatron.operators.numerics import ROUNDING, safe_root


def length(x: torch.Tensor) -> torch.Tensor:
    return safe_root(squared(x).sum(-1))


def outer(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return times(a.unsqueeze(-1), b.unsqueeze(-2))


def turned(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of numbers from 0 to infinity."""
    if bool(a.isfinite().all()) and bool(b.isfinite().all()):
        return a @ b
    infinite = (a.isinf().to(a) @ (b > 0).to(b)) + ((a > 0).to(a) @ b.isinf().to(b))
    finite = torch.where(a.isfinite(), a, 0.0) @ torch.where(b.isfinite(), b, 0.0)
    return torch.where(infinite > 0, torch.inf, finite)


def singular(x: torch.Tensor) -> torch.Tensor:
    """The largest singular value of [..., m, n], rounded up."""
    gram = x @ turned(x) if x.shape[-2] <= x.shape[-1] else turned(x) @ x
    return safe_root(largest_eigenvalue(gram)) * (1 + 10 * ROUNDING[x.dtype])


def head_balls(run: Any, node: Any, x: Form, box: torch.Tensor) -> torch.Tensor:
    """The ball of each head, [B, n, T].

    Args:
        run, node: of the operator that reads x.
        x: [.., T, n d].
        box: its box by heads, [B, n, T, d].
    """
    whole = run.ranks(node).enter(x.plain_ball()).unsqueeze(1)  # [B, 1, T]
    found = torch.minimum(length(box), whole.expand(box.shape[:-1]))
    if x.heads is not None and x.heads.shape[-1] == found.shape[1]:
        found = torch.minimum(found, turned(x.heads))
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
            terms = [q[m] @ turned(k[t - m]) for m in range(t - p, p + 1)]
            total = total + sum(terms[1:], terms[0]).abs()
        return total
    total = 0
    for m in range(1, p + 1):
        for n in range(p + 1 - m, p + 1):
            bound = outer(nq[m], nk[n])
            if m + n == p + 1 and p > 1:
                f, g = algebra.part(q, m), algebra.part(k, n)
                at_corners = domain.is_simplex
                if at_corners:
                    f, g = domain.controls(f, m), domain.controls(g, n)
                exact = None
                for each in f:
                    values = (each @ turned(g)).abs()
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
        own = queries(x)
        return own if heads == groups else own.repeat_interleave(heads // groups, dim=-3)

    cq, ck = padded(xq.c, xk.c)
    q, k = queries(cq), keys(ck)
    k0 = k[0] - k[0].mean(-2, keepdim=True)
    a = head_balls(run, node, xq, queries(xq.box))
    b = head_balls(run, node, xk, queries(xk.box)).repeat_interleave(heads // groups, dim=1)
    scale = abs(node.scale)
    s = run.algebra.multiply(q, k, lambda f, g: f @ turned(g)) * node.scale
    nq, nk = run.domain.norms(q), run.domain.norms(k)
    far, nk[0] = nk[0], length(k0)
    e = pair_excess(run, q, k, nq, nk) * scale
    dq, dk = sum(nq[1:]), sum(nk[1:])
    e = e + scale * (outer(a, dk) + outer(dq, b) + outer(a, b))
    box = e + scale * (outer(a, far) + outer(nq[0], b))
    remainder = ScoreRemainder(a, b, k0, nq[0], e, node.scale)
    form = Form(s, box, run.length(box, node, features=False), scores=remainder)
    return Outcome(form, [Fresh(box=e)])
