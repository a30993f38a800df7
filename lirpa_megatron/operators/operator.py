"""The contract between the backward engine (`lirpa_megatron.crown`) and an operator of a graph.

The engine uses only what operators declare here, never their classes. An operator computes: it
communicates only where its forward pass does, and it never starts a pass. If it needs more than its
inputs' bounds, it declares that, and the engine provides it:

1. `directions()` and the forms of `reads_form` are computed before its input's bounds;
2. in a pass, the engine bounds the rows of `wanted_rows(A, visit)` and passes on the answers;
3. `bound_backward(A, visit)` relaxes and propagates.

auto_LiRPA's own operators do not follow this contract; `crown.host_visit` runs them.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.coefficients import LowerUpper, Propagated
from lirpa_megatron.operators.context import CallState, GraphContext, OperatorInputs, Visit


def boxed(interval: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(lower, upper) of an argument of `interval_propagate`; for an L1 or L2 ball at the model's
    input, those of the box around it."""
    norm, eps = auto_lirpa.Interval.get_perturbation(interval)[:2]
    wider = 0.0 if norm == float("inf") else eps
    return interval[0] - wider, interval[1] + wider


class Sharding(enum.Enum):
    """How an operator's value is distributed over the ranks."""

    AS_INPUTS = enum.auto()
    """Sharded if an input is sharded."""
    SPLITS = enum.auto()
    """Sharded, with a replicated input: a sharded region begins."""
    JOINS = enum.auto()
    """Replicated, with a sharded input: a sharded region ends."""
    REPLICATED = enum.auto()


class Operator:
    """Base of this package's operators, mixed in before an auto_LiRPA class.

    Shapes: R rows of A (see `crown.placement`), B batch.

    ==================  =======================  =============================================
    tensor              shape                    on the ranks
    ==================  =======================  =============================================
    an input's bounds   [B, *input shape]        replicated; sharded: the rank's own features
    A_y                 [R, B, *node shape]      as the rows are placed at the node
    A_x                 [R, B, *input shape]     the same rows; for a replicated input of a sharded
                                                 node, the rank's term of a sum over features
    bias                [R, B]                   complete; at a sharded node, the rank's term
    alpha               [2, R or 1, B, ...]      for the rows of A_y
    ==================  =======================  =============================================
    """

    # ---- how the value is distributed over the ranks
    sharding = Sharding.AS_INPUTS
    sharded_dim = -1
    """The dimension (batch first) along which a sharded value is sharded."""
    weight_shards: slice = slice(0, 0)
    """Inputs that are a rank's part of a sharded parameter."""
    feature_dim: int | None = None
    """The feature dimension of the tensors of `sharded_relaxation`; None: they cannot be gathered,
    so A has to move."""

    # ---- rows of A
    takes_identity = False
    """Whether `bound_backward` accepts `IdentityRows`."""
    identity_starts_at_input = False
    """Whether identity rows here are identity rows of the input, where the pass then begins."""
    leaves_out_columns = False
    """Whether `bound_backward` accepts A without the columns of inactive features (see `Visit`)."""
    takes_positions = False
    """Whether `bound_backward` accepts A of some positions alone (`Visit.positions`)."""
    reads_all_positions: frozenset[int] = frozenset()
    """Inputs whose A is then that of positions from 0 on (keys and values)."""
    exact_by_intervals = False
    """Whether interval arithmetic from a perturbed input is as tight as a backward pass."""
    merges_own_specification = False
    """Whether `interval_propagate` accepts a specification C of the rank's own features."""

    is_stage_input = False
    """Whether it stands for the output of the pipeline stage below."""

    # ---- what it needs from the engine
    reads_form: frozenset[int] = frozenset()
    """Inputs whose affine form (`operators.affine.form`) it uses."""
    reads_centered: int | None = None
    """The input that it reads as attention scores relative to their weighted mean."""
    relaxes_rows = False
    """Whether it relaxes <A, y> for each row of A as a whole (`RowRelaxed`)."""
    asks_directions = False
    """Whether it defines `directions`."""
    asks_rows = False
    """Whether it defines `wanted_rows`."""

    context: GraphContext

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """Bounds <A, y> linearly in the inputs: for all inputs within their bounds,
        <A, y> >= sum <A_x, x> + bias for the lower side, and <= for the upper side.

        Args:
            A: coefficients at the node's output; a side that was not requested is None.
            visit: everything else; read-only.
        """
        raise NotImplementedError

    def sharded_relaxation(self, inputs: OperatorInputs) -> Any:
        """What other ranks need from this rank's features to propagate rows of A with all features:
        a tree of tensors (empty by default)."""
        return ()

    def directions(self) -> torch.Tensor:
        """Vectors v for which a pass bounds <v, x> before the bounds of the first input x are
        computed: [1, B, vectors, d]."""
        raise NotImplementedError

    def of_vectors(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [1, B, vectors, ...], as in `directions`, to [B, *lead, ...]."""
        raise NotImplementedError

    def wanted_rows(self, A: LowerUpper, visit: Visit) -> Sequence[torch.Tensor]:
        """Vectors v for which a pass bounds <v, x> of the first input x in this visit:
        [R, B, vectors, d] each. The bounds arrive in `Visit.answers`."""
        return ()

    def numbers_at_once(self, batch: int, form_columns: int | None, call: CallState) -> int:
        """Peak count of numbers for one row of A and one sample during relaxation, on devices that
        process everything at once.

        Args:
            batch: number of samples.
            form_columns: number of columns of the first input's form; None if it gets no form.
            call: the running call, for its limits.
        """
        return 0

    def check_sharded(self, sharded: Sequence[bool], where: str) -> None:
        """Refuses sharded inputs that the operator cannot handle.

        Args:
            sharded: whether each input is sharded; at least one is.
            where: name of the operator, for the message.
        """
