"""All rows of a start node: which of them each rank carries, in chunks, and how they come together.

Shapes: S rows in all (the neurons of an intermediate node, the rows of a specification), n =
ceil(S/p) per rank in a spec-sharded pass, B batch. The last rows are filled up with repetitions of
the last one, so that all ranks do the same.
"""

from __future__ import annotations

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
from lirpa_megatron.crown.pass_window import PassWindow, PassWindows
from lirpa_megatron.crown.placement import PassPlan, Region, RowPlacement, StartRows, plan_pass
from lirpa_megatron.crown.row_limits import RowLimits, rows_of
from lirpa_megatron.crown.row_order import RowOrder
from lirpa_megatron.crown.stage_below import Course
from lirpa_megatron.operators.affine.form import AffineForm
from lirpa_megatron.operators.coefficients import IdentityRows, LowerUpper, RowBounds
from lirpa_megatron.rounding.forms import with_errors, with_further


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


@dataclass(frozen=True)
class _Task:
    """How the rows of a start node are bounded, decided once."""

    start: auto_lirpa.Bound
    C: torch.Tensor | None
    """As for `RowSchedule.run`, and so are `rows`."""
    rows: torch.Tensor | None
    on_ranks: StartRows
    plan: PassPlan
    """Of the passes, in which weights may move."""
    order: RowOrder
    at_once: int
    """Chunks that go on in turns."""
    moves: bool
    """Whether weights may move in place of A."""
    keep_A: bool
    """Whether the caller wants A."""
    asks: int | None
    """As in `Course`."""
    inputs: InputSet | None
    """What the start node's affine form is a form in; None: none is made."""


class RowSchedule:
    """Runs backward passes of one bound graph."""

    def __init__(self, graph: BoundGraph) -> None:
        self.graph, self.tp, self.sharded = graph, graph.context.collectives, graph.context.sharded
        self.communication, self.directions = CommunicationPlan(graph), Directions(graph)
        self.limits, self.windows = RowLimits(graph), PassWindows(graph)
        self._rows_run: dict[str, int] = {}

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
        total = rows_of(origin) if total is None else total
        return StartRows(plan, total, split, self.tp.size)

    def rows_run(self, start: auto_lirpa.Bound) -> int:
        """Rows of the last run from an intermediate node (of scores: not one for each number)."""
        return self._rows_run.get(start.name, rows_of(start))

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
        task = self._decided(start, C, spec_sharded, lower + upper, form, rows, aside, directions)
        form_rows, order = FormRows(task.on_ranks.own), task.order
        sides = lower, upper
        firsts = range(0, task.on_ranks.own, order.limit)
        chunks = (self._chunk(task, sides, first, form_rows) for first in firsts)
        whole = concatenate(in_turns(chunks, task.at_once))
        if task.keep_A:
            self._record_A(start, whole, task.plan.spec_sharded, order)
        bounds = Bounds(whole.lower, whole.upper)
        gather = task.on_ranks.split or (task.plan.spec_sharded and task.plan.start is not start)
        if gather:
            bounds = self._gathered(bounds, order)
        if task.inputs is not None:
            forms, S = form_rows.all(), task.on_ranks.total
            whole_form = order.is_one_chunk or order.blocks or task.plan.start is not start
            if gather and (forms.requires_grad or whole_form):
                forms = order.in_order(self.tp.gather_results(forms))
            elif gather:
                forms = self._gathered_in_chunks(forms, S, order.limit)
            shape = start.output_shape[1:] if C is None and rows is None else (S,)
            bounds.form = task.inputs.form(forms, shape)
        return bounds

    def _decided(
        self, start: auto_lirpa.Bound, C: torch.Tensor | None, spec_sharded: bool, sides: int,
        form: bool, rows: torch.Tensor | None, aside: bool, directions: bool,
    ) -> _Task:
        """What follows from the plan and the shapes alone, and so is the same on every rank."""
        graph = self.graph
        given = C.shape[0] if C is not None else None if rows is None else len(rows)
        on_ranks = self.rows(start, C is None, spec_sharded, given)
        plan, S, n = on_ranks.plan, on_ranks.total, on_ranks.own
        if not aside:
            self._rows_run[plan.start.name] = S
            for node in plan.order:
                graph.backward_from[node.name].append(start)
        limit = min(n, self.limits.at_once(plan, self.dtype.itemsize))
        moves = not graph.has_alpha(start) and graph.rounding is None
        moves = moves and not self.has_alpha(plan, start)
        if moves:
            plan = self.with_moved_weights(plan, n, -(-n // limit), sides, C is None)
        limit, at_once = self.limits.turns(limit, plan)
        keep_A = bool(graph.return_A and start.name in graph.needed_A_dict) and not aside
        longest = max(x.output_shape[-1] for x in plan.order)
        # Rows on all ranks together, also where each has those of its own block.
        asks = self.limits.numel(start, C) if directions and not self.sharded[start.name] else None
        if asks is not None and not self.directions.are_few(asks, longest):
            asks = None
        inputs = graph.input_set() if form else None
        size = self.limits.numel(start, C), self.limits.form_size()
        if inputs is not None and not inputs.offers_form(*size):
            inputs = None
        order = RowOrder(
            on_ranks, limit,
            # A that is given to the caller as the rank's own is one block of rows.
            blocks=keep_A and graph.own_options.return_A_rows == "own",
            gathered_width=None if plan.start is start else plan.start.output_shape[-1],
            device=torch.device(graph.device),
        )
        return _Task(start, C, rows, on_ranks, plan, order, at_once, moves, keep_A, asks, inputs)

    def has_alpha(self, plan: PassPlan, start: Any) -> bool:
        """Whether operators on the way relax with alpha of this start node."""
        return any(auto_lirpa.is_optimized(node, start) for node in plan.order)

    def with_moved_weights(
        self, plan: PassPlan, own: int, chunks: int, sides: int, identity: bool
    ) -> PassPlan:
        """The plan in which weights move in place of A, where that takes fewer bytes.

        Args:
            plan: in which A moves.
            own: rows that each rank carries.
            chunks: in how many.
            sides: 2 for both bounds.
            identity: whether the pass begins with rows of the identity.
        """
        if not plan.spec_sharded:
            return plan
        regions = self.communication.choose(plan, own, chunks, sides, self.dtype, identity)
        return self.plan(plan.start, plan.spec_sharded, regions)

    def _chunk(
        self, task: _Task, wanted: tuple[bool, bool], first: int, form_rows: FormRows
    ) -> Generator[None, None, RowBounds]:
        """Bounds of the rank's rows from `first` on; their rows of the form go to `form_rows`."""
        local, every = task.order.chunk(first)
        alpha_rows = None if task.order.is_one_chunk else (local, task.on_ranks.own)
        course = None
        if self.graph.below is not None:
            course = self._course(task, first, len(local))
        answer = None
        if task.asks is not None:
            answer = self.directions.answer(task.asks, task.plan.spec_sharded)
        own, rows = local if every is None else every[self.tp.rank], task.rows
        if rows is not None:
            own, every = rows[own], None if every is None else rows[every]
        A = self._start_rows(task.plan.start, task.C, own, every)
        window = self._window(task, own if every is None else every)
        if window is not None and task.plan.start.name in window.cut:
            A = window.rows(A)
        run = BackwardPass(self.graph, task.plan, task.start, alpha_rows, answer, course, window)
        sides = LowerUpper(*(A if side else None for side in wanted))
        found = yield from self.bounded(run, sides, task.keep_A, task.inputs)
        if found.form is not None:
            form_rows.add(found.form)
            found.form = None
        return found

    def _window(self, task: _Task, rows: torch.Tensor) -> PassWindow | None:
        """The positions that a chunk of `rows` needs, the same on every rank."""
        identity, start = task.C is None, task.plan.start
        if task.keep_A or task.asks is not None:
            return None
        still = None if task.plan.moved else self.graph.intermediate.still.window()
        first = 0 if still is None else still.first
        ends = torch.stack((rows.max(), -rows.min()))
        own = identity and task.rows is not None and not task.on_ranks.split
        if own and self.tp.size > 1:  # each rank may have others of its neurons
            ends = self.tp.largest(ends)
        return self.windows.of_start(start, ends if identity else None, first)

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
        if inputs is None:
            return found
        from_below, outward = found.form is not None, self.graph.rounding is not None
        if not from_below:
            found.form = inputs.rows(found, self.tp.copy_to)
        if outward:
            with_own = with_further if from_below else with_errors
            found.form = with_own(inputs, found, found.form)
        if not keep_A:
            found.lA, found.uA = {}, {}
        return found

    def _course(self, task: _Task, first: int, count: int) -> Course:
        """What the stages below have to know of a chunk of `count` rows."""
        graph, rows, order, start = self.graph, task.on_ranks, task.order, task.start
        is_last = first + order.limit >= rows.own
        return Course(
            start=graph.stages.far_name(start), is_final=start.name == graph.final_node_name,
            total=rows.total, own=rows.own, split=rows.split,
            spec_sharded=rows.plan.spec_sharded,
            alpha=None if order.is_one_chunk else (first, count, rows.own),
            without_alpha=graph.intermediate.is_without_alpha,
            asks=task.asks, form=task.inputs is not None,
            chunks=-(-rows.own // order.limit), moves=task.moves,
            hold=0 if is_last else max(task.at_once - 2, 0),
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
