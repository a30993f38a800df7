"""Limits on the rounding error of operators of plain modules: numbers moved, joined, summed."""

from __future__ import annotations

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.rounding.rules import Known, Rule, SumRule


class RearrangeRule(Rule):
    """Numbers that change places. Repeated ones are refused: their A would be added up."""

    def refusal(self, node: auto_lirpa.Bound) -> str | None:
        if node.pads and node.fill:
            return "padding with numbers other than 0"
        if len(node.inputs) > 1:
            index = node.context.value_of(node.inputs[1])
            if len(index.unique()) < len(index):
                return "numbers that are repeated (expanded)"
        return None


class StageInputRule(Rule):
    """The output of the pipeline stage below, as the input of this one.

    Rows of A go on there as exact numbers, and what comes back is widened by the errors there. So
    the errors of a pass are summed up where they arise, each stage its own.
    """

    def magnitude(self, node: auto_lirpa.Bound, known: Known) -> torch.Tensor:
        lower, upper = node.interval_propagate()
        return torch.maximum(lower.detach().abs(), upper.detach().abs())


class ConcatRule(Rule):
    """Values side by side."""

    def refusal(self, node: auto_lirpa.Bound) -> str | None:
        constant = any(not x.perturbed for x in node.inputs)
        return "constants joined with values of the input" if constant else None

    def magnitude(self, node: auto_lirpa.Bound, known: Known) -> torch.Tensor:
        return node.forward(*map(known.magnitude, node.inputs))


class CombineRule(SumRule):
    """s a + t b, s and t 1 or -1: products with them are exact."""

    def refusal(self, node: auto_lirpa.Bound) -> str | None:
        if {abs(factor) for factor in node.factors} != {1.0}:
            return "a sum with factors other than 1 and -1"
        return super().refusal(node)
