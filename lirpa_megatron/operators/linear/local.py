"""Shared by Column and Row: products of A with the local weight shard.

Shapes: R rows of A (see `crown.placement`), B batch, ... token dimensions, o output and i input
features of the local shard. Weight [o, i], bias [o], as in torch.nn.Linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.coefficients import IdentityRows, LowerUpper, Propagated, dense
from lirpa_megatron.operators.context import GraphContext, InputView, Visit
from lirpa_megatron.operators.linear.sparse import SparseWeight
from lirpa_megatron.operators.operator import Operator


class LocalLinear(Operator, auto_lirpa.BoundLinear):
    """Base of the parallel linear operators: the host's BoundLinear on the local shard.

    Inherited features that would mistake the shard for the whole matrix (forward mode, the solver,
    Jacobians, perturbed weights) raise an error.
    """

    takes_identity = True
    takes_positions = True
    leaves_out_columns = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.transB = 1  # [out, in]: the host does not transpose the weight
        self.context: GraphContext = self.options["context"]
        self._known_sparse: SparseWeight | None = None

    def _refused(self, what: str) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__} does not offer {what} on a sharded layer"
        )

    def bound_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refused("forward mode (use IBP, CROWN-IBP, CROWN or CROWN-Optimized)")

    def bound_dynamic_forward(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refused("dynamic forward mode")

    def build_solver(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refused("a solver model")

    def build_gradient_node(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refused("Jacobian bounds")

    def interval_propagate_with_weight(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refused("perturbed weights")

    def check_unperturbed(self) -> None:
        """Refuses perturbed weights."""
        if any(self.is_input_perturbed(i) for i in range(1, len(self.inputs))):
            raise self._refused("perturbed weights")

    def weight_and_bias(self, visit: Visit) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight [o, i] and bias [o] or None that multiply the visit's rows of A: the local
        shard, or all ranks' shards if weights move."""
        self.check_unperturbed()
        weight, *bias = (_constant(x) for x in visit.inputs.views[1:])
        return weight, bias[0] if bias else None

    def of_columns(
        self, w: torch.Tensor, b: torch.Tensor | None, visit: Visit
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Restricts weight and bias to the columns of A here and at the input.

        w [o, i] and b [o] -> [o', i'] and [o'], if a pass skips columns (`relu_sparsity`).
        """
        out, into = (visit.columns.get(name) for name in (self.name, visit.inputs[0].name))
        if out is not None:
            w, b = w.index_select(0, out), None if b is None else b.index_select(0, out)
        return w if into is None else w.index_select(1, into), b

    def product(
        self, w: torch.Tensor, visit: Visit
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """A [R, B, ..., o'] -> A W [R, B, ..., i'] for the columns of A in a visit.

        Args:
            w: of all columns, [o, i].
        """
        sparse = self._sparse(w, visit)
        if sparse is None:
            chosen, _ = self.of_columns(w, None, visit)
            return lambda A: A.matmul(chosen)
        out, into = (visit.columns.get(name) for name in (self.name, visit.inputs[0].name))
        return lambda A: sparse.product(A, out, into)

    def _sparse(self, w: torch.Tensor, visit: Visit) -> SparseWeight | None:
        """The weight, if it is one whose products a call of `compute_bounds` may take as sparse
        ones. What an earlier call has found is compared with the weight first."""
        call = visit.call
        if call.method is None or torch.is_grad_enabled() or not self._keeps_weight(visit):
            return None
        if self.name not in call.sparse_weights:
            known = self._known_sparse
            if known is None or not known.is_still(w):
                known = self._known_sparse = SparseWeight.of(w)
            call.sparse_weights[self.name] = known
        return call.sparse_weights[self.name]

    def _keeps_weight(self, visit: Visit) -> bool:
        """Whether every visit of a call multiplies with the same weight."""
        return visit.gathered is None

    def bound_backward(self, A: LowerUpper, visit: Visit) -> Propagated:
        """A [R, B, ..., o] W and <A, b> with the local weight and bias; no communication."""
        w, b = self.weight_and_bias(visit)
        bias = self.bias_of(A, b, visit)
        if isinstance(A.either, IdentityRows):
            given = A.either
            A_x = self.rows_of_weight(w, given.own, given, visit)
            return Propagated((A.map(lambda _: A_x),), bias)
        return Propagated((A.dense().map(self.product(w, visit)),), bias)

    def bias_of(self, A: LowerUpper, b: torch.Tensor | None, visit: Visit) -> LowerUpper:
        """<A, b> of each row, for the columns of A here; b [o] or None."""
        out = visit.columns.get(self.name)
        if b is not None and out is not None:
            b = b.index_select(0, out)
        return A.map(lambda A: rows_of_bias(A, b))

    def rows_of_weight(
        self, w: torch.Tensor, rows: torch.Tensor, A: IdentityRows, visit: Visit
    ) -> torch.Tensor:
        """`rows_of_weight` of the columns of A at the input."""
        out, into = (visit.columns.get(name) for name in (self.name, visit.inputs[0].name))
        if out is not None:
            w = w.index_select(0, out)
        return rows_of_weight(w, rows, A, into)


def _constant(x: InputView) -> torch.Tensor:
    """The value of a parameter, or of what a model computes from parameters only."""
    return x.value if x.lower is None or x.node.inputs else x.lower


class BoundReplicatedLinear(LocalLinear):
    """nn.Linear, y = x W^T + b, everything replicated; x [B, ..., i], y [B, ..., o].

    The host traces a layer without bias, or on tokens, as a matrix product (and a sum). On 0.3,
    that product's IBP accepts no specification, and its backward pass bounds both factors and
    builds the identity. BoundLinear has none of these problems.
    """

    exact_by_intervals = True


def rows_of_weight(
    w: torch.Tensor, rows: torch.Tensor, A: IdentityRows, into: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows of the identity at a linear layer's output times its weight, without a product.

    Args:
        w: [o, i].
        rows: indices into the flattened output [*tokens, o], [R].
        A: the identity rows; their shape gives the number of tokens.
        into: input features that are wanted, [i']; None: all.

    Returns:
        [R, B, *tokens, i']: row (t, f) has w[f] at token t and zero elsewhere.
    """
    _, batch, *tokens, width = A.shape
    chosen = w.index_select(0, rows % width)
    if into is not None:
        chosen = chosen.index_select(1, into)
    if tokens:
        places = torch.arange(len(rows), device=rows.device), rows // width
        zeros = w.new_zeros(len(rows), math.prod(tokens), chosen.shape[1])
        chosen = zeros.index_put(places, chosen).unflatten(1, tuple(tokens))
    return chosen.unsqueeze(1).expand(-1, batch, *chosen.shape[1:])


def rows_of_bias(A: Any, b: torch.Tensor | None) -> torch.Tensor | int:
    """The bias term of each row, summed over tokens and features.

    Args:
        A: [R, B, ..., o], or IdentityRows.
        b: [o], or None.

    Returns:
        [R, B], or 0 without a bias.
    """
    if b is None:
        return 0
    if isinstance(A, IdentityRows):
        return b.index_select(0, A.own % A.shape[-1]).unsqueeze(1).expand(-1, A.shape[1])
    product = dense(A).matmul(b)
    return product.flatten(2).sum(-1) if product.ndim > 2 else product
