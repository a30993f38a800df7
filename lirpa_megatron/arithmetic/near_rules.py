"""The rules of `near`: what each operation on numbers with an error is off."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from lirpa_megatron.arithmetic.floating import TINY, UNIT, gamma
from lirpa_megatron.arithmetic.near import RULES, Near, numbers

Tensor = torch.Tensor
_LIBM = 8 * UNIT


def rule_of(*names: str) -> Callable:
    """Enters a function as the rule of operations of these names."""
    def enter(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def _parts(x: Any) -> tuple[Any, Tensor | None]:
    """(value, off) of an operand; a number is exact."""
    return (x.value, x.off) if isinstance(x, Near) else (x, None)


def _size(x: Any) -> Any:
    """|x| without a gradient."""
    if not isinstance(x, Tensor):
        return abs(x)
    return x.detach() if x.dtype == torch.bool else x.detach().abs()


def _near(value: Tensor, *limits: Any) -> Near:
    with torch.no_grad():
        found = None
        for limit in limits:
            if limit is not None:
                found = limit if found is None else found + limit
        if found is not None and found.shape != value.shape:
            found = found.expand(value.shape)
    return Near(value, found)


@rule_of("add", "radd")
def _add(a: Any, b: Any) -> Near:
    (x, ex), (y, ey) = _parts(a), _parts(b)
    r = x + y
    return _near(r, ex, ey, UNIT * _size(r))


@rule_of("sub")
def _sub(a: Any, b: Any) -> Near:
    (x, ex), (y, ey) = _parts(a), _parts(b)
    r = x - y
    return _near(r, ex, ey, UNIT * _size(r))


@rule_of("rsub")
def _rsub(a: Any, b: Any) -> Near:
    return _sub(b, a)


@rule_of("mul", "rmul")
def _mul(a: Any, b: Any) -> Near:
    (x, ex), (y, ey) = _parts(a), _parts(b)
    r = x * y
    with torch.no_grad():
        off = (UNIT * _size(r)).add_(TINY)
        if ey is not None:
            off = off + _size(x) * ey
        if ex is not None:
            off = off + ex * (_size(y) if ey is None else _size(y) + ey)
    return Near(r, off)


@rule_of("div")
def _div(a: Any, b: Any) -> Near:
    (x, ex), (y, ey) = _parts(a), _parts(b)
    r = x / y
    with torch.no_grad():
        my = _size(y)
        own = UNIT * _size(r) + TINY
        if ey is None:
            return _near(r, own, None if ex is None else ex / my)
        left = torch.where(2 * ey <= my, my - ey, 0.0)
        above = _size(r) * ey if ex is None else _size(r) * ey + ex
        off = torch.where(left > 0, above / torch.where(left > 0, left, 1.0), math.inf)
    return _near(r, own, off)


@rule_of("rdiv")
def _rdiv(a: Any, b: Any) -> Near:
    return _div(b, a)


@rule_of("reciprocal")
def _reciprocal(a: Any) -> Near:
    return _div(1.0, a)


@rule_of("neg")
def _neg(a: Near) -> Near:
    return Near(-a.value, a.off)


@rule_of("abs")
def _abs(a: Near) -> Near:
    return Near(a.value.abs(), a.off)


@rule_of("square")
def _square(a: Near) -> Near:
    return _mul(a, a)


@rule_of("sum")
def _sum(a: Near, dim: Any = None, keepdim: bool = False) -> Near:
    dims = tuple(range(a.ndim)) if dim is None else dim
    r = a.value.sum(dims, keepdim)
    with torch.no_grad():
        n = a.value.numel() // max(1, r.numel())
        limit = gamma(n) * _size(a.value).sum(dims, keepdim)
        return _near(r, limit, None if a.off is None else a.off.sum(dims, keepdim))


@rule_of("mean")
def _mean(a: Near, dim: Any = None, keepdim: bool = False) -> Near:
    dims = tuple(range(a.ndim)) if dim is None else dim
    r = a.value.mean(dims, keepdim)
    with torch.no_grad():
        n = a.value.numel() // max(1, r.numel())
        limit = gamma(n + 2) * _size(a.value).mean(dims, keepdim) + TINY
        return _near(r, limit, None if a.off is None else a.off.mean(dims, keepdim))


@rule_of("cumsum")
def _cumsum(a: Near, dim: int) -> Near:
    limit = gamma(a.shape[dim]) * _size(a.value).cumsum(dim)
    return _near(a.value.cumsum(dim), limit, None if a.off is None else a.off.cumsum(dim))


def _bilinear(a: Any, b: Any, product: Callable, n: int) -> Near:
    """A product that is linear in both, each result a sum of n terms."""
    (x, ex), (y, ey) = _parts(a), _parts(b)
    r = product(x, y)
    with torch.no_grad():
        mx, my = _size(x), _size(y)
        second = gamma(n) * my if ey is None else ey + gamma(n) * my
        off = product(mx if ex is None else mx + ex, second) + (n + 1) * TINY
        if ex is not None:
            off = off + product(ex, my)
    return Near(r, off)


@rule_of("matmul")
def _matmul(a: Any, b: Any) -> Near:
    return _bilinear(a, b, torch.matmul, a.shape[-1])


@rule_of("rmatmul")
def _rmatmul(a: Any, b: Any) -> Near:
    return _matmul(b, a)


@rule_of("einsum")
def _einsum(pattern: str, *operands: Any) -> Near:
    if len(operands) != 2:
        raise NotImplementedError(f"einsum of {len(operands)} operands")
    inputs, output = pattern.split("->")
    sizes: dict[str, int] = {}
    for labels, x in zip(inputs.split(","), operands, strict=True):
        head, dots, tail = labels.partition("...")
        sizes |= dict(zip(head, x.shape, strict=False))
        if dots:
            between = x.shape[len(head) : x.ndim - len(tail)]
            sizes["."] = math.prod(between)
            sizes |= dict(zip(tail, x.shape[x.ndim - len(tail) :], strict=True))
    n = math.prod(size for label, size in sizes.items() if label not in output)
    return _bilinear(*operands, lambda x, y: torch.einsum(pattern, x, y), n)


@rule_of("addcmul")
def _addcmul(a: Any, b: Any, c: Any) -> Near:
    exact, (x, ex) = _mul(b, c), _parts(a)
    r = torch.addcmul(x, numbers(b), numbers(c))
    return _near(r, exact.off, ex, UNIT * _size(r))


def _of_larger(a: Any, b: Any, sign: int = 1) -> Tensor | None:
    """The limit of max(a, b): that of the one that is surely larger; sign -1: of min(a, b)."""
    (x, e), (y, f) = _parts(a), _parts(b)
    if e is None and f is None:
        return None
    with torch.no_grad():
        e = torch.zeros_like(x) if e is None else e
        f = torch.zeros_like(y) if f is None else f
        ahead, apart = sign * (x - y), 1.01 * (e + f)
        other = torch.where(ahead < -apart, f, torch.maximum(e, f))
        return torch.where(ahead > apart, e, other)


@rule_of("maximum")
def _maximum(a: Any, b: Any) -> Near:
    return _near(torch.maximum(numbers(a), numbers(b)), _of_larger(a, b))


@rule_of("minimum")
def _minimum(a: Any, b: Any) -> Near:
    return _near(torch.minimum(numbers(a), numbers(b)), _of_larger(a, b, -1))


@rule_of("amax")
def _amax(a: Near, dim: Any, keepdim: bool = False) -> Near:
    return Near(a.value.amax(dim, keepdim), None if a.off is None else a.off.amax(dim, keepdim))


@rule_of("amin")
def _amin(a: Near, dim: Any, keepdim: bool = False) -> Near:
    return Near(a.value.amin(dim, keepdim), None if a.off is None else a.off.amax(dim, keepdim))


@rule_of("clamp")
def _clamp(a: Near, min: Any = None, max: Any = None) -> Near:
    if not all(x is None or isinstance(x, (int, float)) for x in (min, max)):
        raise NotImplementedError("clamp at numbers with an error")
    if a.off is None:
        return Near(a.value.clamp(min, max))
    with torch.no_grad():
        off = a.off.expand(a.value.shape)
        if min is not None:  # where it is surely clamped the result is exact
            off = torch.where(min - a.value > 1.01 * off, 0.0, off)
        if max is not None:
            off = torch.where(a.value - max > 1.01 * off, 0.0, off)
    return Near(a.value.clamp(min, max), off)


@rule_of("clamp_min")
def _clamp_min(a: Near, min: float) -> Near:
    return _clamp(a, min=min)


@rule_of("where")
def _where(condition: Tensor, a: Any, b: Any) -> Near:
    (x, ex), (y, ey) = _parts(a), _parts(b)
    r = torch.where(condition, x, y)
    if ex is None and ey is None:
        return Near(r)
    off = torch.where(condition, 0.0 if ex is None else ex, 0.0 if ey is None else ey)
    return _near(r, off)


@rule_of("masked_fill")
def _masked_fill(a: Near, mask: Tensor, value: float) -> Near:
    off = None if a.off is None else a.off.expand(a.shape).masked_fill(mask, 0.0)
    return Near(a.value.masked_fill(mask, value), off)


@rule_of("nan_to_num")
def _nan_to_num(a: Near, nan: float, posinf: float) -> Near:
    """To bounds that say nothing."""
    off = None if a.off is None else torch.where(a.value.isnan() | a.value.isinf(), 0.0, a.off)
    return Near(torch.nan_to_num(a.value, nan=nan, posinf=posinf), off)


@rule_of("safe_root")
def _safe_root(a: Near) -> Near:
    """Square root of a >= 0; the real number is not below 0, whatever rounding made of it."""
    x = a.value
    r = torch.where(x > 0, torch.where(x > 0, x, 1.0).sqrt(), 0.0)
    size = _size(r)
    if a.off is None:
        return _near(r, UNIT * size)
    with torch.no_grad():
        root = a.off.sqrt()
        off = torch.where(size > root, a.off / torch.where(size > 0, size, 1.0), root)
    return _near(r, off, 2 * UNIT * size)


@rule_of("sqrt")
def _sqrt(a: Near) -> Near:
    return _safe_root(a)


@rule_of("rsqrt")
def _rsqrt(a: Near) -> Near:
    r = a.value.rsqrt()
    size = _size(r)
    if a.off is None:
        return _near(r, 4 * UNIT * size)
    with torch.no_grad():
        x = a.value.detach()
        known = (2 * a.off <= x) & (x > 0)
        off = torch.where(known, 1.5 * size * a.off / torch.where(known, x, 1.0), math.inf)
    return _near(r, off, 4 * UNIT * size)


@rule_of("exp")
def _exp(a: Near) -> Near:
    r = a.value.exp()
    size = _size(r)
    with torch.no_grad():
        e = torch.zeros_like(size) if a.off is None else a.off
        off = (size + TINY) * e.expm1() + (_LIBM * size + TINY) * e.exp()
        off = torch.where(a.value == -math.inf, 0.0, off)  # what is left out
    return _near(r, off)


@rule_of("expm1")
def _expm1(a: Near) -> Near:
    r = a.value.expm1()
    size = _size(r)
    with torch.no_grad():
        e = torch.zeros_like(size) if a.off is None else a.off
        off = (size + 1) * e.expm1() * (1 + _LIBM) + (_LIBM * size + TINY)
    return _near(r, off)


@rule_of("softmax")
def _softmax(a: Near, dim: int) -> Near:
    top = a.value.detach().amax(dim, keepdim=True)
    e = _exp(_sub(a, torch.where(top.isfinite(), top, 0.0)))
    share = _div(e, _sum(e, dim, True))
    left_out = a.value == -math.inf
    return Near(share.value, share.off.masked_fill(left_out, 0.0))


@rule_of("vector_norm")
def _vector_norm(a: Near, ord: float = 2, dim: Any = None) -> Near:
    r = torch.linalg.vector_norm(a.value, ord, dim)
    own = None if a.off is None else torch.linalg.vector_norm(a.off, ord, dim)
    if ord == math.inf:
        return Near(r, own)
    n = a.shape[dim]
    return _near(r, own, gamma(n + 4) * _size(r) + math.sqrt(n) * 2.0**-511)


@rule_of("largest_eigenvalue")
def _largest_eigenvalue(G: Near, compute: Callable[[Tensor], Tensor]) -> Near:
    """A number that the largest eigenvalue of symmetric matrices (or 0) does not exceed.

    `compute` finds it from tensors. Whatever V and L a library calls eigenvectors and values,
    G = V L V^T + R gives lambda_max(G) <= max(L, 0) |V|_2^2 + |R|_F, and |V|_2^2 <= 1 +
    |V^T V - I|_F. A G that is off by E adds |E|_F.
    """
    r = compute(G.value)
    with torch.no_grad():
        value, size = G.value.detach(), r.detach().abs()
        fine = value.isfinite().all(-1).all(-1)[..., None, None]
        value = torch.where(fine, value, 0.0)
        L, V = torch.linalg.eigh(value)
        V, L = Near(V), Near(L)
        made = _matmul(_mul(V, L.unsqueeze(-2)), V.transpose(-1, -2))
        rest = _sub(Near(value), made)
        identity = torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)
        turned = _sub(_matmul(V.transpose(-1, -2), V), identity)
        rest, turned = (
            torch.linalg.vector_norm(x.value.abs() + x.off, 2, (-2, -1)) for x in (rest, turned)
        )
        top = L.value.amax(-1).clamp(min=0)
        above = (top * (1 + turned) + rest - size).clamp(min=0) + 8 * UNIT * (top + size)
        if G.off is not None:
            above = above + torch.linalg.vector_norm(G.off, 2, (-2, -1))
        above = above + gamma(2 * value.shape[-1] ** 2) * above + TINY
    return _near(r, above)
