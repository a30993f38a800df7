"""What operators get: the graph's context, the state of the running call, and one visit of a pass.

    GraphContext    one for each BoundedModule; never changes
    CallState       one for each `compute_bounds`; filled while it runs
    OperatorInputs  bounds, values and forms of an operator's inputs
    Visit           everything a backward pass hands to an operator that it visits; a value
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lirpa_megatron.operators.affine.form import AffineForm, LinearFormBounds
from lirpa_megatron.operators.tuning import Tuning
from lirpa_megatron.parallel.collectives import Collectives

_NO_COLUMNS: Mapping[str, torch.Tensor] = {}


class StageBelow(Protocol):
    """What is known of a pipeline stage's input (`crown.stage_below`)."""

    is_asked: bool
    """Whether bounds are being computed; else the graph's own input counts."""
    is_elementwise: bool
    """Whether the operator that the input comes from is."""
    value: torch.Tensor
    """At the clean input of the model, [B, *shape]."""

    def interval(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Interval bounds, [B, *shape] each."""


@dataclass(frozen=True)
class GraphContext:
    """What operators need from their graph; passed to them through the host's `bound_opts`."""

    collectives: Collectives
    """Guarded collectives of the model's tensor-parallel group."""
    value_of: Callable[[Any], torch.Tensor]
    """Gives a node's value at the clean input."""
    tuning: Tuning = field(default_factory=Tuning)
    """Sizes above which operators and passes split their work differently."""
    sharded: dict[str, bool] = field(default_factory=dict)
    """Node name -> whether its value is feature-sharded; filled once the graph is complete."""
    calls: list[Callable[..., Any]] = field(default_factory=list)
    """Functions of constants that the model calls; nodes of the graph refer to them by index."""
    below: StageBelow | None = None
    """The pipeline stage whose output is the graph's input."""
    ended: list[Callable[[CallState], None]] = field(default_factory=list)
    """Told of the state of each call of `compute_bounds` when it ends."""

    def is_sharded(self, node: Any) -> bool:
        """Whether a node's value is feature-sharded; False while the graph is being built."""
        return self.sharded.get(node.name, False)

    def __deepcopy__(self, memo: dict) -> GraphContext:
        return self  # process groups cannot be copied


@dataclass
class CallState:
    """What one call of `compute_bounds` has to compute, and its results so far.

    An affine form is freed after all operators that read it have made their relaxations, unless
    they may read it again (`rereads`: gradients, alpha).
    """

    method: str | None = None
    """Method of the call; None if no call is running."""
    final_is_identity: bool = False
    """Whether the output itself is bounded, without a specification C."""
    final_rows: int = 0
    """Rows of the model's output that are bounded, or of its specification."""
    form_limit: int = 0
    """Maximum size of a table that is computed from forms."""
    form_room: float = 0.0
    """Bytes that remain for forms that every rank holds in full (of replicated nodes)."""
    rereads: bool = True
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
    """Node name -> bounds that stay valid for the whole call; None if alpha iterations recompute
    them."""
    before_alpha: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Node name -> bounds of all its rows, computed without alpha."""
    forms: dict[str, AffineForm] = field(default_factory=dict)
    """Node name -> its affine form, computed by a pass."""
    centered: dict[str, LinearFormBounds] = field(default_factory=dict)
    """Name of attention scores -> their bounds relative to their weighted mean."""
    directions: dict[str, LinearFormBounds] = field(default_factory=dict)
    """Operator's name -> bounds of its `directions()`."""
    active_columns: dict[str, torch.Tensor] = field(default_factory=dict)
    """Linear layer's name -> its features that are not inactive at the ReLU after it."""
    shared_relaxations: dict[str, tuple[list[Any], Any]] = field(default_factory=dict)
    """Node name -> the inputs of its relaxation, and the relaxation."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Node name -> bytes of the rank's `sharded_relaxation` of the node."""
    sparse_weights: dict[str, Any] = field(default_factory=dict)
    """Linear layer's name -> its weight as `SparseWeight`, or None if it is dense, once looked at.
    """
    ranges: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None
    """Node name -> bounds from a forward pass, once the call has made one."""
    window: Any = False
    """The positions that move (`forward.windows`); None: all; False: not looked for yet."""
    causal: Any = False
    """The nodes at which no position depends on later ones, and how many positions there are
    (`crown.pass_window`); None: not so; False: not looked for yet."""
    _unread: dict[str, set[str]] = field(default_factory=dict)

    def to_be_read(self, node: str, operators: set[str]) -> None:
        """Records which operators will read a node's form."""
        if not self.rereads:
            self._unread[node] = operators

    def has_read(self, operator: str, nodes: Iterable[str]) -> None:
        """Records that an operator has made its relaxation from its inputs' forms."""
        for name in nodes:
            if operator not in self._unread.get(name, ()):
                continue
            self._unread[name].remove(operator)
            known = self.centered[name].form if name in self.centered else self.forms[name]
            if known is not None and not self._unread[name]:
                known.free()


@dataclass(frozen=True)
class InputView:
    """One input of an operator, as a pass presents it.

    If each rank of a pass uses a replicated value differently, its tensors have passed Megatron's
    copy_to, so that gradients are summed over the ranks (`crown.conjugates`).
    """

    node: Any
    lower: torch.Tensor | None
    """Bounds [B, *node shape]; None if not computed (yet). A parameter's bounds are its value."""
    upper: torch.Tensor | None
    form: AffineForm | None = None
    """The node's affine form, if a pass of this call has computed it."""
    centered: LinearFormBounds | None = None
    """For attention scores: their bounds relative to their weighted mean."""
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
    """The inputs of an operator's relaxation."""

    views: tuple[InputView, ...]
    call: CallState
    directions: LinearFormBounds | None = None
    """Bounds of the operator's `directions()`, from a pass."""

    @classmethod
    def of(cls, node: Any, context: GraphContext, call: CallState) -> OperatorInputs:
        """Inputs of a node, unchanged."""
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
    """The visit of one backward pass to one operator."""

    inputs: OperatorInputs
    spec_sharded: bool = False
    """Whether each rank carries its own rows."""
    rows: int = 0
    """Number of rows of A at this operator."""
    alpha: torch.Tensor | None = None
    """[2, rows or 1, B, *alpha shape] for the lower and the upper side; None without alpha."""
    gathered: Any = None
    """`sharded_relaxation` of all ranks if weights move instead of A; otherwise None."""
    columns: Mapping[str, torch.Tensor] = field(default_factory=lambda: _NO_COLUMNS)
    """Node name -> features that A has at that node; without an entry, all of them."""
    entered: tuple[torch.Tensor, Callable[[torch.Tensor], Any]] | None = None
    """If the pass enters a sharded region here: A of both sides [R, sides, ...], laid out like the
    rows of the sharded input, and a function that splits it."""
    positions: tuple[int, int] | None = None
    """(first, end) of the positions that A has here; None: all (`crown.pass_window`)."""
    answers: tuple[LinearFormBounds | None, ...] = ()
    """Bounds of the rows that the operator requested (`Operator.wanted_rows`)."""

    @property
    def call(self) -> CallState:
        return self.inputs.call
