"""What the engine uses of a BoundedModule: each collaborator is given the least of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.options import OwnOptions
from lirpa_megatron.operators.context import CallState, GraphContext
from lirpa_megatron.parallel.pipeline import Pipeline


class Schedule(Protocol):
    """Runs passes (`row_schedule.RowSchedule`)."""

    directions: Any
    dtype: torch.dtype

    def run(self, start: auto_lirpa.Bound, C: Any, spec_sharded: bool, **how: Any) -> Any: ...

    def rows(
        self, start: auto_lirpa.Bound, identity: bool, spec_sharded: bool, total: int | None = None
    ) -> Any: ...

    def rows_run(self, start: auto_lirpa.Bound) -> int: ...


class IntermediateBounds(Protocol):
    """Bounds nodes on the way (`intermediate_bounds.Intermediate`)."""

    relus: Mapping[str, auto_lirpa.Bound]
    has_alpha: bool
    still: Any
    """`still_rows.StillRows`."""

    def without_alpha(self) -> AbstractContextManager[None]: ...


class Nodes(Protocol):
    """A graph of auto_LiRPA's operators, by name, and how it lies on the ranks."""

    context: GraphContext
    final_name: str
    """Of the model's output."""

    def __getitem__(self, name: str) -> auto_lirpa.Bound: ...

    def named_nodes(self) -> dict[str, auto_lirpa.Bound]: ...

    def get_forward_value(self, node: auto_lirpa.Bound) -> torch.Tensor: ...


class Call(Nodes, Protocol):
    """The graph in a call of `compute_bounds`."""

    call: CallState
    own_options: OwnOptions
    batch_size: int
    """Samples in the inputs of the call."""
    device: Any
    final_node_name: str
    """Of the node that the call bounds."""

    def input_set(self) -> Any: ...


class StagedCall(Call, Protocol):
    """The same, and the stages of a pipeline that the model may be cut into."""

    pipeline: Pipeline | None
    stages: Any
    """`stages.Stages`, or None: this is the whole model."""
    below: Any
    """`stage_below.StageBelow`; None where the model's input is."""
    stage_input: auto_lirpa.Bound | None
    """The node that stands for the output of the stage below."""
    relaxes_rows: bool
    """Whether an operator of the model does (`Operator.relaxes_rows`)."""


class Passes(StagedCall, Protocol):
    """The same, and what takes part in passes."""

    schedule: Schedule
    intermediate: IntermediateBounds
    rounding: Any
    """`rounding.outward.Outward`, or None."""
    folded: Any
    """`folded_inputs.FoldedInputs` of the call, or None."""
    backward_from: Mapping[str, list]
    """Node name -> the start nodes whose passes have gone through it."""

    def has_alpha(self, start: auto_lirpa.Bound) -> bool: ...


class BoundGraph(Passes, Protocol):
    """The same, and auto_LiRPA's own state of a call."""

    live: Any
    """`live_check.LiveCheck`, or None."""
    bound_opts: Mapping[str, Any]
    optimizable_activations: Sequence[Any]
    return_A: bool
    needed_A_dict: Mapping[str, Any]
    A_dict: dict[str, Any]
    reference_bounds: Mapping[str, Any]
    aux_reference_bounds: Mapping[str, Any]

    def IBP_general(self, node: auto_lirpa.Bound) -> Any: ...

    def check_IBP_intermediate(self, node: auto_lirpa.Bound) -> bool: ...

    def check_IBP_first_linear(self, node: auto_lirpa.Bound) -> bool: ...
