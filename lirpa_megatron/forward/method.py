"""`compute_bounds(method="forward")`: bounds of the specification's rows from a forward pass."""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.forward.adjoint import Adjoint, smallest_rows
from lirpa_megatron.forward.form import Form, times
from lirpa_megatron.forward.propagation import ForwardOptions, Run
from lirpa_megatron.forward.weights import Weights
from lirpa_megatron.operators.numerics import intersect, safe_root, without_nan
from lirpa_megatron.parallel import spmd

Pair = list[torch.Tensor | None]


def forward_run(module: Any, order: int | None = None) -> Run:
    """A pass over the graph of a BoundedModule whose inputs are set."""
    own = module.own_options
    nodes = module.named_nodes()
    weights = module.__dict__.setdefault("_forward_weights", Weights())
    weights.begin({
        name: node.param for name, node in nodes.items() if isinstance(node, auto_lirpa.BoundParams)
    }, module.context.collectives)
    options = ForwardOptions(
        own.order if order is None else order, own.form_symbols, own.kept_errors,
        own.refined_rows,
    )
    return Run(nodes, module.context, module.get_forward_value, weights, Adjoint, options)


def bound_forward(module: Any, call: auto_lirpa.BackwardCall) -> Pair:
    """Bounds of the rows of the specification.

    Args:
        module: a BoundedModule, in a call of `compute_bounds`.
        call: of the host; its C [B, S, *node shape] is not read if the output itself is bounded.

    Returns:
        (lower, upper), each [B, S] or [B, *node shape], None of a side that is not asked for; of a
        sharded output without a specification the rank's own features.
    """
    final, identity = call.node, module.call.final_is_identity
    run = forward_run(module)
    form = run.to(final)
    rows = _Rows(run, final, form, None if identity else call.C.to(form.c))
    lower, upper = rows.bounds(module.own_options.adjoint_rows)
    shape = final.output_shape[1:]
    if identity and form.limits is not None:
        ends = (b.flatten(1) for b in form.limits)
        lower, upper = intersect((lower, upper), tuple(ends))
    if identity:
        lower, upper = (b.reshape(b.shape[0], *shape) for b in (lower, upper))
    return [lower if call.lower else None, upper if call.upper else None]


def forward_range(module: Any, node: auto_lirpa.Bound) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of an intermediate node, [B, *node shape], of a sharded one the rank's own features.

    One pass finds those of all nodes for the rest of the call.
    """
    call = module.call
    if call.ranges is None:
        call.ranges = found = {}
        run = forward_run(module)

        def note(node: auto_lirpa.Bound, form: Form) -> None:
            found[node.name] = without_nan(*run.range(form))

        run.to(module[module.final_node_name], note)
    return call.ranges[node.name]


class _Rows:
    """The rows of a specification, of a form.

    Args:
        run: after its pass.
        final: the node.
        form: of the node.
        C: [B, S, *node shape], for a sharded node of the rank's own features; None: the identity.
    """

    def __init__(self, run: Run, final: Any, form: Form, C: torch.Tensor | None) -> None:
        self.run, self.final, self.form = run, final, form
        self.C = None if C is None else C.flatten(2)
        self.ranks = run.ranks(final)
        self.spread = C is None and self.ranks.size > 1
        """Whether each rank has its own rows."""

    def bounds(self, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(lower, upper), [B, S]; the errors of up to `most` rows through the adjoint."""
        c, error = self._through()
        low, high = self.run.domain_of(self.form).ends(c)
        if self.run.errors is not None:
            return self._better_of_two(c, (low - error, high + error), most)
        if self.run.steps:
            error = self._by_adjoint(low - torch.where(error.isfinite(), error, 0.0), error, most)
        error = torch.where(error.isnan(), torch.inf, error)
        return low - error, high + error

    def _better_of_two(
        self, c: torch.Tensor, ends: tuple[torch.Tensor, torch.Tensor], most: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where errors are symbols: bounds with these, and with the errors of the adjoint."""
        found = without_nan(*ends)
        low, high = self.run.domain_of(self.form).ends(c[: 1 + self.run.errors.own])
        candidates = torch.where(found[0].isfinite(), found[0], low)
        error = self._by_adjoint(candidates, torch.full_like(low, torch.inf), most)
        error = torch.where(error.isnan(), torch.inf, error)
        return intersect(found, (low - error, high + error))

    def _through(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients [M, B, S] and remainders [B, S] of the rows."""
        c, box = self.form.c.flatten(2), self.form.box.flatten(1)
        if self.C is None:
            return c, box
        rows = self.C
        c = self.ranks.total(torch.einsum("bsf,mbf->mbs", rows, c))
        error = self.ranks.total(_sums(rows.abs(), box))
        if self.form.c.ndim == 3:
            stretch = 1.0 if self.form.stretch is None else self.form.stretch
            size = safe_root(self.ranks.total((rows * stretch).square().sum(-1)))
            error = torch.minimum(error, times(size, self.form.ball.unsqueeze(-1)))
        return c, error

    def _by_adjoint(
        self, candidates: torch.Tensor, error: torch.Tensor, most: int
    ) -> torch.Tensor:
        """Errors of the rows with the least `candidates`, at most those given."""
        with torch.no_grad():
            if self.spread:
                candidates = self.run.context.collectives.gather_features(candidates)
            if most < 1:
                return error
            chosen = smallest_rows(candidates, most)
            if chosen:  # the first rank's choice: sums over features are of the same rows
                group = self.run.context.collectives.group
                chosen = spmd.broadcast_tensor(torch.stack(chosen), group).unbind(0)
        adjoint = Adjoint(self.run, self.final)
        for index in chosen:
            found = adjoint.errors(self._row(index))
            own, width = index, error.shape[1]
            if self.spread:
                own = index - self.ranks.rank * width
            here = (own >= 0) & (own < width)
            place = torch.nn.functional.one_hot(own.clamp(0, width - 1), width).bool()
            place = place & here.unsqueeze(-1)
            better = torch.minimum(error, found.unsqueeze(-1))
            error = torch.where(place, better, error)
        return error

    def _row(self, index: torch.Tensor) -> torch.Tensor:
        """One row of each sample, [B, *output shape]."""
        shape = self.form.shape
        if self.C is not None:
            return self.C[torch.arange(len(index), device=index.device), index].reshape(shape)
        width = self.form.box[0].numel()
        own = index - self.ranks.rank * width if self.spread else index
        here = ((own >= 0) & (own < width)).to(self.form.box)
        row = torch.nn.functional.one_hot(own.clamp(0, width - 1), width).to(self.form.box)
        return (row * here.unsqueeze(-1)).reshape(shape)


def _sums(rows: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """sum_f rows [B, S, f] box [B, f], where 0 times infinity is 0."""
    if bool(box.isfinite().all()):
        return torch.einsum("bsf,bf->bs", rows, box)
    return times(rows, box.unsqueeze(1)).sum(-1)
