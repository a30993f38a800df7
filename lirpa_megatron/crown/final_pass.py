"""The pass from the model's output: its specification, and what the host's loop is given."""

from __future__ import annotations

import math

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown import alpha
from lirpa_megatron.crown.graph import Passes
from lirpa_megatron.crown.row_limits import rows_of
from lirpa_megatron.forward.method import bound_forward
from lirpa_megatron.parallel import spmd


def bound_final(graph: Passes, call: auto_lirpa.BackwardCall) -> list[torch.Tensor | None]:
    """Bounds of the final node's rows.

    On a pipeline stage before the last, those of the model, which the last stage finds.

    Args:
        graph: the bound graph, in a call of `compute_bounds`.
        call: of the host.

    Returns:
        (lower, upper), each [B, S] or [B, *node shape]; None of a side not asked for.
    """
    if graph.stages is not None and not graph.pipeline.is_last:
        return graph.stages.service.serve()
    if graph.call.method == "forward":
        bounds = bound_forward(graph, call)
        return bounds if graph.stages is None else graph.stages.found(bounds)
    final, tp = call.node, graph.context.collectives
    identity = graph.call.final_is_identity and final.name == graph.final_node_name
    C = None if identity else call.C.transpose(0, 1).to(graph.schedule.dtype)
    shape, S = final.output_shape[1:], rows_of(final, C)
    graph.call.final_rows = S
    spec_sharded = final_spec_sharded(graph, final, identity, S)
    found = graph.schedule.run(final, C, spec_sharded, call.lower, call.upper, directions=True)
    if not (graph.context.sharded[final.name] and identity):
        # Replicated: what the alpha loop decides from them is decided by one rank's values.
        found.lower, found.upper = (
            None if b is None else spmd.broadcast_tensor(b, tp.group)
            for b in (found.lower, found.upper)
        )
    if graph.call.method == "CROWN-Optimized":
        found.lower, found.upper = (alpha.tied(graph, b) for b in (found.lower, found.upper))
    # The host's alpha loop is of bounds [B, S]; `compute_bounds` gives them their shape.
    flat = graph.call.method == "CROWN-Optimized" or math.prod(shape) != S
    bounds = list(found.shaped((S,) if flat else shape))
    return bounds if graph.stages is None else graph.stages.found(bounds)


def final_spec_sharded(graph: Passes, final: auto_lirpa.Bound, identity: bool, S: int) -> bool:
    """Whether the ranks carry their own rows of the final pass.

    Args:
        graph: the bound graph.
        final: the final node.
        identity: whether there is no specification C.
        S: rows.
    """
    if graph.context.collectives.size == 1:
        return False
    if graph.context.sharded[final.name]:
        return identity  # each rank its own features; a C is summed over them
    choice = graph.own_options.final_rows
    return choice == "own" or (choice == "auto" and S > graph.own_options.whole_rows_limit)
