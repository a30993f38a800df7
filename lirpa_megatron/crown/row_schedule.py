"""All rows of a start node: which of them each rank carries, in chunks, and how they come together.

Shapes: S rows in all (the neurons of an intermediate node, the rows of a specification), n =
ceil(S/p) per rank in a spec-sharded pass, B batch. The last rows are filled up with repetitions of
the last one, so that all ranks do the same.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.affine_forms import FormRows, InputSet
from lirpa_megatron.crown.auxiliary_rows import Directions
from lirpa_megatron.crown.backward_pass import BackwardPass
from lirpa_megatron.crown.chunks import concatenate, in_turns
from lirpa_megatron.crown.communication import CommunicationPlan
from lirpa_megatron.crown.graph import BoundGraph
from lirpa_megatron.crown.limits import CACHE
from lirpa_megatron.crown.placement import PassPlan, Region, RowPlacement, StartRows, plan_pass
from lirpa_megatron.crown.row_order import RowOrder
from lirpa_megatron.crown.stage_below import Course
from lirpa_megatron.operators.affine.form import AffineForm
from lirpa_megatron.operators.coefficients import IdentityRows, LowerUpper, RowBounds
from lirpa_megatron.operators.operator import Operator
from lirpa_megatron.rounding.forms import with_errors


@dataclass
class Bounds:
    """Concrete bounds of a start node's rows.

    Attributes:
        lower, upper: [S, B], the same on every rank; for a sharded node without a specification
            the rank's own neurons [S/p, B]. None where not asked for.
    """

    lower: torch.Tensor | None
    upper: torch.Tensor | None
    form: AffineForm | None = None

    def shaped(self, shape: Sequence[int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(lower, upper), each [B, *shape]."""
        lower, upper = (
            None if b is None else b.t().reshape(b.shape[1], *shape)
            for b in (self.lower, self.upper)
        )
        return lower, upper


class RowSchedule:
    """Runs backward passes of one bound graph."""

    def __init__(self, graph: BoundGraph) -> None:
        self.graph, self.tp, self.sharded = graph, graph.context.collectives, graph.context.sharded
        self.communication, self.directions = CommunicationPlan(graph), Directions(graph)
        self.pipeline = graph.pipeline
        self._rows_run: dict[str, int] = {}
        self._free: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs, and so of A."""
        return next(
            node.value.dtype for node in auto_lirpa.roots(self.graph)
            if type(node) is auto_lirpa.BoundInput and node.value.is_floating_point()
        )

    def plan(
        self, start: auto_lirpa.Bound, spec_sharded: bool, regions: Sequence[Region] = ()
    ) -> PassPlan:
        """The course of a pass from `start`; weights move to `regions`."""
        return plan_pass(start, self.sharded, spec_sharded, self.tp.size, regions)

    def rows(
        self, start: auto_lirpa.Bound, identity: bool, spec_sharded: bool, total: int | None = None
    ) -> StartRows:
        """How the rows of a start node lie on the ranks.

        All rows of gathered features are those of the sharded node that is gathered: there each
        rank has its own, and the identity is neither built nor communicated.

        Args:
            start: the start node.
            identity: whether its rows are those of the identity.
            spec_sharded: whether ranks carry their own rows, for other start nodes.
            total: how many there are; None for all of the identity's.
        """
        origin = start
        if identity and getattr(start, "identity_starts_at_input", False):
            if self.sharded[start.inputs[0].name]:
                origin, spec_sharded, total = start.inputs[0], self.tp.size > 1, None
        plan = self.plan(origin, spec_sharded)
        split = spec_sharded and plan.rows[origin.name] is not RowPlacement.BLOCK
        total = self.rows_of(origin) if total is None else total
        return StartRows(plan, total, split, self.tp.size)

    def rows_run(self, start: auto_lirpa.Bound) -> int:
        """Rows of the last run from an intermediate node (of scores: not one for each number)."""
        return self._rows_run.get(start.name, self.rows_of(start))

    def rows_of(self, start: auto_lirpa.Bound, C: torch.Tensor | None = None) -> int:
        """Rows in all: of C [S, B, ...], or of the identity at the start node (on this rank)."""
        return math.prod(start.output_shape[1:]) if C is None else C.shape[0]

    def _numel(self, start: auto_lirpa.Bound, C: Any) -> int:
        """Rows of a start node on all ranks together, and so the same at every size."""
        rows = self.rows_of(start, C)
        return rows * self.tp.size if self.sharded[start.name] else rows

    def _limit(self) -> int:
        return self.graph.own_options.form_limit // self.graph.batch_size

    def _rows_at_once(self, plan: PassPlan) -> int:
        """Most rows that the rank carries at once, the same on every rank."""
        graph, options = self.graph, self.graph.own_options
        if options.max_spec_rows is not None:
            return options.max_spec_rows
        widest = self._widest(plan)
        if torch.device(self.graph.device).type != "cpu":  # rows go through whole forms at once
            inputs = self.graph.input_set()
            for node in plan.order:
                if isinstance(node, Operator):
                    offered = inputs.offers_form(self._numel(node.inputs[0], None), self._limit())
                    widest = max(widest, node.numbers_at_once(
                        graph.batch_size, inputs.columns() if offered else None, graph.call
                    ))
        per_row = 2 * self.graph.batch_size * widest * self.dtype.itemsize
        return max(1, int(self._memory() // per_row))

    def _widest(self, plan: PassPlan) -> int:
        """Most numbers of one sample that a row of A has in a pass."""
        return max(
            math.prod(node.output_shape[1:]) * (
                self.tp.size if plan.rows[node.name] is RowPlacement.GATHERED else 1
            )
            for node in (*plan.order, *plan.leaves)
        )

    def _turns(self, limit: int, plan: PassPlan) -> tuple[int, int]:
        """(rows of a chunk, chunks that go on in turns), for `limit` rows at once in all.

        Where only A moves two chunks do, so that one is computed while the other's rows are under
        way. Weights would be fetched twice as often; they are fetched ahead instead.
        """
        turn, device = self.graph.context.tuning.turn, torch.device(self.graph.device).type
        if self.pipeline is not None and not torch.is_grad_enabled():
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
        on_the_way = self.pipeline.stage + 1
        parts = self.pipeline.size
        if self.graph.below is not None:
            parts = tuning.chunks_for_stages * on_the_way
        numbers = tuning.numbers_for_stages
        if self.graph.relaxes_rows:
            numbers = tuning.relaxed_numbers_for_stages
        enough = -(-numbers // (self.graph.batch_size * self._widest(plan)))
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

    def run(
        self, start: auto_lirpa.Bound, C: torch.Tensor | None, spec_sharded: bool,
        lower: bool = True, upper: bool = True, form: bool = False,
        rows: torch.Tensor | None = None, aside: bool = False, directions: bool = False,
    ) -> Bounds:
        """Bounds of all rows of a start node, by backward passes to the inputs.

        Args:
            start: the start node.
            C: [S, B, *start shape] in the layout of the start node; None for the identity.
            spec_sharded: whether each rank carries its own rows.
            lower, upper: which bounds.
            form: whether to make the start node's affine form too, where it is not too large.
            rows: indices of S rows of the identity that are to be bounded, the others not: the same
                on every rank; the rank's own neurons, as many on every rank, at a sharded node.
                Not of gathered features. Alpha, where it is in use, is that of these rows.
            aside: whether these rows are beside the node's own, of which alone notes are kept.
            directions: whether operators may have rows of theirs bounded on the way (`Directions`).
        """
        graph = self.graph
        given = C.shape[0] if C is not None else None if rows is None else len(rows)
        on_ranks = self.rows(start, C is None, spec_sharded, given)
        plan, S, n, split = on_ranks.plan, on_ranks.total, on_ranks.own, on_ranks.split
        origin, spec_sharded = plan.start, plan.spec_sharded
        if not aside:
            self._rows_run[origin.name] = S
            for node in plan.order:
                graph.backward_from[node.name].append(start)
        limit = min(n, self._rows_at_once(plan))
        in_use = any(auto_lirpa.is_optimized(node, start) for node in plan.order)
        moves = not in_use and not graph.has_alpha(start) and graph.rounding is None
        if spec_sharded and moves:
            regions = self.communication.choose(
                plan, n, -(-n // limit), lower + upper, self.dtype, C is None
            )
            plan = self.plan(origin, spec_sharded, regions)
        limit, at_once = self._turns(limit, plan)
        keep_A = bool(graph.return_A and start.name in graph.needed_A_dict) and not aside
        longest = max(x.output_shape[-1] for x in plan.order)
        asks = directions and not self.sharded[start.name] and self.directions.are_few(S, longest)
        answer = self.directions.answer(S, split) if asks else None
        inputs = graph.input_set() if form else None
        if inputs is not None and not inputs.offers_form(self._numel(start, C), self._limit()):
            inputs = None
        order = RowOrder(
            on_ranks, limit,
            # A that is given to the caller as the rank's own is one block of rows.
            blocks=keep_A and graph.own_options.return_A_rows == "own",
            gathered_width=None if origin is start else origin.output_shape[-1],
            device=torch.device(graph.device),
        )
        gather = split or (spec_sharded and origin is not start)
        form_rows = FormRows(n)

        def chunk(first: int) -> Generator[None, None, RowBounds]:
            """Bounds of the rank's rows from `first` on, and their rows of the form."""
            local, every = order.chunk(first)
            alpha_rows = None if order.is_one_chunk else (local, n)
            course = None
            if graph.below is not None:
                course = self._course(
                    start, on_ranks, order, first, len(local), S if asks else None,
                    inputs is not None, moves, at_once,
                )
            run = BackwardPass(graph, plan, start, alpha_rows, answer, course)
            own = local if every is None else every[self.tp.rank]
            if rows is not None:
                own, every = rows[own], None if every is None else rows[every]
            A = self._start_rows(origin, C, own, every)
            sides = LowerUpper(A if lower else None, A if upper else None)
            found = yield from self.bounded(run, sides, keep_A, inputs)
            if found.form is not None:
                form_rows.add(found.form)
                found.form = None
            return found

        chunks = (chunk(first) for first in range(0, n, limit))
        whole = concatenate(in_turns(chunks, at_once))

        if keep_A:
            self._record_A(start, whole, spec_sharded, order)
        bounds = Bounds(whole.lower, whole.upper)
        if gather:
            bounds = self._gathered(bounds, order)
        if inputs is not None:
            forms = form_rows.all()
            whole_form = order.is_one_chunk or order.blocks or origin is not start
            if gather and (forms.requires_grad or whole_form):
                forms = order.in_order(self.tp.gather_results(forms))
            elif gather:
                forms = self._gathered_in_chunks(forms, S, limit)
            bounds.form = inputs.form(forms, start.output_shape[1:] if C is None else (S,))
        return bounds

    def bounded(
        self, run: BackwardPass, A: LowerUpper, keep_A: bool, inputs: InputSet | None,
        bias: LowerUpper | None = None,
    ) -> Generator[Any, None, RowBounds]:
        """The steps of a pass, and rows of the affine form.

        Args:
            run: the pass.
            A, keep_A, bias: as for `BackwardPass.steps`.
            inputs: what the form is a form in; None: none is wanted.
        """
        found = yield from run.steps(A, keep_A or inputs is not None, bias)
        if inputs is not None and found.form is None:
            found.form = inputs.rows(found, self.tp.copy_to)
            if self.graph.rounding is not None:
                found.form = with_errors(inputs, found, found.form)
            if not keep_A:
                found.lA, found.uA = {}, {}
        return found

    def _course(
        self, start: auto_lirpa.Bound, rows: StartRows, order: RowOrder, first: int, count: int,
        asks: int | None, form: bool, moves: bool, at_once: int,
    ) -> Course:
        """What the stages below have to know of a chunk."""
        graph, n = self.graph, rows.own
        is_last = first + order.limit >= n
        return Course(
            start=graph.stages.far_name(start), is_final=start.name == graph.final_node_name,
            total=rows.total, own=n, split=rows.split, spec_sharded=rows.plan.spec_sharded,
            alpha=None if order.is_one_chunk else (first, count, n),
            without_alpha=graph.intermediate.is_without_alpha, asks=asks, form=form,
            chunks=-(-n // order.limit), moves=moves,
            hold=0 if is_last else max(at_once - 2, 0),
        )

    def _gathered_in_chunks(self, own: torch.Tensor, S: int, limit: int) -> torch.Tensor:
        """The rows of all ranks in the start node's order, [S, ...], in one copy."""
        whole, filled = own.new_empty(S, *own.shape[1:]), 0
        for chunk in own.split(limit):
            found = self.tp.gather_results(chunk)[: S - filled]
            whole[filled : filled + len(found)] = found
            filled += len(found)
        return whole

    def _start_rows(
        self, start: auto_lirpa.Bound, C: torch.Tensor | None, own: torch.Tensor,
        every: torch.Tensor | None,
    ) -> Any:
        """The rank's rows of C, or of the identity.

        Args:
            start: the start node.
            C: [S, B, *start shape]; None for the identity.
            own: which rows.
            every: each rank's, [p, rows], where ranks have their own.
        """
        if C is not None:
            some = every is not None or len(own) < C.shape[0] or not isinstance(C, torch.Tensor)
            return C.index_select(0, own) if some else C
        return IdentityRows(
            own=own,
            all=None if every is None else every.flatten(),
            shape=(len(own), self.graph.batch_size, *start.output_shape[1:]),
            dtype=self.dtype,
            device=torch.device(self.graph.device),
        )

    def _gathered(self, own: Bounds, order: RowOrder) -> Bounds:
        """Every rank's rows, both sides in one collective: [n, B] -> [S, B]."""
        present = [b for b in (own.lower, own.upper) if b is not None]
        gathered = order.in_order(self.tp.gather_results(torch.stack(present, dim=1)))
        sides = iter(gathered.unbind(1))
        return Bounds(*(None if b is None else next(sides) for b in (own.lower, own.upper)))

    def _record_A(
        self, start: auto_lirpa.Bound, bounds: RowBounds, spec_sharded: bool, order: RowOrder
    ) -> None:
        """A and biases of the pass into the host's dictionary, batch first.

        Args:
            start: the start node.
            bounds: the rank's rows.
            spec_sharded: whether ranks carried their own rows.
            order: of the rows of all ranks.
        """
        gather = spec_sharded and self.graph.own_options.return_A_rows == "whole"

        def shown(A: torch.Tensor | None) -> torch.Tensor | None:
            if A is None:
                return None
            A = A.detach()
            return (order.in_order(self.tp.gather_results(A)) if gather else A).transpose(0, 1)

        lbias, ubias = shown(bounds.lbias), shown(bounds.ubias)
        self.graph.A_dict[start.name] = {
            name: {"lA": shown(bounds.lA[name]), "uA": shown(bounds.uA[name]),
                   "lbias": lbias, "ubias": ubias, "unstable_idx": None}
            for name in bounds.lA
        }
