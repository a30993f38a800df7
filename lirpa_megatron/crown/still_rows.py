"""Rows that need no pass: values that a causal mask keeps from the words that move.

At the positions before the first word that moves (`forward.windows`) a node has its clean value,
whatever the set holds. CROWN's bounds of it are that value, up to rounding, so only the rows of the
other positions are bounded by passes. Of one word among T that is the share of the words after it.

Not with gradients, which would have to go another way, with alpha, which is of all rows, with
outward rounding, on pipeline stages, and where the caller wants A.
"""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.crown.graph import BoundGraph
from lirpa_megatron.forward import windows
from lirpa_megatron.forward.inputs import of_leaf
from lirpa_megatron.forward.propagation import in_order
from lirpa_megatron.forward.windows import Window
from lirpa_megatron.operators.affine.form import AffineForm


class StillRows:
    """Of the nodes of one bound graph."""

    def __init__(self, graph: BoundGraph) -> None:
        self.graph, self.tp = graph, graph.context.collectives

    def window(self) -> Window | None:
        """The positions that move, found once a call; None: all."""
        graph, call = self.graph, self.graph.call
        if call.window is False:
            call.window = None
            if graph.rounding is None and graph.stages is None and graph.below is None:
                order = in_order(graph[graph.final_node_name])
                leaves = [n for n in order if getattr(n, "perturbation", None) is not None]
                if leaves and not any(graph.context.sharded[leaf.name] for leaf in leaves):
                    symbols = {leaf.name: of_leaf(leaf, lambda x: x) for leaf in leaves}
                    call.window = windows.window(
                        order, None, symbols, graph.get_forward_value, self.tp.largest
                    )
        return call.window

    def first(self, node: Any) -> int:
        """How many positions of a node [B, T, F], or queries of scores [B, n, T, S], stand still.
        """
        graph = self.graph
        if len(node.output_shape or ()) < 3 or node.name in graph.needed_A_dict:
            return 0
        if getattr(node, "identity_starts_at_input", False):
            return 0
        if any(x.opt_stage in ("init", "opt", "reuse") for x in graph.optimizable_activations):
            return 0
        if torch.is_grad_enabled() and graph.get_forward_value(node).requires_grad:
            return 0
        found = self.window()
        return found.first if found is not None and node.name in found.cut else 0

    def rows(self, node: Any, first: int) -> torch.Tensor:
        """The rows of the other positions of a node [B, T, F]."""
        T, F = node.output_shape[1:]
        return torch.arange(first * F, T * F, device=self.graph.device)

    def whole(
        self, node: Any, first: int, found: Any
    ) -> tuple[torch.Tensor, torch.Tensor, AffineForm | None]:
        """(lower, upper, form) of a node of which a pass has bounded these rows."""
        value = self.graph.get_forward_value(node)
        shape, still = (-1, *value.shape[2:]), value[:, :first]
        lower, upper = (
            torch.cat((still, b.t().unflatten(1, shape)), 1) for b in (found.lower, found.upper)
        )
        form = found.form
        if form is not None:
            form = form.view(lambda x: x.unflatten(-1, shape))
            zeros = torch.zeros_like(still)
            A = zeros.unsqueeze(-1).expand(*zeros.shape, form.A.shape[-1])
            form = AffineForm(
                torch.cat((still, form.center), 1), torch.cat((A, form.A), 1),
                torch.cat((zeros, form.slack), 1), form.norm,
            )
        return lower, upper, form
