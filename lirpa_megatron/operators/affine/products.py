"""Ranges of products of two affine forms: of vectors (attention scores) and of numbers (gates).

Products are bounded over an ellipsoid: the box |u_n| <= 1 lies in {u: sum_n D_n u_n^2 <= sum D} for
all weights D > 0 (Cauchy and Schwarz), and over it, with <b, b'>_D = (sum D) sum_n b_n b'_n / D_n,

    max <b, u> = |b|_D        <b, u> <b', u> in ( <b, b'>_D -+ |b|_D |b'|_D ) / 2.

D is the mean size of the columns of the forms in question. For a Euclidean ball D = 1 / N is exact;
an L1 ball is contained in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lirpa_megatron.arithmetic.near import Near, chosen, exact
from lirpa_megatron.operators.affine.form import AffineForm
from lirpa_megatron.operators.numerics import ROUNDING, safe_root


def _weights(*squares: torch.Tensor) -> torch.Tensor:
    """(sum D) / D_n from the squared sizes [..., N] of the columns of several matrices.

    Detached from gradients: every D gives a sound bound.
    """
    shares = [s / s.sum(-1, keepdim=True).clamp_min(1e-30) for s in squares]
    D = torch.stack(torch.broadcast_tensors(*shares)).sum(0).detach().sqrt()
    D = chosen(D + 1e-6 * D.amax(-1, keepdim=True) + 1e-18)
    return D.sum(-1, keepdim=True) / D


def product_range(
    a: AffineForm, b: AffineForm, at_once: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of <delta a_i, delta b_j> for all i and j; delta is the deviation from the center.

    With A' and B' the matrices over the unit ball of the ellipsoid (A' = A D^-1/2 (sum D)^1/2), for
    every s > 0

        <A'x, B'x> = |(s A' + B'/s) x|^2 / 4 - |(s A' - B'/s) x|^2 / 4,

    which lies between -+ 1/4 of the largest eigenvalues of s^2 A'A'^T + B'B'^T/s^2 -+ (C + C^T),
    C = A'B'^T [d, d]; s balances the two traces. The slacks add their products with everything.

    Args:
        a: [*lead, T, d].
        b: [*lead, U, d].
        at_once: how many coefficients of pairs to compute at once; at least those of one query.

    Returns:
        (lower, upper), each [*lead, T, U].
    """
    # Not all queries at once: the weighted coefficients of all pairs would fill the memory.
    pairs = [
        _pairs_range(own, b.A, a.norm)
        for own in a.A.split(_queries_at_once(b.A, at_once), -3)
    ]
    lower, upper = (torch.cat(bounds, -2) for bounds in zip(*pairs, strict=True))
    slack = a.reach() @ b.slack.transpose(-1, -2)
    slack = slack + a.slack @ (b.reach() + b.slack).transpose(-1, -2)
    return lower - slack, upper + slack


def _queries_at_once(A: torch.Tensor, at_once: int) -> int:
    """How many queries to process together, each with all keys of A."""
    return max(1, at_once // max(1, A.numel()))


def _pairs_range(
    A: torch.Tensor, B: torch.Tensor, norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`product_range` of all pairs at once, without slacks.

    Args:
        A: [*lead, T, d, N].
        B: [*lead, U, d, N].

    Returns:
        (lower, upper), each [*lead, T, U].
    """
    A, B = A.unsqueeze(-3), B.unsqueeze(-4)
    if norm == float("inf"):
        weights = _weights(A.square().sum(-2), B.square().sum(-2))
    else:
        weights = B.new_ones(*B.shape[:-2], B.shape[-1])
    weighted, turned = A * weights.unsqueeze(-2), B.transpose(-1, -2)
    AA = weighted @ A.transpose(-1, -2)
    AB = weighted @ turned
    BB = (B * weights.unsqueeze(-2)) @ turned
    traces = [G.diagonal(dim1=-1, dim2=-2).sum(-1).clamp_min(1e-30) for G in (AA, BB)]
    s2 = chosen((traces[1] / traces[0]).detach().sqrt()[..., None, None])
    squares, cross = s2 * AA + BB / s2, AB + AB.transpose(-1, -2)
    grow = (1 + 10 * ROUNDING[A.dtype]) / 4
    upper = grow * largest_eigenvalue(squares + cross)
    return -grow * largest_eigenvalue(squares - cross), upper


def elementwise_range(a: AffineForm, b: AffineForm) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of delta a delta b for each coordinate of two forms of one shape.

    Returns:
        (lower, upper), each [B, *node shape].
    """
    if a.norm == float("inf"):
        weights = _weights(a.A.square(), b.A.square())
    else:
        weights = torch.ones_like(a.A)
    cross = (a.A * weights * b.A).sum(-1)
    sizes = safe_root((a.A.square() * weights).sum(-1) * (b.A.square() * weights).sum(-1))
    slack = a.reach() * b.slack + a.slack * (b.reach() + b.slack)
    sizes = sizes * (1 + 10 * ROUNDING[a.A.dtype])
    return (cross - sizes) / 2 - slack, (cross + sizes) / 2 + slack


def largest_eigenvalue(G: torch.Tensor) -> torch.Tensor:
    """For symmetric positive semidefinite matrices: exact or a bit more; NaN if not finite."""
    if isinstance(G, Near):
        return G.largest_eigenvalue(largest_eigenvalue)
    finite = torch.isfinite(G).all(-1).all(-1)
    G = torch.where(finite[..., None, None], G, 0.0)
    if G.is_cuda and G.shape[-1] > 32:  # cuSOLVER processes a batch one by one
        largest = above_largest_eigenvalue(G)
    else:
        largest = torch.linalg.eigvalsh(G)[..., -1].clamp_min(0)
    return torch.where(finite, largest, float("nan"))


def above_largest_eigenvalue(G: torch.Tensor, products: int = 6) -> torch.Tensor:
    """An upper bound from matrix products: lambda_max^m <= |G^m|_F <= sqrt(d) lambda_max^m.

    For m = 2^6 = 64, at most 4% too large for d = 128, and nearly exact if one eigenvalue
    dominates.

    Args:
        G: [..., d, d], symmetric, positive semidefinite and finite.
        products: m is 2 to this power.

    Returns:
        [...].
    """
    largest, share = G.abs().amax((-2, -1)).detach(), 1.0
    G = G / torch.where(largest > 0, largest, 1.0)[..., None, None]
    for squarings in range(products + 1):
        G = G @ G if squarings else G
        size = safe_root(G.square().sum((-2, -1)))  # powers would overflow or underflow
        largest = largest * size**share
        G, share = G / torch.where(size > 0, size, 1.0)[..., None, None], share / 2
    return largest


@dataclass
class Pairs:
    """For query i and key j, the forms of v_j minus its mean over i's keys, and of the score t_ij.

    A' [d, N] are the coefficients of v_j - sum_k p_ik v_k, and alpha [N] those of t_ij. Queries are
    processed in groups of G, for which only the first K <= U keys matter.

    Attributes:
        Q: for each group [B, n, G, d, K d]; a^T Q a = |A'^T a|_D^2 for each key's [d, d].
        cross: [B, n, G, d, K]; <a, cross> = <A'^T a, alpha>_D.
        slack: [B, n, G, d, K], slack of the centred value.
        size: [B, n, T, U], |alpha|_D.
    """

    Q: list[torch.Tensor]
    cross: list[torch.Tensor]
    slack: list[torch.Tensor]
    size: torch.Tensor

    @classmethod
    def of(
        cls, values: AffineForm, p: torch.Tensor, scores: AffineForm | None,
        keys: Sequence[int] | None = None, at_once: int = 1,
    ) -> Pairs:
        """Pairs of values [B, n, U, d], weights p [B, n, T, U] and, if known, scores [B, n, T, U].

        Args:
            values, p, scores: as above.
            keys: for each query, how many of the first keys matter (None: all).
            at_once: as in `product_range`.
        """
        rows, every, step = [], p.shape[-1], _queries_at_once(values.A, at_once)
        for i in range(0, p.shape[-2], step):
            own = p[..., i : i + step, :]  # [B, n, G, U]
            K = every if keys is None else max(keys[i : i + step])
            A, slack = values.A.unsqueeze(2), values.slack.unsqueeze(2)
            mean = torch.einsum("bngu,bnudm->bngdm", own, values.A).unsqueeze(3)
            A = A[:, :, :, :K] - mean  # [B, n, G, K, d, N]
            shared = own.unsqueeze(-1) * slack
            slack = (slack - 2 * shared + shared.sum(3, keepdim=True))[:, :, :, :K]
            if scores is None:
                alpha = A.new_zeros(*A.shape[:-2], A.shape[-1])
            else:
                alpha = scores.A[:, :, i : i + step, :K]
            if values.norm == float("inf"):
                weights = _weights(A.square().sum(-2), alpha.square())
            else:
                weights = torch.ones_like(alpha)
            weighted = A * weights.unsqueeze(-2)
            rows.append((
                (weighted @ A.transpose(-1, -2)).transpose(3, 4).flatten(-2),
                (weighted @ alpha.unsqueeze(-1)).squeeze(-1).transpose(-1, -2),
                slack.transpose(-1, -2),
                F.pad(safe_root((alpha.square() * weights).sum(-1)), (0, every - K)),
            ))
        Q, cross, slack, size = (list(row) for row in zip(*rows, strict=True))
        return cls(Q, cross, slack, torch.cat(size, 2))

    def at(self, first: int, end: int, keys: int) -> Pairs:
        """Of the queries from `first` to `end`, and of the first keys."""
        found, place = ([], [], []), 0
        for group in zip(self.Q, self.cross, self.slack, strict=True):
            low, high = (min(max(x - place, 0), group[0].shape[2]) for x in (first, end))
            place += group[0].shape[2]
            if low == high:
                continue
            K = min(keys, group[1].shape[-1])
            for known, x in zip(found, group, strict=True):
                width = x.shape[-1] // group[1].shape[-1] * K
                known.append(x[:, :, low:high, :, :width])
        return Pairs(*found, self.size[:, :, first:end, :keys])

    def reaches(self, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Bounds for rows a [R, B, n, T, d], each [R, B, n, T, U]; 0 for pairs that do not matter.

        Returns:
            (W, s, c): |<a_i, delta v'_j>| <= W + s, where s comes from the slack. The product of
            the affine part, bounded by W, with the affine part of t_ij is at least (c - W size)/2.
        """
        found, first = [], 0
        d, keys = a.shape[-1], self.size.shape[-1]
        passes_over = a.device.type == "cpu" and not torch.is_grad_enabled()
        for Q, cross, slack in zip(self.Q, self.cross, self.slack, strict=True):
            own = a[..., first : first + Q.shape[2], :].movedim(0, -2)  # [B, n, G, R, d]
            first += Q.shape[2]
            if passes_over and not own.any():  # the row is 0 here because of a causal mask
                found.append((exact(a.new_zeros(*a.shape[:-2], Q.shape[2], keys)),) * 3)
                continue
            through = (own @ Q).unflatten(-1, (-1, d))
            three = (through * own.unsqueeze(-2)).sum(-1), own.abs() @ slack, own @ cross
            found.append([F.pad(x, (0, keys - x.shape[-1])).movedim(-2, 0) for x in three])
        W, slack, cross = (torch.cat(x, -2) for x in zip(*found, strict=True))
        root = safe_root(W.clamp(min=0)) * (1 + 10 * ROUNDING[a.dtype])
        return root, slack, cross
