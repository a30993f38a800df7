"""CROWN's backward pass over a sharded bound graph.

The host's operators do the geometry (`bound_backward`); this traversal keeps track of where rows
and features of A lie (`crown.placement`) and takes the sums over ranks. It replaces the host's
`backward_general`, which knows one device, and is the same for both host versions.

Shapes: S rows, n = ceil(S/p) of them per rank, B batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.communication import features_of
from lirpa_megatron.crown.conjugates import conjugates_of, conjugates_of_set
from lirpa_megatron.crown.placement import PassPlan, RowPlacement
from lirpa_megatron.crown.relu_sparsity import live_columns
from lirpa_megatron.operators.attention.scores import BoundScores
from lirpa_megatron.operators.coefficients import (
    IdentityRows,
    LowerUpper,
    RowBounds,
    both_sides,
    dense,
    stack_sides,
)
from lirpa_megatron.operators.context import Layout
from lirpa_megatron.operators.linear.borders import BoundGatherFromRegion
from lirpa_megatron.operators.linear.local import LocalLinear
from lirpa_megatron.operators.linear.row import BoundRowParallelLinear
from lirpa_megatron.operators.linear.vocabulary_margins import Margins
from lirpa_megatron.parallel.packed_gather import begin_gather_whole
from lirpa_megatron.rounding.charges import charges_of


class BackwardPass:
    """One backward pass from a start node, for some rows.

    Args:
        module: the bound module (for values of constants).
        layout: its layout, shared with the operators.
        sharded: node name -> whether its value is feature-sharded.
        plan: the course of the pass.
        start: the start node, by whose name operators know their alpha (`plan.start` may be what
            it gathers).
        alpha_rows: which rows of alpha this pass carries at REPLICATED, SPEC_SHARDED and BLOCK
            nodes, and how many rows the rank has in all; None when it carries all of them.
        know: the layout's `know` at each node.
    """

    def __init__(
        self,
        module: Any,
        layout: Layout,
        sharded: dict[str, bool],
        plan: PassPlan,
        start: auto_lirpa.Bound,
        alpha_rows: tuple[torch.Tensor, int] | None = None,
        know: Callable[..., Any] | None = None,
    ) -> None:
        self.module, self.layout, self.sharded = module, layout, sharded
        self.plan, self.start, self.alpha_rows, self.know = plan, start, alpha_rows, know
        self.tp = layout.collectives
        self._A: dict[str, LowerUpper] = {}
        self._partial_A: dict[str, LowerUpper] = {}
        self._bias, self._partial_bias = LowerUpper(), LowerUpper()
        self._columns: dict[str, torch.Tensor] = {}
        self._moved = {node.name for nodes in plan.moved for node in nodes}
        self._regions = iter(plan.moved)
        self._brought: Callable[[], dict[str, Any]] = dict
        self._charges = charges_of(self)

    def steps(
        self, C: Any, lower: bool, upper: bool, keep_A: bool
    ) -> Generator[None, None, RowBounds]:
        """Propagates the rows to the inputs and concretizes them.

        A generator: it pauses where it waits for other ranks, so that another pass can go on.

        Args:
            C: [rows, B, *start shape] in the layout of the start node, or IdentityRows.
            lower, upper: which bounds are asked for.
            keep_A: whether to return the coefficients at the inputs too.
        """
        self.rows, self.batch, self.like = C.shape[0], C.shape[1], C
        self.sides = lower, upper
        self._A[self.plan.start.name] = LowerUpper(C if lower else None, C if upper else None)
        self.layout.spec_sharded = self.plan.spec_sharded
        self._leave_out_columns()
        self._bring_next()
        for node in self.plan.order:
            yield from self._visit(node)
        total = yield from self._total_bias()
        result = RowBounds(*total, *total)
        for leaf in self.plan.leaves:
            lA, uA = yield from self._take(leaf)
            self._concretize(leaf, lA, uA, result)
            if keep_A:
                result.lA[leaf.name], result.uA[leaf.name] = lA, uA
        yield from self._charges.widen(result)
        return result

    # ---------------------------------------------------------------- one node

    def _visit(self, node: auto_lirpa.Bound) -> Generator[None, None, None]:
        self.tp.poll()
        lA, uA = yield from self._take(node)
        entered = yield from self._enter(node, lA, uA)
        if node.name in self._moved and node.name not in self.layout.whole:
            brought = self._brought()
            self.layout.whole.update(brought)
            self._leave_out_columns(brought)
            self._bring_next()
        # For this visit alone: other passes go on meanwhile.
        self.layout.entered, self.layout.columns = entered, self._columns
        self.layout.know = self.know
        with conjugates_of(self, node), self._alpha_of(node), self._shown_intervals(node):
            rows = self._rows_at(node)
            As, lbias, ubias = auto_lirpa.bound_backward(node, lA, uA, self.start, rows)
        self._charges.visited(node, (lA, uA), As, (lbias, ubias))
        self._add_bias(node, lbias, ubias)
        del lA, uA, entered
        self.layout.entered, self.layout.columns, self.layout.know = None, {}, None
        for x, (lA_x, uA_x) in zip(node.inputs, As, strict=False):
            if x.perturbed:
                self._send(node, x, lA_x, uA_x)
            elif lA_x is not None or uA_x is not None:
                # auto_LiRPA would concretize constants at the end, where a rank's part of the
                # sum over features is no longer known as such.
                value = self.module.get_forward_value(x)
                self._add_bias(node, *(_constant_term(A, value, x) for A in (lA_x, uA_x)))
        self.layout.whole.pop(node.name, None)

    def _bring_next(self) -> None:
        """Begins to gather what the operators of the next region need of all ranks' features."""
        nodes = next(self._regions, ())
        own = []
        for node in nodes:
            with conjugates_of(self, node):
                own.append(features_of(node))
        if own:
            whole = begin_gather_whole(self.tp, own, self.like.dtype)
            self._brought = lambda: {
                node.name: tree for node, tree in zip(nodes, whole(), strict=True)
            }

    def _leave_out_columns(self, brought: Mapping[str, Any] | None = None) -> None:
        """Finds the columns of A that this pass has around its ReLUs (`relu_sparsity`).

        Args:
            brought: features of the region where weights have just arrived; None at the start.
        """
        for linear, relu in self.module.intermediate.relus.items():
            name = relu.name
            in_use = name in self.plan.rows and relu is not self.plan.start
            if not in_use or getattr(relu, "opt_stage", None) == "init":
                continue
            if brought is None:
                live = None if name in self._moved else self.layout.active_columns.get(linear)
            else:
                live = live_columns(brought[name][1]) if name in brought else None
            if live is not None:
                self._columns[linear] = self._columns[name] = live

    def _enter(self, node: auto_lirpa.Bound, lA: Any, uA: Any) -> Generator[None, None, Any]:
        """A where the pass enters sharded features: gathered rows, or f; None elsewhere."""
        A = lA if lA is not None else uA
        reads = isinstance(node, (BoundRowParallelLinear, BoundGatherFromRegion))
        if not reads or self.tp.size == 1 or node.name in self._moved:
            return None
        if isinstance(A, IdentityRows):
            if isinstance(node, BoundRowParallelLinear):
                return None
            lA, uA = both_sides(dense, lA, uA)
        A, unstack = stack_sides(lA, uA)
        if not self.plan.spec_sharded:
            return self.tp.copy_to(A), unstack
        received = self.tp.begin_gather_rows(A)
        yield
        return received(), unstack

    @contextlib.contextmanager
    def _shown_intervals(self, node: auto_lirpa.Bound) -> Iterator[None]:
        """The host's ReLU reads its input's bounds: of all ranks, and of the columns that are left.
        """
        columns = self._columns.get(node.name)
        whole = self.layout.whole.get(node.name)
        if type(node) is not auto_lirpa.BoundRelu or (columns is None and whole is None):
            yield
            return
        x = node.inputs[0]
        own = x.lower, x.upper
        shown = own if whole is None else whole
        if columns is not None:
            shown = tuple(bound.index_select(-1, columns) for bound in shown)
        x.lower, x.upper = shown
        try:
            yield
        finally:
            x.lower, x.upper = own

    def _take(self, node: auto_lirpa.Bound) -> Generator[None, None, tuple[Any, Any]]:
        """A at the node, the partial sums of its sharded consumers included."""
        total = self._A.pop(node.name, None) or LowerUpper()
        partial = self._partial_A.pop(node.name, None)
        if partial is not None:
            self._charges.reducing(node, partial)
            self._add(node, total, *(yield from self.reduce(partial.lower, partial.upper)))
        lower = self._for_operator(node, total.lower)
        upper = lower if total.upper is total.lower else self._for_operator(node, total.upper)
        return lower, upper

    def _for_operator(self, node: auto_lirpa.Bound, A: Any) -> Any:
        """Identity rows in a form that the operator knows."""
        if not isinstance(A, IdentityRows) or isinstance(node, (LocalLinear, Margins)):
            return A
        if type(node) is auto_lirpa.BoundLinear and len(A.shape) == 3:
            return auto_lirpa.OneHotC(A.shape, A.device, A.own, None)
        return dense(A)

    def _rows_at(self, node: auto_lirpa.Bound) -> int:
        gathered = self.plan.rows[node.name] is RowPlacement.GATHERED
        return self.rows * self.tp.size if gathered else self.rows

    def is_partial(self, node: auto_lirpa.Bound) -> bool:
        """Whether what arises at the node is one rank's term of a sum over features."""
        sums = self.plan.rows[node.name] in (RowPlacement.REPLICATED, RowPlacement.GATHERED)
        return self.tp.size > 1 and sums and self.sharded[node.name]

    def _send(self, node: auto_lirpa.Bound, x: auto_lirpa.Bound, lA: Any, uA: Any) -> None:
        """Adds the node's A to that of its input, in the input's layout."""
        lA, uA = self._zeros_for_none(node, x, lA, uA)
        if self.is_partial(node) and not self.sharded[x.name]:
            self._add(x, self._partial_A.setdefault(x.name, LowerUpper()), lA, uA, partial=True)
            return
        block_to_all = (RowPlacement.BLOCK, RowPlacement.GATHERED)
        if (self.plan.rows[node.name], self.plan.rows[x.name]) == block_to_all:
            lA, uA = (None if A is None else self._among_all_rows(A) for A in (lA, uA))
        self._add(x, self._A.setdefault(x.name, LowerUpper()), lA, uA)

    def _add(
        self, x: auto_lirpa.Bound, total: LowerUpper, lA: Any, uA: Any, partial: bool = False
    ) -> None:
        known = total.lower is not None or total.upper is not None
        total.add(lA, uA)
        if known:
            self._charges.added(x, total, partial or self.is_partial(x))

    def _zeros_for_none(
        self, node: auto_lirpa.Bound, x: auto_lirpa.Bound, lA: Any, uA: Any
    ) -> tuple:
        """Some operators drop an A that is all zero, which other ranks may not find to be so."""
        want_lower, want_upper = self.sides
        if (lA is not None) == want_lower and (uA is not None) == want_upper:
            return lA, uA
        shape = (self._rows_at(node), self.batch, *self._shape_of(x))
        zeros = torch.zeros(shape, dtype=self.like.dtype, device=self.like.device)
        lower = zeros if want_lower and lA is None else lA
        return lower, zeros if want_upper and uA is None else uA

    def _shape_of(self, x: auto_lirpa.Bound) -> tuple[int, ...]:
        """Of A at a node, without rows and batch."""
        shape = list(x.output_shape)
        if x.name in self._moved and self.sharded[x.name]:
            shape[1 if isinstance(x, BoundScores) else -1] *= self.tp.size
        if x.name in self._columns:
            shape[-1] = len(self._columns[x.name])
        return tuple(shape[1:])

    def columns_at(self, node: auto_lirpa.Bound) -> torch.Tensor | None:
        """The features that A has at a node; None: all."""
        return self._columns.get(node.name)

    def _among_all_rows(self, A: torch.Tensor) -> torch.Tensor:
        """The rank's rows at their place among all rows, zero elsewhere."""
        before = self.tp.rank * self.rows
        after = (self.tp.size - 1 - self.tp.rank) * self.rows
        return F.pad(A, (0, 0) * (A.ndim - 1) + (before, after))

    def _add_bias(self, node: auto_lirpa.Bound, lower: Any, upper: Any) -> None:
        partial = self.is_partial(node)
        bias = self._partial_bias if partial else self._bias
        bias.add(*(b if isinstance(b, torch.Tensor) else None for b in (lower, upper)))
        self._charges.grew(bias, partial)

    def reduce(self, lower: Any, upper: Any) -> Generator[None, None, tuple[Any, Any]]:
        """Sums over ranks, both sides in one collective."""
        stacked, unstack = stack_sides(lower, upper)
        if not self.plan.spec_sharded:
            return unstack(self.tp.reduce_from(stacked))
        received = self.tp.begin_reduce_to_rows(stacked)
        yield
        return unstack(received())

    # ------------------------------------------------------- gradients and alpha

    @contextlib.contextmanager
    def _alpha_of(self, node: auto_lirpa.Bound) -> Iterator[None]:
        """Shows the operator the rows of alpha that this pass carries at the node.

        Alpha shared by all rows is a replicated value used on each rank's own rows, so it gets f.
        """
        if not auto_lirpa.is_optimized(node, self.start):
            with auto_lirpa.without_alpha(node):
                yield
            return
        alpha, dim = node.alpha[self.start.name], auto_lirpa.alpha_spec_dim(node)
        index = None
        if alpha.shape[dim] == 1 and self._rows_at(node) != 1:
            shown = self.tp.copy_to(alpha) if self._alpha_is_shared(node) else alpha
        elif self.alpha_rows is None:
            shown = alpha
        else:
            index = self._alpha_index(node)
            shown = alpha.index_select(dim, index)
        if node.name in self._columns:
            shown = shown.index_select(-1, self._columns[node.name])
        node.alpha[self.start.name] = shown
        try:
            yield
        finally:
            node.alpha[self.start.name] = alpha
            # S-shaped activations clip alpha where they use it.
            if index is not None and node.name not in self._columns:
                alpha.data.index_copy_(dim, index, shown.data)

    def _alpha_is_shared(self, node: auto_lirpa.Bound) -> bool:
        return self.plan.spec_sharded and not self.sharded[node.name]

    def _alpha_index(self, node: auto_lirpa.Bound) -> torch.Tensor:
        rows, in_all = self.alpha_rows
        if self.plan.rows[node.name] is not RowPlacement.GATHERED:
            return rows
        return torch.cat([rows + rank * in_all for rank in range(self.tp.size)])

    # ------------------------------------------------------------------- the end

    def _concretize(self, leaf: auto_lirpa.Bound, lA: Any, uA: Any, result: RowBounds) -> None:
        with conjugates_of_set(self, leaf):
            self._charges.concretized(leaf, (lA, uA), result)
            if lA is not None:
                result.lower = result.lower + self._extreme(leaf, lA, -1)
            if uA is not None:
                result.upper = result.upper + self._extreme(leaf, uA, +1)

    def _total_bias(self) -> Generator[None, None, tuple[Any, Any]]:
        total = self._zeros(self.rows)
        total.add(self._bias.lower, self._bias.upper)
        if self.plan.has_partial_bias:  # decided by the plan, so that every rank takes part
            partial = self.zeros_of_partial()
            partial.add(self._partial_bias.lower, self._partial_bias.upper)
            self._charges.summed(partial)
            total.add(*(yield from self.reduce(partial.lower, partial.upper)))
        return total.lower, total.upper

    def zeros_of_partial(self) -> LowerUpper:
        """A sum of the ranks' parts of biases (or of their errors) to begin with."""
        return self._zeros(self.rows * (self.tp.size if self.plan.spec_sharded else 1))

    def _zeros(self, rows: int) -> LowerUpper:
        zeros = torch.zeros(rows, self.batch, dtype=self.like.dtype, device=self.like.device)
        return LowerUpper(*(zeros if wanted else None for wanted in self.sides))

    def _extreme(self, leaf: auto_lirpa.Bound, A: torch.Tensor, sign: int) -> torch.Tensor:
        """min (sign -1) or max (+1) of <A, x> over the perturbation set: [rows, B]."""
        A = dense(A).reshape(self.rows, self.batch, -1).transpose(0, 1)
        bound = leaf.perturbation.concretize(leaf.center, A, sign=sign, aux=leaf.aux)
        return bound.reshape(self.batch, self.rows).transpose(0, 1)


def _constant_term(A: Any, value: torch.Tensor, node: auto_lirpa.Bound) -> Any:
    """<A, value> for each row: A [R, B, ...], value [B, ...] or [...] without a batch -> [R, B]."""
    if A is None:
        return None
    pattern = "sb...,...->sb" if node.batch_dim == -1 else "sb...,b...->sb"
    return torch.einsum(pattern, A, value.to(A.dtype))
