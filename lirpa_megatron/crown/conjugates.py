"""Gradients in a backward pass of bounds: replicated values that each rank uses differently get f.

f is the identity whose backward pass sums over ranks (`Collectives.copy_to`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.relaxed import RowRelaxed


@contextlib.contextmanager
def conjugates_of(run: Any, node: auto_lirpa.Bound) -> Iterator[None]:
    """Replicated values that each rank uses differently get f (identity / all-reduce).

    At a replicated node of a spec-sharded pass each rank applies them to its own rows, at a
    sharded node to its own features. Without f their gradient is one rank's part of it.
    """
    own_rows = run.plan.spec_sharded and not run.sharded[node.name]
    if isinstance(node, RowRelaxed):  # they read clean values, and these must get f too
        for x in node.inputs:
            run.module.get_forward_value(x)
    saved: list[tuple] = []
    forms, known = run.layout.forms, {}
    directions = run.layout.directions.get(node.name)
    if torch.is_grad_enabled() and run.tp.size > 1 and (own_rows or run.sharded[node.name]):
        for x in node.inputs:
            if run.sharded[x.name]:
                continue
            for name in ("lower", "upper", "forward_value"):
                value = getattr(x, name, None)
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    saved.append((x, name, value))
                    setattr(x, name, run.tp.copy_to(value))
            if x.name in forms and forms[x.name].requires_grad:
                known[x.name] = forms[x.name]
                forms[x.name] = forms[x.name].mapped(run.tp.copy_to)
        if directions is not None and directions.requires_grad and not run.sharded[node.name]:
            run.layout.directions[node.name] = directions.mapped(run.tp.copy_to)
    try:
        yield
    finally:
        forms.update(known)
        if directions is not None:
            run.layout.directions[node.name] = directions
        for x, name, value in saved:
            setattr(x, name, value)


@contextlib.contextmanager
def conjugates_of_set(run: Any, leaf: auto_lirpa.Bound) -> Iterator[None]:
    """f for the perturbation set, which each rank uses on its own rows."""
    saved = []
    if run.plan.spec_sharded and torch.is_grad_enabled() and run.tp.size > 1:
        names = ("x_L", "x_U", "eps", "vertices", "radii")
        for owner, name in ((leaf, "center"), *((leaf.perturbation, n) for n in names)):
            value = getattr(owner, name, None)
            if isinstance(value, torch.Tensor) and value.requires_grad:
                saved.append((owner, name, value))
                setattr(owner, name, run.tp.copy_to(value))
    try:
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)
