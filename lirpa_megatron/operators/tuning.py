"""Sizes found by measurement, from which on work is cut in another way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Tuning:
    """How work is cut into parts; the bounds are the same, up to the order of sums.

    Mappings are by the type of device. Must be the same on every rank.
    """

    pairs: Mapping[str, int] = field(default_factory=lambda: {"cpu": 1, "cuda": 2**26})
    """Coefficients of pairs of two forms that are made at once: on a CPU those of one query; a GPU
    would wait for the many small operators."""
    whole_form: Mapping[str, int] = field(default_factory=lambda: {"cpu": 2**16})
    """Norms use forms of more numbers position by position: what fits a processor's cache is faster
    there; a GPU would wait for the many small operators."""
    few: int = 2**14
    """Numbers of A up to which, on a CPU, both sides are bounded in one call."""
    turn: Mapping[str, int] = field(default_factory=lambda: {"cuda": 128})
    """Rows of A that are worth a chunk that takes turns with another; chunks never do where there
    is no entry: on a CPU transfers compete for the cores that compute (docs/measurements.md)."""

    def pairs_at_once(self, A: torch.Tensor) -> int:
        """`pairs` for forms that lie where A does."""
        return self.pairs.get(A.device.type, 1)
