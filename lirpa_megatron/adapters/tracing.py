"""What facades need to know of torch's tracer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """What is computed inside becomes a constant of a graph that is being traced."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def sizes_of(value: Any) -> list[int | None] | None:
    """The shape of a value of a graph, None for a size that is not known (0.7.1's batch)."""
    kind = value.type()
    return kind.varyingSizes() if kind.kind() == "TensorType" else None


def shape_of(x: torch.Tensor) -> tuple[int, ...]:
    """The shape of a traced value, in numbers that are not traced."""
    with untraced():
        return tuple(x.shape)


def operator(
    name: str, function: Callable[..., torch.Tensor], numbers: tuple[str, ...] = (),
    sizes: Callable[..., list[int]] | None = None,
) -> Callable[..., torch.Tensor]:
    """A function that is plain torch when run, and one node of the graph when traced.

    Args:
        name: of the operator in the domain `lirpa_megatron`, see `operators.CUSTOM_OPS`.
        function: (*numbers, *tensors) -> a tensor that is no view of theirs. Differentiable.
        numbers: the operator's attributes, as torch.onnx wants them, with their type as suffix.
        sizes: (*numbers, *shapes of the tensors) -> the result's shape; None for a shape that the
            graph does not know, other than the first. By default the result has the first shape.

    Returns:
        the function; its arguments are those of `function`.
    """
    count = len(numbers)

    class Symbol(torch.autograd.Function):
        @staticmethod
        def symbolic(g: Any, *args: Any) -> Any:
            values, inputs = args[:count], args[count:]
            attributes = dict(zip(numbers, values, strict=True))
            out = g.op(f"lirpa_megatron::{name}", *inputs, **attributes)
            shapes = [_full_shape(x) for x in inputs]
            if shapes[0] is None:
                return out
            kind = inputs[0].type()
            return out.setType(kind.with_sizes(sizes(*values, *shapes)) if sizes else kind)

        @staticmethod
        def forward(ctx: Any, *args: Any) -> torch.Tensor:
            return function(*args)

    Symbol.__name__ = f"_{name}Symbol"

    def run(*args: Any) -> torch.Tensor:
        return Symbol.apply(*args) if torch.jit.is_tracing() else function(*args)

    return run


def _full_shape(value: Any) -> list[int] | None:
    """The shape of a value of a graph, None where a size is not known."""
    kind = value.type()
    return kind.sizes() if kind.kind() == "TensorType" else None
