"""Outputs of submodules, of the live model and of its facade, and where they begin to differ."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from lirpa_megatron.adapters.linear_facades import RowFacade, column_rows, is_column
from lirpa_megatron.parallel.collectives import Collectives

Records = dict[str, list[torch.Tensor]]
"""A submodule's name -> its outputs, in the order in which submodules were done."""


def difference(y: torch.Tensor, other: torch.Tensor, floor: float = 0.0) -> float:
    """The largest |y - other| as a share of floor + the largest |y|, of any sample; inf where
    their shapes differ, or one of them alone is NaN or infinite."""
    if y.numel() != other.numel():
        return float("inf")
    other = other.reshape(y.shape).to(y)
    same = (y == other) | (y.isnan() & other.isnan())
    if not bool((same | (y.isfinite() & other.isfinite())).all()):
        return float("inf")
    y, other = (torch.where(same, 0, x).double() for x in (y, other))
    largest = y.abs().max() if y.numel() else y.new_zeros(())
    gap = (y - other).abs().max() if y.numel() else y.new_zeros(())
    if not bool(gap > 0):
        return 0.0
    return float(gap / (floor + largest).clamp_min(torch.finfo(torch.float64).tiny))


def values(y: torch.Tensor, other: torch.Tensor, of: str = "its graph of bounds") -> str:
    """Both values where they differ most."""
    if y.numel() != other.numel():
        return f"an output of shape {tuple(y.shape)}, {of} {tuple(other.shape)}"
    gap = (y.double() - other.reshape(y.shape).to(y).double()).abs().nan_to_num(torch.inf)
    at = int(gap.argmax())
    where = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(at), y.shape))
    mine, theirs = y.flatten()[at].item(), other.flatten()[at].item()
    return f"{mine:.6g} at [{where}] on the clean input, {of} {theirs:.6g}"


def record(model: nn.Module, records: Records, stack: contextlib.ExitStack) -> None:
    """Hooks that note the outputs of all submodules, in the order in which they are done."""
    for name, module in model.named_modules():
        if name:
            def note(module: Any, args: Any, y: Any, name: str = name) -> None:
                y = _with_bias(y)
                if isinstance(y, torch.Tensor):
                    records.setdefault(name, []).append(y.detach().clone())

            stack.callback(module.register_forward_hook(note).remove)


def _with_bias(y: Any) -> Any:
    """Megatron's modules return the bias that they leave to their caller."""
    if isinstance(y, tuple) and y and isinstance(y[0], torch.Tensor):
        pair = len(y) == 2 and isinstance(y[1], torch.Tensor) and y[1].ndim == 1
        return y[0] + y[1] if pair and y[1].shape[0] == y[0].shape[-1] else y[0]
    return y


def record_facade(facade: nn.Module, records: Records, stack: contextlib.ExitStack) -> None:
    """The same of facades, whose linear layers are also asked for parts of their output."""

    def put(name: str, y: torch.Tensor) -> None:
        records.setdefault(name, []).append(y.detach().clone())

    for name, module in facade.named_modules():
        if not name:
            continue
        asked = hasattr(module, "_layer")
        if asked and is_column(module._layer):
            def normalized(x: Any, module: Any = module, name: str = name) -> Any:
                x = type(module).normalized(module, x)
                if module.weight is not None:
                    put(name, column_rows(x, module.weight, module.bias, None, module.tp))
                return x

            module.__dict__["normalized"] = normalized
            stack.callback(module.__dict__.pop, "normalized")
        elif isinstance(module, RowFacade):
            def product(x: Any, bias: Any, module: Any = module, name: str = name) -> Any:
                y = type(module)._product(module, x, bias)
                put(name, y if bias is not None or module.bias is None else y + module.bias)
                return y

            module.__dict__["_product"] = product
            stack.callback(module.__dict__.pop, "_product")
        else:
            def note(module: Any, args: Any, y: Any, name: str = name) -> None:
                y = _with_bias(y)
                if isinstance(y, torch.Tensor):
                    put(name, y)

            stack.callback(module.register_forward_hook(note).remove)


def first_difference(
    records: Records, theirs: Records, limit: float, tp: Collectives, position: int | None
) -> tuple[int, str, str] | None:
    """Place in the order, name and values of the first submodule whose output differs."""
    longest = max((len(y) for found in records.values() for y in found if y.ndim > 2), default=0)
    for place, (name, outputs) in enumerate(records.items()):
        for y, other in zip(outputs, theirs.get(name, ()), strict=False):
            here = _place(position, len(y), longest, tp.rank) if y.ndim > 2 else None
            pairs = _comparable(y, other, tp, here)
            if pairs and min(difference(*pair) for pair in pairs) > limit:
                return place, name, values(*min(pairs, key=lambda pair: difference(*pair)))
    return None


def _comparable(
    y: torch.Tensor, other: torch.Tensor, tp: Collectives, place: int | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A live output and the facade's in all forms of the same shape.

    Facades are batch first and may have one position alone; Megatron's hidden states are [S, B, h],
    or the rank's positions of them with sequence_parallel.
    """
    ours, others = [y], [other]
    if y.ndim > 2:
        own = y.transpose(0, 1)
        ours.append(own)
        if place is not None:
            ours += [own[:, place], own[:, [place]]]
    if other.ndim > 2 and other.shape[1] % tp.size == 0:
        others.append(other.chunk(tp.size, 1)[tp.rank])
    return [(a, b) for a in ours for b in others if a.shape == b.shape]


def _place(position: int | None, length: int, whole: int, rank: int) -> int | None:
    """Where a position of a sequence is in a rank's part of it; None if it is not there."""
    if position is None:
        return None
    here = position % whole - (rank * length if length < whole else 0)
    return here if 0 <= here < length else None
