"""Second-order errors of many numbers as one ball.

In a network's layer the errors of hundreds of numbers are squares (or products) of linear forms in
the same symbols s. One error has a range of its own; together they reach far less than the box of
these ranges, because few s are at the end of many ranges. The set of s lies in an ellipsoid
sum_n D_n s_n^2 <= 1 (D_n > 0 of sum 1; in an L2 ball of symbols all have one D, which counts once),
so s' = (D_n^(1/2) s_n)_n has |s'|_2 <= 1, and a form <a, s> is <a', s'>, a'_n = a_n / D_n^(1/2).
A number that is quadratic in s,

    e_k = sum_j <a'_kj, s'> <b'_kj, s'> = <M_k, s' s'^T>,  M_k = sum_j a'_kj b'_kj^T, symmetrized,

is a linear form of s' s'^T, a matrix of Frobenius norm |s'|^2 <= 1. So with G the Gram matrix of
all M_k the vector e lies in {L u : |u|_2 <= 1} for L L^T >= G: by Cauchy-Schwarz
<w, e> = <sum_k w_k M_k, s' s'^T> <= (w^T G w)^(1/2) for every w. Gram matrices:

========================  ========================================================================
e_k                       G_kl
========================  ========================================================================
kappa_k <a_k, s>^2        kappa_k kappa_l <a'_k, a'_l>^2
sum_j <a_j, s> <b_jk, s>  sum_ij (<a'_i, a'_j> <b'_ik, b'_jl> + <a'_i, b'_jl> <b'_ik, a'_j>) / 2
========================  ========================================================================

Further errors |r_k| <= h_k are added as in `ellipsoids`: with trace(G)^(1/2) = g and sum h = h, the
sum of both lies in the ellipsoid of (g + h) (G / g + diag(h)).

A row w of F numbers with random signs meets a box of half-widths b by about (2 / (pi F))^(1/2) |w|
sum b and a ball by |w| (trace / F)^(1/2). A ball takes the place of a box where that is less.

Degenerate: numbers that stand still have no error (rows of zeros); where sums overflow, or h is
infinite, the box stays.
"""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.forward.ellipsoids import AT_ONCE, LEAST, root
from lirpa_megatron.forward.form import Form, squared, times
from lirpa_megatron.forward.sums import in_cache
from lirpa_megatron.operators.numerics import ROUNDING, safe_root
from lirpa_megatron.parallel import spmd

_RANDOM = (2 / torch.pi) ** 0.5
_MOST = 2**27
"""Numbers that Gram matrices of attention may have: they grow as the fourth power of the number of
tokens that move."""


def weighted_gram(domain: Any, a: torch.Tensor) -> torch.Tensor:
    """<a'_k, a'_l> of linear forms a [N, P, F] in a domain that `is_sum`: [P, F, F].

    D is in proportion to the norms of a_n, for each of P.
    """
    sizes = torch.cat([safe_root(x.square().sum(-1)) for x in a.split(in_cache(a))])
    D, total = domain.shares_of(sizes)
    total = total * (1 + len(D) * LEAST + ROUNDING[a.dtype])
    D = torch.maximum(D, LEAST * total)
    by = torch.where(total > 0, (total / torch.where(D > 0, D, 1.0)).sqrt(), 0.0)
    gram = a.new_zeros(a.shape[1], a.shape[2], a.shape[2])
    step = max(AT_ONCE, in_cache(a))
    for own, k in zip(a.split(step), by.split(step), strict=True):
        own = (own * k.unsqueeze(-1)).transpose(0, 1)
        gram = torch.baddbmm(gram, own.transpose(1, 2), own)
    return gram


def one_ball(
    G: torch.Tensor, h: torch.Tensor, box: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ball of e + r, where it is smaller than a box.

    Args:
        G: Gram matrices of e, [P, F, F].
        h: bounds of r, [P, F].
        box: half-widths of the box, [P, F].

    Returns:
        (whether the ball is smaller [P], L [P, F, F], 0 elsewhere).
    """
    g = safe_root(G.diagonal(dim1=-2, dim2=-1).sum(-1))
    total = g + h.sum(-1)
    better = total.isfinite() & (total < _RANDOM * box.sum(-1))
    by = torch.where(better & (g > 0), total / torch.where(g > 0, g, 1.0), 0.0)
    C = torch.where(better[:, None, None], G, 0.0) * by[:, None, None]
    C = C + torch.diag_embed(torch.where(better.unsqueeze(-1), h * total.unsqueeze(-1), 0.0))
    return better, torch.where(better[:, None, None], root(C), 0.0)


def _of_first_rank(
    run: Any, better: torch.Tensor, L: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `one_ball` has found on the first rank of numbers that all ranks have: whether a ball is
    smaller must not depend on a rank's rounding."""
    group = run.context.collectives
    if group.size == 1:
        return better, L
    L = spmd.broadcast_tensor(L.contiguous(), group.group)
    return (L != 0).flatten(1).any(1), L


def parabola(
    taylor: Any, c: torch.Tensor, reach: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(value, slope, kappa, h): |f(c + d) - value - slope d - kappa d^2| <= h for |d| <= reach = r.

    With t_k = f^(k)(c) / k! the least h of: Taylor's polynomial of degree 2; that of degree 3 with
    |d^3 - 3/4 r^2 d| <= r^3 / 4 (Chebyshev's polynomial), so that 3/4 t_3 r^2 goes to the slope;
    that of degree 4 with d^4 - r^2 d^2 in [-r^4 / 4, 0], so that t_4 r^2 goes to kappa and
    -t_4 r^4 / 8 to the value.
    """
    t0, t1, t2, t3, t4 = taylor.jet(c, 4)
    rest = [times(taylor.largest(k, c, reach), reach**k) for k in (3, 4, 5)]
    cube, fourth = t3.abs() * reach**3 / 4, t4.abs() * reach**4 / 8
    steeper = t1 + 0.75 * t3 * reach**2
    found = t0, t1, t2, rest[0]
    for other in (
        (t0, steeper, t2, cube + rest[1]),
        (t0 - t4 * reach**4 / 8, steeper, t2 + t4 * reach**2, cube + fourth + rest[2]),
    ):
        less = other[3] < 0.9 * found[3]
        found = tuple(torch.where(less, b, a) for a, b in zip(found, other, strict=True))
    noise = 8 * torch.finfo(c.dtype).eps * (c.abs() + 1)
    h = found[3] + torch.where(reach > 0, noise, 0.0)
    return *found[:3], h


def of_curve(
    run: Any, node: Any, x: Form, parts: tuple, reach: torch.Tensor, box: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The errors of lines of y = f(x) as one ball for each position.

    f(c + d) = value + slope d + kappa d^2 + r, |r| <= h (`parabola`), with d = <a, s> + R:
    kappa d^2 is kappa <a, s>^2 and at most |kappa| |R| (2 |d| + |R|).

    Args:
        parts: (kappa, h), [B, T..., F].
        reach: the largest |d|, [B, T..., F].
        box: half-widths of the errors of other lines.

    Returns:
        (where the ball is smaller than the box, [B, T..., 1]; balls [P, n, B, T..., F] of P
        positions, all features' n symbols, on each rank of its own features); None if no position
        moves.
    """
    ranks, a = run.ranks(node), x.c[1:].flatten(1, -2)
    moving = ranks.most((a != 0).any(0).any(-1).to(reach)).nonzero().flatten()
    if not len(moving):
        return None
    R, reach, box, kappa, h = (b.flatten(0, -2)[moving] for b in (x.box, reach, box, *parts))
    a, h = a[:, moving], h + times(kappa.abs() * R, 2 * reach + R)
    width, rank = box.shape[-1], ranks.rank
    if ranks.size > 1:
        of_all = run.context.collectives.gather_features
        a, kappa, h, box = (of_all(b) for b in (a, kappa, h, box))
    G = squared(weighted_gram(run.domain, a)) * kappa.unsqueeze(-1) * kappa.unsqueeze(-2)
    better, L = _of_first_rank(run, *one_ball(G, h, box))
    return _placed(better, L[:, rank * width : (rank + 1) * width], moving, x.shape)


def _placed(
    better: torch.Tensor, L: torch.Tensor, moving: torch.Tensor, shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor]:
    """What was found for the positions `moving`, for all of a node [B, T..., F]."""
    places, every = torch.arange(len(L), device=L.device), shape[:-1]
    out = L.new_zeros(len(L), L.shape[-1], every.numel(), shape[-1])
    out[places, :, moving] = L.transpose(1, 2)
    where = torch.zeros(every.numel(), dtype=torch.bool, device=L.device)
    where[moving] = better
    return where.reshape(*every, 1), out.unflatten(2, every)


def of_norm(
    run: Any, i: torch.Tensor, z: torch.Tensor, h: torch.Tensor, box: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The errors <i, s> <z_f, s> of a norm at a replicated node, as one ball for each position.

    Args:
        i, z: linear parts [N, B, T...] and [N, B, T..., F] of the factor and of what it multiplies.
        h: bounds of further errors, [B, T..., F].
        box: half-widths of the errors' ranges, [B, T..., F].

    Returns:
        (where the ball is smaller than the box, [B, T..., 1]; balls [P, n, B, T..., F]); None if no
        position moves.
    """
    shape, i, z = z.shape[1:], i.flatten(1), z.flatten(1, -2)
    h, box = h.flatten(0, -2), box.flatten(0, -2)
    moving = (z != 0).any(0).any(-1).nonzero().flatten()
    if not len(moving):
        return None
    i, z = i[:, moving], z[:, moving]
    size_i, size_z = (safe_root(x.square().flatten(2).sum((0, 2))) for x in (i.unsqueeze(2), z))
    by = torch.where(size_i > 0, size_z / torch.where(size_i > 0, size_i, 1.0), 0.0)
    gram = weighted_gram(run.domain, torch.cat(((i * by).unsqueeze(-1), z), -1))
    ii, iz, zz = gram[:, :1, :1], gram[:, 0, 1:], gram[:, 1:, 1:]
    back = torch.where(by > 0, 1 / torch.where(by > 0, by, 1.0), 0.0)[:, None, None]
    G = (ii * zz + iz.unsqueeze(-1) * iz.unsqueeze(-2)) / 2 * back.square()
    better, L = _of_first_rank(run, *one_ball(G, h[moving], box[moving]))
    return _placed(better, L, moving, shape)


def of_products(
    run: Any, node: Any, w: torch.Tensor, v: torch.Tensor, box: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The errors sum_j <w_ij, s> <v_j, s> of attention, as one ball for each query of a head.

    Args:
        w: linear parts of the weights, [N, B, n, Q, S].
        v: of the values, [N, B, n, S, d].
        box: half-widths of the errors' ranges, [B, n, Q, d].

    Returns:
        (where the ball is smaller, [B, n, Q, 1]; balls [K, d, B, n, Q, d], K of all ranks' heads
        and the queries that move; of other ranks' heads zeros); None if no query moves, or if
        matrices would be too large (`_MOST`).
    """
    ranks, (B, n, _, d) = run.ranks(node), v.shape[1:]
    moves = ranks.most((w != 0).any(0).any(-1).any(0).any(0).to(w)).nonzero().flatten()
    keys = ranks.most((v != 0).any(0).any(-1).any(0).any(0).to(v)).nonzero().flatten()
    if not len(moves) or not len(keys):
        return None
    rows, w, v = w.shape[3], w[:, :, :, moves][..., keys], v[:, :, :, keys]
    Q, S = len(moves), len(keys)
    if B * n * (Q * S + S * d) ** 2 > _MOST:
        return None
    # of one size, so that D belongs to both
    size_w, size_v = (safe_root(x.square().sum((0, 3, 4))) for x in (w, v))
    by = torch.where(size_w > 0, size_v / torch.where(size_w > 0, size_w, 1.0), 0.0)
    by = by[..., None, None]
    both = torch.cat(((w * by).flatten(3), v.flatten(3)), -1).flatten(1, 2)
    gram = weighted_gram(run.domain, both)  # [B n, Q S + S d, ...]
    ww = gram[:, : Q * S, : Q * S].unflatten(1, (Q, S)).unflatten(3, (Q, S))
    ww = ww.diagonal(dim1=1, dim2=3)  # [B n, S, S, Q]
    wv = gram[:, : Q * S, Q * S :].unflatten(1, (Q, S)).unflatten(3, (S, d))
    vv = gram[:, Q * S :, Q * S :].unflatten(1, (S, d)).unflatten(3, (S, d))
    G = torch.einsum("pijq,pifjg->pqfg", ww, vv) + torch.einsum("pqijg,pqjif->pqfg", wv, wv)
    back = torch.where(by > 0, 1 / torch.where(by > 0, by, 1.0), 0.0).reshape(B * n, 1, 1, 1)
    G = (G / 2 * back.square()).flatten(0, 1)
    box = box[:, :, moves].reshape(-1, d)
    better, L = one_ball(G, torch.zeros_like(box), box)
    if ranks.size == 1:  # otherwise heads are the rank's own
        better, L = _of_first_rank(run, better, L)
    L = L.unflatten(0, (B, n, Q))
    out = L.new_zeros(ranks.size * n, Q, d, B, n, rows, d)
    heads, queries = (torch.arange(k, device=w.device) for k in (n, Q))
    heads = heads[:, None]
    out[ranks.rank * n + heads, queries, :, :, heads, moves] = L.permute(1, 2, 4, 0, 3)
    where = torch.zeros(B, n, rows, 1, dtype=torch.bool, device=w.device)
    where[:, :, moves] = better.reshape(B, n, Q, 1)
    return where, out.flatten(0, 1)
