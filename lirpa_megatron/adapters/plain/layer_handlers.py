"""What is called instead of torch's layers while a plain module is traced: norms, pooling, ...

As `handlers`, which has what moves numbers, sums and products.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.adapters import traced_ops
from lirpa_megatron.adapters.plain import structure
from lirpa_megatron.adapters.plain.handlers import handles, plain
from lirpa_megatron.adapters.tracing import shape_of, untraced


@handles("layer_norm rms_norm")
def _norm(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    def of(input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None,
           eps: Any = None, *_: Any, **__: Any) -> tuple:
        return input, normalized_shape, weight, bias, eps

    if name == "rms_norm":
        def of(input: Any, normalized_shape: Any, weight: Any = None,  # noqa: F811
               eps: Any = None) -> tuple:
            return input, normalized_shape, weight, None, eps

    x, shape, weight, bias, eps = of(*args, **kwargs)
    shape = (shape,) if isinstance(shape, int) else tuple(plain(tuple(shape)))
    if len(shape) != 1 or x.ndim < 2:
        raise mode.refused(name, f"normalises over the dimensions {shape} of {shape_of(x)}: "
                           "only the last one is supported, after the batch")
    if weight is None:
        with untraced():
            weight = torch.ones(shape, dtype=x.dtype, device=x.device)
    if name == "layer_norm":
        return traced_ops.norm(x, weight, bias, 1e-5 if eps is None else eps)
    return traced_ops.norm(x, weight, None, torch.finfo(x.dtype).eps if eps is None else eps, True)


@handles("batch_norm")
def _batch_norm(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """In eval mode (x - mean) / sqrt(var + eps) weight + bias, per channel (dimension 1)."""
    def of(input: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None,
           training: bool = False, momentum: Any = 0.1, eps: float = 1e-5, *_: Any) -> tuple:
        return input, mean, var, weight, bias, training, eps

    names = {"running_mean": "mean", "running_var": "var"}
    x, mean, var, weight, bias, training, eps = of(
        *args, **{names.get(k, k): v for k, v in kwargs.items()}
    )
    if training or mean is None or var is None:
        raise mode.refused(name, "normalises by the batch's own statistics, so that samples depend "
                           "on each other: call model.eval() before (with running statistics)")
    if any(mode.depends(c) for c in (mean, var, weight, bias) if c is not None):
        raise mode.refused(name, "has statistics that depend on the inputs: not supported")
    shape = (1, -1, *[1] * (x.ndim - 2))
    like = x.dtype  # statistics of half precision
    y = structure.combined(x, mode.constant(lambda m: m.view(shape).to(like), mean), 1, -1)
    given = (var,) if weight is None else (var, weight)
    y = structure.scaled(
        y, mode.constant(lambda v, w=1: ((v.to(like) + eps).rsqrt() * w).view(shape), *given)
    )
    if bias is None:
        return y
    return structure.combined(y, mode.constant(lambda b: b.view(shape), bias))


@handles("conv1d conv2d")
def _conv(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """Two dimensions are the host's; one is a picture of height 1 (0.3 has no other)."""
    def of(input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
           dilation: Any = 1, groups: Any = 1) -> tuple:
        return input, weight, bias, stride, padding, dilation, groups

    x, weight, bias, *sizes, groups = of(*args, **kwargs)
    if x.ndim != weight.ndim:
        raise structure.MovesBatch(f"reads {shape_of(x)}, which has no batch dimension")
    if any(mode.depends(w) for w in (weight, bias) if w is not None):
        raise mode.refused(name, "has a weight that depends on the inputs: not supported")
    if name == "conv2d":
        return func(*args, **kwargs)
    stride, padding, dilation = (
        n if isinstance(n, (int, str)) else plain(tuple(n))[0] for n in sizes
    )
    padding = padding if isinstance(padding, str) else (0, padding)
    y = F.conv2d(
        mode.moved(x, lambda p: p.unsqueeze(2)), mode.constant(lambda w: w.unsqueeze(2), weight),
        bias, (1, stride), padding, (1, dilation), groups,
    )
    return mode.moved(y, lambda p: p.squeeze(2))


@handles("avg_pool1d avg_pool2d")
def _avg_pool(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """The mean over windows: they are gathered, and added up."""
    def of(input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0,
           ceil_mode: bool = False, count_include_pad: bool = True, divisor: Any = None) -> tuple:
        return input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor

    kwargs = {k.removesuffix("_override"): v for k, v in kwargs.items()}
    x, kernel, stride, padding, ceil, with_padding, divisor = of(*args, **kwargs)
    n = int(name[-2])
    if x.ndim != n + 2:
        raise structure.MovesBatch(f"reads {shape_of(x)}, which has no batch dimension")

    def each(size: Any) -> tuple[int, ...]:
        sizes = plain(tuple(size)) if isinstance(size, (tuple, list)) else (plain(size),)
        return sizes * n if len(sizes) == 1 else sizes

    kernel, padding = each(kernel), each(padding)
    stride = each(stride) if stride not in (None, [], ()) else kernel
    if ceil or (any(padding) and not with_padding):
        raise mode.refused(name, "rounds up, or leaves its padding out of the mean "
                           "(ceil_mode, count_include_pad=False): not supported")

    def windows(p: torch.Tensor) -> torch.Tensor:
        p = F.pad(p, [w for size in reversed(padding) for w in (size, size)], value=-1)
        for d in range(n):
            p = p.unfold(2 + d, kernel[d], stride[d])
        return p

    count = divisor or math.prod(kernel)
    return structure.added_up(
        mode.moved(x, windows), range(n + 2, 2 * n + 2), False, 1 / count
    )


@handles("adaptive_avg_pool1d adaptive_avg_pool2d")
def _adaptive_avg_pool(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    x, size = (*args, *kwargs.values())[:2]
    n = int(name[-2])
    sizes = plain(tuple(size)) if isinstance(size, (tuple, list)) else (plain(size),) * n
    if set(sizes) != {1} or x.ndim != n + 2:
        raise mode.refused(name, f"to {sizes}: only one number per channel is supported")
    return structure.added_up(x, range(2, n + 2), True, 1 / math.prod(shape_of(x)[2:]))


@handles(
    "dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d"
)
def _dropout(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    def of(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False,
           train: bool = True) -> tuple:
        return input, p, training and train

    x, p, training = of(*args, **kwargs)
    if training and p > 0:
        raise mode.refused(name, "drops values at random: call model.eval() before")
    return x


@handles("softmax log_softmax softmin logsumexp cumsum cumprod logcumsumexp")
def _along(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    x = args[0] if args else kwargs["input"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dim is None:  # torch's old rule
        dim = 0 if x.ndim in (0, 1, 3) else 1
    dims = [dim] if not isinstance(dim, (tuple, list)) else dim
    if any(int(d) % max(x.ndim, 1) == 0 for d in dims):
        raise structure.MovesBatch("works along dimension 0")
    return func(*args, **kwargs)


@handles("where masked_fill")
def _choose(mode: Any, name: str, func: Any, args: tuple, kwargs: dict) -> Any:
    """With a constant condition: a m + b (1 - m), m of zeros and ones."""
    if name == "masked_fill":
        x, condition, value = (*args, *kwargs.values())[:3]
        a, b = value, x
    else:
        condition, a, b = (*args, *kwargs.values())[:3]
    if mode.depends(condition):
        raise mode.refused(name, "chooses by a condition that depends on the inputs: "
                           "write it with relu, clamp, maximum or minimum")
    for x in (a, b):
        constant = not isinstance(x, torch.Tensor) or not mode.depends(x)
        if constant and not bool(torch.isfinite(torch.as_tensor(x)).all()):
            raise mode.refused(name, "fills in a value that is not finite, which cannot be "
                               "bounded: use a large finite one such as -10000")
    like = next(x for x in (a, b) if isinstance(x, torch.Tensor) and mode.depends(x))
    with untraced(), torch.no_grad():
        one = condition.to(like.dtype)
        other = 1 - one
    shape = torch.broadcast_shapes(*(shape_of(x) for x in (condition, a, b)
                                     if isinstance(x, torch.Tensor)))
    total = None
    for x, keep in ((a, one), (b, other)):
        if isinstance(x, torch.Tensor) and mode.depends(x):
            x = mode.moved(x, lambda p: p.expand(shape)) if shape_of(x) != shape else x
            x = structure.scaled(x, keep)
        elif isinstance(x, torch.Tensor):
            x = mode.constant(lambda v, k=keep: v * k, x)
        else:
            x = _scaled_number(x, keep)
        if total is None:
            total = x
        elif mode.depends(total):
            total = structure.combined(total, x)
        else:
            total = structure.combined(x, total)
    return total


def _scaled_number(value: Any, keep: torch.Tensor) -> torch.Tensor:
    with untraced(), torch.no_grad():
        return (torch.as_tensor(value, dtype=keep.dtype) * keep).clone()
