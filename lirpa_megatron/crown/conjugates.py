"""Gradients of replicated values that each rank uses differently in a pass of bounds.

Such values pass Megatron's copy_to: the identity, whose backward pass sums over the ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.context import CallState, GraphContext, InputView, OperatorInputs
from lirpa_megatron.parallel.collectives import Collectives


def inputs_in_pass(
    node: auto_lirpa.Bound, context: GraphContext, call: CallState, spec_sharded: bool
) -> OperatorInputs:
    """The inputs of an operator as a pass sees them.

    Each rank applies replicated values to its own rows (at a replicated node of a spec-sharded
    pass) or to its own features (at a sharded node). Without copy_to each rank would compute only
    its own part of their gradient.

    Args:
        node: the operator.
        context: the graph's context.
        call: state of the running call.
        spec_sharded: whether each rank carries its own rows.
    """
    inputs = OperatorInputs.of(node, context, call)
    tp, sharded = context.collectives, context.sharded
    if not torch.is_grad_enabled() or tp.size == 1 or not (spec_sharded or sharded[node.name]):
        return inputs
    views = tuple(x if sharded[x.name] else _conjugated(x, tp) for x in inputs.views)
    directions = inputs.directions
    if directions is not None and directions.requires_grad and not sharded[node.name]:
        directions = directions.mapped(tp.copy_to)
    return replace(inputs, views=views, directions=directions)


def _conjugated(x: InputView, tp: Collectives) -> InputView:
    def f(value: Any) -> Any:
        needs = isinstance(value, torch.Tensor) and value.requires_grad
        return tp.copy_to(value) if needs else value

    form, read = x.form, x.read_value
    if form is not None and form.requires_grad:
        form = form.mapped(tp.copy_to)
    return replace(
        x, lower=f(x.lower), upper=f(x.upper), form=form, read_value=lambda node: f(read(node))
    )


@contextlib.contextmanager
def conjugates_of_set(
    leaf: auto_lirpa.Bound, spec_sharded: bool, copy_to: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Applies copy_to to the perturbation set: ranks of a spec-sharded pass use it on own rows."""
    saved = []
    if spec_sharded and torch.is_grad_enabled():
        names = ("x_L", "x_U", "eps", "vertices", "radii")
        for owner, name in ((leaf, "center"), *((leaf.perturbation, n) for n in names)):
            value = getattr(owner, name, None)
            if isinstance(value, torch.Tensor) and value.requires_grad:
                saved.append((owner, name, value))
                setattr(owner, name, copy_to(value))
    try:
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
