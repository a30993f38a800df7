"""Forward passes that are used in several places, as functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, interleaved: bool
) -> torch.Tensor:
    """Rotary positions as torch computes them.

    Args:
        x: [..., S, heads * d].
        cos, sin: [S, r], r <= d even: the first r coordinates of each head are rotated.
        heads: number of heads on this rank.
        interleaved: whether neighbours are rotated together instead of halves.
    """
    x = x.unflatten(-1, (heads, -1))
    r = cos.shape[-1]
    turned, kept = x[..., :r], x[..., r:]
    if interleaved:
        half = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        half = torch.cat((-turned[..., r // 2 :], turned[..., : r // 2]), dim=-1)
    turned = turned * cos.unsqueeze(-2) + half * sin.unsqueeze(-2)
    return torch.cat((turned, kept), dim=-1).flatten(-2)


def margins(
    x: torch.Tensor, wt: torch.Tensor, bt: torch.Tensor | None, logits: torch.Tensor, shared: bool
) -> torch.Tensor:
    """Logits of the targets minus `logits`.

    Args:
        x: [..., B, h].
        wt, bt: rows [B or T, h] of the targets, and their biases [B or T] or None.
        logits: [..., B, m].
        shared: whether all samples have the same targets.

    Returns:
        [..., B, m], or [..., B, T, m] for shared targets.
    """
    if shared:
        return F.linear(x, wt, bt).unsqueeze(-1) - logits.unsqueeze(-2)
    target = (x * wt).sum(-1)
    return (target if bt is None else target + bt).unsqueeze(-1) - logits


def normalized(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, rms: bool,
    groups: int,
) -> torch.Tensor:
    """LayerNorm or RMSNorm of each of `groups` equal parts of the last dimension.

    Args:
        x: [..., groups d].
        weight, bias: [d], shared by all parts.
        eps: added to the mean square.
        rms: RMSNorm: the mean is not subtracted.
        groups: number of parts; 1 normalises all features together.
    """
    shape = x.shape
    x = x.unflatten(-1, (groups, -1)) if groups > 1 else x
    if not rms:
        x = x - x.mean(-1, keepdim=True)
    y = x * (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).rsqrt() * weight
    return (y if bias is None else y + bias).reshape(shape)


def heads_first(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[..., S, n d] -> [..., n, S, d]."""
    return x.unflatten(-1, (-1, head_dim)).transpose(-2, -3)


def heads_last(x: torch.Tensor) -> torch.Tensor:
    """[..., n, S, d] -> [..., S, n d]."""
    return x.transpose(-2, -3).flatten(-2)
