"""What operators are given: their graph, the call that is running, and one visit of a pass.

    GraphContext    of a BoundedModule: made with it, never changed
    CallState       of one `compute_bounds`: made anew by each, filled while it runs
    OperatorInputs  what is known of an operator's inputs
    Visit           all that a backward pass hands to the operator that it goes through: a value
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lirpa_megatron.operators.affine.form import AffineForm, LinearFormBounds
from lirpa_megatron.operators.tuning import Tuning
from lirpa_megatron.parallel.collectives import Collectives

_NO_COLUMNS: Mapping[str, torch.Tensor] = {}


@dataclass(frozen=True)
class GraphContext:
    """A bound graph, as its operators know it; handed to them through the host's `bound_opts`."""

    collectives: Collectives
    """The guarded mappings of the model's tensor-parallel group."""
    value_of: Callable[[Any], torch.Tensor]
    """A node's value at the clean input."""
    tuning: Tuning = field(default_factory=Tuning)
    """Sizes from which on operators and passes cut their work in another way."""
    sharded: dict[str, bool] = field(default_factory=dict)
    """Node name -> whether its value is feature-sharded; filled when the graph is complete."""
    calls: list[Callable[..., Any]] = field(default_factory=list)
    """Functions of constants that the model calls, by their number in the graph."""

    def is_sharded(self, node: Any) -> bool:
        """Whether a node's value is feature-sharded; False while the graph is being built."""
        return self.sharded.get(node.name, False)

    def __deepcopy__(self, memo: dict) -> GraphContext:
        return self  # process groups cannot be copied


@dataclass
class CallState:
    """What one call of `compute_bounds` was asked for, and what it has found so far.

    An affine form is freed when the operators that read it have made their relaxations of it,
    unless they may have to read it again (`rereads`: gradients, alpha).
    """

    method: str | None = None
    """Method of the call; None if no call is running."""
    final_is_identity: bool = False
    """Whether the output itself is bounded, without a specification C."""
    form_limit: int = 0
    """Maximum size of a table that is made of forms."""
    form_room: float = 0.0
    """Bytes that remain for forms of replicated nodes that every rank holds in full."""
    rereads: bool = True
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
    """Node name -> bounds that hold for the whole call; None if alpha iterations recompute them."""
    before_alpha: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Node name -> bounds of all its rows, without alpha."""
    forms: dict[str, AffineForm] = field(default_factory=dict)
    """Node name -> its affine form, found by a pass."""
    centered: dict[str, LinearFormBounds] = field(default_factory=dict)
    """Scores of an attention -> what is known of them relative to their weighted mean."""
    directions: dict[str, LinearFormBounds] = field(default_factory=dict)
    """Operator's name -> what is known of its `directions()`."""
    active_columns: dict[str, torch.Tensor] = field(default_factory=dict)
    """Linear layer's name -> its features that the ReLU after it does not cut off."""
    shared_relaxations: dict[str, tuple[list[Any], Any]] = field(default_factory=dict)
    """Node name -> what its relaxation was made of, and the relaxation."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Node name -> bytes of the rank's `sharded_relaxation` there."""
    _unread: dict[str, set[str]] = field(default_factory=dict)

    def to_be_read(self, node: str, operators: set[str]) -> None:
        """Notes which operators will read a node's form."""
        if not self.rereads:
            self._unread[node] = operators

    def has_read(self, operator: str, nodes: Iterable[str]) -> None:
        """Notes that an operator has made its relaxation of its inputs' forms."""
        for name in nodes:
            if operator not in self._unread.get(name, ()):
                continue
            self._unread[name].remove(operator)
            known = self.centered[name].form if name in self.centered else self.forms[name]
            if known is not None and not self._unread[name]:
                known.free()


@dataclass(frozen=True)
class InputView:
    """What an operator is shown of one of its inputs.

    In a pass whose ranks use a replicated value each in its own way, its tensors have passed
    Megatron's copy_to, so that gradients are summed over the ranks (`crown.conjugates`).
    """

    node: Any
    lower: torch.Tensor | None
    """Bounds [B, *node shape]; None where they are not known (yet). A parameter's are its value."""
    upper: torch.Tensor | None
    form: AffineForm | None = None
    """The node's affine form, if a pass of this call has found it."""
    centered: LinearFormBounds | None = None
    """Of attention scores: what is known of them relative to their weighted mean."""
    read_value: Callable[[Any], torch.Tensor] | None = None

    @functools.cached_property
    def value(self) -> torch.Tensor:
        """The value at the clean input of the model."""
        return self.read_value(self.node)

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def perturbed(self) -> bool:
        return self.node.perturbed

    @property
    def output_shape(self) -> torch.Size:
        return self.node.output_shape


@dataclass(frozen=True)
class OperatorInputs:
    """What an operator's relaxation is made of."""

    views: tuple[InputView, ...]
    call: CallState
    directions: LinearFormBounds | None = None
    """What a pass has found of the operator's `directions()`."""

    @classmethod
    def of(cls, node: Any, context: GraphContext, call: CallState) -> OperatorInputs:
        """Of a node, as they are."""
        views = tuple(
            InputView(
                x, getattr(x, "lower", None), getattr(x, "upper", None), call.forms.get(x.name),
                call.centered.get(x.name), context.value_of,
            ) for x in node.inputs
        )
        return cls(views, call, call.directions.get(node.name))

    def __getitem__(self, index: int) -> InputView:
        return self.views[index]

    def __len__(self) -> int:
        return len(self.views)


@dataclass(frozen=True)
class Visit:
    """One backward pass at one operator."""

    inputs: OperatorInputs
    spec_sharded: bool = False
    """Whether the ranks carry their own rows."""
    rows: int = 0
    """Rows of A here."""
    alpha: torch.Tensor | None = None
    """[2, rows or 1, B, *alpha shape] for the lower and the upper side; None without."""
    gathered: Any = None
    """`sharded_relaxation` of all ranks, where weights move in place of A; else None."""
    columns: Mapping[str, torch.Tensor] = field(default_factory=lambda: _NO_COLUMNS)
    """Node name -> the features that A has there; all where there is no entry."""
    entered: tuple[torch.Tensor, Callable[[torch.Tensor], Any]] | None = None
    """Where the pass enters sharded features: A of both sides [R, sides, ...] as the rows of the
    sharded input are laid out, and a function that takes it apart."""
    answers: tuple[LinearFormBounds | None, ...] = ()
    """What is known of the rows that the operator wanted to know of (`Operator.wanted_rows`)."""

    @property
    def call(self) -> CallState:
        return self.inputs.call
