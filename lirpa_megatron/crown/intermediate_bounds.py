"""Bounds of intermediate nodes: which of them by interval arithmetic, which rows by CROWN."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.affine_forms import readers_of_form
from lirpa_megatron.crown.auxiliary_rows import bound_centered, reader_of_scores
from lirpa_megatron.crown.graph import BoundGraph
from lirpa_megatron.crown.relu_sparsity import (
    UnstableRows,
    between_linears,
    live_columns,
    relus_decide,
    unstable_rows,
    with_rows,
)
from lirpa_megatron.crown.still_rows import StillRows
from lirpa_megatron.forward.method import forward_range
from lirpa_megatron.operators import cut_with_range
from lirpa_megatron.operators.affine.form import AffineForm
from lirpa_megatron.operators.numerics import without_nan
from lirpa_megatron.problem.perturbations import is_box

Pair = tuple[torch.Tensor, torch.Tensor]


class Intermediate:
    """Bounds the intermediate nodes of one bound graph.

    Attributes:
        relus: see `relu_sparsity.between_linears`.
        with_alpha: node name -> the rows that have alpha in passes from there (None: all of them),
            since alpha was last begun; nodes of which not all rows count.
    """

    def __init__(self, graph: BoundGraph) -> None:
        self.graph, self.tp, self.sharded = graph, graph.context.collectives, graph.context.sharded
        self.relus = between_linears(graph.named_nodes().values())
        self.with_alpha: dict[str, UnstableRows | None] = {}
        self.still = StillRows(graph)
        self._without_alpha = 0

    @property
    def has_alpha(self) -> bool:
        """Whether alpha-CROWN has alpha for the passes of intermediate nodes (`OwnOptions`)."""
        choice = self.graph.own_options.optimize_intermediate
        if choice == "auto":
            return not self.graph.relaxes_rows
        return bool(choice)

    def knows(self, node: auto_lirpa.Bound) -> bool:
        """Whether the node's bounds are kept from before."""
        return bool(self.graph.call.kept) and node.name in self.graph.call.kept

    def compute(self, node: auto_lirpa.Bound) -> None:
        """Bounds of a node whose predecessors have theirs, into `node.lower` and `node.upper`.

        Each is [B, *node shape]: the rank's own features at a sharded node, else the same on every
        rank.

        Sharded nodes are bounded by the rank that has them, replicated ones row by row on all
        ranks; both exactly, by a backward pass to the input.
        """
        kept = self.graph.call.kept
        if self.knows(node):
            node.lower, node.upper = kept[node.name]
        elif not node.perturbed:
            node.lower = node.upper = self.graph.get_forward_value(node)
        else:
            self._compute(node)
            self._note_live_columns(node)
            if kept is not None:
                kept[node.name] = (node.lower, node.upper)
        node.interval = (node.lower, node.upper)

    def _compute(self, node: auto_lirpa.Bound) -> None:
        graph, call = self.graph, self.graph.call
        readers = [graph[name] for name in node.output_name]
        attend, use = reader_of_scores(node, readers), readers_of_form(node, readers)
        known = None if use or attend is not None else self.without_pass(node)
        if call.method == "forward+backward":
            attend, known = None, forward_range(graph, node)
        if attend is not None:
            node.lower, node.upper = self.ibp(node)
            first = self.still.first(node)
            call.centered[node.name] = bound_centered(graph, node, attend, first)
            call.to_be_read(node.name, {attend.name})
        elif known is not None:
            node.lower, node.upper = known
        elif self._rows_are_sparse(node, readers):
            node.lower, node.upper = self._bound_unstable(node)
        else:
            for reader in readers:
                if use and getattr(reader, "asks_directions", False):
                    found = graph.schedule.directions.along(node, reader.directions())
                    call.directions[reader.name] = found.mapped(reader.of_vectors)
            form = self._by_rows(node, bool(use))
            if form is not None:
                call.forms[node.name] = form
                call.to_be_read(node.name, use)
        found = without_nan(node.lower, node.upper)
        if use and self._is_activation(node):
            found = cut_with_range(node, *found)
        if graph.own_options.compare_crown_with_ibp:
            found = _tighter(found, self.ibp(node))
        if node.name in graph.reference_bounds:
            found = _tighter(found, graph.reference_bounds[node.name])
        node.lower, node.upper = found

    def _by_rows(self, node: auto_lirpa.Bound, form: bool) -> AffineForm | None:
        """Bounds by a pass for all rows but those of positions that stand still, and the form."""
        schedule, first = self.graph.schedule, self.still.first(node)
        if first:
            rows = self.still.rows(node, first)
            bounds = schedule.run(node, None, self.tp.size > 1, form=form, rows=rows)
            node.lower, node.upper, found = self.still.whole(node, first, bounds)
            return found
        others = self.with_alpha.get(node.name) is not None  # rows of alpha, these are all
        with self.without_alpha() if others else contextlib.nullcontext():
            bounds = schedule.run(node, None, self.tp.size > 1, form=form)
        node.lower, node.upper = bounds.shaped(node.output_shape[1:])
        return bounds.form

    def _is_activation(self, node: auto_lirpa.Bound) -> bool:
        """Whether the node reads bounds of its one input; of a stage's input: what it stands for.
        """
        if node is self.graph.stage_input:
            return self.graph.below.facts.is_activation
        return len(node.inputs) == 1 and auto_lirpa.reads_bounds(node)

    def from_inputs(self, node: auto_lirpa.Bound) -> bool:
        """Whether the node reads a perturbed input; of a stage's input: what it stands for."""
        if node is self.graph.stage_input:
            return self.graph.below.facts.from_inputs
        return any(type(x) is auto_lirpa.BoundInput and x.perturbed for x in node.inputs)

    def without_pass(self, node: auto_lirpa.Bound) -> Pair | None:
        """Bounds by IBP where it gives what CROWN gives; None elsewhere."""
        if node is self.graph.stage_input:
            return self.graph.below.facts.bounds
        return (node.lower, node.upper) if self._bounded_by_ibp(node) else None

    def _bounded_by_ibp(self, node: auto_lirpa.Bound) -> bool:
        """IBP where it gives what CROWN gives: monotone activations, and a first linear layer."""
        graph = self.graph
        x = node.inputs[0] if node.inputs else None
        ptb = getattr(x, "perturbation", None)
        if isinstance(node, auto_lirpa.BoundLinear) and ptb is not None and not is_box(ptb):
            return False  # its interval is the box around the set
        if graph.check_IBP_intermediate(node) or graph.check_IBP_first_linear(node):
            return True
        exact = getattr(node, "exact_by_intervals", False)
        wanted_A = node.name in graph.needed_A_dict
        if exact and type(x) is auto_lirpa.BoundInput and x.perturbed and not wanted_A:
            node.lower, node.upper = graph.IBP_general(node)
            return True
        return False

    # ----------------------------------------------------------------------- ReLUs

    def _rows_are_sparse(self, node: auto_lirpa.Bound, readers: Sequence[auto_lirpa.Bound]) -> bool:
        """Whether only neurons that are not known to be stable get rows of A."""
        graph = self.graph
        return (
            graph.own_options.sparse_intermediate_bounds
            and relus_decide(readers)
            and not self.from_inputs(node)  # a ball's interval is the box around it
            and not getattr(node, "identity_starts_at_input", False)
            and node.name not in graph.needed_A_dict
        )

    def _bound_unstable(self, node: auto_lirpa.Bound) -> Pair:
        """Bounds of neurons that cheaper ones leave unstable by CROWN, the cheaper ones of others.

        Cheaper than CROWN is interval arithmetic; for alpha's own see `_by_alpha`.
        """
        stages = {operator.opt_stage for operator in self.graph.optimizable_activations}
        in_use = bool(stages & {"opt", "reuse"})
        if in_use and node.name in self.with_alpha:
            return self._by_alpha(node)
        begins = not in_use and "init" in stages and self.graph.has_alpha(node)
        if begins and not self.graph.own_options.sparse_spec_alpha:
            self.with_alpha[node.name] = None
            return self._of_rows(node, None, None)
        found = self._by_crown(node, None)
        if begins:
            self.graph.call.before_alpha[node.name] = found
            rows = unstable_rows(self.tp, found, self.sharded[node.name])
            self.with_alpha[node.name] = None if self._too_many(rows) else rows
        return found

    def _by_alpha(self, node: auto_lirpa.Bound) -> Pair:
        """Bounds in an iteration of alpha-CROWN, or with the alpha of an earlier call.

        As with auto_LiRPA 0.7.1's `sparse_spec_alpha`, a neuron that the best bounds of earlier
        iterations show to be stable keeps those. The first iteration's are CROWN's, so that alpha
        is of use to no more than the rows that CROWN leaves unstable. Alpha of an earlier call is
        of the rows that it was made for; others go without.
        """
        rows, best = self.with_alpha[node.name], self.graph.aux_reference_bounds.get(node.name)
        known = best or self.graph.call.before_alpha.get(node.name)
        if rows is not None and known is None:
            with self.without_alpha():
                known = self.graph.call.before_alpha[node.name] = self._by_crown(node, rows.own)
        found = self._of_rows(node, known, rows)
        if best is None:
            return found
        unstable = unstable_rows(self.tp, best, self.sharded[node.name])
        if self._too_many(unstable):
            return found
        lower, upper = (bound.flatten(1).t()[unstable.own] for bound in found)
        return with_rows(tuple(best), unstable.own, lower, upper)

    def _by_crown(self, node: auto_lirpa.Bound, skip: torch.Tensor | None) -> Pair:
        """CROWN's bounds of neurons that IBP leaves unstable, IBP's of the rest and of `skip`."""
        known = without_nan(*self.ibp(node))
        rows = unstable_rows(self.tp, known, self.sharded[node.name], skip)
        return self._of_rows(node, known, None if self._too_many(rows) else rows)

    @contextlib.contextmanager
    def without_alpha(self) -> Iterator[None]:
        """For passes of rows that have no alpha."""
        self._without_alpha += 1
        try:
            with contextlib.ExitStack() as stack:
                for operator in self.graph.optimizable_activations:
                    stack.enter_context(auto_lirpa.without_alpha(operator))
                yield
        finally:
            self._without_alpha -= 1

    @property
    def is_without_alpha(self) -> bool:
        """Whether passes have none at present."""
        return self._without_alpha > 0

    def _too_many(self, rows: UnstableRows) -> bool:
        return rows.share > self.graph.bound_opts.get("minimum_sparsity", 0.9)

    def _of_rows(
        self, node: auto_lirpa.Bound, known: Pair | None, rows: UnstableRows | None
    ) -> Pair:
        """`known` with rows bounded by a pass; None: all of them are."""
        if rows is None:
            bounds = self.graph.schedule.run(node, None, self.tp.size > 1)
            return bounds.shaped(node.output_shape[1:])
        if rows.share == 0:
            return known
        found = self.graph.schedule.run(node, None, self.tp.size > 1, rows=rows.filled)
        return with_rows(known, rows.own, found.lower, found.upper)

    def rows_with_alpha(self, start: auto_lirpa.Bound) -> int:
        """How many rows of alpha the passes from an intermediate node have, on this rank."""
        rows = self.with_alpha.get(start.name)
        return self.graph.schedule.rows_run(start) if rows is None else len(rows.filled)

    def _note_live_columns(self, node: auto_lirpa.Bound) -> None:
        """Which of the node's features passes from later nodes leave out."""
        graph = self.graph
        if node.name not in self.relus or not graph.own_options.sparse_intermediate_bounds:
            return
        columns = live_columns(node.upper, None if self.sharded[node.name] else self.tp)
        graph.call.active_columns.pop(node.name, None)
        if columns is not None:
            graph.call.active_columns[node.name] = columns

    # ------------------------------------------------------------------------- IBP

    def ibp(self, node: auto_lirpa.Bound) -> Pair:
        """Interval bounds of a node from the bounds of its inputs."""
        return node.interval_propagate(*[self._interval_of(x) for x in node.inputs])

    def _interval_of(self, x: auto_lirpa.Bound) -> Any:
        if not hasattr(x, "interval"):
            x.interval = self.ibp(x) if x.perturbed else (self.graph.get_forward_value(x),) * 2
        return x.interval


def _tighter(found: Pair, other: Any) -> Pair:
    """The tighter of two sound bounds, with the gradient of the computed one (as the host)."""
    lower, upper = torch.max(other[0].detach(), found[0]), torch.min(other[1].detach(), found[1])
    if found[0].requires_grad:
        lower = found[0] + (lower - found[0]).detach()
        upper = found[1] + (upper - found[1]).detach()
    return lower, upper
