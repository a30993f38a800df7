"""Number of alpha rows of an operator, for each start node whose passes go through it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.final_pass import final_spec_sharded
from lirpa_megatron.crown.graph import Passes
from lirpa_megatron.crown.placement import StartRows
from lirpa_megatron.crown.row_limits import rows_of


def alpha_start_nodes(
    graph: Passes, node: auto_lirpa.Bound, c: Any, share_alphas: bool, final_name: str
) -> list[tuple]:
    """Start nodes whose passes go through `node`, each with its number of alpha rows there.

    Args:
        graph: the bound graph.
        node: the operator that relaxes with alpha.
        c: the specification [B, S, ...] of the final pass.
        share_alphas: whether all rows of an intermediate start node share one alpha.
        final_name: name of the final node.

    Returns:
        Entries as the host keeps them (`auto_lirpa.alpha_start_node`).
    """
    entries = []
    for start in dict.fromkeys(graph.backward_from[node.name]):
        is_final = getattr(start, "is_final", start.name == final_name)
        if not is_final and share_alphas and graph.intermediate.has_alpha:
            entries.append(auto_lirpa.alpha_start_node(start.name, 1, is_final))
            continue
        rows = rows_with_alpha(graph, start, is_final, c)
        if rows is not None:
            entries.append(auto_lirpa.alpha_start_node(start.name, rows.at(node), is_final))
    return entries


def rows_with_alpha(
    graph: Passes, start: Any, is_final: bool, c: Any = None
) -> StartRows | None:
    """The rows of a start node that have alpha; None where none have.

    Args:
        graph: the bound graph.
        start: the start node, perhaps of a pipeline stage above (`stage_service.FarStart`).
        is_final: whether it is the model's output.
        c: the specification [B, S, ...] of the final pass; None: that of the last one.
    """
    if getattr(start, "is_far", False):
        total = graph.stages.service.far_alpha.get(start.name)
        return None if not total else replace(start.rows, total=total)
    if not is_final and not graph.intermediate.has_alpha:
        return None
    identity = not is_final or graph.call.final_is_identity
    if not identity:
        S = graph.call.final_rows if c is None else c.size(1)
    elif is_final:
        S = rows_of(start)
    else:
        S = graph.intermediate.rows_with_alpha(start)
    if S == 0:
        return None
    spec_sharded = graph.context.collectives.size > 1
    if is_final:
        spec_sharded = final_spec_sharded(graph, start, identity, S)
    return graph.schedule.rows(start, identity, spec_sharded, S)
