"""Values of inner neurons that inputs of a box attain: how tight their bounds can become at most.

They are aims, nothing rests on them: a search for a bound ends where it is close to such a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.complete.agreement import from_rank_zero
from lirpa_megatron.crown.placement import PassPlan

_STEPS = 24


def least_attained(
    graph: Any, plan: PassPlan, rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor,
    begin: torch.Tensor, is_over: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Small values that rows of a node take, by signed gradient steps.

    Args:
        graph: a BoundedModule.
        plan: of passes that begin at the node.
        rows: of this rank's features, [N, *node shape].
        low, high: the box of each row, [N, inputs].
        begin: the first points, [N, inputs].
        is_over: whether time is, on this rank: it is the last step then.

    Returns:
        [N] float64, the same on every rank.
    """
    tp, (leaf,) = graph.context.collectives, plan.leaves
    sharded, width = graph.sharded[plan.start.name], high - low
    shape = (len(low), *leaf.output_shape[1:])
    x, best = begin, None
    for step in range(_STEPS + 1):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            z = _value(graph, plan.start, {leaf.name: x.view(shape)})
            found = (z * rows).flatten(1).sum(1)
            found = tp.reduce_from(found) if sharded else found
            (slope,) = torch.autograd.grad(found.sum(), x)
        found = found.detach().nan_to_num(nan=torch.inf)
        best = found if best is None else torch.minimum(best, found)
        best, over = from_rank_zero(tp, best.double(), is_over())
        if over:
            break
        x = torch.clamp(x.detach() - 0.5 * 0.9**step * width * slope.sign(), low, high)
    return best


def _value(graph: Any, node: auto_lirpa.Bound, known: dict[str, torch.Tensor]) -> torch.Tensor:
    """The node's value where those of `known` are given; the graph keeps nothing of it."""
    if node.name in known:
        return known[node.name]
    if not node.from_input:
        return graph.get_forward_value(node)
    value = node.forward(*(_value(graph, n, known) for n in node.inputs))
    known[node.name] = value
    return value
