"""ColumnParallelLinear: y_r = x W_r^T + b_r, x replicated, y sharded on the last dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.context import OperatorInputs, Visit
from lirpa_megatron.operators.linear.local import LocalLinear
from lirpa_megatron.operators.operator import Sharding


class BoundColumnParallelLinear(LocalLinear):
    """Bounds of megatron-core's ColumnParallelLinear (gather_output=False).

    ======  ========================  ==========================================
    tensor  shape                     on the ranks
    ======  ========================  ==========================================
    x       [B, ..., h]               replicated
    W_r     [n/p, h]                  rank r's rows of W [n, h]
    b_r     [n/p]                     rank r's part of b
    y_r     [B, ..., n/p]             rank r's features of y
    A_y     [R, B, ..., n/p]          REPLICATED, GATHERED or BLOCK (`crown.placement`)
    A_x     [R, B, ..., h]            partial sums over ranks (complete for BLOCK)
    ======  ========================  ==========================================

    The layer is linear, so there is no relaxation:

        A_x = sum_r A_y[..., r] W_r          bias = sum_r <A_y[..., r], b_r>

    This operator computes its rank's term of both sums. The pass that runs it computes the sum
    (once per consumer group; all-reduce, or reduce-scatter over rows). If the layer is the start
    node, A_x consists of the rank's rows of W, without a product. If weights move (SPEC_SHARDED
    rows with all features), W and b are whole, and A_x and the bias are complete.

    IBP: [l, u] -> W_r m -+ |W_r| d + b_r with midpoint m and half-width d (for an L1 or L2 ball at
    the model's input: the dual norm of each row times eps). Exact for each neuron; a zero-width
    interval gives a zero-width interval.

    With `rows`, only some of the rank's output features are computed (the queries, keys or values
    of a packed projection; the gate of a gated MLP): W_r and b_r consist of those rows.
    """

    sharding = Sharding.SPLITS
    weight_shards = slice(1, None)
    exact_by_intervals = True
    merges_own_specification = True
    feature_dim = 0

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.has_rows = bool(attr.get("has_rows", 0))

    def _own(self, w: Any, rest: Any) -> tuple[Any, Any]:
        """(weight, bias or None) of the selected rows; `rest` is [bias], [rows]."""
        *bias, rows = rest if self.has_rows else (*rest, None)
        b = bias[0] if bias else None
        if rows is None:
            return w, b
        return w[rows], None if b is None else b[rows]

    def weight_and_bias(self, visit: Visit) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.check_unperturbed()
        return self.sharded_relaxation(visit.inputs) if visit.gathered is None else visit.gathered

    def _keeps_weight(self, visit: Visit) -> bool:
        return not self.has_rows and super()._keeps_weight(visit)

    def sharded_relaxation(
        self, inputs: OperatorInputs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rank's weight and bias."""
        w, *rest = (x.value for x in inputs.views[1:])
        return self._own(w, rest)

    def forward(self, x: torch.Tensor, w: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        w, b = self._own(w, rest)
        self.input_shape = self.x_shape = x.shape
        self.y_shape = w.t().shape
        return F.linear(self.context.collectives.copy_to(x), w, b)

    def interval_propagate(self, *v: Any, C: Any = None, w: Any = None) -> tuple:
        """Interval bounds of y_r, or of C y if `C` [B, S, n/p] (own features) is given."""
        tp = self.context.collectives
        lower, upper = tp.copy_to(v[0][0]), tp.copy_to(v[0][1])
        if isinstance(v[0], auto_lirpa.Interval):
            x = auto_lirpa.Interval(lower, upper if v[0].ptb is not None else lower, v[0].ptb)
        else:
            x = (lower, upper)
        w, b = self._own(v[1][0], [y[0] for y in v[2:]])
        if C is None:
            merged, bias = w, b
        else:
            # |sum_r C_r W_r| is needed, not sum_r |C_r W_r|: the product is reduced first.
            merged = tp.reduce_from(C.matmul(w))
            bias = None if b is None else tp.reduce_from(C.matmul(b))
            x = v[0]
        rest = [(merged, merged)] if bias is None else [(merged, merged), (bias, bias)]
        return super().interval_propagate(x, *rest)
