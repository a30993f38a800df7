"""alpha-CROWN when there is nothing to optimise, and when gradients are disabled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.graph import BoundGraph
from lirpa_megatron.crown.options import check_method


def is_asked_for(kwargs: Mapping[str, Any]) -> bool:
    """Whether arguments of `compute_bounds` ask for alpha-CROWN."""
    try:
        return check_method(kwargs.get("method", "CROWN")) == "CROWN-Optimized"
    except (NotImplementedError, ValueError):
        return False  # refused later, on all ranks


def without_gradients(
    module: auto_lirpa.HostBoundedModule, x: Any, aux: Any, C: Any, kwargs: dict[str, Any]
) -> Any:
    """Runs alpha-CROWN under no_grad: optimising alpha needs gradients, but the result has none."""
    training = module.training
    module.eval()
    try:
        with torch.enable_grad():
            lower, upper, *A = module.compute_bounds(x, aux, C, **kwargs)
    finally:
        module.train(training)
    return (*(None if b is None else b.detach() for b in (lower, upper)), *A)


@contextlib.contextmanager
def stopping(module: auto_lirpa.HostBoundedModule, threshold: Any) -> Iterator[None]:
    """While the host optimises alpha, it stops as soon as lower bounds exceed a threshold.

    A sample all of whose bounds do gets no more gradients; when all samples are done the loop ends.

    Args:
        module: the BoundedModule.
        threshold: a number or [B, S], the same on every rank; None: all iterations are made.
    """
    options = module.bound_opts["optimize_bound_args"]
    if threshold is None:
        yield
        return
    saved, tp = options["stop_criterion_func"], module.context.collectives

    def proved(lower: torch.Tensor) -> torch.Tensor:
        below = ~((lower > threshold) & lower.isfinite())
        # of a sharded output each rank has its own features
        return tp.largest(below.any(1, keepdim=True).to(lower)) == 0

    options["stop_criterion_func"] = proved
    try:
        yield
    finally:
        options["stop_criterion_func"] = saved


def is_of_use(graph: BoundGraph, final: auto_lirpa.Bound, x: Any) -> bool:
    """Whether a path from a perturbed input to `final` has an operator with alpha (from the graph).

    Args:
        graph: the bound graph.
        final: the node to bound.
        x: the tuple of inputs; None means the inputs of the last call.
    """
    moving: dict[str, bool] = {}
    todo = [final]
    while todo:
        node = todo[-1]
        missing = [y for y in node.inputs if y.name not in moving]
        if missing:
            todo += missing
            continue
        todo.pop()
        own = node.perturbed
        if x is not None and type(node) is auto_lirpa.BoundInput:
            own = getattr(x[node.input_index], "ptb", None) is not None
        moving[node.name] = any(moving[y.name] for y in node.inputs) if node.inputs else own
    return any(moving.get(node.name) for node in graph.optimizable_activations)


def same_without(method: str) -> str:
    """The method that gives the same bounds when there is no alpha."""
    return "CROWN" if method == "CROWN-Optimized" else method


def tied(graph: BoundGraph, bound: torch.Tensor | None) -> torch.Tensor | None:
    """A bound with a gradient, 0, where alpha does not matter: all ReLUs are stable."""
    if bound is None or bound.requires_grad or not torch.is_grad_enabled():
        return bound
    alphas = [
        alpha for node in graph.optimizable_activations for alpha in node.alpha.values()
        if isinstance(alpha, torch.Tensor) and alpha.requires_grad
    ]
    return bound + sum(0 * alpha.flatten()[:1].sum() for alpha in alphas)


def shaped(final: auto_lirpa.Bound, *bounds: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Bounds [B, S] of the output itself, as [B, *output shape]."""
    shape = final.output_shape[1:]
    return [None if b is None else b.reshape(b.shape[0], *shape) for b in bounds]
