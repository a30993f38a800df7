"""One ellipsoid around many errors, which takes the place of all but the largest of them.

The set {sum_n g_n e_n + G v + ... : |e_n| <= 1, |v|_2 <= 1} lies, for weights D_n, D > 0 of sum 1,
in the ellipsoid {L u : |u|_2 <= 1} with

    L L^T = C = sum_n g_n g_n^T / D_n + G G^T / D + ...:

the largest <w, .> over the set is sum_n |<w, g_n>| + |G^T w|, and by Cauchy-Schwarz its square is
at most (sum_n D_n + D) (sum_n <w, g_n>^2 / D_n + |G^T w|^2 / D) = <w, C w>. The trace of C is least
for weights in proportion to |g_n| and to G's Frobenius norm. Rows w that meet N errors of equal
length at random find the ellipsoid (pi / 2)^(1/2) times as wide as the set, for any N; the box
around the set would be wider by a factor that grows as the root of w's length, which is what made
errors grow from layer to layer.

L is Cholesky's factor of C with each diagonal element larger by `_JITTER`, which is more than
rounding takes away. Where there is no factor, L = F^(1/2) diag(C)^(1/2) for the F numbers:
<w, C w> <= (sum_f |w_f| C_ff^(1/2))^2 <= F sum_f w_f^2 C_ff. Numbers without errors have none.
Each number is measured by its own reach, the sum of its |coefficients|, so that squares do not
overflow; errors that are nothing beside the largest have a least weight (`LEAST`), which is as
sound as any.
"""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.forward.sums import in_cache
from lirpa_megatron.operators.numerics import safe_root
from lirpa_megatron.parallel import spmd

AT_ONCE = 256
"""Rows whose products are added to a matrix at a time, at least."""
LEAST = 1e-12
"""The least weight of an error, beside those of the largest."""
_JITTER = {torch.float32: 3e-4, torch.float64: 1e-11}


def ellipsoid(boxes: torch.Tensor, balls: list[torch.Tensor], collectives: Any) -> torch.Tensor:
    """Symbols u in one L2 ball, such that {sum_n g_n e_n + sum G v} lies in {L u}.

    Args:
        boxes: g, [N, B, ...], for e in [-1, 1].
        balls: each G, [R, B, ...], for v in an L2 ball.
        collectives: of the ranks, which all have these numbers and get the first one's L.

    Returns:
        L, [F, B, ...], F the numbers that move; NaN or infinite where sums overflow.
    """
    shape = boxes.shape[1:]
    boxes, balls = boxes.flatten(2), [x.flatten(2) for x in balls]
    reach = total_size(boxes, 1) + sum(safe_root(total_size(x, 2)) for x in balls)
    moving = (reach != 0).any(0).nonzero().flatten()
    F = len(moving)
    if not F:
        return boxes.new_zeros(0, *shape)
    reach = reach[:, moving]
    inverse = torch.where(reach > 0, 1 / torch.where(reach > 0, reach, 1.0), 0.0)
    boxes, *balls = (x if F == x.shape[2] else x[..., moving] for x in (boxes, *balls))
    sizes = torch.cat([_size(x, reach, -1) for x in boxes.split(in_cache(boxes))])
    lengths = [_size(x, reach, (0, 2)) for x in balls]
    total = sizes.sum(0) + sum(lengths)
    C = inverse.new_zeros(len(inverse), F, F)
    pairs = [(x, y.expand(len(x), -1)) for x, y in zip(balls, lengths, strict=True)]
    for rows, of in [(boxes, sizes), *pairs]:
        by = (total / of).sqrt()
        step = max(AT_ONCE, in_cache(rows))
        for own, k in zip(rows.split(step), by.split(step), strict=True):
            own = (own * inverse * k.unsqueeze(-1)).transpose(0, 1)
            C = torch.baddbmm(C, own.transpose(1, 2), own)
    L = root(C) * reach.unsqueeze(-1)
    if collectives.size > 1:
        L = spmd.broadcast_tensor(L.contiguous(), collectives.group)
    out = boxes.new_zeros(F, len(L), shape[1:].numel())
    out[..., moving] = L.permute(2, 0, 1)
    return out.unflatten(2, shape[1:])


def total_size(rows: torch.Tensor, power: int) -> torch.Tensor:
    """sum |rows_n|^power, [N, B, F] -> [B, F]."""
    total = rows.new_zeros(rows.shape[1:])
    for some in rows.split(in_cache(rows)):
        total = total + (some.abs() if power == 1 else some.square()).sum(0)
    return total


def _size(rows: torch.Tensor, reach: torch.Tensor, over: int | tuple[int, ...]) -> torch.Tensor:
    """Lengths in units of the largest reach, which are not lost to underflow."""
    unit = reach.amax(-1, keepdim=True)
    rows = rows / torch.where(unit > 0, unit, 1.0)
    return safe_root(rows.square().sum(over)).clamp(min=LEAST)


def root(C: torch.Tensor) -> torch.Tensor:
    """L with L L^T >= C for positive semidefinite [B, F, F]; zero rows stay zero."""
    diagonal = C.diagonal(dim1=-2, dim2=-1)
    some = diagonal > 0
    scale = torch.where(some, torch.where(some, diagonal, 1.0).sqrt(), 0.0)
    inverse = torch.where(some, 1 / torch.where(some, scale, 1.0), 0.0)
    C = C * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    C.diagonal(dim1=-2, dim2=-1).fill_(1 + _JITTER[C.dtype])
    L, failed = torch.linalg.cholesky_ex(C)
    wide = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device) * C.shape[-1] ** 0.5
    bad = (failed != 0) | ~L.flatten(1).isfinite().all(1)
    return torch.where(bad[:, None, None], wide, L) * scale.unsqueeze(-1)
