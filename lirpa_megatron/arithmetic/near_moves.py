"""The rules of `near` for what rounds nothing: numbers that move, questions, constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lirpa_megatron.arithmetic.near import RULES, Near, apply, maybe_nonzero, numbers
from lirpa_megatron.arithmetic.near_rules import rule_of

Tensor = torch.Tensor


def _moves(name: str) -> None:
    """Numbers change places or are repeated, as in torch's method or function `name`."""

    def rule(a: Near, *args: Any, **kwargs: Any) -> Any:
        def move(x: Tensor) -> Any:
            return getattr(x, name)(*args, **kwargs)

        if a.off is None:
            return _zipped(move(a.value), None)
        return _zipped(move(a.value), move(a.off.expand(a.value.shape)))

    RULES[name] = rule


def _zipped(value: Any, off: Any) -> Any:
    if isinstance(value, Tensor):
        return Near(value, off)
    offs = [None] * len(value) if off is None else off
    return tuple(_zipped(x, e) for x, e in zip(value, offs, strict=True))


for _each in (
    "unflatten", "flatten", "movedim", "transpose", "t", "unsqueeze", "squeeze", "expand", "narrow",
    "reshape", "index_select", "split", "unbind", "diagonal", "repeat_interleave", "flip",
    "contiguous", "clone", "detach", "double", "to",
):
    _moves(_each)


@rule_of("getitem")
def _getitem(a: Near, index: Any) -> Near:
    off = None if a.off is None else a.off.expand(a.value.shape)[index]
    return Near(a.value[index], off)


@rule_of("expand_as")
def _expand_as(a: Near, other: Any) -> Near:
    return RULES["expand"](a, *other.shape)


@rule_of("broadcast_tensors")
def _broadcast_tensors(*xs: Any) -> tuple:
    shape = torch.broadcast_shapes(*(x.shape for x in xs))
    return tuple(apply("expand", x, *shape) if isinstance(x, Near) else x.expand(shape) for x in xs)


def _joined(function: Callable) -> Callable:
    def rule(xs: Any, dim: int = 0) -> Near:
        r = function([numbers(x) for x in xs], dim)
        if all(getattr(x, "off", None) is None for x in xs):
            return Near(r)
        return Near(r, function([
            (x.limit if isinstance(x, Near) else torch.zeros_like(x)).expand(x.shape) for x in xs
        ], dim))

    return rule


RULES["cat"], RULES["stack"] = _joined(torch.cat), _joined(torch.stack)


@rule_of("pad")
def _pad(a: Near, pad: Any, *args: Any, **kwargs: Any) -> Near:
    def move(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, pad, *args, **kwargs)

    return Near(move(a.value), None if a.off is None else move(a.off.expand(a.value.shape)))


def _asks(name: str) -> None:
    """Questions to the computed numbers."""

    def rule(a: Any, *args: Any) -> Any:
        return getattr(numbers(a), name)(*map(numbers, args))

    RULES[name] = rule


for _each in ("gt", "ge", "lt", "le", "eq", "ne", "isfinite", "isnan", "isinf", "bool"):
    _asks(_each)


@rule_of("any")
def _any(a: Near, *args: Any) -> Any:
    return maybe_nonzero(a).any(*args)


def _filled(name: str) -> None:
    def rule(a: Near, *args: Any, **kwargs: Any) -> Any:
        r = getattr(torch, name)(a.value, *args, **kwargs)
        return Near(r) if r.is_floating_point() else r

    RULES[name] = rule


for _each in ("zeros_like", "ones_like", "full_like"):
    _filled(_each)
