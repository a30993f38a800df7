"""How many rows of A a rank carries at once, and in which parts they go: memory decides.

What is decided here follows from the plan, the shapes and the options, and so is the same on every
rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.graph import StagedCall
from lirpa_megatron.crown.limits import CACHE
from lirpa_megatron.crown.placement import PassPlan, RowPlacement
from lirpa_megatron.operators.operator import Operator


def rows_of(start: auto_lirpa.Bound, C: torch.Tensor | None = None) -> int:
    """Rows in all: of C [S, B, ...], or of the identity at the start node (on this rank)."""
    return math.prod(start.output_shape[1:]) if C is None else C.shape[0]


class RowLimits:
    """Of the passes of one bound graph.

    Args:
        graph: the graph.
    """

    def __init__(self, graph: StagedCall) -> None:
        self.graph, self.tp, self.sharded = graph, graph.context.collectives, graph.context.sharded
        self._free: float | None = None

    def numel(self, start: auto_lirpa.Bound, C: Any = None) -> int:
        """Rows of C, or of the identity at a start node, on all ranks together: the same at every
        size."""
        rows = rows_of(start, C)
        return rows * self.tp.size if self.sharded[start.name] else rows

    def form_size(self) -> int:
        """Most numbers of one sample that an affine form may have."""
        return self.graph.own_options.form_limit // self.graph.batch_size

    def at_once(self, plan: PassPlan, itemsize: int) -> int:
        """Most rows of A, whose numbers have `itemsize` bytes, that the rank carries at once."""
        graph, options = self.graph, self.graph.own_options
        if options.max_spec_rows is not None:
            return options.max_spec_rows
        widest = self._widest(plan)
        if torch.device(self.graph.device).type != "cpu":  # rows go through whole forms at once
            inputs = self.graph.input_set()
            for node in plan.order:
                if isinstance(node, Operator):
                    offered = inputs.offers_form(self.numel(node.inputs[0]), self.form_size())
                    widest = max(widest, node.numbers_at_once(
                        graph.batch_size, inputs.columns() if offered else None, graph.call
                    ))
        per_row = 2 * self.graph.batch_size * widest * itemsize
        return max(1, int(self._memory() // per_row))

    def _widest(self, plan: PassPlan) -> int:
        """Most numbers of one sample that a row of A has in a pass, also on the stages below."""
        below = 0
        if self.graph.below is not None:
            below = self.graph.stages.widest_below[plan.spec_sharded]
        return max(below, *(
            math.prod(node.output_shape[1:]) * (
                self.tp.size if plan.rows[node.name] is RowPlacement.GATHERED else 1
            )
            for node in (*plan.order, *plan.leaves)
        ))

    def turns(self, limit: int, plan: PassPlan) -> tuple[int, int]:
        """(rows of a chunk, chunks that go on in turns), for `limit` rows at once in all.

        Where only A moves two chunks do, so that one is computed while the other's rows are under
        way. Weights would be fetched twice as often; they are fetched ahead instead.
        """
        turn, device = self.graph.context.tuning.turn, torch.device(self.graph.device).type
        if self.graph.pipeline is not None and not torch.is_grad_enabled():
            return self._for_stages(limit, plan)
        half = -(-limit // 2)
        moves = RowPlacement.GATHERED in plan.rows.values() and not plan.moved
        turns = moves and half >= turn.get(device, math.inf) and not torch.is_grad_enabled()
        return (half, 2) if turns else (limit, 1)

    def _for_stages(self, limit: int, plan: PassPlan) -> tuple[int, int]:
        """The same over pipeline stages, where a rank carries fewer rows at once than one that has
        the whole model.

        Passes that go on in the stages below have a chunk on each of them. Those of the first stage
        end there, one chunk after the other.
        """
        tuning = self.graph.context.tuning
        on_the_way = self.graph.pipeline.stage + 1
        parts = self.graph.pipeline.size
        if self.graph.below is not None:
            parts = tuning.chunks_for_stages * on_the_way
        numbers = tuning.numbers_for_stages
        if self.graph.relaxes_rows:
            numbers = tuning.relaxed_numbers_for_stages
        of_a_row = self.graph.batch_size * self._widest(plan) * self.graph.pipeline.size
        enough = -(-numbers // of_a_row)
        return min(limit, max(-(-limit // parts), enough)), on_the_way

    def _memory(self) -> float:
        """Bytes for the rows of A that are carried at once."""
        given, free = self.graph.own_options.pass_memory, self._free_on_a_gpu()
        if given is not None:
            return given * 2**20
        return CACHE / self.tp.size if free is None else free / 128

    def form_memory(self) -> float:
        """Bytes for the forms of replicated nodes that every rank keeps whole, the same on all."""
        given, free = self.graph.own_options.form_memory, self._free_on_a_gpu()
        if given is not None:
            return given * 2**20
        return CACHE if free is None else free / 16

    def _free_on_a_gpu(self) -> float | None:
        """Bytes on the rank that had least when bounds began; None on other devices."""
        device = torch.device(self.graph.device)
        if device.type != "cuda":
            return None
        if self._free is None:
            free = torch.tensor(float(torch.cuda.mem_get_info(device)[0]), device=device)
            self._free = -float(self.tp.largest(-free))
        return self._free
