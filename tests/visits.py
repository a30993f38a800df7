"""Operators by themselves, without a graph: the context and the visit that a pass would give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lirpa_megatron.operators.context import (
    CallState,
    GraphContext,
    InputView,
    OperatorInputs,
    Visit,
)
from lirpa_megatron.parallel.collectives import Collectives


def options() -> dict[str, Any]:
    """What a BoundedModule gives to its operators, on one rank."""
    return {"optimize_bound_args": {}, "context": GraphContext(Collectives(None), _unknown)}


def _unknown(node: Any) -> Any:
    raise AssertionError("no graph computes clean values here")


def visit(*inputs: Any, **more: Any) -> Visit:
    """A visit whose inputs have the bounds `lower` and `upper`."""
    views = tuple(
        InputView(SimpleNamespace(name=f"x{i}", perturbed=True, inputs=()), x.lower, x.upper)
        for i, x in enumerate(inputs)
    )
    return Visit(OperatorInputs(views, CallState()), **more)
