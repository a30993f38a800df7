"""What a pipeline stage does for the stage above it: its passes go on here (`stage_below`).

When the bounds of its own nodes are known a stage serves: passes, values and intervals, in the
order in which they are asked for, until the stage above has what it wanted. It then takes the
model's bounds for its own, so that every rank of every stage has them, and auto_LiRPA's loop of
alpha-CROWN decides the same on all stages. Gradients: `stage_gradients`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.backward_pass import UPSTREAM, BackwardPass
from lirpa_megatron.crown.graph import Passes
from lirpa_megatron.crown.placement import PassPlan, StartRows
from lirpa_megatron.crown.stage_below import Course, StageBelow
from lirpa_megatron.crown.stage_gradients import Cut, Served, Session
from lirpa_megatron.forward.adjoint import Adjoint
from lirpa_megatron.forward.method import forward_run
from lirpa_megatron.forward.stages import FarForm
from lirpa_megatron.operators.coefficients import IdentityRows, LowerUpper, RowBounds
from lirpa_megatron.parallel import spmd
from lirpa_megatron.parallel.pipeline import DOWN, UP, Message, Pipeline, telling

_QUESTIONS = ("rows", "value", "interval", "facts", "form", "errors", "together")
"""See `stage_below`."""


@dataclass(frozen=True, eq=False)
class FarStart:
    """A start node of a stage above, as operators of this stage know it: by its name."""

    name: str
    is_final: bool
    rows: StartRows
    """On this stage; `rows.plan` begins at its output."""
    output_shape: Any = None

    is_far = True

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, FarStart) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class StageService:
    """Serves the stage above; one for each BoundedModule.

    Args:
        graph: of this stage.
        pipeline: of this rank.
        below: None on the first stage.
    """

    def __init__(self, graph: Passes, pipeline: Pipeline, below: StageBelow | None) -> None:
        self.graph, self.pipeline, self.below = graph, pipeline, below
        self.tp = graph.context.collectives
        self.far_alpha: dict[str, int] = {}
        self._run, self._adjoint = None, None
        self._session: Session | None = None
        self._sessions: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()
        self._count = 0
        self._going_back: list[int] = []

    @property
    def output(self) -> auto_lirpa.Bound:
        """The node that the stage above continues from."""
        return self.graph[self.graph.final_name]

    # ------------------------------------------------------------------- serving

    def serve(self) -> list[torch.Tensor | None]:
        """Until the stage above has found the bounds of the model.

        Returns:
            Those bounds [B, S] of both sides (None of one that was not asked for), the same on all
            stages. Gradients that reach them are asked for by the stage above.
        """
        session = self._session = Session(self.next_number())
        self._sessions[session.number] = session
        with contextlib.ExitStack() as stack:
            if torch.is_grad_enabled():
                session.cut = stack.enter_context(Cut(self.graph))
            message = self._until_end()
        self._session = None
        self.far_alpha = dict(message.fields["alpha"])
        self.end(message.fields, message.tensors)
        values = iter(message.tensors)
        bounds = [next(values) if given else None for given in message.fields["sides"]]
        if torch.is_grad_enabled() and message.fields["grad"]:
            anchor = torch.zeros((), requires_grad=True)
            served = iter(
                Served.apply(self.serve_gradients, session, anchor, *message.tensors)
            )
            bounds = [None if b is None else next(served) for b in bounds]
        return bounds

    def end(self, fields: dict[str, Any], tensors: Sequence[torch.Tensor]) -> None:
        """Tells the stage below that the bounds of the model have been found."""
        if self.below is None:
            return
        self.below.keep_value()
        alpha = [[name, total] for name, total in self.graph.stages.starts_with_alpha()]
        self.pipeline.send(DOWN, "end", {**fields, "alpha": alpha}, tensors)
        self.below.forget_bounds()

    def _until_end(self) -> Message:
        waiting: deque = deque()
        while True:
            message = self.pipeline.receive(UP, *_QUESTIONS, "end")
            spmd.handshake(self.tp.group, f"stage {self.pipeline.stage}: {message.described}")
            if message.what == "end":
                return message
            with torch.set_grad_enabled(message.fields["grad"]):
                if message.what != "rows":
                    getattr(self, f"_{message.what}")(message)
                    continue
                course = Course(**message.fields["course"])
                finish = self._begin(message, course)
                waiting.append(finish)
                while len(waiting) > course.hold:
                    waiting.popleft()()

    def _answer(
        self, message: Message, tensors: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor] = (), **fields: Any,
    ) -> None:
        tied = message.fields["grad"] and any(x.requires_grad for x in tensors)
        entry = None
        if tied:
            self._session.tape.append((list(inputs), list(tensors)))
            entry = [self._session.number, len(self._session.tape) - 1]
        self.pipeline.send(
            UP, "answer", {"number": message.fields["number"], "entry": entry, **fields}, tensors
        )

    def _value(self, message: Message) -> None:
        self._answer(message, [self.graph.get_forward_value(self.output)])

    def _interval(self, message: Message) -> None:
        self._answer(message, self.graph.intermediate.ibp(self.output))

    def _facts(self, message: Message) -> None:
        node, inputs = self.output, self.graph.input_set()
        bounds = self.graph.intermediate.without_pass(node)
        one = len(node.inputs) == 1
        self._answer(message, bounds or (), facts={
            "norm": str(inputs.norm), "columns": inputs.columns(), "leaves": len(inputs.leaves),
            "from_inputs": self.graph.intermediate.from_inputs(node),
            "is_activation": one and auto_lirpa.reads_bounds(node),
        })

    def _form(self, message: Message) -> None:
        run = self._run = forward_run(self.graph)
        form = run.to(self.output)
        self._adjoint = None
        fields, tensors = FarForm(
            form, run.domain.groups, run.symbols_left, run.tokens,
            [] if run.shares is None else run.shares.blocks, (run.costs.way, run.costs.spent),
            run.kept, 0 if run.errors is None else len(run.errors.groups),
        ).packed()
        self._answer(message, tensors, form=fields)

    def _errors(self, message: Message) -> None:
        (needs,), (row,) = message.fields["needs"], message.tensors
        row = row.requires_grad_(needs)
        self._answer(message, [self._linearised().errors(row)], [row] if needs else [])

    def _together(self, message: Message) -> None:
        (rows,) = message.tensors
        self._answer(message, self._linearised().together(rows))

    def _linearised(self) -> Adjoint:
        if self._adjoint is None:
            self._adjoint = Adjoint(self._run, self.output)
        return self._adjoint

    # -------------------------------------------------------------------- passes

    def _begin(self, message: Message, course: Course) -> Callable[[], None]:
        """Takes rows as far as the stage's input; the function that is returned answers."""
        fields, graph = message.fields, self.graph
        inputs = [
            x.requires_grad_(needs)
            for x, needs in zip(message.tensors, fields["needs"], strict=True)
        ]
        A, bias = self._received(fields, inputs)
        start = self._start(course)
        for node in start.rows.plan.order:
            if start not in graph.backward_from[node.name]:
                graph.backward_from[node.name].append(start)
        stack = contextlib.ExitStack()
        if course.without_alpha:
            stack.enter_context(graph.intermediate.without_alpha())
        plan = self._plan(start, course, A, fields["sides"])
        alpha_rows = None
        if course.alpha is not None:
            first, count, total = course.alpha
            device = torch.device(graph.device)
            alpha_rows = torch.arange(first, first + count, device=device), total
        answer = None
        if course.asks is not None:
            answer = graph.schedule.directions.answer(course.asks, course.spec_sharded)
        run = BackwardPass(graph, plan, start, alpha_rows, answer, self._further(course))
        inputs_set = graph.input_set() if course.form else None
        steps = graph.schedule.bounded(run, A, False, inputs_set, bias)
        found = _to_border(steps)

        def finish() -> None:
            with torch.set_grad_enabled(fields["grad"]):
                bounds = found()
            stack.close()
            tensors = [b for b in (bounds.lower, bounds.upper, bounds.form) if b is not None]
            self._answer(message, tensors, [x for x in inputs if x.requires_grad])

        return finish

    def _received(
        self, fields: Any, inputs: Sequence[torch.Tensor]
    ) -> tuple[LowerUpper, LowerUpper]:
        """A and biases of both sides."""
        values, sides = iter(inputs), fields["sides"]
        if fields["identity"]:
            n, batch = fields["identity"]
            own = next(values)
            rows = IdentityRows(
                own, next(values) if fields["every"] else None,
                (n, batch, *self.output.output_shape[1:]), self.graph.schedule.dtype,
                torch.device(self.graph.device),
            )
            A = LowerUpper(*(rows if wanted else None for wanted in sides))
        elif fields["same"]:
            rows = next(values)
            A = LowerUpper(rows, rows)
        else:
            A = LowerUpper(*(next(values) if wanted else None for wanted in sides))
        return A, LowerUpper(*(next(values) if wanted else None for wanted in sides))

    def _start(self, course: Course) -> FarStart:
        plan = self.graph.schedule.plan(self.output, course.spec_sharded)
        rows = StartRows(plan, course.total, course.split, self.tp.size)
        return FarStart(course.start, course.is_final, rows, self.output.output_shape)

    def _plan(
        self, start: FarStart, course: Course, A: LowerUpper, sides: Sequence[bool]
    ) -> PassPlan:
        plan, schedule = start.rows.plan, self.graph.schedule
        if not course.moves or schedule.has_alpha(plan, start):
            return plan
        identity = isinstance(A.either, IdentityRows)
        return schedule.with_moved_weights(plan, course.own, course.chunks, sum(sides), identity)

    @staticmethod
    def _further(course: Course) -> Course:
        """For the stage after the next."""
        return replace(course, hold=max(course.hold - 1, 0))

    # ----------------------------------------------------------------- gradients

    def serve_gradients(self) -> None:
        """Until the stage above has gone back through all passes."""
        with telling(self.pipeline, self.tp.group, "the gradients of all stages"):
            self._until_end_of_gradients()

    def _until_end_of_gradients(self) -> None:
        while True:
            message = self.pipeline.receive(UP, "gradient", "the end of gradients")
            spmd.handshake(self.tp.group, f"stage {self.pipeline.stage}: {message.described}")
            if message.what != "gradient":
                break
            number, entry = message.fields["entry"]
            session = self._sessions[number]
            inputs, outputs = session.tape[entry]
            values = iter(message.tensors)
            given = [
                (y, next(values))
                for y, present in zip(outputs, message.fields["present"], strict=True) if present
            ]
            given = [(y, g) for y, g in given if y.requires_grad]
            for x in inputs:
                x.grad = None
            torch.autograd.backward(*zip(*given, strict=True), retain_graph=True)
            found = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
            self.pipeline.send(UP, "gradient", {}, found)
        self._going_back = message.fields["numbers"]
        for number in sorted(self._going_back, reverse=True):
            session = self._sessions[number]
            session.cut.go_on()
            session.tape, session.gone_back = [], True
        self.end_of_gradients()

    def begin_call(self) -> None:
        """A call begins: a backward pass that failed has not said its end."""
        self._session, self._going_back = None, []
        self._run = self._adjoint = None

    def next_number(self) -> int:
        """Bounds of the model are found, or served: as many times on every stage."""
        self._count += 1
        return self._count

    def begin_gradients(self, number: int) -> None:
        """On the last stage: a backward pass has reached bounds. It will say when it ends."""
        if not self._going_back:
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(self.end_of_gradients)
        self._going_back.append(number)

    def end_of_gradients(self) -> None:
        """Tells the stage below."""
        numbers, self._going_back = self._going_back, []
        if self.below is not None:
            self.pipeline.send(DOWN, "the end of gradients", {"numbers": numbers})


def _to_border(steps: Generator[Any, None, RowBounds]) -> Callable[[], RowBounds]:
    """Runs a pass until its rows are with the stage below; the function waits for the rest."""

    def rest() -> RowBounds:
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value

    try:
        while next(steps) is not UPSTREAM:
            pass
    except StopIteration as end:
        value = end.value
        return lambda: value
    return rest
