"""The table of forward rules: which operator has which.

A rule is a function `rule(run, node, inputs) -> Outcome` (`propagation.Run`, an operator of the
graph, `form.Inputs`). It is entered for a class of operators and holds for classes derived from it.
An operator without a rule is enclosed by its interval bounds (`by_intervals`), which is sound for
every operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lirpa_megatron.forward.form import Form, Fresh, Inputs, Outcome

Rule = Callable[[Any, Any, Inputs], Outcome]
_RULES: dict[type | str, Rule] = {}
_READ_SHARES: set[Rule] = set()


def rule_for(*classes: type | str) -> Callable[[Rule], Rule]:
    """Enters a rule for operators: classes, or names of auto_LiRPA's (without "Bound")."""

    def enter(rule: Rule) -> Rule:
        for cls in classes:
            _RULES[cls] = rule
        return rule

    return enter


def reading_shares(rule: Rule) -> Rule:
    """Marks a rule that takes forms of the rank's own symbols (`Form.shared`), too. To others all
    symbols are given."""
    _READ_SHARES.add(rule)
    return rule


def reads_shares(rule: Rule) -> bool:
    """Whether a rule is marked."""
    return rule in _READ_SHARES


def rule_of(node: Any) -> Rule:
    """The rule of the most derived class that has one."""
    for cls in type(node).__mro__:
        found = _RULES.get(cls)
        if found is None and cls.__module__.startswith("auto_LiRPA"):
            found = _RULES.get(cls.__name__.removeprefix("Bound"))
        if found is not None:
            return found
    return by_intervals


@reading_shares
def by_intervals(run: Any, node: Any, inputs: Inputs) -> Outcome:
    """The centre of the operator's interval bounds, and half of their width as an error."""
    ends = [run.range(x) if isinstance(x, Form) else (x, x) for x in inputs]
    lower, upper = node.interval_propagate(*ends)
    wild = ~(lower.isfinite() & upper.isfinite())
    centre = torch.where(wild, 0.0, lower / 2 + upper / 2)
    half = torch.where(wild, torch.inf, (upper - lower) / 2)
    half = half + 4 * torch.finfo(half.dtype).eps * centre.abs()
    form = replace(run.constant(centre, node), box=half, ball=run.length(half, node))
    nothing = [x for x in inputs if isinstance(x, Form)]

    def linear(*values: torch.Tensor) -> torch.Tensor:
        # depends on its inputs by name alone: their errors end here
        ties = [0 * v.sum() for v, x in zip(values, inputs, strict=True) if isinstance(x, Form)]
        return centre + sum(ties) if nothing else centre

    return Outcome(form, [Fresh(box=half)], linear)
