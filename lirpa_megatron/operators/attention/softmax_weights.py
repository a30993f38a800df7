"""Bounds of softmax weights, as functions of tensors; keys are the last dimension."""

from __future__ import annotations

import torch

from lirpa_megatron.arithmetic.near import chosen, maybe_nonzero


def masked_softmax(s: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Softmax over unmasked keys; uniform if all keys are masked."""
    none = masked.all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(masked & ~none, -float("inf")).masked_fill(none, 0.0), -1)


def phi(z: torch.Tensor) -> torch.Tensor:
    """An upper bound of e^z - 1 - z: Taylor's remainder z^2/2 e^(z+), or the value itself."""
    series = z.square() / 2 * z.clamp(min=0).exp()
    direct = (torch.expm1(z) - z) + 4 * torch.finfo(z.dtype).eps * (z.abs() + torch.expm1(z).abs())
    return torch.minimum(series, direct.clamp(min=0))


def _outward(low: torch.Tensor, high: torch.Tensor, like: torch.Tensor) -> tuple:
    """Converts to the dtype of `like`, rounded outwards and clamped to [0, 1]."""
    eps = 8 * torch.finfo(like.dtype).eps
    low, high = (low * (1 - eps)).to(like.dtype), (high * (1 + eps)).to(like.dtype)
    return low.clamp(0, 1), high.clamp(0, 1)


def _others(e: torch.Tensor) -> torch.Tensor:
    """For each key, the sum of all others. (total - e would cancel if one key dominates.)"""
    ahead = torch.nn.functional.pad(e, (1, 0))[..., :-1].cumsum(-1)
    behind = torch.nn.functional.pad(e, (0, 1))[..., 1:].flip(-1).cumsum(-1).flip(-1)
    return ahead + behind


def _from_exponentials(el: torch.Tensor, eu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Range of p_j = e_j / (e_j + the others) for e in [el, eu], in float64, tightened by the
    simplex."""
    low = el / (_others(eu) + el).clamp(min=1e-300)
    others = _others(el)
    both = others + eu
    high = torch.where(both > 0, eu / torch.where(both > 0, both, 1.0), 1.0)
    return torch.maximum(low, 1 - _others(high)), torch.minimum(high, 1 - _others(low))


def weight_box(
    p0: torch.Tensor, dl: torch.Tensor, du: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Range of p_j = p0_j e^delta_j / sum_k p0_k e^delta_k for delta in [dl, du], sum p0 delta = 0.

    By Jensen the denominator is at least 1, and it is 1 + sum p0 phi(delta). Contains p0.
    """
    p, l, u = p0.double(), dl.double(), du.double()
    el, eu = p * l.exp(), p * u.exp()
    total = 1 + (p * torch.maximum(phi(l), phi(u))).sum(-1, keepdim=True)
    low, high = _from_exponentials(el, eu)
    low, high = torch.maximum(low, el / total), torch.minimum(high, eu)
    # A key of weight 0 keeps weight 0.
    some = maybe_nonzero(p)
    low, high = _outward(torch.where(some, low, 0.0), torch.where(some, high, 0.0), p0)
    return torch.minimum(low, p0), torch.maximum(high, p0)


def weight_interval(
    l: torch.Tensor, u: torch.Tensor, masked: torch.Tensor, fill: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Range of the softmax of scores in [l, u], masked ones replaced by `fill`."""
    like, out = l, masked & (fill == float("-inf"))
    l, u = (x.double().masked_fill(masked, max(fill, -1e300)) for x in (l, u))
    wild = ~((l.abs() < 1e15) & (u.abs() < 1e15)) & ~out
    wild = wild.any(-1, keepdim=True)
    l, u = (torch.where(wild, 0.0, x).masked_fill(out, -float("inf")) for x in (l, u))
    top = u.amax(-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, 0.0)
    low, high = _from_exponentials((l - top).exp(), (u - top).exp())
    low, high = torch.where(wild, 0.0, low), torch.where(wild, 1.0, high)
    return _outward(low.masked_fill(out, 0.0), high.masked_fill(out, 0.0), like)


def quotient(H: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    """An upper bound of max sum_j P_j f_j H_j / (1 + sum_j P_j f_j) over 0 <= f_j <= 1, and of 0.

    The maximum is the root of F(theta) = theta with F(theta) = sum_j P_j [H_j - theta]+, because a
    value theta is attained if and only if sum_j P_j f_j (H_j - theta) >= theta for some f. F is
    decreasing and convex, so Newton's method from 0 approaches the root from the left, and F at a
    point left of the root lies right of the root.
    """
    theta = torch.zeros_like(H[..., :1])
    for _ in range(4):
        active = P * (H > theta)
        theta = (active * H).sum(-1, keepdim=True) / (1 + active.sum(-1, keepdim=True))
        theta = chosen(theta.clamp(min=0))
    above = (P * (H - theta).clamp(min=0)).sum(-1, keepdim=True)
    return torch.maximum(theta, above).squeeze(-1)
