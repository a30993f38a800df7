"""Limits on the rounding error of a language model's linear operators: positions, vocabulary."""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.arithmetic.floating import TINY, dot, gamma
from lirpa_megatron.operators.coefficients import IdentityRows
from lirpa_megatron.rounding.rules import Known, Rule, Visit

Tensor = torch.Tensor


class RotaryRule(Rule):
    """y = x cos + J x sin, with the tables as the numbers that they are.

    Pass: each entry of A_x is the sum of two products, off by gamma_2 (|A| |cos| + |J A| |sin|), so
    the bound by gamma_2 <|A|, R>, R = |cos| mag(x) + |sin| |J| mag(x), which is the magnitude of y
    too. IBP: midpoint and half-width are off by u, their products and sums by 4 u: gamma_8 R.
    """

    moves = False

    def _reach(self, node: Any, m: Tensor, known: Known) -> Tensor:
        cos, sin = (known.value(x).abs() for x in node.inputs[1:3])
        swapped = node.forward(m, torch.zeros_like(cos), torch.ones_like(sin)).abs()
        heads, r = (node.heads, -1), cos.shape[-1]
        m, swapped = m.unflatten(-1, heads), swapped.unflatten(-1, heads)[..., :r]
        turned = m[..., :r] * cos.unsqueeze(-2) + swapped * sin.unsqueeze(-2)
        return torch.cat((turned, m[..., r:]), -1).flatten(-2)

    def magnitude(self, node: Any, known: Known) -> Tensor:
        m = known.magnitude(node.inputs[0])
        return known.once("reach", node, lambda: self._reach(node, m, known))

    def of_interval(
        self, node: Any, v: tuple, ends: tuple[Tensor, Tensor], C: Any, known: Known
    ) -> Tensor:
        m = torch.maximum(*(end.detach().abs() for end in v[0][:2]))
        return gamma(8) * self._reach(node, m, known) + 8 * TINY

    def of_visit(self, node: Any, visit: Visit, known: Known) -> Tensor:
        spill = 4 * TINY * (known.magnitude(node.inputs[0]).flatten(1).sum(1) + 1)
        return gamma(3) * dot(visit.A, self.magnitude(node, known)) + spill


class MarginsRule(Rule):
    """y_j = (w_t - w_j) x + b_t - b_j, t a target.

    With R_j = (|w_t| + |w_j|) mag(x) + |b_t| + |b_j| and n the terms of a row of A: each entry of
    A_x = (sum A) w_t - A W is off by gamma_{n+4} (sum |A| |w_t| + |A| |W|), the bias alike, and so
    the bound by gamma_{n+4} <|A|, R>. A row of the identity is one difference: gamma_2 R_j. (Of a
    sharded vocabulary a rank has its tokens' part; what the sum over ranks adds is charged there.)

    IBP: differences, h products and their sum, of midpoint and half-width: gamma_{h+8} R.
    """

    moves = False

    def _reach(self, node: Any, m: Tensor, known: Known) -> Tensor:
        def made() -> list:
            return node._tables(*(known.value(x) for x in node.inputs[1:]))

        (wt, w), (bt, b) = known.once("tables", node, made)
        own = torch.nn.functional.linear(m, w.abs(), None if b is None else b.abs())
        if node.shared:
            target = torch.nn.functional.linear(m, wt.abs(), None if bt is None else bt.abs())
            return target.unsqueeze(-1) + own.unsqueeze(1)
        target = (m * wt.abs()).sum(-1)
        return (target if bt is None else target + bt.abs()).unsqueeze(-1) + own

    def magnitude(self, node: Any, known: Known) -> Tensor:
        m = known.magnitude(node.inputs[0])
        return known.once("reach", node, lambda: self._reach(node, m, known).detach())

    def of_interval(
        self, node: Any, v: tuple, ends: tuple[Tensor, Tensor], C: Any, known: Known
    ) -> Tensor:
        m = torch.maximum(*(end.detach().abs() for end in v[0][:2]))
        h = m.shape[-1]
        return gamma(h + 8) * self._reach(node, m, known) + (h + 8) * TINY * (1 + m.sum())

    def of_visit(self, node: Any, visit: Visit, known: Known) -> Tensor:
        reach, n = self.magnitude(node, known), visit.terms + 6
        spill = n * TINY * (known.magnitude(node.inputs[0]).sum() + 1)
        if isinstance(visit.A, IdentityRows):
            return gamma(3) * reach.flatten(1)[:, visit.A.own].t() + spill
        return gamma(n) * dot(visit.A, reach) + spill
