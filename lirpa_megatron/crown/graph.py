"""What the engine uses of a BoundedModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.options import OwnOptions
from lirpa_megatron.operators.context import CallState, GraphContext

if TYPE_CHECKING:
    from lirpa_megatron.crown.intermediate_bounds import Intermediate
    from lirpa_megatron.crown.live_check import LiveCheck
    from lirpa_megatron.crown.row_schedule import RowSchedule
    from lirpa_megatron.rounding.outward import Outward


class BoundGraph(Protocol):
    """A bound graph and what drives it. Its nodes are auto_LiRPA's operators, by name."""

    context: GraphContext
    call: CallState
    """Of the `compute_bounds` that is running."""
    own_options: OwnOptions
    schedule: RowSchedule
    intermediate: Intermediate
    rounding: Outward | None
    live: LiveCheck | None
    device: Any

    # auto_LiRPA's
    bound_opts: Mapping[str, Any]
    final_name: str
    """Of the model's output."""
    batch_size: int
    """Samples in the inputs of the call."""
    optimizable_activations: Sequence[Any]
    backward_from: Mapping[str, list]
    """Node name -> the start nodes whose passes have gone through it."""
    return_A: bool
    needed_A_dict: Mapping[str, Any]
    A_dict: dict[str, Any]
    reference_bounds: Mapping[str, Any]
    aux_reference_bounds: Mapping[str, Any]

    def __getitem__(self, name: str) -> auto_lirpa.Bound: ...

    def named_nodes(self) -> dict[str, auto_lirpa.Bound]: ...

    def has_alpha(self, start: auto_lirpa.Bound) -> bool: ...

    def get_forward_value(self, node: auto_lirpa.Bound) -> torch.Tensor: ...

    def IBP_general(self, node: auto_lirpa.Bound) -> Any: ...

    def check_IBP_intermediate(self, node: auto_lirpa.Bound) -> bool: ...

    def check_IBP_first_linear(self, node: auto_lirpa.Bound) -> bool: ...
