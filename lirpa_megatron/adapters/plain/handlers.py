"""What is called instead of torch's functions while a plain module is traced (`functions`).

A handler is called as handler(mode, name, function, args, kwargs), mode the `TracedFunctions`,
where a value among the arguments depends on the model's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.adapters import traced_ops
from lirpa_megatron.adapters.linear_facades import replicated_linear
from lirpa_megatron.adapters.plain import structure
from lirpa_megatron.adapters.tracing import shape_of, untraced

Handler = Callable[..., Any]
HANDLERS: dict[str, Handler] = {}
"""Name of a function of torch, torch.nn.functional or Tensor -> what is called instead."""

_MOVING = (
    "view reshape view_as reshape_as flatten ravel unflatten squeeze unsqueeze transpose permute "
    "movedim moveaxis swapaxes swapdims adjoint t expand expand_as repeat tile repeat_interleave "
    "broadcast_to select narrow index_select __getitem__ flip fliplr flipud roll diagonal rot90 "
    "chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split hsplit vsplit dsplit "
    "unbind take gather take_along_dim pixel_shuffle pixel_unshuffle channel_shuffle atleast_2d "
    "atleast_3d select_copy unfold"
).split()
_MOVING_PROPERTIES = ("T", "mT", "H", "mH")
FREE = {
    "size", "dim", "ndim", "shape", "numel", "dtype", "device", "is_floating_point",
    "requires_grad", "layout", "is_complex", "element_size", "ndimension", "nelement", "is_cuda",
    "is_contiguous",
    "stride", "storage_offset", "get_device", "__len__", "names", "is_sparse", "is_nested",
    "is_quantized", "is_meta", "is_mkldnn", "__hash__", "__format__", "__repr__", "is_leaf",
    "grad_fn", "_is_view", "is_inference", "data_ptr", "itemsize", "nbytes", "is_tensor",
}
"""Asked about a tensor; its values do not matter."""


def handles(names: str | Sequence[str]) -> Callable[[Handler], Handler]:
    """Registers a handler for functions by name."""

    def register(handler: Handler) -> Handler:
        for name in names.split() if isinstance(names, str) else names:
            HANDLERS[name] = handler
        return handler

    return register


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested arguments."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for x in tree:
            yield from tensors_in(x)
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))


def plain(tree: Any) -> Any:
    """Arguments without traced numbers (sizes are 0-d tensors while tracing)."""
    if isinstance(tree, torch.Tensor) and tree.ndim == 0 and not tree.is_floating_point():
        return int(tree) if tree.dtype != torch.bool else bool(tree)
    if isinstance(tree, tuple):
        return tuple(plain(x) for x in tree)
    if isinstance(tree, list):
        return [plain(x) for x in tree]
    if isinstance(tree, dict):
        return {key: plain(x) for key, x in tree.items()}
    return tree


def _on_places(func: Any, args: tuple, kwargs: dict) -> Callable[[torch.Tensor], Any]:
    """The same call on another first argument."""
    with untraced():
        rest, named = plain(args[1:]), plain(kwargs)
    named.pop("input", None)
    return lambda places: func(places, *rest, **named)


# ------------------------------------------------------------------------ structure


@handles(_MOVING)
def _move(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    x = args[0] if args else kwargs["input"]
    if any(mode.depends(y) for y in tensors_in((args[1:], {k: v for k, v in kwargs.items()
                                                         if k != "input"}))
           if name not in ("view_as", "reshape_as", "expand_as")):
        raise mode.refused(name, "chooses by a value that depends on the inputs: not supported")
    return mode.moved(x, _on_places(func, args if args else (x,), kwargs))


@handles(_MOVING_PROPERTIES)
def _move_property(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    return mode.moved(args[0], lambda places: func(places))


@handles("pad")
def _pad(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    def of(x: torch.Tensor, pad: Any, mode: str = "constant", value: Any = None) -> tuple:
        return x, plain(pad), mode, value

    x, widths, kind, value = of(*args, **{("x" if k == "input" else k): v
                                          for k, v in kwargs.items()})
    if kind != "constant":
        def places(p: torch.Tensor) -> torch.Tensor:  # torch pads numbers of floating point alone
            return F.pad(p.double(), widths, kind).long()

        return mode.moved(x, places)
    return mode.moved(x, lambda p: F.pad(p, widths, value=-1), float(value or 0.0))


@handles("new_ones new_zeros new_full zeros_like ones_like full_like")
def _filled(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    with untraced(), torch.no_grad():
        filled = func(*plain(args), **plain(kwargs))
    return mode.for_any_batch(filled)


@handles("contiguous")
def _same(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    return args[0]


@handles("to float double half bfloat16 type type_as")
def _cast(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    with untraced(), torch.no_grad():
        wanted = func(*args, **kwargs)
    if not isinstance(wanted, torch.Tensor) or wanted.dtype == args[0].dtype:
        return args[0]
    raise mode.refused(
        name, f"casts {args[0].dtype} to {wanted.dtype}, which rounds: bounds are of one number "
        "type throughout; remove the cast, or give the input in that type"
    )


@handles("cat concat concatenate")
def _cat(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    parts = list(args[0] if args else kwargs["tensors"])
    dim = int(args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0)))
    return _join(mode, name, parts, dim)


@handles("stack")
def _stack(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    parts = list(args[0] if args else kwargs["tensors"])
    dim = int(args[1] if len(args) > 1 else kwargs.get("dim", 0))
    dim = dim % (parts[0].ndim + 1)
    parts = [mode.moved(x, lambda p: p.unsqueeze(dim)) if dim else x for x in parts]
    return _join(mode, name, parts, dim)


@handles("hstack column_stack")
def _hstack(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    parts = list(args[0] if args else kwargs["tensors"])
    return _join(mode, name, parts, 1 if parts[0].ndim > 1 else 0)


def _join(mode: Any, name: str, parts: list, dim: int) -> Any:
    parts = [x for x in parts if shape_of(x) != (0,)]
    dim = dim % parts[0].ndim
    if dim == 0:
        raise structure.MovesBatch("joins along dimension 0")
    parts = [x if mode.depends(x) else mode.for_any_batch(x) for x in parts]
    parts = [x.to(parts[0].dtype) if x.dtype != parts[0].dtype else x for x in parts]
    return parts[0] if len(parts) == 1 else structure.joined(parts, dim)


@handles("sum mean")
def _sum(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    def of(x: torch.Tensor, dim: Any = None, keepdim: bool = False, dtype: Any = None, *,
           axis: Any = None, keepdims: bool = False) -> tuple:
        return x, plain(dim if axis is None else axis), keepdim or keepdims

    x, dim, keepdim = of(*args, **{("x" if k == "input" else k): v for k, v in kwargs.items()})
    dims = [dim] if isinstance(dim, int) else dim
    if not dims:  # perhaps for control flow alone; else `host_operators` refuses it
        return func(*args, **kwargs)
    dims = sorted(d % x.ndim for d in dims)
    if 0 in dims:
        raise structure.MovesBatch(f"takes the {name} over dimension 0")
    count = 1
    for d in dims:
        count *= shape_of(x)[d]
    return structure.added_up(x, dims, keepdim, 1 / count if name == "mean" else 1.0)


# ------------------------------------------------------------ two values, linear maps


_SUMS = {
    "add": (1, 1), "__add__": (1, 1), "__radd__": (1, 1), "__iadd__": (1, 1), "add_": (1, 1),
    "sub": (1, -1), "subtract": (1, -1), "__sub__": (1, -1), "__isub__": (1, -1), "sub_": (1, -1),
    "rsub": (-1, 1), "__rsub__": (-1, 1),
}
"""s and t of s a + t b."""
_PRODUCTS = "mul multiply __mul__ __rmul__ __imul__ mul_".split()
_QUOTIENTS = "div divide true_divide __truediv__ __div__ __itruediv__ div_".split()
_REVERSED_QUOTIENTS = "__rtruediv__ __rdiv__".split()
_EXTREMES = "maximum minimum max min fmax fmin".split()


@handles([*_SUMS, *_PRODUCTS, *_QUOTIENTS, *_REVERSED_QUOTIENTS, *_EXTREMES])
def _two(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """Two values of the inputs get one shape; sums, and products with constants, are linear."""
    a, b = (*args, kwargs.get("other"))[:2]
    alpha = plain(kwargs.get("alpha", 1))
    number = isinstance(b, (int, float)) and not isinstance(b, bool)
    if not (number or isinstance(b, torch.Tensor)) or kwargs.get("rounding_mode") is not None:
        return func(*args, **kwargs)
    of_inputs = [isinstance(x, torch.Tensor) and mode.depends(x) for x in (a, b)]
    if not number and isinstance(a, torch.Tensor):
        shape = torch.broadcast_shapes(shape_of(a), shape_of(b))
        a, b = (
            mode.moved(x, lambda p: p.expand(shape)) if depends and shape_of(x) != shape else x
            for x, depends in zip((a, b), of_inputs, strict=True)
        )
    if "batch" in mode.origins(b) if isinstance(b, torch.Tensor) and not of_inputs[1] else False:
        raise mode.refused(name, "computes with the size of the batch: not supported")
    if name in _SUMS:
        s, t = _SUMS[name]
        s, t = (s * alpha, t) if name == "rsub" else (s, t * alpha)
        y = structure.combined(a, b, s, t) if of_inputs[0] else structure.combined(b, a, t, s)
        return _in_place(name, args[0], y)
    if name in _PRODUCTS:
        if all(of_inputs):  # x x is never negative, which a product of two values does not know
            return _in_place(name, args[0], torch.square(a) if a is b else traced_ops.product(a, b))
        y = structure.scaled(a, b) if of_inputs[0] else structure.scaled(b, a)
        return _in_place(name, args[0], y)
    if name in (*_QUOTIENTS, *_REVERSED_QUOTIENTS):
        a, b, of_inputs = (b, a, of_inputs[::-1]) if name in _REVERSED_QUOTIENTS else (
            a, b, of_inputs
        )
        if not of_inputs[1]:
            c = 1 / b if number else mode.constant(torch.reciprocal, b)
            return _in_place(name, args[0], structure.scaled(a, c))
        inverse = torch.reciprocal(b)
        y = traced_ops.product(a, inverse) if of_inputs[0] else structure.scaled(inverse, a)
        return _in_place(name, args[0], y)
    return func(a, b, *args[2:], **{k: v for k, v in kwargs.items() if k != "other"})


def _in_place(name: str, x: Any, y: torch.Tensor) -> torch.Tensor:
    """`x += ...` leaves the result in x, for whoever reads x later."""
    if not (name.endswith("_") and (not name.endswith("__") or name.startswith("__i"))):
        return y
    with untraced(), torch.no_grad():
        x.data = y.detach().clone()
    torch._C._set_value_trace(x, torch._C._get_value_trace(y))
    return x


@handles("neg __neg__ negative")
def _negated(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    return structure.scaled(args[0] if args else kwargs["input"], -1.0)


@handles("linear")
def _linear(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    def of(input: Any, weight: Any, bias: Any = None) -> tuple:
        return input, weight, bias

    x, weight, bias = of(*args, **kwargs)
    if any(mode.depends(w) for w in (weight, bias) if w is not None):
        raise mode.refused(name, "has a weight that depends on the inputs: not supported")
    return _applied(mode, name, x, weight, bias)


def _applied(mode: Any, name: str, x: torch.Tensor, weight: Any, bias: Any) -> Any:
    if x.ndim < 2:
        raise structure.MovesBatch(f"reads {shape_of(x)}, which has no batch dimension")
    return replicated_linear(x, weight, bias)


@handles("matmul mm bmm __matmul__ __rmatmul__")
def _matmul(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    a, b = args[:2] if len(args) > 1 else (args[0], kwargs.get("other", kwargs.get("mat2")))
    if name == "__rmatmul__":
        a, b = b, a
    if mode.depends(a) and mode.depends(b):
        return _product(mode, name, a, b)
    if mode.depends(a) and b.ndim <= 2:
        vector = b.ndim == 1
        weight = mode.constant(lambda w: w.unsqueeze(0) if vector else w.t(), b)
        y = _applied(mode, name, a, weight, None)
        return mode.moved(y, lambda p: p.squeeze(-1)) if vector else y
    if mode.depends(b) and a.ndim == 2 and b.ndim > 2:
        turned = mode.moved(b, lambda p: p.transpose(-1, -2))
        return mode.moved(_applied(mode, name, turned, a, None), lambda p: p.transpose(-1, -2))
    if mode.depends(b) and b.ndim <= 2:
        raise structure.MovesBatch(f"multiplies {shape_of(b)} from the left, across the batch")
    raise mode.refused(name, f"multiplies {shape_of(a)} and {shape_of(b)}, one of them "
                       "constant: give the constant as a matrix")


def _product(mode: Any, name: str, a: torch.Tensor, b: torch.Tensor) -> Any:
    """a [B, ..., n, k] times b [B, ..., k, m], both of the inputs: products, added up over k."""
    if a.ndim < 3 or a.ndim != b.ndim or shape_of(a)[:-2] != shape_of(b)[:-2]:
        raise structure.MovesBatch(f"multiplies {shape_of(a)} and {shape_of(b)}")
    n, m = shape_of(a)[-2], shape_of(b)[-1]
    left = mode.moved(a, lambda p: p.unsqueeze(-2).expand(*p.shape[:-1], m, p.shape[-1]))
    right = mode.moved(b, lambda p: p.transpose(-1, -2).unsqueeze(-3).expand(
        *p.shape[:-2], n, m, p.shape[-2]
    ))
    return structure.added_up(traced_ops.product(left, right), [left.ndim - 1], False, 1.0)
