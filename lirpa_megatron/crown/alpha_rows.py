"""Number of alpha rows of an operator, for each start node whose passes go through it."""

from __future__ import annotations

from typing import Any

from lirpa_megatron.compat import auto_lirpa


def alpha_start_nodes(
    module: Any, node: auto_lirpa.Bound, c: Any, share_alphas: bool, final_name: str
) -> list[tuple]:
    """Start nodes whose passes go through `node`, each with its number of alpha rows there.

    Args:
        module: a BoundedModule.
        node: the operator that relaxes with alpha.
        c: the specification [B, S, ...] of the final pass.
        share_alphas: whether all rows of an intermediate start node share one alpha.
        final_name: name of the final node.

    Returns:
        Entries as the host keeps them (`auto_lirpa.alpha_start_node`).
    """
    entries = []
    for start in dict.fromkeys(module.backward_from[node.name]):
        is_final = start.name == final_name
        if not is_final and not module.intermediate.has_alpha:
            continue
        if not is_final and share_alphas:
            rows = 1
        else:
            identity = not is_final or module.call.final_is_identity
            if not identity:
                S = c.size(1)
            elif is_final:
                S = module.schedule.rows_of(start)
            else:
                S = module.intermediate.rows_with_alpha(start)
            if S == 0:
                continue
            spec_sharded = module.context.collectives.size > 1
            if is_final:
                spec_sharded = module._final_spec_sharded(start, identity, S)
            rows = module.schedule.rows(start, identity, spec_sharded, S).at(node)
        entries.append(auto_lirpa.alpha_start_node(start.name, rows, is_final))
    return entries
