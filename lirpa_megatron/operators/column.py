"""ColumnParallelLinear: y_r = x W_r^T + b_r, x replicated, y sharded on the last dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron import host
from lirpa_megatron.operators.linear import (
    IdentityRows,
    LocalLinear,
    both_sides,
    dense,
    rows_of_bias,
)


class BoundColumnParallelLinear(LocalLinear):
    """Bounds of megatron-core's ColumnParallelLinear (gather_output=False).

    ======  ========================  ==========================================
    tensor  shape                     on the ranks
    ======  ========================  ==========================================
    x       [B, ..., h]               replicated
    W_r     [n/p, h]                  rank r's rows of W [n, h]
    b_r     [n/p]                     rank r's part of b
    y_r     [B, ..., n/p]             rank r's features of y
    A_y     [R, B, ..., n/p]          WHOLE, ALL or BLOCK (`parallel.layouts`)
    A_x     [R, B, ..., h]            partial sums over ranks (complete for BLOCK)
    ======  ========================  ==========================================

    The layer is linear, so there is no relaxation:

        A_x = sum_r A_y[..., r] W_r          bias = sum_r <A_y[..., r], b_r>

    This operator computes its rank's term of both sums. Taking the sum (once per consumer group,
    all-reduce or reduce-scatter over rows) is the business of the pass that runs it. A start node
    here has its own rows of W as A_x: nothing is multiplied.

    IBP: [l, u] -> W_r m -+ |W_r| d + b_r with midpoint m and half-width d (for an L2 or L1 ball
    straight from the input: the dual norm of each row times eps). Exact for each neuron;
    a zero-width interval gives a zero-width one.
    """

    def forward(
        self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.input_shape = self.x_shape = x.shape
        self.y_shape = w.t().shape
        return F.linear(self.layout.collectives.copy_to(x), w, b)

    def interval_propagate(self, *v: Any, C: Any = None, w: Any = None) -> tuple:
        """Interval bounds of y_r, or of C y when `C` [B, S, n/p] (own features) is given."""
        tp = self.layout.collectives
        lower, upper = tp.copy_to(v[0][0]), tp.copy_to(v[0][1])
        if isinstance(v[0], host.Interval):
            x = host.Interval(lower, upper if v[0].ptb is not None else lower, v[0].ptb)
        else:
            x = (lower, upper)
        if C is None:
            return super().interval_propagate(x, *v[1:])
        # |sum_r C_r W_r| is needed, not sum_r |C_r W_r|: the product is reduced first.
        merged = tp.reduce_from(C.matmul(v[1][0]))
        bias = tp.reduce_from(C.matmul(v[2][0])) if len(v) > 2 else None
        rest = [(merged, merged)] if bias is None else [(merged, merged), (bias, bias)]
        return host.BoundLinear.interval_propagate(self, v[0], *rest)

    def bound_backward(self, last_lA: Any, last_uA: Any, *x: Any, **kwargs: Any) -> tuple:
        """This rank's terms of A_x and of the bias. Shapes: see the class."""
        w, b = self.weight_and_bias(x)

        def product(A: Any) -> torch.Tensor:
            if isinstance(A, IdentityRows) and len(A.shape) == 3:
                return w.index_select(0, A.own).unsqueeze(1).expand(-1, A.shape[1], -1)
            return dense(A).matmul(w)

        lbias, ubias = both_sides(lambda A: rows_of_bias(A, b), last_lA, last_uA)
        A_x = both_sides(product, last_lA, last_uA)
        return [A_x, *[(None, None)] * (len(x) - 1)], lbias, ubias
