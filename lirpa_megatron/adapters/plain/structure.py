"""Reshapes, slices, transposes, sums, ... of a traced model as operators of our own.

The functions here are called in place of torch's while a model is traced (`functions`). What a
function does to the places of numbers is found by letting it do the same to numbered places: that
covers all of torch's functions that only move numbers, with whatever arguments, and shows what they
do to the batch. A model must keep the batch at dimension 0, sample by sample; whatever moves it is
refused, for the bounds of one sample would be made of another's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lirpa_megatron.adapters.tracing import sizes_of, untraced


class MovesBatch(ValueError):
    """A function that does not keep the batch at dimension 0."""


def rearranged(
    x: torch.Tensor, function: Callable[[torch.Tensor], Any], batched: bool, fill: float = 0.0
) -> Any:
    """`function(x)`, which only moves, repeats or drops numbers, or puts in `fill`.

    Args:
        x: [B, ...], or a constant of any shape.
        function: applied to numbers of places in the shape of x; its result (or results) have
            places where function(x) has those numbers, and -1 for `fill`.
        batched: whether dimension 0 of x is the batch.
        fill: what padding puts in.

    Returns:
        One tensor or a tuple of them, as `function` returns.

    Raises:
        MovesBatch: x is `batched` and dimension 0 of a result is not the batch.
    """
    with untraced(), torch.no_grad():
        shape = tuple(x.shape)
        found = function(_places(shape, batched))
        several = isinstance(found, (tuple, list))
        maps = [_map_of(y, shape, batched) for y in (found if several else (found,))]
        if batched and shape[0] == 1:
            _check_two(shape, function, found if several else (found,))
        nodes = [_node_of(shape, *entry, batched) for entry in maps]
    results = []
    for attributes, index in nodes:
        inputs = (x,) if index is None else (x, index)
        results.append(_RearrangeSymbol.apply(*attributes, fill, *inputs))
    return tuple(results) if several else results[0]


def added_up(x: torch.Tensor, dims: Sequence[int], keepdim: bool, scale: float) -> torch.Tensor:
    """scale * x.sum(dims, keepdim): x [B, ...]; dims from 1 on."""
    return _SumSymbol.apply(x, tuple(dims), keepdim, float(scale), x.ndim - 1 in dims)


def joined(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """torch.cat of [B, ...] along a dimension from 1 on; constants may have a batch of 1."""
    with untraced():
        batch = max(part.shape[0] for part in parts)
    return _ConcatSymbol.apply(dim, parts[0].ndim, batch, *parts)


def combined(a: torch.Tensor, b: Any, s: float = 1.0, t: float = 1.0) -> torch.Tensor:
    """s a + t b: a [B, ...] of the inputs; b of the same shape, or a constant or number."""
    return _CombineSymbol.apply(float(s), float(t), a, _constant(b, a))


def scaled(a: torch.Tensor, c: Any) -> torch.Tensor:
    """c a: a [B, ...] of the inputs, c a constant or number that broadcasts to it."""
    return _ScaleSymbol.apply(a, _constant(c, a))


def _constant(c: Any, like: torch.Tensor) -> torch.Tensor:
    if isinstance(c, torch.Tensor) and c.is_floating_point() == like.is_floating_point():
        return c
    with untraced(), torch.no_grad():
        return torch.as_tensor(c, device=like.device).to(like.dtype)


def of_constants(
    calls: list[Callable[..., Any]], function: Callable[..., Any], *x: torch.Tensor
) -> Any:
    """`function` of parameters, buffers and constants as one node, recomputed when bounds are.

    Args:
        calls: where the function is kept, for `BoundOfConstants`.
        function: of the tensors, alone; returns a tensor or a tuple of them.
        *x: none depends on the model's inputs.
    """
    with untraced(), torch.no_grad():
        found = function(*x)
        several = isinstance(found, (tuple, list))
        kind = None if several else (tuple(found.shape), found.dtype)
    if not several:
        calls.append(function)
        return _OfConstantsSymbol.apply(calls, len(calls) - 1, kind, *x)
    return type(found)([
        of_constants(calls, lambda *y, i=i: function(*y)[i], *x) for i in range(len(found))
    ])


def _places(shape: Sequence[int], batched: bool) -> torch.Tensor:
    """Number n of sample b is b * (numbers of a sample) + n; it counts on in a constant."""
    return torch.arange(math.prod(shape)).view(*shape)


def _map_of(
    y: torch.Tensor, shape: tuple[int, ...], batched: bool
) -> tuple[list[int], torch.Tensor]:
    """(shape of a result, without the batch; the place of each of its numbers, in one sample)."""
    if not batched:
        return list(y.shape), y
    width = math.prod(shape[1:])
    if y.ndim == 0 or y.shape[0] != shape[0]:
        raise MovesBatch(f"makes {tuple(y.shape)} of {shape}")
    before = width * torch.arange(len(y)).view(-1, *[1] * (y.ndim - 1))
    own = torch.where(y < 0, y, y - before)
    if bool(((own >= width) | ((own < 0) & (y >= 0)) | (own != own[:1])).any()):
        raise MovesBatch(f"mixes samples ({shape} to {tuple(y.shape)})")
    return list(y.shape[1:]), own[0]


def _check_two(
    shape: tuple[int, ...], function: Callable[[torch.Tensor], Any], ones: Sequence[torch.Tensor]
) -> None:
    """With one sample a moved batch is not to be seen: a second one shows it, where `ones`, the
    results of one sample, have a 1.

    A model may have its batch of 1 written into it (`view(1, -1)`), which two samples do not fit.
    """
    try:
        found = function(_places((2, *shape[1:]), True))
    except (RuntimeError, IndexError, ValueError):
        return
    for y, one in zip(found if isinstance(found, (tuple, list)) else (found,), ones, strict=False):
        grown = list(zip(one.shape, y.shape, strict=False))[1:]
        if y.ndim and (1, 2) in grown and y.shape[0] != 2:
            raise MovesBatch(f"moves the batch of {shape}")


def _node_of(
    before: tuple[int, ...], shape: list[int], places: torch.Tensor, batched: bool
) -> tuple[tuple, torch.Tensor | None]:
    """(attributes of `BoundRearrange`, its index or None for a reshape) of a map of places."""
    into = list(before[1:] if batched else before)
    width, n = math.prod(into), into[-1] if into else 0
    places, features = places.reshape(-1), 0
    if batched and len(shape) > 1 and len(into) > 1 and shape[-1] == n and n > 0:
        rows = places.view(-1, n)
        first = rows[:, :1]
        whole = (first % n == 0) & (rows == first + torch.arange(n))
        if bool((whole | ((first < 0) & (rows == first))).all()):
            features, width = 1, width // n
            places = torch.where(first < 0, first, first // n).flatten()
    pads = int((places < 0).any())
    places = torch.where(places < 0, width, places)
    same = len(places) == width and bool((places == torch.arange(width)).all())
    return (shape, features, int(batched), pads), None if same else places.clone()


# ------------------------------------------------------------------ the graph's nodes


class _RearrangeSymbol(torch.autograd.Function):
    @staticmethod
    def symbolic(
        g: Any, shape: list[int], features: int, batched: int, pads: int, fill: float, x: Any,
        *index: Any,
    ) -> Any:
        out = g.op(
            "lirpa_megatron::Rearrange", x, *index, shape_i=list(shape), features_i=features,
            batched_i=batched, pads_i=pads, fill_f=float(fill),
        )
        known = sizes_of(x)
        if batched and known is None:
            return out
        return out.setType(x.type().with_sizes([*known[:1], *shape] if batched else [*shape]))

    @staticmethod
    def forward(
        ctx: Any, shape: list[int], features: int, batched: int, pads: int, fill: float,
        x: torch.Tensor, *index: torch.Tensor,
    ) -> torch.Tensor:
        last = x.shape[-1:] if features else ()
        batch = x.shape[:1] if batched else ()
        y = x.reshape(*batch, -1, *last)
        if pads:
            y = torch.cat((y, y.new_full((*batch, 1, *last), fill)), len(batch))
        if index:
            y = y.index_select(len(batch), index[0])
        return y.reshape(*batch, *shape).clone()


class _SumSymbol(torch.autograd.Function):
    @staticmethod
    def symbolic(
        g: Any, x: Any, dims: Sequence[int], keepdim: bool, scale: float, last: bool
    ) -> Any:
        sizes = sizes_of(x)
        out = g.op(
            "lirpa_megatron::Sum", x, dims_i=list(dims), keepdim_i=int(keepdim), scale_f=scale,
            last_i=int(last),
        )
        if sizes is None:
            return out
        kept = [1 if d in dims else n for d, n in enumerate(sizes) if keepdim or d not in dims]
        return out.setType(x.type().with_sizes(kept))

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dims: Sequence[int], keepdim: bool, scale: float, last: bool
    ) -> torch.Tensor:
        return x.sum(dims, keepdim=keepdim) * scale


class _ConcatSymbol(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, dim: int, rank: int, batch: int, *parts: Any) -> Any:
        out = g.op("lirpa_megatron::Concat", *parts, dim_i=dim, last_i=int(dim == rank - 1))
        known = [sizes_of(part) for part in parts]
        if any(sizes is None or sizes[dim] is None for sizes in known):
            return out
        whole = [None, *known[0][1:]]
        whole[dim] = sum(sizes[dim] for sizes in known)
        return out.setType(parts[0].type().with_sizes(whole))

    @staticmethod
    def forward(ctx: Any, dim: int, rank: int, batch: int, *parts: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.expand(batch, *part.shape[1:]) for part in parts], dim)


class _OfConstantsSymbol(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, calls: list, call: int, kind: tuple, *x: Any) -> Any:
        out = g.op("lirpa_megatron::OfConstants", *x, call_i=call)
        shape, dtype = kind
        return out.setType(x[0].type().with_dtype(dtype).with_sizes(list(shape)))

    @staticmethod
    def forward(ctx: Any, calls: list, call: int, kind: tuple, *x: torch.Tensor) -> torch.Tensor:
        return calls[call](*x).clone()


class _CombineSymbol(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, s: float, t: float, a: Any, b: Any) -> Any:
        out = g.op("lirpa_megatron::Combine", a, b, s_f=s, t_f=t)
        return out.setType(a.type())

    @staticmethod
    def forward(ctx: Any, s: float, t: float, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return s * a + t * b


class _ScaleSymbol(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, a: Any, c: Any) -> Any:
        return g.op("lirpa_megatron::Scale", a, c).setType(a.type())

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return a * c
