"""Plain torch code that uses the elementwise functions, each as users write it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 5

PRELU = [0.3, -0.2, 1.5, 0.0, 0.9]


def _prelu(count: int) -> nn.Module:
    module = nn.PReLU(count)
    module.weight.data = torch.tensor(PRELU[:count])
    return module


FUNCTIONS: dict[str, Callable[[], Callable]] = {
    "x ** 2": lambda: lambda x: x**2,
    "x * x": lambda: lambda x: x * x,
    "square": lambda: torch.square,
    "x ** 3": lambda: lambda x: x.pow(3),
    "x ** 1.5": lambda: lambda x: (x * x + 0.1) ** 1.5,
    "2 ** x": lambda: lambda x: 2.0**x,
    "sqrt": lambda: lambda x: torch.sqrt(x.abs() + 0.1),
    "rsqrt": lambda: lambda x: torch.rsqrt(F.softplus(x) + 0.1),
    "reciprocal": lambda: lambda x: 1 / (2 + torch.sigmoid(x)),
    "quotient": lambda: lambda x: x / (1 + x.exp()),
    "exp": lambda: torch.exp,
    "log": lambda: lambda x: torch.log(F.softplus(x) + 0.05),
    "abs": lambda: torch.abs,
    "sin": lambda: torch.sin,
    "cos": lambda: lambda x: x.cos(),
    "erf": lambda: torch.erf,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "softplus, beta 3": lambda: nn.Softplus(beta=3, threshold=4),
    "mish": nn.Mish,
    "ELU": nn.ELU,
    "ELU, alpha 0.4": lambda: nn.ELU(0.4),
    "SELU": nn.SELU,
    "CELU": lambda: nn.CELU(0.7),
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "hardtanh": lambda: nn.Hardtanh(-0.5, 0.8),
    "ReLU6": nn.ReLU6,
    "clamp": lambda: lambda x: x.clamp(max=0.4),
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "PReLU": lambda: _prelu(1),
    "PReLU of each channel": lambda: _prelu(WIDTH),
    "softsign": nn.Softsign,
    "sign": lambda: torch.sign,
    "log-sigmoid": nn.LogSigmoid,
    "GELU": nn.GELU,
    "tanh GELU": lambda: nn.GELU(approximate="tanh"),
    "SiLU": nn.SiLU,
    "maximum": lambda: lambda x: torch.maximum(x, 0.7 - x),
    "minimum": lambda: lambda x: torch.min(x, 0.3 - 0.5 * x),
    "maximum with a constant": lambda: lambda x: torch.maximum(x, torch.full((WIDTH,), 0.2)),
    "softmax": lambda: nn.Softmax(-1),
    "log-softmax": lambda: nn.LogSoftmax(-1),
    "in place": lambda: lambda x: F.elu(x + 0.0, inplace=True),
}
"""Name -> maker of the function."""


class Between(nn.Module):
    """Linear(function(Linear x))."""

    def __init__(self, function: Callable, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        for parameter in self.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = (scale * drawn).to(parameter.dtype)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.function(self.first(x)))
