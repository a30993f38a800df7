"""Norms and attention by themselves, their bounds over a box, and attacks on these."""

from __future__ import annotations

import math

import torch
from models import drawn
from torch import nn

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_megatron.adapters import traced_ops

SLACK = {torch.float64: 1e-11, torch.float32: 2e-5}
METHODS = ("IBP", "CROWN-IBP", "CROWN")
B, T, HEAD = 2, 4, 4


class Norm(nn.Module):
    """A norm of the input, or of a norm's linear image (where the input's form is known)."""

    def __init__(self, rms=False, groups=1, bias=True, deep=False, eps=1e-5):
        super().__init__()
        width = 8
        self.rms, self.groups, self.eps = rms, groups, eps
        self.weight = nn.Parameter(1 + drawn(width // groups, seed=1, scale=0.5))
        self.bias = nn.Parameter(drawn(width // groups, seed=2)) if bias else None
        self.linear = nn.Linear(width, width).double() if deep else None
        if deep:
            self.linear.weight.data = drawn(width, width, seed=3, scale=0.5)
            self.linear.bias.data = drawn(width, seed=8, scale=0.3)

    def forward(self, x):
        y = traced_ops.norm(x, self.weight, self.bias, self.eps, self.rms, self.groups)
        if self.linear is not None:
            y = self.linear(y)
            y = traced_ops.norm(y, self.weight, self.bias, self.eps, self.rms, self.groups)
        return y


class Attention(nn.Module):
    """Scores and softmax of linear maps of the input; `groups` key/value heads for two heads."""

    def __init__(self, mask=None, fill=-10000.0, groups=2, rotary=False, sharp=1.0):
        super().__init__()
        width = 6
        self.q, self.k, self.v = (
            nn.Linear(width, n * HEAD).double() for n in (2, groups, groups)
        )
        for i, layer in enumerate((self.q, self.k, self.v)):
            layer.weight.data = drawn(*layer.weight.shape, seed=4 + i, scale=0.6 * sharp)
            layer.bias.data = drawn(len(layer.bias), seed=14 + i, scale=0.3)
        self.fill, self.groups, self.rotary = fill, groups, rotary
        self.register_buffer("mask", mask)
        angles = torch.outer(torch.arange(T).double(), torch.tensor([1.0, 0.1]).double())
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, x):
        q, k = self.q(x), self.k(x)
        if self.rotary:
            q = traced_ops.rotary(q, self.cos, self.sin, 2)
            k = traced_ops.rotary(k, self.cos, self.sin, self.groups)
        s = traced_ops.scores(q, k, HEAD, HEAD**-0.5)
        return traced_ops.attend(s, self.v(x), self.mask, HEAD, self.fill)


def bounds(net, x, radius, dtype, methods=METHODS, options=None):
    """method -> (lower, upper) in float64; `radius` a number or a tensor like x."""
    net = net.to(dtype)
    x = x.to(dtype)
    ball = PerturbationLpNorm(norm=math.inf, x_L=x - radius, x_U=x + radius)
    bounded = BoundedModule(net, x, bound_opts=options)
    found = {}
    with torch.no_grad():
        for method in methods:
            pair = bounded.compute_bounds((BoundedTensor(x, ball),), method=method)
            found[method] = tuple(b.double() for b in pair)
    net.double()
    return found, (ball.x_L.double(), ball.x_U.double())


def attack(net, box, steps=8, points=24):
    """Outputs at random points, corners and along gradients to extremes of random directions."""
    low, high = box
    generator = torch.Generator().manual_seed(9)
    middle, half = (low + high) / 2, (high - low) / 2
    found = []
    for kind in ("inside", "corner", "ascent"):
        u = 2 * torch.rand(points, *low.shape, generator=generator, dtype=torch.float64) - 1
        u = u if kind == "inside" else u.sign()
        x = (middle + half * u).flatten(0, 1)
        if kind == "ascent":
            direction = None
            for _ in range(steps):
                x.requires_grad_(True)
                y = _apply(net, x, points)
                if direction is None:
                    direction = torch.randn(y.shape, generator=generator, dtype=torch.float64)
                (gradient,) = torch.autograd.grad((y * direction).sum(), x)
                moved = x.detach() + 0.5 * half.repeat(points, 1, 1) * gradient.sign()
                x = torch.min(torch.max(moved, low.repeat(points, 1, 1)), high.repeat(points, 1, 1))
        with torch.no_grad():
            found.append(_apply(net, x, points).unflatten(0, (points, -1)))
    return torch.cat(found)


def _apply(net, x, points):
    """The net on `points` batches; one after the other if it has a mask for each sample."""
    mask = getattr(net, "mask", None)
    if mask is None or len(mask) == 1:
        return net(x)
    return torch.cat([net(part) for part in x.split(x.shape[0] // points)])


def violation(found, outputs):
    """The largest violation, relative to the largest bound."""
    lower, upper = found
    size = torch.stack((lower, upper)).nan_to_num(posinf=0.0, neginf=0.0).abs().max().clamp(min=1.0)
    return (torch.max((lower - outputs).max(), (outputs - upper).max()) / size).item()
