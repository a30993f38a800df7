"""Networks with the elementwise operators, and intervals to try these on."""

from __future__ import annotations

from typing import Any

import torch
from layers import megatron_layer
from models import Net, Region, region
from torch import nn

from lirpa_megatron import BoundedModule
from lirpa_megatron.adapters import traced_ops

SIZES = Net(inputs=6)
HIDDEN = 8


class Mlp(nn.Module):
    """Two blocks x -> Linear(act(Linear x)), or with a gate Linear(act(Linear x) * Linear x)."""

    def __init__(self, kind: str, gated: bool, layers: list[nn.Module]) -> None:
        super().__init__()
        self.kind, self.gated, self.layers = kind, gated, nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = iter(self.layers)

        def linear(x: torch.Tensor) -> torch.Tensor:
            y = next(layers)(x)
            return y[0] if isinstance(y, tuple) else y

        for _ in range(2):
            y = traced_ops.activation(linear(x), self.kind)
            if self.gated:
                y = traced_ops.product(y, linear(x))
            x = linear(y)
        return x


def mlp(kind: str, gated: bool, dtype: torch.dtype, sharded: bool = False) -> Mlp:
    """The network, the same in every process; on Megatron's layers when `sharded`."""
    generator = torch.Generator().manual_seed(5)
    layers = []
    for name in ("column", "column", "row") * 2 if gated else ("column", "row") * 2:
        sizes = (SIZES.inputs, HIDDEN) if name == "column" else (HIDDEN, SIZES.inputs)
        full = nn.Linear(*sizes, dtype=dtype)
        for parameter in full.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = (0.7 * drawn).to(dtype)
        layers.append(megatron_layer(name, False, full) if sharded else full)
    return Mlp(kind, gated, layers).eval()


def inputs(eps: float, dtype: torch.dtype = torch.float64, tokens: int = 0) -> Region:
    return region(Net(inputs=SIZES.inputs, tokens=tokens), eps=eps, batch=2, dtype=dtype)


def bounded(model: nn.Module, where: Region, **alpha: Any) -> BoundedModule:
    args = {"iteration": 3, "optimizer": "sgd", **alpha}
    return BoundedModule(model, where.center, {"optimize_bound_args": args})


def sharded_bounds(kind: str, gated: bool, methods: tuple, eps: float) -> list:
    """On each rank: (lower, upper) by each method."""
    torch.set_default_dtype(torch.float64)
    model = mlp(kind, gated, torch.float64, sharded=True)
    return [[x.numpy() for x in both] for both in bounds_of(model, methods, eps)]


def bounds_of(model: nn.Module, methods: tuple, eps: float) -> list:
    """(lower, upper) by each method, float64."""
    where = inputs(eps)
    module = bounded(model, where)
    return [
        [b.detach() for b in module.compute_bounds(x=(where.bounded(),), method=method)]
        for method in methods
    ]


def intervals(count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Intervals of all kinds: across zero, of no or tiny width, far out, huge, at bends."""
    generator = torch.Generator().manual_seed(1)

    def normal() -> torch.Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    pairs = []
    for scale in (0.1, 1, 3, 10, 40, 1e3, 1e6):
        middle, width = scale * normal(), scale * normal().abs()
        pairs += [(middle - w, middle + w) for w in (width, 1e-3 * width, 1e-7 * width, 0 * width)]
    for point in (2**0.5, 1.4185, 2.3994, 1.4097, 0.7518, 1.2785, 0.0):
        width = normal().abs() * 10 ** (-8 * torch.rand(count, generator=generator).double())
        for p in (torch.full_like(width, point), torch.full_like(width, -point)):
            pairs += [(p, p + width), (p - width, p), (p - width, p + width)]
    lower, upper = (torch.cat(ends).to(dtype) for ends in zip(*pairs, strict=True))
    return torch.minimum(lower, upper), torch.maximum(lower, upper)


def moves(like: torch.Tensor) -> list[torch.Tensor | None]:
    random = 2 * torch.rand_like(like) - 1
    return [None, torch.full_like(like, -1), torch.full_like(like, 1), random]
