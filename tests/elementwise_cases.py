"""The elementwise functions of the table with numbers to try them at, and their exact values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from lirpa_megatron.operators.elementwise.curves import Curve
from lirpa_megatron.operators.elementwise.functions import FUNCTIONS

INF = math.inf


@dataclass(frozen=True)
class Case:
    """An entry of the table with its numbers."""

    name: str
    """Of its entry in `FUNCTIONS`."""
    numbers: dict = field(default_factory=dict)
    """Arguments of the entry's `curve`."""

    def __str__(self) -> str:
        return self.name + "".join(f" {value:g}" for value in self.numbers.values())

    @property
    def curve(self) -> Curve:
        return FUNCTIONS[self.name].curve(**self.numbers)


_NUMBERS: dict[str, list[dict]] = {
    "Softplus": [{}, {"beta": 3.0}, {"beta": 0.5, "threshold": 2.0}],
    "Exponential": [{"base": 2.0}, {"base": 0.3}],
    "Power": [{"exponent": n} for n in (2.0, 3.0, 4.0, 5.0, -1.0, -2.0, -3.0, 0.5, 1.5, 0.3,
                                        -0.5, 2.7, 1.0, 0.0)],
    "LeakyRelu": [{}, {"negative_slope": 0.3}, {"negative_slope": 2.0}, {"negative_slope": -0.5}],
    "Threshold": [{"threshold": 0.5, "value": 0.0}, {"threshold": -1.0, "value": 2.0}],
    "Clamp": [{"least": -1.0, "most": 1.0}, {"least": 0.0, "most": 6.0}, {"least": 0.3},
              {"most": -0.7}, {"least": 1.0, "most": 1.0}],
    "Elu": [{}, {"alpha": 0.5}, {"alpha": 3.0},
            {"alpha": 1.6732632423543772, "scale": 1.0507009873554805}],
    "Celu": [{}, {"alpha": 0.3}, {"alpha": 4.0}],
    "ErfGate": [{"divisor": 1.4142135}, {"divisor": 1.3}],
    "TanhGate": [{"factor": 0.7978846, "cubic": 0.044715}, {"factor": 0.87, "cubic": 0.0403}],
}

CASES = [
    Case(name, numbers) for name in FUNCTIONS for numbers in _NUMBERS.get(name, [{}])
]


def inside_domain(curve: Curve, lower: torch.Tensor, upper: torch.Tensor) -> tuple:
    """The intervals folded into the function's domain, away from a pole; ends in order."""
    first, last = curve.domain
    if math.isfinite(first) and not math.isfinite(last):
        lower, upper = first + (lower - first).abs(), first + (upper - first).abs()
    if curve.pole is not None:
        same = torch.sign(lower) == torch.sign(upper)
        upper = torch.where(same, upper, lower)
    return torch.minimum(lower, upper), torch.maximum(lower, upper)
