"""Networks of ReLUs in real arithmetic, by fractions, and the points where they are extreme."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import torch
from models import drawn
from torch import nn

CANCELS = 1e8
"""Size of the weights that cancel in `random_net`."""


class Pairs(nn.Module):
    """x -> W2 relu(W1 x + b1) + b2, or with further layers; with `skip` x is added to the end."""

    def __init__(self, weights: list[tuple[torch.Tensor, torch.Tensor]], skip: bool = False):
        super().__init__()
        self.layers, self.skip = nn.ModuleList(), skip
        for w, b in weights:
            layer = nn.Linear(w.shape[1], w.shape[0])
            layer.weight.data, layer.bias.data = w, b
            self.layers.append(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers[0](x)
        for layer in list(self.layers)[1:]:
            y = layer(torch.relu(y))
        return y + x if self.skip else y

    def exact(self, x: list[Fraction]) -> list[Fraction]:
        """The output in real arithmetic."""
        y, first = x, True
        for layer in self.layers:
            y = y if first else [max(v, Fraction(0)) for v in y]
            first = False
            y = [
                sum((Fraction(c) * v for c, v in zip(row, y, strict=True)), Fraction(b))
                for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
            ]
        return [v + u for v, u in zip(y, x, strict=True)] if self.skip else y


def corners(x: list[float], eps: float) -> Any:
    """Of the box [x - eps, x + eps] in real arithmetic."""
    ends = [(Fraction(v) - Fraction(eps), Fraction(v) + Fraction(eps)) for v in x]
    return itertools.product(*ends)


def breaks(net: Pairs, x: list[float], eps: float) -> Any:
    """Points of the square around x [2] among which a net of one hidden layer has its extremes.

    It is linear between the lines where a neuron is 0: its extremes are at corners of the square,
    where lines cross its edges, and where they cross each other.
    """
    yield from corners(x, eps)
    low, high = ([Fraction(v) + s * Fraction(eps) for v in x] for s in (-1, 1))
    layer = net.layers[0]
    lines = [
        (Fraction(row[0]), Fraction(row[1]), Fraction(b))
        for row, b in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]
    edges = [(1, 0, -e) for e in (low[0], high[0])] + [(0, 1, -e) for e in (low[1], high[1])]
    for (a, b, c), (d, e, f) in itertools.combinations([*lines, *edges], 2):
        det = a * e - b * d
        if det:
            p = [(b * f - c * e) / det, (c * d - a * f) / det]
            if all(lo <= v <= hi for v, lo, hi in zip(p, low, high, strict=True)):
                yield p


def random_net(seed: int, widths: tuple[int, ...], cancel: bool, bias: float = 0.5) -> Pairs:
    """Weights of the usual size; with `cancel` neurons in pairs whose large weights cancel."""
    weights = []
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        w, b = drawn(m, n, seed=seed + 31 * i), bias * drawn(m, seed=seed + 31 * i + 7)
        if cancel and i == 0:
            w[1::2] = w[::2][: len(w[1::2])]  # pairs of neurons that are nearly alike
            b = b.abs() + 4 * w.abs().sum(1)
        if cancel and i == 1:
            w[:, ::2] = CANCELS * w[:, ::2].sign()
            w[:, 1::2] = -w[:, ::2][:, : w[:, 1::2].shape[1]]
        weights.append((w, b))
    return Pairs(weights)
