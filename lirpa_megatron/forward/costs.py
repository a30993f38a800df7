"""What a forward pass and rows through the linearised network cost, by their multiply-adds.

A pass takes M coefficients through every operator, a row goes back through the operators so far
once: a row costs about what a coefficient does. Counted are products with weights and attention's,
for one sample and of all ranks together, so that what is decided from them depends on neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lirpa_megatron.operators.attention.scores import BoundScores
from lirpa_megatron.operators.attention.softmax_values import BoundSoftmaxValues
from lirpa_megatron.operators.linear.local import LocalLinear

_MOST = 1024
"""Inputs of norms with more numbers are never refined by default,"""
_CHEAP = 2**34
"""while refining costs less than the pass, or than this (about a second of one core)."""


def _is_linear(node: Any) -> bool:
    return isinstance(node, LocalLinear) or type(node).__name__ in ("BoundLinear", "BoundMatMul")


@dataclass
class Costs:
    """Counts of a run.

    Attributes:
        way: multiply-adds of one coefficient's way so far.
        spent: those of all rows so far.
    """

    way: int = 0
    spent: int = 0

    def add(self, node: Any, inputs: list[Any], numbers: int) -> None:
        """The pass has gone through an operator.

        Args:
            node: the operator.
            inputs: its inputs, forms or tensors.
            numbers: of its output for one sample; of all ranks, if these have some of its features
                or of its input's.
        """
        if isinstance(node, BoundScores):
            self.way += numbers * node.head_dim
        elif isinstance(node, BoundSoftmaxValues) or _is_linear(node):
            self.way += numbers * inputs[0].shape[-1]  # of keys, of features

    def affords(self, rows: int, coefficients: int, limit: int | None) -> bool:
        """Whether some rows may go back through the operators so far; counts them if so.

        Args:
            rows: how many.
            coefficients: of the pass.
            limit: the most rows; None: what costs no more than the pass so far.
        """
        if limit is not None:
            return rows <= limit
        cost = rows * self.way
        if rows > _MOST or self.spent + cost > max(coefficients * self.way, _CHEAP):
            return False
        self.spent += cost
        return True
