"""What a pipeline stage asks of the stage below it, whose output is its input.

The mathematics of a pass does not change at a border between stages: rows of A that have reached a
stage's input are rows of the output of the stage below, where they go on (`stage_service`). They
travel down to the stage of the model's input, are concretized there, and their bounds (and rows of
their affine forms) travel back up. Weights, relaxations, alpha and forms stay on their stage.

==========  ========================================  =========================================
asked       sent down                                 sent back
==========  ========================================  =========================================
rows        A [n, B, *input shape] of each side (or   bounds [n, B] of each side, and
            which rows of the identity), biases       [n, B, N + 2] of the affine form if it is
            [n, B], the `Course` of the pass          wanted
value       nothing                                   the input's clean value [B, *input shape]
interval    nothing                                   its interval bounds, lower and upper
facts       nothing                                   `Facts`; bounds if it needs no pass
form        nothing                                   the forward form of the input (`FarForm`)
errors      a margin's row g [B, *input shape]        bound [B] of what it has from all errors
together    such rows [R, B, *input shape]            bounds of each [R, B] and of all [B]
gradient    gradients of what was sent back           gradients of what was sent down
==========  ========================================  =========================================

With 2 sides, e bytes a number and h numbers of one sample at the border, a pass of n rows a rank
sends 2 e n B (h + 1) bytes down and 2 e n B up.

**The schedule.** Chunks of rows are the micro-batches of a pipeline: while chunk c is on the stage
below, this one computes chunk c + 1. A pass that begins on stage s has up to s + 1 chunks under
way. What each stage may keep back (`Course.hold`) is decided by the sender, so that nobody waits
for a message that has not been sent.

**Idle.** In a call a stage waits

- at its beginning, until those below have bounded their own nodes: of two balanced stages
  (`stage_split`) these are 0.09 of all work, and the upper one waits 0.15 of the time for them;
- in each pass: of c chunks s / (c + s) of the time of equally fast stages, for the first chunk to
  arrive and the last one to return;
- on lower stages, while one above relaxes nodes between two passes.

No row of the same call could be computed meanwhile, as each pass needs what the one before it
found. Those of other sentences can: where pipelines share cores, stage by stage, one computes while
another waits. In `verify --data` these are replicas, which hold the weights once
(`parallel.shared_weights`). Two stages of a GPT of 6 layers are idle for 0.30 and 0.46 of the time
with one sentence, for 0.16 and 0.35 with two; the upper one for 0.22 at least, as the lower one has
more to do (docs/measurements.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from lirpa_megatron.crown.affine_forms import InputSet
from lirpa_megatron.forward.stages import FarForm
from lirpa_megatron.operators.coefficients import IdentityRows, LowerUpper, RowBounds
from lirpa_megatron.parallel.pipeline import DOWN, Message, Pipeline, telling
from lirpa_megatron.problem.perturbations import PerturbationInBox

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Course:
    """What lower stages have to know of a pass besides its rows: plain data."""

    start: str
    """Name of the start node, unique among all stages: there alpha is kept under it."""
    is_final: bool
    """Whether it is the model's output."""
    total: int
    """As `StartRows.total`."""
    own: int
    """As `StartRows.own`."""
    split: bool
    """As `StartRows.split`."""
    spec_sharded: bool
    """Whether the ranks of a stage carry their own rows."""
    alpha: tuple[int, int, int] | None
    """First row, rows and rows in all of the rank, where a chunk has some of the rows of alpha."""
    without_alpha: bool
    """Whether these rows have none."""
    asks: int | None
    """Rows of all ranks together, where operators may have rows of their own bounded on the way."""
    form: bool
    """Whether the rows' affine form is wanted."""
    chunks: int
    """How many chunks the pass has."""
    moves: bool
    """Whether weights may move in place of A."""
    hold: int = 0
    """How many chunks the next stage may keep before it answers the oldest."""


@dataclass(frozen=True)
class Facts:
    """What decides how the input of a stage is bounded, known to the stage below in a call."""

    norm: float
    """Of the perturbation set (`InputSet.norm`)."""
    columns: int
    """Coordinates that move (`InputSet.columns`)."""
    leaves: int
    """Perturbed inputs of the model."""
    from_inputs: bool
    """Whether the operator below reads a perturbed input directly."""
    is_activation: bool
    """Whether the operator below reads bounds of its one input."""
    bounds: Pair | None = None
    """Interval bounds, where they are as good as those of a pass."""


class FarInputs(InputSet):
    """The model's perturbed inputs, seen from a stage that does not have them."""

    def __init__(self, facts: Facts) -> None:
        self.leaves, self.norm = [None] * facts.leaves, facts.norm
        self._columns = facts.columns

    def columns(self) -> int:
        return self._columns


class FarSet(PerturbationInBox):
    """The set of a stage's input: what the stage below makes of the model's inputs.

    Its box is NaN: nobody is to read it. `BoundStageInput` and `BackwardPass` ask below instead.
    """

    def __init__(self, like: torch.Tensor) -> None:
        nan = torch.full_like(like, float("nan"))
        super().__init__(nan, nan)

    def extreme(self, x: torch.Tensor, A: torch.Tensor, sign: int) -> torch.Tensor:
        raise AssertionError("rows at a stage's input go on in the stage below")


class StageBelow:
    """The stage below, as the graph of this stage knows it; one for each BoundedModule.

    Args:
        pipeline: of this rank.
        group: its tensor-parallel group.

    Attributes:
        is_asked: whether bounds are being computed; else the graph's own input counts.
        is_elementwise: whether the operator that the input comes from is.
    """

    def __init__(self, pipeline: Pipeline, group: dist.ProcessGroup | None) -> None:
        self.pipeline, self.group = pipeline, group
        self.is_asked = self.is_elementwise = False
        self._asked = 0
        self._answers: dict[int, Message] = {}
        self.forget()

    def forget(self) -> None:
        """A call begins: what was answered is of another one."""
        self._value: torch.Tensor | None = None
        self._answers.clear()  # of a call that failed
        self.forget_bounds()

    def forget_bounds(self) -> None:
        """The bounds have been found, perhaps of one iteration of alpha-CROWN. The value stays: it
        is compared with the model's own at the end of the call."""
        if self._value is not None:
            self._value = self._value.detach()
        self._interval: Pair | None = None
        self._facts: Facts | None = None

    @property
    def value(self) -> torch.Tensor:
        """The stage's input at the clean input of the model, [B, *input shape]."""
        if self._value is None:
            (self._value,) = self._answered(self._ask("value"))
        return self._value

    def keep_value(self) -> None:
        """Asks for the value while the stage below still serves."""
        assert self.value is not None

    def interval(self) -> Pair:
        """Interval bounds of the stage's input, [B, *input shape] each."""
        if self._interval is None:
            lower, upper = self._answered(self._ask("interval"))
            self._interval = lower, upper
        return self._interval

    @property
    def facts(self) -> Facts:
        """What decides how the stage's input is bounded."""
        if self._facts is None:
            number = self._ask("facts")
            fields = dict(self._answer(number).fields["facts"])
            bounds = self._answered(number, keep=False)
            self._facts = Facts(
                **{**fields, "norm": float(fields["norm"])}, bounds=bounds or None
            )
        return self._facts

    def form(self) -> FarForm:
        """The form of the stage's input in a forward pass."""
        number = self._ask("form")
        fields = dict(self._answer(number).fields["form"])
        return FarForm.unpacked(fields, self._answered(number))

    def errors(self, row: torch.Tensor) -> torch.Tensor:
        """Bound of what a margin's row has from the errors of lower stages' forward forms.

        Args:
            row: [B, *input shape], at the stage's input.
        """
        (found,) = self._answered(self._ask("errors", None, [row]), [row])
        return found

    def together(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`Adjoint.together` of rows [R, B, *input shape] at the stage's input, without gradients.
        """
        box, ball = self._answered(self._ask("together", None, [rows]))
        return box, ball

    def rows(
        self, A: LowerUpper, bias: LowerUpper, course: Course
    ) -> Callable[[], RowBounds]:
        """Sends rows of A that have reached the stage's input.

        Args:
            A: [n, B, *input shape] of each side, or IdentityRows; None of a side not asked for.
            bias: [n, B] of each side, what the pass has added up so far.
            course: of the pass.

        Returns:
            A function that waits for the bounds, [n, B], and rows of the form.
        """
        identity = isinstance(A.either, IdentityRows)
        same = A.upper is A.lower
        if identity:
            every = A.either.all
            tensors = [A.either.own, *([] if every is None else [every])]
        else:
            tensors = [x for x in ((A.lower,) if same else A) if x is not None]
        sides = [x is not None for x in A]
        biases = [b for b in bias if b is not None]
        inputs = [*tensors, *biases]
        number = self._ask("rows", {
            "course": asdict(course), "sides": sides, "same": same,
            "identity": list(A.either.shape[:2]) if identity else None,
            "every": identity and A.either.all is not None,
        }, inputs)

        def found() -> RowBounds:
            values = iter(self._answered(number, inputs))
            lower, upper = (next(values) if wanted else None for wanted in sides)
            return RowBounds(lower, upper, None, None, form=next(values, None))

        return found

    # ---------------------------------------------------------------------- answers

    def _ask(
        self, what: str, fields: dict[str, Any] | None = None, tensors: Sequence[torch.Tensor] = ()
    ) -> int:
        self._asked += 1
        grad = torch.is_grad_enabled()
        needs = [grad and x.requires_grad for x in tensors]
        self.pipeline.send(
            DOWN, what, {**(fields or {}), "number": self._asked, "grad": grad, "needs": needs},
            tensors,
        )
        return self._asked

    def _answer(self, number: int) -> Message:
        """Answers arrive in the order of their questions; others' are kept."""
        while number not in self._answers:
            message = self.pipeline.receive(DOWN, "answer")
            self._answers[message.fields["number"]] = message
        return self._answers[number]

    def _answered(
        self, number: int, inputs: Sequence[torch.Tensor] = (), keep: bool = True
    ) -> tuple[torch.Tensor, ...]:
        """The tensors of an answer, with their place in the graph of gradients."""
        message = self._answer(number)
        del self._answers[number]
        entry = message.fields["entry"]
        if entry is None or not torch.is_grad_enabled():
            return message.tensors
        anchor = torch.zeros((), requires_grad=True)
        inputs = [x for x in inputs if x.requires_grad]
        return _Border.apply(self, entry, len(inputs), anchor, *inputs, *message.tensors)

    def gradients(
        self, entry: int, grads: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor, ...]:
        """Gradients of what an answer was made of, from those of the answer."""
        present = [g is not None for g in grads]
        with telling(self.pipeline, self.group, "the gradients of all stages"):
            self.pipeline.send(
                DOWN, "gradient", {"entry": entry, "present": present},
                [g for g in grads if g is not None],
            )
            return self.pipeline.receive(DOWN, "gradient").tensors


class _Border(torch.autograd.Function):
    """Ties what came back from the stage below to what was sent there."""

    @staticmethod
    def forward(
        ctx: Any, below: StageBelow, entry: int, sent: int, anchor: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.below, ctx.entry, ctx.sent = below, entry, sent
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in tensors[sent:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if ctx.sent == 0 and all(g is None for g in grads):
            return (None,) * (4 + len(grads))
        found = ctx.below.gradients(ctx.entry, grads)
        return (None,) * 4 + tuple(found) + (None,) * len(grads)
