"""Networks, plain auto_LiRPA's bounds of them, and attacks, for the tests of the core.

Networks are described by plain data (`Net`), from which every process builds the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lirpa_megatron import BoundedTensor, PerturbationLpNorm
from lirpa_megatron.compat import auto_lirpa

ACTIVATIONS: dict[str, Callable] = {
    "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Net:
    """A stack of Linear-activation-Linear pairs, with activations between the pairs."""

    inputs: int = 6
    hidden: tuple[int, ...] = (16, 12)
    """Width inside each pair: what tensor parallelism shards (if it divides)."""
    width: int = 8
    """Width between pairs, replicated."""
    outputs: int = 3
    acts: tuple[str, ...] = ("relu",)
    """In turn: inside the first pair, after it, inside the second, ..."""
    bias: bool = True
    residual: bool = False
    """Each pair is added to its input where the widths are equal."""
    skip_hidden: bool = False
    """Inside each pair, act(h) + h: a skip between sharded values."""
    long_skip: bool = False
    """What is inside a pair is added to what is inside the next (equal `hidden`)."""
    constants: bool = False
    """Inside each pair, h becomes 1.5 h - 0.25."""
    act_first: bool = False
    """An activation reads the input."""
    tokens: int = 0
    """Inputs are [B, tokens, inputs] instead of [B, inputs]."""
    bias_scale: float = 0.3
    """Large biases make neurons that are never cut, or always."""
    seed: int = 0


class Stack(nn.Module):
    """The network that a `Net` describes."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        pairs = len(net.hidden)
        self.between = between = [net.inputs, *[net.width] * (pairs - 1), net.outputs]
        self.columns = nn.ModuleList(
            nn.Linear(n, h, bias=net.bias) for n, h in zip(between, net.hidden, strict=False)
        )
        self.rows = nn.ModuleList(
            nn.Linear(h, n, bias=net.bias) for h, n in zip(net.hidden, between[1:], strict=True)
        )

    def _acts(self) -> Iterator[Callable]:
        while True:
            yield from (ACTIVATIONS[name] for name in self.net.acts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        net, acts = self.net, self._acts()
        if net.act_first:
            x = next(acts)(x)
        inside = None
        for i, (column, row) in enumerate(zip(self.columns, self.rows, strict=True)):
            h = column(x)
            if net.constants:
                h = 1.5 * h - 0.25
            if net.long_skip and inside is not None:
                h = h + inside
            act = next(acts)
            inside = act(h) + h if net.skip_hidden else act(h)
            y = row(inside)
            if net.residual and self.between[i] == self.between[i + 1]:
                y = y + x
            x = y if i == len(self.rows) - 1 else next(acts)(y)
        return x


def build(net: Net, dtype: torch.dtype = torch.float64) -> Stack:
    """The network with weights that keep the size of activations, the same in every process."""
    model = Stack(net)
    generator = torch.Generator().manual_seed(net.seed)
    for parameter in model.parameters():
        scale = net.bias_scale if parameter.ndim == 1 else 1.2 / parameter.shape[1] ** 0.5
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (drawn * scale).to(dtype)
    return model


@dataclass
class Region:
    """A set of inputs: an Lp ball around `center`, or the box from `x_L` to `x_U`."""

    center: torch.Tensor
    """[B, *shape]."""
    norm: float
    """1, 2 or inf."""
    eps: float
    """Radius of the ball; of no meaning for a box."""
    x_L: torch.Tensor | None = None
    """[B, *shape]; None for a ball."""
    x_U: torch.Tensor | None = None

    def bounded(self) -> BoundedTensor:
        """As the input of `compute_bounds`."""
        ptb = PerturbationLpNorm(norm=self.norm, eps=self.eps, x_L=self.x_L, x_U=self.x_U)
        return BoundedTensor(self.center, ptb)

    def vertex(self, direction: torch.Tensor) -> torch.Tensor:
        """The farthest point of the set in a direction [..., B, *shape], for each input."""
        if self.x_L is not None:
            return torch.where(direction > 0, self.x_U, self.x_L)
        if self.norm == float("inf"):
            return self.center + self.eps * direction.sign()
        first = direction.ndim - self.center.ndim + 1
        flat = direction.flatten(first)
        if self.norm == 2:
            step = flat / flat.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        else:
            largest = flat.abs().argmax(-1, keepdim=True)
            step = torch.zeros_like(flat).scatter_(-1, largest, flat.gather(-1, largest).sign())
        return self.center + self.eps * step.view_as(direction)

    def random(self, count: int) -> torch.Tensor:
        """Points [count, B, *shape]: half of them extreme (corners), half inside."""
        shape = (count, *self.center.shape)
        extreme = self.vertex(torch.randn(shape, dtype=self.center.dtype))
        other = self.vertex(torch.randn(shape, dtype=self.center.dtype))
        share = torch.rand(count, *[1] * self.center.ndim, dtype=self.center.dtype)
        share[: count // 2] = 0
        return extreme + share * (other - extreme)

    def to(self, dtype: torch.dtype) -> Region:
        ends = (None if end is None else end.to(dtype) for end in (self.x_L, self.x_U))
        return Region(self.center.to(dtype), self.norm, self.eps, *ends)


REGIONS = ("linf", "l2", "l1", "box")


def region(
    net: Net, kind: str = "linf", eps: float = 0.2, batch: int = 3,
    dtype: torch.dtype = torch.float64, seed: int = 100,
) -> Region:
    """Inputs of a network within eps of random ones, the same in every process."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, net.tokens, net.inputs) if net.tokens else (batch, net.inputs)
    x, below, above = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3))
    if kind == "box":  # not symmetric, and of zero width here and there
        return Region(x, float("inf"), 0.0, x - eps * below.clamp_min(0), x + eps * above.abs())
    return Region(x, {"linf": float("inf"), "l2": 2.0, "l1": 1.0}[kind], eps)


def specification(batch: int, rows: int, outputs: int, dtype: torch.dtype = torch.float64
                  ) -> torch.Tensor:
    """C [batch, rows, outputs], the same in every process."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, rows, outputs, generator=generator, dtype=torch.float64).to(dtype)


class Plain(auto_lirpa.HostBoundedModule):
    """auto_LiRPA's own BoundedModule, able to run on today's torch."""

    _named_members = auto_lirpa.named_members


HOSTS_OWN: dict[str, Any] = {
    "lirpa_megatron::Tanh": auto_lirpa.auto_LiRPA.bound_ops.BoundTanh,
    "lirpa_megatron::Sigmoid": auto_lirpa.auto_LiRPA.bound_ops.BoundSigmoid,
}
"""As `custom_ops`: the host's operators in place of ours, where bounds are compared with plain
auto_LiRPA's, to see sharding alone. (Ours have other lines.)"""


def _tabulate_once(kind: Any) -> None:
    """Makes nodes of a class of the host share its table of tangent points.

    It has 50,000 points, found by 100 bisections, and the host computes it for each node anew.
    """
    compute, tables = kind.precompute_relaxation, {}

    @functools.wraps(compute)
    def precompute_relaxation(self: Any, *args: Any, **kwargs: Any) -> None:
        named = [a for a in (*args, *kwargs.values()) if not callable(a)]
        key = type(self), self.device, torch.get_default_dtype(), *named
        if key not in tables:
            before = dict(vars(self))
            compute(self, *args, **kwargs)
            tables[key] = {k: v for k, v in vars(self).items() if before.get(k) is not v}
        vars(self).update(tables[key])

    kind.precompute_relaxation = precompute_relaxation


for _kind in HOSTS_OWN.values():
    _tabulate_once(_kind)

AS_PLAIN: dict[str, Any] = {"sparse_spec_alpha": False} if auto_lirpa.IS_03 else {}
"""Our options where alpha-CROWN is compared with plain auto_LiRPA: 0.3 has sparse alpha too, and on
small networks ends in assertions of its own with it."""


def plain(model: nn.Module, x: torch.Tensor, **options: Any) -> Plain:
    """auto_LiRPA's BoundedModule of an unsharded model, with the options that are pinned in ours.

    Neurons that are known to be stable get no rows, nor alpha, as is the default of both; but with
    0.3 alpha has all rows (`AS_PLAIN`).
    """
    args = auto_lirpa.translate_optimize_args(options.pop("optimize_bound_args", {}))
    sparse = options.setdefault("sparse_intermediate_bounds", True)
    alpha = sparse and not auto_lirpa.IS_03
    options = {**auto_lirpa.PINNED_OPTIONS, **options, "optimize_bound_args": args,
               "sparse_intermediate_bounds_with_ibp": sparse,
               "sparse_spec_alpha": alpha, "sparse_features_alpha": alpha}
    with auto_lirpa.conversion(), auto_lirpa.running():
        module = Plain(model, x, bound_opts=options)
    for parameter in model.parameters():  # the host turns gradients off with eval mode
        parameter.requires_grad_(True)
    module.train(model.training)
    return module


def plain_compute(module: Plain, x: BoundedTensor, C: torch.Tensor | None, method: str,
                  **kwargs: Any) -> Any:
    """`compute_bounds` of plain auto_LiRPA, under the argument names of 0.7.1."""
    with auto_lirpa.running():
        return module.compute_bounds(
            x=(x,), C=C, method=method, **auto_lirpa.translate_compute_bounds(kwargs)
        )


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers in float64, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def rank_part(full: torch.Tensor, parameter: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The rank's shard of a full weight (or of its gradient)."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    return full.chunk(size, parameter.partition_dim)[rank]


def relative_error(got: Any, want: Any, scale: torch.Tensor) -> float:
    """The largest difference between two lists of bounds, relative to `scale` (elementwise)."""
    errors = [0.0]
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            assert g.shape == w.shape, (g.shape, w.shape)
            errors.append(((g - w).abs() / scale).max().item())
    assert all(e == e for e in errors), "NaN"
    return max(errors)


def attack(
    function: Callable, where: Region, lower: torch.Tensor, upper: torch.Tensor, count: int = 100,
    steps: int = 5,
) -> float:
    """The largest violation of bounds that sampling finds (negative: none).

    Random points, corners, and Frank-Wolfe ascent of each output in both directions.

    Args:
        function: x [N, *shape] -> y [N, ...].
        where: the inputs.
        lower, upper: bounds [B, ...] of y.
        count: random points for each input.
        steps: of the ascent; the first goes to the vertex that the gradient points to.
    """

    def values(points: torch.Tensor) -> torch.Tensor:
        y = function(points.flatten(0, 1))
        return y.view(*points.shape[:2], *lower.shape[1:])

    def violation(y: torch.Tensor) -> float:
        return torch.maximum(lower - y, y - upper).max().item()

    with torch.no_grad():
        worst = violation(values(where.random(count)))
    outputs = lower[0].numel()
    signs = torch.cat([torch.eye(outputs), -torch.eye(outputs)]).to(where.center.dtype)
    signs = signs.view(2 * outputs, 1, *lower.shape[1:])
    points = where.random(2 * outputs)
    for step in range(steps):
        points = points.detach().requires_grad_()
        y = values(points)
        (gradient,) = torch.autograd.grad((y * signs).sum(), points)
        share = 1.0 if step == 0 else 2.0 / (step + 2)
        points = points + share * (where.vertex(gradient) - points)
        with torch.no_grad():
            worst = max(worst, violation(values(points)))
    return worst
