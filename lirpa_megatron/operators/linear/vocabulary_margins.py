"""Margins of target tokens over other tokens: differences of logits, formed before bounding.

The difference of two bounds would add the looseness of both, whereas y = (w_t - w_j) x is bounded
as one row of weights. From other ranks, a rank only needs the rows of the targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.coefficients import IdentityRows, LowerUpper, Propagated
from lirpa_megatron.operators.context import GraphContext, OperatorInputs, Visit
from lirpa_megatron.operators.functional import margins
from lirpa_megatron.operators.operator import Operator, Sharding

_TOKENS = 4096
"""Interval bounds take so many tokens at a time."""


class Margins(Operator, auto_lirpa.Bound):
    """y[b, j] = (w_t x_b + b_t) - (w_j x_b + b_j), t the target of sample b, j from m tokens.

    ========  ==============  =====================================================
    tensor    shape           on the ranks
    ========  ==============  =====================================================
    x         [B, h]          replicated
    W_r       [V/p, h]        rank r's rows of the output layer's weight
    b_r       [V/p]           rank r's part of its bias, if it has one
    targets   [B] or [T]      token ids, replicated: one for each sample, or (attribute
                              `shared`) the same T for all
    y         [B, m]          or [B, T, m] for shared targets
    ========  ==============  =====================================================

    The operator is linear in x, so there is no relaxation. With s the sum of A_y over j:

        A_x = s w_t - A_y W          bias = s b_t - <A_y, b>

    IBP is exact for each y[b, j]: with D_j = w_t - w_j it is D_j m -+ |D_j| d + b_t - b_j for
    midpoint m and half-width d. Only the rows w_t are communicated (an all-reduce of B or T rows).
    """

    weight_shards = slice(1, None)
    takes_identity = True

    def __init__(self, attr: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(attr, *args, **kwargs)
        self.context: GraphContext = self.options["context"]
        self.shared, self.has_bias = bool(attr["shared"]), bool(attr["has_bias"])

    def _others(self, shard: torch.Tensor, rest: Sequence[torch.Tensor]) -> torch.Tensor:
        """w_j (or b_j) of the m tokens: [m, ...]; `rest` holds the inputs after the targets."""
        raise NotImplementedError

    def _enter(self, x: torch.Tensor, own_rows: bool = False) -> torch.Tensor:
        """Applies copy_to to a replicated value if each rank uses it differently.

        Args:
            x: the value.
            own_rows: whether a backward pass uses it on the rank's own rows.
        """
        raise NotImplementedError

    def _tables(self, w: torch.Tensor, *rest: torch.Tensor, own_rows: bool = False) -> list[tuple]:
        """(w_t, W) and (b_t, b): [B or T, h] and [m, h]; [B or T] and [m], or (None, None)."""
        bias, (targets, *others) = rest[: self.has_bias], rest[self.has_bias :]
        tables = []
        for table in (w, *bias):
            found = self.context.collectives.look_up(table, targets), self._others(table, others)
            tables.append(tuple(self._enter(x, own_rows) if x is not table else x for x in found))
        return tables if bias else [*tables, (None, None)]

    def _values(self, inputs: OperatorInputs) -> list[torch.Tensor]:
        """Values of weights and ids; refuses perturbed ones."""
        if any(self.is_input_perturbed(i) for i in range(1, len(self.inputs))):
            raise NotImplementedError(f"{type(self).__name__}: only the features may be perturbed")
        return [x.value for x in inputs.views[1:]]

    def forward(self, x: torch.Tensor, *tables: torch.Tensor) -> torch.Tensor:
        """y, from differences of logits."""
        x = self._enter(x)
        (wt, w), (bt, b) = self._tables(*tables)
        return margins(x, wt, bt, F.linear(x, w, b), self.shared)

    def interval_propagate(self, *v: Any) -> tuple:
        """Interval bounds of y, for an interval of x."""
        (wt, w), (bt, b) = self._tables(*(constant[0] for constant in v[1:]))
        lower, upper = self._enter(v[0][0]), self._enter(v[0][1])
        middle, half = (lower + upper) / 2, (upper - lower) / 2
        centers, deviations = [], []
        for t in range(len(wt)):
            own, parts = slice(None) if self.shared else slice(t, t + 1), ([], [])
            for part in w.split(_TOKENS):  # the differences of one target are as large as W
                D = wt[t] - part
                parts[0].append(F.linear(middle[own], D))
                parts[1].append(F.linear(half[own], D.abs()))
            center, deviation = (torch.cat(part, -1) for part in parts)
            centers.append(center if b is None else center + (bt[t] - b))
            deviations.append(deviation)
        join = torch.stack if self.shared else torch.cat
        center, deviation = (join(parts, int(self.shared)) for parts in (centers, deviations))
        return center - deviation, center + deviation

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A_x [R, B, h] and the bias [R, B] of A_y [R, B, (T,) m]."""
        values = self._values(visit.inputs)
        (wt, w), (bt, b) = self._tables(*values, own_rows=visit.spec_sharded)

        def product(A: Any, target: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
            """<A_y, target - table>, summed over tokens: target [B or T, ...], table [m, ...]."""
            if isinstance(A, IdentityRows):
                return self._rows(A, target, table)
            total = A.sum(-1)
            if self.shared:
                return torch.tensordot(total, target, 1) - torch.tensordot(A.sum(2), table, 1)
            total = total.reshape(*total.shape, *[1] * (target.ndim - 1))
            return total * target - torch.tensordot(A, table, 1)

        A_x = A.map(lambda A: product(A, wt, w))
        bias = LowerUpper() if b is None else A.map(lambda A: product(A, bt, b))
        return Propagated((A_x,), bias)

    def _rows(self, A: IdentityRows, target: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """target - table for each row of the identity: [R, B, ...]."""
        batch, m = A.shape[1], A.shape[-1]
        table = table[A.own % m].unsqueeze(1)
        if self.shared:
            rows = target[A.own // m].unsqueeze(1) - table
            return rows.expand(-1, batch, *rows.shape[2:])
        return target.unsqueeze(0) - table

    def bound_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not offer forward mode")


class BoundVocabularyMargins(Margins):
    """Margins over the whole vocabulary, each rank's over its own tokens: y_r [B, (T,) V/p].

    x and w_t pass `copy_to`, because each rank uses them for different tokens. A_x and the bias are
    this rank's terms of sums that the pass computes; a start node's own rows are complete.
    """

    sharding = Sharding.SPLITS

    def _others(self, shard: torch.Tensor, rest: Sequence[torch.Tensor]) -> torch.Tensor:
        return shard

    def _enter(self, x: torch.Tensor, own_rows: bool = False) -> torch.Tensor:
        return self.context.collectives.copy_to(x)


class BoundTokenMargins(Margins):
    """Margins over a list of tokens, replicated: y [B, (T,) m]. Their rows are communicated too.

    The list's ids are the last input. In a spec-sharded pass each rank applies all rows to its own
    A, so they pass `copy_to` there.
    """

    sharding = Sharding.REPLICATED

    def _others(self, shard: torch.Tensor, rest: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.context.collectives.look_up(shard, rest[0])

    def _enter(self, x: torch.Tensor, own_rows: bool = False) -> torch.Tensor:
        return self.context.collectives.copy_to(x) if own_rows else x

