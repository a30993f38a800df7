"""What a backward pass carries and finds, for its lower and its upper side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lirpa_megatron.operators.linear.local import dense


@dataclass
class RowBounds:
    """Bounds of the rows that this rank carried.

    Attributes:
        lower, upper: concrete bounds [rows, B]; None where not asked for.
        lA, uA: input node name -> coefficients [rows, B, *input shape].
        lbias, ubias: the constant terms [rows, B], without the inputs' share.
    """

    lower: torch.Tensor | None
    upper: torch.Tensor | None
    lbias: torch.Tensor | None
    ubias: torch.Tensor | None
    lA: dict[str, torch.Tensor] = field(default_factory=dict)
    uA: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Sides:
    """A running sum for the lower and the upper side; None where there is nothing yet.

    The two sides stay one object for as long as nothing made them differ.
    """

    lower: Any = None
    upper: Any = None

    def add(self, lower: Any, upper: Any) -> None:
        shared = upper is lower and self.upper is self.lower
        self.lower = _plus(self.lower, lower)
        self.upper = self.lower if shared else _plus(self.upper, upper)


def _plus(total: Any, term: Any) -> Any:
    if total is None or term is None:
        return term if total is None else total
    return dense(total) + dense(term)
