"""`branch_and_bound`: whether every row of C y is above its threshold, decided for good."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lirpa_megatron.bounded_module import BoundedModule
from lirpa_megatron.complete.points import Walks
from lirpa_megatron.complete.problem import Problem, Searched, SearchOptions
from lirpa_megatron.complete.search import Progress
from lirpa_megatron.complete.strategy import decide
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel import spmd
from lirpa_megatron.parallel.replicas import ALONE, Replicas
from lirpa_megatron.problem.perturbations import is_box


def branch_and_bound(
    model: nn.Module,
    x: Any,
    C: torch.Tensor,
    thresholds: torch.Tensor | float = 0.0,
    *,
    timeout: float | None = None,
    batch: int | None = None,
    options: SearchOptions | None = None,
    progress: Progress | None = None,
    replicas: Replicas = ALONE,
) -> Searched:
    """Decides whether `C y > thresholds` for all inputs of a box.

    What is split are ReLUs and intervals of other functions of one variable, or the box itself, in
    which few inputs move (`SearchOptions.branching`, `strategy.chosen`); attention, norms and
    products of two nodes keep planes that hold in the whole box. Every rank of the tensor-parallel
    group calls it alike; bounds and verdicts are those of the unsharded model, up to rounding.

    Args:
        model: batch first, perhaps sharded; or its BoundedModule (with `check_live`, so that it
            has the model itself for counterexamples).
        x: BoundedTensor [B, *input shape] with a box (PerturbationLpNorm, infinity norm),
            replicated.
        C: [B, S, outputs], replicated.
        thresholds: a number, or [B, S].
        timeout: seconds; None: until it is decided.
        batch: most domains that are split at once.
        options: all there are; `timeout` and `batch` replace those in it.
        progress: called with the bound, open domains, bounded domains and seconds.
        replicas: that call it alike and share the work (`Replicas.of_megatron()`: the data-parallel
            ones); each gets what all have found out.

    Returns:
        `Searched`: "proved"; "refuted" with a point [*input shape] where the model's own output is
        not above a threshold (`goal` counts rows: sample b's row s is b S + s); "timeout"; or
        "unknown" and why. `bound` is the least of `C y - thresholds` that is known.

    Raises:
        UserError: the network or the set of inputs is not supported, by name.
        ReplicaError: another replica failed.
        ValueError: shapes that do not fit.
    """
    options = options or SearchOptions()
    if timeout is not None:
        options = replace(options, timeout=timeout)
    if batch is not None:
        options = replace(options, batch=batch)
    ptb = getattr(x, "ptb", None)
    if ptb is None or not is_box(ptb):
        raise UserError("branch and bound needs a box of inputs: a BoundedTensor with a "
                        "PerturbationLpNorm of the infinity norm")
    if x.ndim < 2 or C.ndim != 3 or len(C) != len(x):
        raise ValueError(f"x [B, *input shape] and C [B, S, outputs] are wanted, not "
                         f"{tuple(x.shape)} and {tuple(C.shape)}")
    graph = model if isinstance(model, BoundedModule) else BoundedModule(model, x.detach())
    if model is graph and graph.live is None:
        raise UserError("branch and bound runs the model itself on counterexamples: give it the "
                        "model in place of a BoundedModule without check_live")
    center = x.detach()
    low = center - ptb.eps if ptb.x_L is None else ptb.x_L
    high = center + ptb.eps if ptb.x_U is None else ptb.x_U
    B, S, _ = C.shape
    ends = torch.as_tensor(thresholds, dtype=torch.float64, device=C.device).expand(B, S)
    problem = Problem(
        low.expand_as(center).flatten(1).contiguous(),
        high.expand_as(center).flatten(1).contiguous(),
        tuple(b for b in range(B) for _ in range(S)),
        C.detach().reshape(B * S, 1, -1).to(center), ends.reshape(B * S, 1),
    )
    # A forward pass of the graph itself would clear what passes read there.
    own = graph.live.model if model is graph else model
    walks = Walks(lambda points: own(points.view(-1, *x.shape[1:])), graph.context.collectives)

    def confirm(goal: int, points: torch.Tensor) -> torch.Tensor | None:
        box = problem.boxes[goal]
        near, margins = walks.closest(
            problem.C[goal], problem.thresholds[goal], problem.low[box], problem.high[box], points
        )
        return near[0].view(x.shape[1:]) if bool(margins[0] <= 0) else None

    group = graph.context.collectives.group
    with replicas.guard("branch and bound"), spmd.guard(group, "branch and bound"):
        return decide(graph, problem, options, confirm, progress, replicas)
