"""`rounding="outward"` for one graph: what is covered, intervals, inputs."""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.arithmetic.floating import box_around, gamma, widened
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.errors import UserError
from lirpa_megatron.operators.elementwise.activations import BoundCurve
from lirpa_megatron.rounding.curves import rule_of_curve
from lirpa_megatron.rounding.language import MarginsRule, RotaryRule
from lirpa_megatron.rounding.planes import PlaneRule, SoftmaxValuesRule
from lirpa_megatron.rounding.rules import (
    ColumnRule,
    Known,
    LinearRule,
    ReluRule,
    RowRule,
    Rule,
    ScaleRule,
    SumRule,
    is_constant,
    refused,
)
from lirpa_megatron.rounding.structure import (
    CombineRule,
    ConcatRule,
    RearrangeRule,
    StageInputRule,
)

_MOVES, _LINEAR, _SUM, _PLANES = Rule(), LinearRule(), SumRule(), PlaneRule()
RULES: dict[str, Rule] = {
    "auto_LiRPA.BoundLinear": _LINEAR,
    "auto_LiRPA.BoundRelu": ReluRule(),
    "auto_LiRPA.BoundAdd": _SUM,
    "auto_LiRPA.BoundSub": _SUM,
    "auto_LiRPA.BoundMul": ScaleRule(),
    "auto_LiRPA.BoundFlatten": _MOVES,
    "auto_LiRPA.BoundReshape": _MOVES,
    "auto_LiRPA.BoundIdentity": _MOVES,
    "auto_LiRPA.BoundNeg": _MOVES,
    "lirpa_megatron.BoundCombine": CombineRule(),
    "lirpa_megatron.BoundScale": ScaleRule(),
    "lirpa_megatron.BoundRearrange": RearrangeRule(),
    "lirpa_megatron.BoundConcat": ConcatRule(),
    "lirpa_megatron.BoundStageInput": StageInputRule(),
    "lirpa_megatron.BoundReplicatedLinear": _LINEAR,
    "lirpa_megatron.BoundColumnParallelLinear": ColumnRule(),
    "lirpa_megatron.BoundRowParallelLinear": RowRule(),
    "lirpa_megatron.BoundGatherFromRegion": _MOVES,
    "lirpa_megatron.BoundScatterToRegion": _MOVES,
    "lirpa_megatron.BoundSelectPosition": _MOVES,
    "lirpa_megatron.BoundRotary": RotaryRule(),
    "lirpa_megatron.BoundVocabularyMargins": MarginsRule(),
    "lirpa_megatron.BoundTokenMargins": MarginsRule(),
    "lirpa_megatron.BoundProduct": _PLANES,
    "lirpa_megatron.BoundNorm": _PLANES,
    "lirpa_megatron.BoundScores": _PLANES,
    "lirpa_megatron.BoundSoftmax": _PLANES,
    "lirpa_megatron.BoundSoftmaxValues": SoftmaxValuesRule(),
}
"""Package and class (itself, no subclass) -> its rule. An operator that is
not here, nor among the curves of known accuracy, is refused."""


class Outward:
    """What outward rounding needs of one BoundedModule.

    Args:
        module: the BoundedModule, its graph built.

    Raises:
        UserError: an operator without a rule, or numbers that are not float64, by name.
    """

    def __init__(self, module: auto_lirpa.HostBoundedModule) -> None:
        self.module = module
        self.known = Known(module, self.rule_of)
        nodes = module.named_nodes().values()
        for node in nodes:
            if isinstance(node, auto_lirpa.BoundParams):
                _check_dtype(f"parameter {node.ori_name!r}", node.param)
        reached = _reached(nodes)
        for node in nodes:
            if node.name in reached and node.inputs:
                self._cover(node)
            elif node.inputs and any(name in reached for name in node.output_name):
                self._check_constant(node)

    def rule_of(self, node: auto_lirpa.Bound) -> Rule:
        """The rule of an operator.

        Raises:
            UserError: there is none.
        """
        kind = type(node)
        package = kind.__module__.partition(".")[0]
        rule = RULES.get(f"{package}.{kind.__name__}")
        if rule is None and isinstance(node, BoundCurve) and package == "lirpa_megatron":
            rule = rule_of_curve(node)
        if rule is None:
            raise refused(node, "no limit on its rounding error is known")
        return rule

    def begin(self, x: Any, kwargs: dict[str, Any]) -> Any:
        """A call of `compute_bounds`: forgets the last one's inputs, and rounds these outwards.

        Args:
            x: inputs, or None.
            kwargs: its other arguments.

        Returns:
            the inputs with boxes that hold [x - eps, x + eps].

        Raises:
            UserError: an input that is not float64; a set of inputs or an argument not covered.
        """
        self.known.kept.clear()
        if kwargs.get("return_A"):
            raise UserError('return_A does not go with rounding="outward": A is not widened')
        if x is None:
            return None
        far = 0 if self.module.below is None else 1  # rounded where the model's input is
        return (*x[:far], *(self._box(i, value) for i, value in enumerate(x[far:], far)))

    def _box(self, index: int, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        _check_dtype(f"input {index}", value)
        ptb = getattr(value, "ptb", None)
        if ptb is None:
            return value
        known = type(ptb) is auto_lirpa.PerturbationLpNorm or "rounding_known" in vars(type(ptb))
        if not known or ptb.norm not in (1, 2, float("inf")):
            ball = type(ptb) is auto_lirpa.PerturbationLpNorm
            kind = f"L{ptb.norm:g}" if ball else type(ptb).__name__
            raise UserError(
                f'input {index}: a set of inputs ({kind}) without a limit on its rounding error: '
                'use rounding="nearest"'
            )
        for name in ("x_L", "x_U"):
            if getattr(ptb, name) is not None:
                _check_dtype(f"{name} of input {index}", getattr(ptb, name))
        if ptb.norm != float("inf") or (ptb.x_L is not None and ptb.x_U is not None):
            return value
        plain = value.as_subclass(torch.Tensor)
        x_L, x_U = box_around(plain, ptb.eps)
        x_L = x_L if ptb.x_L is None else ptb.x_L
        x_U = x_U if ptb.x_U is None else ptb.x_U
        box = auto_lirpa.PerturbationLpNorm(norm=float("inf"), x_L=x_L, x_U=x_U)
        return auto_lirpa.BoundedTensor(plain, box)

    def merged(self, interval: Any, C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The range of C y on an interval of y, widened: [B, S] each.

        As a linear layer's (`LinearRule`): gamma_{n+6} |C| m.
        """
        lower, upper = auto_lirpa.BoundLinear.interval_propagate(None, interval, C=C)
        with torch.no_grad():
            m = torch.maximum(interval[0].abs(), interval[1].abs())
            error = gamma(m.shape[-1] + 8) * torch.einsum("bsf,bf->bs", C.abs(), m)
        return widened(lower, upper, error)

    def _cover(self, node: auto_lirpa.Bound) -> None:
        reason = self.rule_of(node).refusal(node)
        if reason is not None:
            raise refused(node, reason)
        rule = self.rule_of(node)
        if isinstance(rule, PlaneRule):
            rule.attach(node)
        inner = node.interval_propagate
        own = type(node).__module__.startswith("lirpa_megatron.")
        boxes_balls = own and not isinstance(rule, LinearRule)

        def interval_propagate(*v: Any, **kwargs: Any) -> Any:
            self.known.check_constants(node)
            if boxes_balls:
                v = tuple(map(_boxed, v))
            ends = inner(*v, **kwargs)
            with torch.no_grad():
                error = rule.of_interval(node, v, tuple(ends[:2]), kwargs.get("C"), self.known)
            return ends if isinstance(error, float) else widened(ends[0], ends[1], error)

        object.__setattr__(node, "interval_propagate", interval_propagate)

    def _check_constant(self, node: auto_lirpa.Bound) -> None:
        """Values that the graph computes of constants alone are exact where numbers only move."""
        if is_constant(node):
            return
        if not self.rule_of(node).moves:
            raise refused(node, "the graph computes a constant with it, which is rounded")
        for x in node.inputs:
            self._check_constant(x)


def _boxed(interval: Any) -> Any:
    """The box around an L1 or L2 ball straight from the input, its ends rounded outwards."""
    norm, eps = auto_lirpa.Interval.get_perturbation(interval)[:2]
    return interval if norm == float("inf") else box_around(interval[0], eps)


def _reached(nodes: Any) -> set[str]:
    """Names of the nodes whose values depend on an input."""
    found: set[str] = set()
    for node in _in_order(nodes):
        if type(node) is auto_lirpa.BoundInput or any(x.name in found for x in node.inputs):
            found.add(node.name)
    return found


def _in_order(nodes: Any) -> list[auto_lirpa.Bound]:
    order: dict[str, auto_lirpa.Bound] = {}

    def visit(node: auto_lirpa.Bound) -> None:
        if node.name not in order:
            for x in node.inputs:
                visit(x)
            order[node.name] = node

    for node in nodes:
        visit(node)
    return list(order.values())


def _check_dtype(what: str, value: torch.Tensor) -> None:
    if value.is_floating_point() and value.dtype != torch.float64:
        raise UserError(
            f'{what} is {str(value.dtype).removeprefix("torch.")}: rounding="outward" needs '
            "float64 (model.double(), inputs in float64; on the command line --dtype float64)"
        )

