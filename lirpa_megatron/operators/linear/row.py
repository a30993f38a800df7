"""RowParallelLinear: y = sum_r x_r W_r^T + b, x sharded on the last dimension, y replicated."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.coefficients import IdentityRows, LowerUpper, Propagated
from lirpa_megatron.operators.context import OperatorInputs, Visit
from lirpa_megatron.operators.linear.local import LocalLinear
from lirpa_megatron.operators.operator import Sharding


class BoundRowParallelLinear(LocalLinear):
    """Bounds of megatron-core's RowParallelLinear (input_is_parallel=True).

    ======  ========================  ==========================================
    tensor  shape                     on the ranks
    ======  ========================  ==========================================
    x_r     [B, ..., n/p]             rank r's features of x
    W_r     [h, n/p]                  rank r's columns of W [h, n]
    b       [h]                       replicated
    y       [B, ..., h]               replicated (summed over ranks)
    A_y     [S, ...] or [n, B, ... h] REPLICATED, or SPEC_SHARDED rows
    A_x     [S, ...] or [p n, ...]    REPLICATED, or GATHERED rows; rank r's features
    ======  ========================  ==========================================

    The layer is linear, so there is no relaxation:

        A_x[..., r] = A_y W_r (for every row of A)          bias = <A_y, b>

    In a spec-sharded pass the rows of all ranks are gathered first (both sides in one collective),
    because each rank computes its own features for all rows. Each rank's bias is complete for the
    rows it carries and is counted once. If the layer is the start node, nothing is gathered: every
    rank knows which rows of the identity the others carry, and takes them from its W_r. If weights
    move (SPEC_SHARDED rows with all features of x), W is whole and nothing is gathered.

    IBP: midpoint and deviation are sums over features, so the sum over ranks of W_r m_r -+ |W_r|
    d_r bounds the whole layer; b is added once. A zero-width interval keeps zero width.
    """

    sharding = Sharding.JOINS
    weight_shards = slice(1, 2)
    feature_dim = 1

    def sharded_relaxation(self, inputs: OperatorInputs) -> tuple[torch.Tensor]:
        """The rank's weight."""
        return (inputs[1].lower,)

    def forward(
        self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.input_shape = self.x_shape = x.shape
        self.y_shape = w.t().shape
        y = self.context.collectives.reduce_from(F.linear(x, w))
        return y if b is None else y + b

    def interval_propagate(self, *v: Any, C: Any = None, w: Any = None) -> tuple:
        """Interval bounds of y, or of C y if `C` [B, S, h] is given."""
        norm = auto_lirpa.Interval.get_perturbation(v[0])[0]
        if norm != float("inf"):
            raise self._refused(f"IBP straight from an L{norm} ball on its sharded input")
        tp = self.context.collectives
        weight = v[1][0]
        bias = v[2][0] if len(v) > 2 else None
        if C is not None:  # the host merges the last linear layer with the specification
            weight = tp.copy_to(C).matmul(weight)
            bias = C.matmul(bias) if bias is not None else None
        center, deviation = tp.reduce_from(
            torch.stack(auto_lirpa.BoundLinear._propagate_Linf(v[0], weight))
        )
        if bias is not None:
            center = center + bias
        return center - deviation, center + deviation

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A at this rank's features of x, and the bias. Shapes: see the class."""
        w, b = self.weight_and_bias(visit)
        if visit.gathered is not None:
            w, = visit.gathered
        bias = self.bias_of(A, b, visit)
        given = A.either
        if isinstance(given, IdentityRows):
            start = given.own if given.all is None or visit.gathered is not None else given.all
            A_x = self.rows_of_weight(w, start, given, visit)
            return Propagated((A.map(lambda _: A_x),), bias)
        product = self.product(w, visit)
        if visit.entered is None:
            return Propagated((A.dense().map(product),), bias)
        gathered, unstack = visit.entered
        return Propagated((LowerUpper(*unstack(product(gathered))),), bias)
