"""The contract between the backward engine (`lirpa_megatron.crown`) and an operator of a graph.

The engine knows operators by what they declare here, never by their class. An operator computes:
it communicates only where its forward pass does, and it starts no pass of its own. What it wants
to know beyond its inputs' bounds it declares, and is given:

1. `directions()` and the forms of `reads_form`, found before its input's bounds are;
2. in a pass, `wanted_rows(A, visit)`; the engine bounds these rows and visits it with the answers;
3. `bound_backward(A, visit)` relaxes and propagates.

auto_LiRPA's own operators, which know none of this, are run by `crown.host_visit`.
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
    """(lower, upper) of what `interval_propagate` is given; of the box around a ball (L1, L2)
    straight from the input."""
    norm, eps = auto_lirpa.Interval.get_perturbation(interval)[:2]
    wider = 0.0 if norm == float("inf") else eps
    return interval[0] - wider, interval[1] + wider


class Sharding(enum.Enum):
    """How an operator's value lies on the ranks."""

    AS_INPUTS = enum.auto()
    """Sharded where an input is."""
    SPLITS = enum.auto()
    """Sharded, of a replicated input: a sharded region begins."""
    JOINS = enum.auto()
    """Replicated, of a sharded input: a sharded region ends."""
    REPLICATED = enum.auto()


class Operator:
    """Base of this package's operators, mixed in before a class of auto_LiRPA's.

    Shapes: R rows of A (as the placement at the node has it, `crown.placement`), B batch.

    ==================  =======================  =============================================
    tensor              shape                    on the ranks
    ==================  =======================  =============================================
    an input's bounds   [B, *input shape]        replicated; sharded: the rank's own features
    A_y                 [R, B, *node shape]      as the rows are placed at the node
    A_x                 [R, B, *input shape]     the same rows; of a replicated input of a sharded
                                                 node the rank's term of a sum over features
    bias                [R, B]                   complete; at a sharded node the rank's term
    alpha               [2, R or 1, B, ...]      the rows of A_y
    ==================  =======================  =============================================
    """

    # ---- how the value lies on the ranks
    sharding = Sharding.AS_INPUTS
    sharded_dim = -1
    """The dimension of the value (batch first) that is sharded where it is sharded."""
    weight_shards: slice = slice(0, 0)
    """Which inputs are a rank's part of a sharded parameter."""
    feature_dim: int | None = None
    """The dimension of the tensors of `sharded_relaxation` with the rank's features; None: they
    are not to be gathered, so that A has to move."""

    # ---- rows of A
    takes_identity = False
    """Whether `bound_backward` takes `IdentityRows` as they are."""
    identity_starts_at_input = False
    """Whether the identity's rows here are those of the input: a pass begins there."""
    leaves_out_columns = False
    """Whether `bound_backward` takes A without the columns that a ReLU cuts off (see `Visit`)."""
    exact_by_intervals = False
    """Whether interval arithmetic from a perturbed input gives what a backward pass gives."""
    merges_own_specification = False
    """Whether `interval_propagate` takes a specification C of the rank's own features."""

    # ---- what it wants to know
    reads_form: frozenset[int] = frozenset()
    """The inputs whose affine form (`operators.affine.form`) it makes use of."""
    reads_centered: int | None = None
    """The input that it reads as attention scores, relative to their weighted mean."""
    relaxes_rows = False
    """Whether it relaxes <A, y> for each row of A as a whole (`RowRelaxed`)."""
    asks_directions = False
    """Whether it defines `directions`."""
    asks_rows = False
    """Whether it defines `wanted_rows`."""

    context: GraphContext

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """Linear bounds of <A, y> in the inputs: <A, y> >= sum <A_x, x> + bias for the lower side,
        <= for the upper one, for all inputs within their bounds.

        Args:
            A: coefficients at the node's output; a side that is not asked for is None.
            visit: everything else; what it holds is not to be changed.
        """
        raise NotImplementedError

    def sharded_relaxation(self, inputs: OperatorInputs) -> Any:
        """What other ranks need of this one's features to go through with whole rows of A: a tree
        of tensors (nothing, unless a subclass says so)."""
        return ()

    def directions(self) -> torch.Tensor:
        """Vectors v whose products <v, x> with the first input are worth a pass before its bounds
        are: [1, B, vectors, d]."""
        raise NotImplementedError

    def of_vectors(self, x: torch.Tensor) -> torch.Tensor:
        """[1, B, vectors, ...] of `directions` -> [B, *lead, ...]."""
        raise NotImplementedError

    def wanted_rows(self, A: LowerUpper, visit: Visit) -> Sequence[torch.Tensor]:
        """Vectors v whose products <v, x> with the first input are worth a pass in this visit:
        [R, B, vectors, d] each, answered in `Visit.answers`."""
        return ()

    def numbers_at_once(self, batch: int, form_columns: int | None, call: CallState) -> int:
        """Most numbers that one row of A becomes for each sample while it is relaxed, on devices
        that do all at once.

        Args:
            batch: samples.
            form_columns: coefficients of the first input's form, if it will have one.
            call: for its limits.
        """
        return 0

    def check_sharded(self, sharded: Sequence[bool], where: str) -> None:
        """Refuses inputs whose shards the operator cannot take, by name.

        Args:
            sharded: whether each input is; some input is.
            where: the operator, for the message.
        """
