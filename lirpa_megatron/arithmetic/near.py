"""Numbers with a limit on their error: an operator's own code, run in them, says what it is off.

A `Near` is a tensor of computed numbers `value` and one of limits `off`: what real arithmetic makes
of the same expression lies within value -+ off. Code that is written for tensors (the planes of
norms and of attention) runs on them unchanged: each operation computes what torch computes, and the
limit from those of its operands and its own rounding (running error analysis, Higham 3.3). So the
values, and their gradients, are those of the ordinary run.

For operands a -+ e_a and b -+ e_b, u = UNIT, r the computed result:

    a + b          e_a + e_b + u |r|
    a b            |a| e_b + e_a (|b| + e_b) + u |r| + TINY
    a / b          (e_a + |r| e_b) / (|b| - e_b) + u |r| + TINY         where e_b <= |b| / 2
    sum of n       sum of e + gamma_n sum |a|
    A B            (|A| + E_A)(E_B + gamma_n |B|) + E_A |B| + n TINY    n the terms of a product
    max, min       the larger of e_a and e_b, or that of the one that it surely is; |a|: e_a
    clamp          e_a, or 0 where it is surely clamped
    sqrt a         min(e_a / r, sqrt(e_a)) + u r
    a^(-1/2)       1.5 r e_a / a + 4 u r                                where e_a <= a / 2
    exp a          (r + TINY)(e^{e_a} - 1) + (8 u r + TINY) e^{e_a};  e^a - 1 with |r| + 1 for r
    |a| (L2)       |e_a| + gamma_{n+4} r + sqrt(n) 2^-511 (squares that underflow)

where no limit is known `off` is infinite, and the bound says nothing. gamma_n covers any order of
the sum, blocks, several ranks and fused multiply-adds. That torch's exp and expm1 are within 4
units in the last place is assumed, as in `curves`. Limits are sums of positive numbers: what they
are off themselves is in the slack of `floating.margin`.

**What this proves.** Real arithmetic, *with the branches that were taken*. So code that runs here
may branch (`where`, `if`) on computed numbers only where either side is sound: a choice between
planes, say. Where the sign of a number decides what is sound, it asks `surely_positive`, takes the
least of both sides, or subtracts what the wrong side could cost (`doubt`). Where any number would
do (a slope, a weight), `chosen` makes the computed one exact.

Within `strict()` an arithmetic operation on tensors alone, whose rounding nobody would count, is
an error; so is one that has no rule here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lirpa_megatron.arithmetic.floating import UNIT

Tensor = torch.Tensor


class Near:
    """Numbers `value`, each within `off` (>= 0, of the same shape; None: exact) of the real one."""

    def __init__(self, value: Tensor, off: Tensor | None = None) -> None:
        self.value, self.off = value, off

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        return apply(func.__name__, *args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name in _OF_VALUE:
            return getattr(self.value, name)
        if name.startswith("__") or name not in RULES:
            raise AttributeError(f"Near has no rule for {name}")
        return lambda *args, **kwargs: apply(name, self, *args, **kwargs)

    def __bool__(self) -> bool:
        raise NotImplementedError("the truth of a number with an error")

    def __len__(self) -> int:
        return len(self.value)

    def __getitem__(self, index: Any) -> Near:
        return apply("getitem", self, index)

    @property
    def limit(self) -> Tensor:
        """`off` as a tensor."""
        return torch.zeros_like(self.value) if self.off is None else self.off


_OF_VALUE = (
    "shape", "ndim", "dtype", "device", "requires_grad", "is_cuda", "numel", "nbytes",
    "element_size", "new_zeros", "new_ones", "new_full", "dim", "size",
)


def chosen(x: Any) -> Any:
    """A number that could be any: the computed one is exact from here on."""
    return Near(x.value) if isinstance(x, Near) else x


def exact(x: Tensor) -> Any:
    """A tensor of exact numbers, for code that may be running in `strict`."""
    return Near(x) if _state["strict"] else x


def numbers(x: Any) -> Any:
    """The computed numbers."""
    return x.value if isinstance(x, Near) else x


def doubt(x: Any) -> Near | None:
    """How far the computed numbers may be off; None for tensors: nobody counts."""
    return Near(x.limit) if isinstance(x, Near) else None


def surely_positive(x: Any) -> Tensor:
    """Where the real number is above 0."""
    if not isinstance(x, Near):
        return x > 0
    with plainly(), torch.no_grad():
        return x.value > 1.01 * x.limit


def maybe_nonzero(x: Any) -> Tensor:
    """Where the real number may be something else than 0."""
    if isinstance(x, Near):
        return (x.value != 0) if x.off is None else (x.value != 0) | (x.off != 0)
    return x != 0


def most(x: Any) -> Any:
    """Numbers that |x| does not exceed."""
    if not isinstance(x, Near):
        return x.abs()
    with plainly(), torch.no_grad():
        return Near((x.value.abs() + x.limit) * (1 + 4 * UNIT))


# ---------------------------------------------------------------------------- the rules

RULES: dict[str, Callable] = {}
_state = {"inside": 0, "strict": 0}


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Within `strict`: arithmetic on tensors alone, which is counted elsewhere."""
    _state["inside"] += 1
    try:
        yield
    finally:
        _state["inside"] -= 1


def apply(name: str, *args: Any, **kwargs: Any) -> Any:
    """One operation by its name, on operands of which some are Near."""
    name = _name(name)
    if name not in RULES:
        raise NotImplementedError(f"{name}: no limit on its rounding error is known")
    with torch._C.DisableTorchFunction():
        return RULES[name](*args, **kwargs)


def _name(name: str) -> str:
    name = name.strip("_")
    return {
        "truediv": "div", "true_divide": "div", "rtruediv": "rdiv", "linalg_vector_norm":
        "vector_norm", "clamp_min": "clamp_min", "concat": "cat",
    }.get(name, name)


def _operator(name: str) -> Callable:
    def method(self: Near, *args: Any) -> Any:
        if args and args[0] is None:
            return NotImplemented
        return apply(name, self, *args)

    return method


for _each in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "neg", "matmul",
              "rmatmul", "gt", "ge", "lt", "le", "eq", "ne"):
    setattr(Near, f"__{_each}__", _operator(_each))
Near.__hash__ = object.__hash__  # type: ignore[method-assign]


# ------------------------------------------------------------------------------ strict

_EXACT = {
    "abs", "neg", "maximum", "minimum", "amax", "amin", "clamp", "clamp_min", "where",
    "masked_fill", "nan_to_num", "any", "all", "new_zeros", "new_ones", "new_full", "zeros_like",
    "ones_like", "full_like", "expand_as", "getitem", "setitem", "cat", "stack", "pad",
    "broadcast_tensors", "gt", "ge", "lt", "le", "eq", "ne", "isfinite", "isnan", "isinf", "get",
    "item", "tolist", "numel", "dim", "size", "nonzero", "invert", "and", "or", "rand", "ror",
    "permute", "view", "element_size", "is_floating_point", "has_names", "copy", "requires_grad",
    "bool", "int", "len", "long", "logical_not", "type", "float", "clone", "detach", "contiguous",
    "unflatten", "flatten", "movedim", "transpose", "t", "unsqueeze", "squeeze", "expand", "narrow",
    "reshape", "index_select", "split", "unbind", "diagonal", "repeat_interleave", "flip",
    "double", "to", "arange", "finfo", "hash", "is_complex", "zero", "as_subclass", "numpy",
}


class _Strict(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, _name(getattr(func, "__name__", str(func)))
        if _state["inside"]:
            return func(*args, **kwargs)
        if _holds_near(args) or _holds_near(tuple(kwargs.values())):
            return apply(name, *args, **kwargs)
        if name not in _EXACT and _holds_numbers(args):
            raise NotImplementedError(f"{name} of tensors: nobody counts its rounding error")
        return func(*args, **kwargs)


def _holds_near(args: Any) -> bool:
    return any(
        isinstance(x, Near) or (isinstance(x, (tuple, list)) and _holds_near(x)) for x in args
    )


def _holds_numbers(args: Any) -> bool:
    return any(
        (isinstance(x, Tensor) and x.is_floating_point())
        or (isinstance(x, (tuple, list)) and _holds_numbers(x)) for x in args
    )


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Arithmetic on tensors alone is an error within."""
    before, _state["inside"] = _state["inside"], 0
    _state["strict"] += 1
    try:
        with _Strict():
            yield
    finally:
        _state["inside"] = before
        _state["strict"] -= 1
