"""CROWN's backward pass over a sharded bound graph.

The host's operators do the geometry (`bound_backward`); this traversal keeps track of where rows
and features of A lie (`crown.placement`) and takes the sums over ranks. It replaces the host's
`backward_general`, which knows one device, and is the same for both host versions.

Shapes: S rows, n = ceil(S/p) of them per rank, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.communication import features_of
from lirpa_megatron.crown.conjugates import conjugates_of_set, inputs_in_pass
from lirpa_megatron.crown.graph import Passes
from lirpa_megatron.crown.host_visit import visit_host
from lirpa_megatron.crown.pass_alpha import alpha_at, keep_clipped
from lirpa_megatron.crown.pass_window import PassWindow
from lirpa_megatron.crown.placement import PassPlan, RowPlacement
from lirpa_megatron.crown.relu_sparsity import live_columns
from lirpa_megatron.crown.stage_below import Course
from lirpa_megatron.operators.affine.form import LinearFormBounds
from lirpa_megatron.operators.coefficients import (
    IdentityRows,
    LowerUpper,
    Propagated,
    RowBounds,
    dense,
    stack_sides,
)
from lirpa_megatron.operators.context import OperatorInputs, Visit
from lirpa_megatron.operators.operator import Operator, Sharding
from lirpa_megatron.parallel.packed_gather import begin_gather_whole
from lirpa_megatron.rounding.charges import charges_of

UPSTREAM = object()
"""What a pass yields when its rows have gone on to the stage below."""


class BackwardPass:
    """One backward pass from a start node, for some rows.

    Args:
        graph: the bound graph.
        plan: the course of the pass.
        start: the start node, by whose name operators know their alpha (`plan.start` may be what
            it gathers).
        alpha_rows: which rows of alpha this pass carries at REPLICATED, SPEC_SHARDED and BLOCK
            nodes, and how many rows the rank has in all; None when it carries all of them.
        answer: bounds rows that an operator wants to know of (`Operator.wanted_rows`); None where
            none are bounded on the way.
        course: what the stages below have to know of the pass; None where there are none.
        window: the positions that A has; None: all.
    """

    def __init__(
        self,
        graph: Passes,
        plan: PassPlan,
        start: auto_lirpa.Bound,
        alpha_rows: tuple[torch.Tensor, int] | None = None,
        answer: Callable[[auto_lirpa.Bound, torch.Tensor], LinearFormBounds | None] | None = None,
        course: Course | None = None,
        window: PassWindow | None = None,
    ) -> None:
        self.plan, self.start, self.alpha_rows, self.answer = plan, start, alpha_rows, answer
        self.context, self.call, self.relus = graph.context, graph.call, graph.intermediate.relus
        self.tp, self.sharded = self.context.collectives, self.context.sharded
        self.course, self.below, self.window = course, graph.below, window
        self._A: dict[str, LowerUpper] = {}
        self._partial_A: dict[str, LowerUpper] = {}
        self._bias, self._partial_bias = LowerUpper(), LowerUpper()
        self._columns: dict[str, torch.Tensor] = {}
        self._folded = graph.folded
        if self._folded is not None:
            self._columns[self._folded.leaf] = self._folded.columns
        self._moved = {node.name for nodes in plan.moved for node in nodes}
        self._regions = iter(plan.moved)
        self._brought: Callable[[], dict[str, Any]] = dict
        self._gathered: dict[str, Any] = {}
        self._charges = charges_of(self, graph.rounding)

    def steps(
        self, C: LowerUpper, keep_A: bool, bias: LowerUpper | None = None
    ) -> Generator[Any, None, RowBounds]:
        """Propagates the rows to the inputs and concretizes them.

        A generator: it pauses where it waits for other ranks, so that another pass can go on
        (`UPSTREAM`: for the stage below).

        Args:
            C: [rows, B, *start shape] in the layout of the start node, or IdentityRows; None of a
                side that is not asked for.
            keep_A: whether to return the coefficients at the inputs too.
            bias: [rows, B] of each side, what stages above have added up.
        """
        self.like = C.either
        self.rows, self.batch = self.like.shape[:2]
        self.sides = C.lower is not None, C.upper is not None
        self._A[self.plan.start.name] = LowerUpper(*C)
        if bias is not None:
            self._bias.add(*bias)
        self._leave_out_columns()
        self._bring_next()
        for node in self.plan.order:
            yield from self._visit(node)
        total = yield from self._total_bias()
        if self.below is not None:
            A = yield from self._take(self.plan.leaves[0])
            self._charges.grew(total, False)
            found = self.below.rows(A, total, self.course)
            yield UPSTREAM
            result = found()
        else:
            result = RowBounds(total.lower, total.upper, total.lower, total.upper)
            for leaf in self.plan.leaves:
                A = yield from self._take(leaf)
                self._concretize(leaf, A, result)
                if keep_A:
                    result.lA[leaf.name], result.uA[leaf.name] = A
        yield from self._charges.widen(result)
        return result

    # ---------------------------------------------------------------- one node

    def _visit(self, node: auto_lirpa.Bound) -> Generator[Any, None, None]:
        self.tp.poll()
        A = yield from self._take(node)
        entered = yield from self._enter(node, A)
        if node.name in self._moved and node.name not in self._gathered:
            brought = self._brought()
            self._gathered.update(brought)
            self._leave_out_columns(brought)
            self._bring_next()
        alpha, index = alpha_at(self, node)
        visit = Visit(
            inputs=self._inputs_of(node),
            spec_sharded=self.plan.spec_sharded,
            rows=self.rows_at(node),
            alpha=alpha,
            gathered=self._gathered.get(node.name), columns=self._columns, entered=entered,
            positions=None if self.window is None else self.window.of(node),
        )
        found = self._through(node, A, visit, alpha, index)
        self._charges.visited(node, tuple(A), found)
        self._add_bias(node, found.bias)
        if self._folded is not None and self._folded.leaf in (x.name for x in node.inputs):
            self._add_bias(node, self._folded.bias(node, A, visit))
        del A, entered, visit
        for i, x in enumerate(node.inputs):
            A_x = found.A[i] if i < len(found.A) else LowerUpper()
            if x.perturbed:
                A_x = self._zeros_for_none(node, x, A_x)
                self._send(node, x, self._in_window(node, i, A_x))
            elif A_x.either is not None:
                # auto_LiRPA would concretize constants at the end, where a rank's part of the
                # sum over features is no longer known as such.
                value = self.context.value_of(x)
                self._add_bias(node, A_x.map(lambda A, v=value, x=x: _constant_term(A, v, x)))
        self._gathered.pop(node.name, None)

    def _in_window(self, node: auto_lirpa.Bound, index: int, A: LowerUpper) -> LowerUpper:
        """A at an input, in the positions that it has there; of constants into the bias."""
        if self.window is None:
            return A
        A, still = self.window.leaving(node, index, A)
        if still is not None:
            x = node.inputs[index]
            value = self.context.value_of(x)[:, : self.window.first]
            self._add_bias(node, still.map(lambda A: _constant_term(A, value, x)))
        return A

    def _through(
        self, node: auto_lirpa.Bound, A: LowerUpper, visit: Visit, alpha: Any, index: Any
    ) -> Propagated:
        """What the operator passes on; `alpha` and `index` as `alpha_at` gives them."""
        if self.window is not None and self.window.is_sum(node):
            return Propagated((A, A))
        if isinstance(node, Operator):
            return node.bound_backward(A, self._answered(node, A, visit))
        found = visit_host(node, A, self._with_shown_bounds(node, visit), self.start)
        keep_clipped(self, node, alpha, index)
        return found

    def _inputs_of(self, node: auto_lirpa.Bound) -> OperatorInputs:
        return inputs_in_pass(node, self.context, self.call, self.plan.spec_sharded)

    def _answered(self, node: Operator, A: LowerUpper, visit: Visit) -> Visit:
        """With answers to what the operator wants to know of its first input."""
        x = node.inputs[0]
        ask = self.answer is not None and node.asks_rows and x.inputs and not self.sharded[x.name]
        if not ask:
            return visit
        return replace(visit, answers=tuple(
            self.answer(x, vectors) for vectors in node.wanted_rows(A, visit)
        ))

    def _bring_next(self) -> None:
        """Begins to gather what the operators of the next region need of all ranks' features."""
        nodes = next(self._regions, ())
        own = [features_of(node, self._inputs_of(node)) for node in nodes]
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
        for linear, relu in self.relus.items():
            name = relu.name
            in_use = name in self.plan.rows and relu is not self.plan.start
            if not in_use or getattr(relu, "opt_stage", None) == "init":
                continue
            if brought is None:
                live = None if name in self._moved else self.call.active_columns.get(linear)
            else:
                live = live_columns(brought[name][1]) if name in brought else None
            if live is not None:
                self._columns[linear] = self._columns[name] = live

    def _enter(self, node: auto_lirpa.Bound, A: LowerUpper) -> Generator[None, None, Any]:
        """A where the pass enters sharded features: gathered rows, or copied; None elsewhere."""
        joins = getattr(node, "sharding", None) is Sharding.JOINS
        if not joins or self.tp.size == 1 or node.name in self._moved:
            return None
        if isinstance(A.either, IdentityRows) and node.takes_identity:
            return None
        stacked, unstack = stack_sides(*A.dense())
        if not self.plan.spec_sharded:
            return self.tp.copy_to(stacked), unstack
        received = self.tp.begin_gather_rows(stacked)
        yield
        return received(), unstack

    def _with_shown_bounds(self, node: auto_lirpa.Bound, visit: Visit) -> Visit:
        """For the host's ReLU: its input's bounds of all ranks, and of the columns that are left.
        """
        columns = self._columns.get(node.name)
        if type(node) is not auto_lirpa.BoundRelu or (columns is None and visit.gathered is None):
            return visit
        x = visit.inputs[0]
        shown = (x.lower, x.upper) if visit.gathered is None else visit.gathered
        if columns is not None:
            shown = tuple(bound.index_select(-1, columns) for bound in shown)
        views = (replace(x, lower=shown[0], upper=shown[1]), *visit.inputs.views[1:])
        return replace(visit, inputs=replace(visit.inputs, views=views))

    def _take(self, node: auto_lirpa.Bound) -> Generator[None, None, LowerUpper]:
        """A at the node, the partial sums of its sharded consumers included."""
        total = self._A.pop(node.name, None) or LowerUpper()
        partial = self._partial_A.pop(node.name, None)
        if partial is not None:
            self._charges.reducing(node, partial)
            self._add(node, total, (yield from self.reduce(partial)))
        return total.map(lambda A: self._for_operator(node, A))

    def _for_operator(self, node: auto_lirpa.Bound, A: Any) -> Any:
        """Identity rows in a form that the operator knows, in the positions that it takes."""
        sums = self.window is not None and self.window.is_sum(node)
        if not isinstance(A, IdentityRows) or sums or getattr(node, "takes_identity", False):
            return A if self.window is None else self.window.entering(node, A)
        if type(node) is auto_lirpa.BoundLinear and len(A.shape) == 3:
            return auto_lirpa.OneHotC(A.shape, A.device, A.own, None)
        return dense(A) if self.window is None else self.window.entering(node, dense(A))

    def rows_at(self, node: auto_lirpa.Bound) -> int:
        gathered = self.plan.rows[node.name] is RowPlacement.GATHERED
        return self.rows * self.tp.size if gathered else self.rows

    def is_partial(self, node: auto_lirpa.Bound) -> bool:
        """Whether what arises at the node is one rank's term of a sum over features."""
        sums = self.plan.rows[node.name] in (RowPlacement.REPLICATED, RowPlacement.GATHERED)
        return self.tp.size > 1 and sums and self.sharded[node.name]

    def _send(self, node: auto_lirpa.Bound, x: auto_lirpa.Bound, A: LowerUpper) -> None:
        """Adds the node's A to that of its input, in the input's placement."""
        if self.is_partial(node) and not self.sharded[x.name]:
            self._add(x, self._partial_A.setdefault(x.name, LowerUpper()), A, partial=True)
            return
        block_to_all = (RowPlacement.BLOCK, RowPlacement.GATHERED)
        if (self.plan.rows[node.name], self.plan.rows[x.name]) == block_to_all:
            A = LowerUpper(*(None if side is None else self._among_all_rows(side) for side in A))
        self._add(x, self._A.setdefault(x.name, LowerUpper()), A)

    def _add(
        self, x: auto_lirpa.Bound, total: LowerUpper, A: LowerUpper, partial: bool = False
    ) -> None:
        known = total.either is not None
        total.add(*A)
        if known:
            self._charges.added(x, total, partial or self.is_partial(x))

    def _zeros_for_none(
        self, node: auto_lirpa.Bound, x: auto_lirpa.Bound, A: LowerUpper
    ) -> LowerUpper:
        """Some operators drop an A that is all zero, which other ranks may not find to be so."""
        if tuple(side is not None for side in A) == self.sides:
            return A
        shape = (self.rows_at(node), self.batch, *self._shape_of(x))
        zeros = torch.zeros(shape, dtype=self.like.dtype, device=self.like.device)
        return LowerUpper(*(
            zeros if wanted and side is None else side
            for side, wanted in zip(A, self.sides, strict=True)
        ))

    def _shape_of(self, x: auto_lirpa.Bound) -> tuple[int, ...]:
        """Of A at a node, without rows and batch."""
        shape = list(x.output_shape)
        if x.name in self._moved and self.sharded[x.name]:
            shape[getattr(x, "sharded_dim", -1)] *= self.tp.size
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

    def _add_bias(self, node: auto_lirpa.Bound, term: LowerUpper) -> None:
        partial = self.is_partial(node)
        bias = self._partial_bias if partial else self._bias
        bias.add(*(b if isinstance(b, torch.Tensor) else None for b in term))
        self._charges.grew(bias, partial)

    def reduce(self, parts: LowerUpper) -> Generator[None, None, LowerUpper]:
        """Sums over ranks, both sides in one collective."""
        stacked, unstack = stack_sides(*parts)
        if not self.plan.spec_sharded:
            return LowerUpper(*unstack(self.tp.reduce_from(stacked)))
        received = self.tp.begin_reduce_to_rows(stacked)
        yield
        return LowerUpper(*unstack(received()))

    # ------------------------------------------------------------------- the end

    def _concretize(self, leaf: auto_lirpa.Bound, A: LowerUpper, result: RowBounds) -> None:
        with conjugates_of_set(leaf, self.plan.spec_sharded, self.tp.copy_to):
            self._charges.concretized(leaf, tuple(A), result)
            if A.lower is not None:
                result.lower = result.lower + self._extreme(leaf, A.lower, -1)
            if A.upper is not None:
                result.upper = result.upper + self._extreme(leaf, A.upper, +1)

    def _total_bias(self) -> Generator[None, None, LowerUpper]:
        total = self._zeros(self.rows)
        total.add(*self._bias)
        if self.plan.has_partial_bias:  # decided by the plan, so that every rank takes part
            partial = self.zeros_of_partial()
            partial.add(*self._partial_bias)
            self._charges.summed(partial)
            total.add(*(yield from self.reduce(partial)))
        return total

    def zeros_of_partial(self) -> LowerUpper:
        """A sum of the ranks' parts of biases (or of their errors) to begin with."""
        return self._zeros(self.rows * (self.tp.size if self.plan.spec_sharded else 1))

    def _zeros(self, rows: int) -> LowerUpper:
        zeros = torch.zeros(rows, self.batch, dtype=self.like.dtype, device=self.like.device)
        return LowerUpper(*(zeros if wanted else None for wanted in self.sides))

    def _extreme(self, leaf: auto_lirpa.Bound, A: torch.Tensor, sign: int) -> torch.Tensor:
        """min (sign -1) or max (+1) of <A, x> over the perturbation set: [rows, B]."""
        if self._folded is not None and self._folded.leaf == leaf.name:
            return self._folded.extreme(A, sign)
        A = dense(A).reshape(self.rows, self.batch, -1).transpose(0, 1)
        bound = leaf.perturbation.concretize(leaf.center, A, sign=sign, aux=leaf.aux)
        return bound.reshape(self.batch, self.rows).transpose(0, 1)


def _constant_term(A: torch.Tensor, value: torch.Tensor, node: auto_lirpa.Bound) -> torch.Tensor:
    """<A, value> for each row: A [R, B, ...], value [B, ...] or [...] without a batch -> [R, B]."""
    pattern = "sb...,...->sb" if node.batch_dim == -1 else "sb...,b...->sb"
    return torch.einsum(pattern, A, value.to(A.dtype))
