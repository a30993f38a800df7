"""Borders of a sharded region without a matrix product, and of a pipeline stage."""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.coefficients import LowerUpper, Propagated
from lirpa_megatron.operators.context import GraphContext, OperatorInputs, Visit
from lirpa_megatron.operators.operator import Operator, Sharding, boxed


class _Border(Operator, auto_lirpa.Bound):
    """Base: the operators only move features, so all bounds are exact."""

    feature_dim = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.context: GraphContext = self.options["context"]

    def interval_propagate(self, *v: Any) -> tuple:
        """Interval bounds, with features moved as in `forward`. An L1 or L2 ball at the model's
        input becomes the box around it."""
        lower, upper = boxed(v[0])
        rest = [constant[0] for constant in v[1:]]
        return self.forward(lower, *rest), self.forward(upper, *rest)

    def bound_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not offer forward mode")


class BoundGatherFromRegion(_Border):
    """y = [x_1 ... x_p] on the last dimension (ColumnParallelLinear's gather_output=True).

    x_r [B, ..., n/p] sharded, y [B, ..., n] replicated. A_x[..., r] = A_y[..., features of r]:
    a slice in a whole pass (no communication); in a spec-sharded pass the rows are gathered first
    ((p-1) |A_y| bytes), because each rank needs all rows for its features. If weights move, A is
    unchanged.
    """

    sharding = Sharding.JOINS
    identity_starts_at_input = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.context.collectives.gather_features(x)

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, ..., n] -> [R', B, ..., n/p], R' as in `crown.placement`."""
        if visit.entered is None:
            return Propagated((A.dense(),))
        tp = self.context.collectives
        gathered, unstack = visit.entered
        width = gathered.shape[-1] // tp.size
        return Propagated((LowerUpper(*unstack(gathered.narrow(-1, tp.rank * width, width))),))


class BoundScatterToRegion(_Border):
    """y_r = the rank's slice of x's last dimension (RowParallelLinear's input_is_parallel=False).

    x [B, ..., n] replicated, y_r [B, ..., n/p] sharded. A_x is A_y placed at the rank's features,
    zero elsewhere: this rank's term of a sum that the pass computes. If weights move, A_x is A_y.
    """

    sharding = Sharding.SPLITS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.context.collectives.split_features(x)

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, ..., n/p] -> partial sums [R, B, ..., n]."""
        tp = self.context.collectives
        if visit.gathered is not None:
            return Propagated((A.dense(),))

        def place(A: torch.Tensor) -> torch.Tensor:
            width = A.shape[-1]
            return torch.nn.functional.pad(
                A, (tp.rank * width, (tp.size - 1 - tp.rank) * width)
            )

        return Propagated((A.dense().map(place),))


class BoundSelectFromRegion(_Border):
    """y_r = the rank's selection of x's features (its query heads and their key/value group).

    x [B, ..., n] replicated, idx [m] int64, y_r [B, ..., m] sharded; ranks may select the same
    feature. A_x is A_y summed up at idx, zero elsewhere: this rank's term of a sum that the pass
    computes. If weights move, idx is that of all ranks.
    """

    sharding = Sharding.SPLITS

    def sharded_relaxation(self, inputs: OperatorInputs) -> tuple[torch.Tensor]:
        """The rank's selected features."""
        return (inputs[1].lower,)

    def forward(self, x: torch.Tensor, idx: torch.Tensor) -> torch.Tensor:
        return self.context.collectives.copy_to(x).index_select(-1, idx)

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, ..., m] -> partial sums [R, B, ..., n]."""
        n = visit.inputs[0].output_shape[-1]
        (chosen,) = visit.gathered or self.sharded_relaxation(visit.inputs)

        def place(A: torch.Tensor) -> torch.Tensor:
            A_x = A.new_zeros(*A.shape[:-1], n)
            return A_x.index_add(-1, chosen, A)

        return Propagated((A.dense().map(place),))


class BoundStageInput(_Border):
    """y = x, the output of the pipeline stage below, as the input of this one.

    Value and interval bounds are asked of the stage below, and so are bounds of rows of A: the
    graph's own input node x stands for nothing. A_x = A_y.
    """

    is_stage_input = True
    takes_identity = True

    @property
    def elementwise(self) -> bool:
        """Whether the operator that it stands for is (`elementwise.intervals`)."""
        return self.context.below is not None and self.context.below.is_elementwise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        below = self.context.below
        return below.value if below is not None and below.is_asked else x

    def interval_propagate(self, *v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Interval bounds, as the stage below has them."""
        return self.context.below.interval()

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, ...] as it is."""
        return Propagated((A,))
