"""The pass from the model's output: its specification, and what the host's loop is given."""

from __future__ import annotations

import math
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown import alpha
from lirpa_megatron.forward.method import bound_forward
from lirpa_megatron.parallel import spmd


def bound_final(module: Any, call: auto_lirpa.BackwardCall) -> list[torch.Tensor | None]:
    """Bounds of the final node's rows.

    On a pipeline stage before the last, those of the model, which the last stage finds.

    Args:
        module: a BoundedModule, in a call of `compute_bounds`.
        call: of the host.

    Returns:
        (lower, upper), each [B, S] or [B, *node shape]; None of a side not asked for.
    """
    if module.stages is not None and not module.pipeline.is_last:
        return module.stages.service.serve()
    if module.call.method == "forward":
        return bound_forward(module, call)
    final, tp = call.node, module.context.collectives
    identity = module.call.final_is_identity and final.name == module.final_node_name
    C = None if identity else call.C.transpose(0, 1).to(module.schedule.dtype)
    shape, S = final.output_shape[1:], module.schedule.rows_of(final, C)
    object.__setattr__(module, "final_rows", S)
    spec_sharded = final_spec_sharded(module, final, identity, S)
    found = module.schedule.run(final, C, spec_sharded, call.lower, call.upper, directions=True)
    if not (module.sharded[final.name] and identity):
        # Replicated: what the alpha loop decides from them is decided by one rank's values.
        found.lower, found.upper = (
            None if b is None else spmd.broadcast_tensor(b, tp.group)
            for b in (found.lower, found.upper)
        )
    if module.call.method == "CROWN-Optimized":
        found.lower, found.upper = (alpha.tied(module, b) for b in (found.lower, found.upper))
    # The host's alpha loop is of bounds [B, S]; `compute_bounds` gives them their shape.
    flat = module.call.method == "CROWN-Optimized" or math.prod(shape) != S
    bounds = list(found.shaped((S,) if flat else shape))
    return bounds if module.stages is None else module.stages.found(bounds)


def final_spec_sharded(module: Any, final: auto_lirpa.Bound, identity: bool, S: int) -> bool:
    """Whether the ranks carry their own rows of the final pass.

    Args:
        module: a BoundedModule.
        final: the final node.
        identity: whether there is no specification C.
        S: rows.
    """
    if module.context.collectives.size == 1:
        return False
    if module.sharded[final.name]:
        return identity  # each rank its own features; a C is summed over them
    choice = module.own_options.final_rows
    return choice == "own" or (choice == "auto" and S > module.own_options.whole_rows_limit)
