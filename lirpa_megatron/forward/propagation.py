"""Runs the rules over a bound graph, from the perturbed inputs to a node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.forward import (
    attention_rules,
    elementwise_rules,
    linear_rules,
    norm_rule,
    score_rules,
)
from lirpa_megatron.forward.costs import Costs
from lirpa_megatron.forward.domains import Domain
from lirpa_megatron.forward.error_symbols import ErrorSymbols, errors_kept
from lirpa_megatron.forward.form import Form, Outcome, squared
from lirpa_megatron.forward.inputs import Symbols, of_leaves
from lirpa_megatron.forward.polynomials import Polynomials
from lirpa_megatron.forward.ranks import Ranks
from lirpa_megatron.forward.rules import reads_shares, rule_of
from lirpa_megatron.forward.shared_domain import SharedDomain
from lirpa_megatron.forward.shares import FEWEST, Shares
from lirpa_megatron.forward.weights import Weights
from lirpa_megatron.forward.windows import Window, window
from lirpa_megatron.operators.attention.scores import BoundScores
from lirpa_megatron.operators.attention.softmax_values import BoundSoftmaxValues
from lirpa_megatron.operators.context import GraphContext
from lirpa_megatron.operators.linear.borders import (
    BoundGatherFromRegion,
    BoundSelectFromRegion,
)
from lirpa_megatron.operators.linear.positions import BoundRotary, BoundSelectPosition
from lirpa_megatron.operators.norm.norm import BoundNorm
from lirpa_megatron.operators.numerics import intersect, safe_root, without_nan
from lirpa_megatron.parallel import spmd

_PASSED_ON = (BoundRotary, BoundSelectPosition, BoundNorm, BoundSelectFromRegion)
"""What may stand between a layer and attention."""
RULES = (attention_rules, elementwise_rules, linear_rules, norm_rule, score_rules)
"""The modules that enter rules."""


@dataclass(frozen=True)
class ForwardOptions:
    """How the forward method works."""

    order: int = 1
    """Degree of the polynomials in the set's symbols: up to 2 for 16, 3 for 8 symbols, and 8 for
    one."""
    form_symbols: int = 1024
    """How many symbols errors may become, for affine forms of nodes [B, features]."""
    kept_errors: int | None = None
    """How many errors are symbols from layer to layer in networks with tokens (`error_symbols`).
    None: by size."""
    refined_rows: int | None = None
    """Inputs of norms with at most so many numbers have their errors bounded by the adjoint. None:
    while that costs no more than the pass (`costs`)."""


@dataclass
class Run:
    """One forward pass over a graph.

    Args:
        nodes: of the graph, by name.
        context: of the graph.
        value_of: a node's value at the clean input.
        weights: what is known of the weights.
        adjoint: see there.
        options: see there.

    Attributes:
        steps: the visited nodes that depend on the perturbation, in order; without their forms.
        window: the positions that move, None: all.
        centres: perturbed input -> centre; on a pipeline stage after the first, its input's.
        below: the stage below, or None.
        shares: which symbols are the rank's at replicated nodes; None where all ranks have all.
        errors: which errors are symbols in a network with tokens; None: none.
        kept: how many of them go from layer to layer.
        behind: on a later pipeline stage, inputs that its input alone reads.
    """

    nodes: Mapping[str, auto_lirpa.Bound]
    context: GraphContext
    value_of: Any
    weights: Weights
    adjoint: Any
    """`adjoint.Adjoint`, which is above this module."""
    options: ForwardOptions = field(default_factory=ForwardOptions)

    def __post_init__(self) -> None:
        self.order = self.options.order
        self.steps: dict[str, Outcome] = {}
        self.centres: dict[str, torch.Tensor] = {}
        self.constants: dict[str, torch.Tensor] = {}
        self.shares: Shares | None = None
        self.window: Window | None = None
        self.errors: ErrorSymbols | None = None
        self.kept = 0
        self.behind: set[str] = set()
        self.costs = Costs()
        self.below = self.context.below
        if self.below is not None and not self.below.is_asked:
            self.below = None

    # ------------------------------------------------------------------ the pass

    def to(self, final: auto_lirpa.Bound, seen: Any = None) -> Form:
        """The form of a node.

        Args:
            final: the node.
            seen: called with every node that depends on the perturbation and its form.
        """
        order = in_order(final)
        leaves = [n for n in order if not n.inputs and _is_perturbed(n)]
        forms: dict[str, Form] = {}
        self.tokens = any(len(n.output_shape or ()) > 2 for n in order if n.inputs)
        if self.below is None:
            symbols = self._symbols(leaves, order)
            groups = [group for own in symbols.values() for group in own.groups]
            self.symbols_left = self.options.form_symbols if self.order == 1 else 0
        else:
            far = self.below.form()
            self.kept = far.kept
            groups, self.symbols_left = far.groups, far.symbols_left
            self.shares = Shares(self.context.collectives, far.shares) if far.shares else None
            self.costs, self.tokens = Costs(*far.costs), self.tokens or far.tokens
            (stage_input,) = (n for n in order if getattr(n, "is_stage_input", False))
            forms |= {n.name: far.form for n in (*leaves, stage_input)}
            self.centres[stage_input.name] = far.form.c[0].clone()
            self.behind = {
                n.name for n in leaves
                if n is not stage_input and set(n.output_name) <= {stage_input.name}
            }
            leaves = []
        self.domain = Domain(groups, self.order)
        if self.kept:
            own = len(groups) if self.below is None else far.set_groups
            self.errors = ErrorSymbols(self, self.kept, groups[:own])
        if self.below is not None:
            forms[stage_input.name] = self._refined(stage_input, far.form, {})
        forms |= self._leaves(leaves, symbols) if leaves else {}
        readers = Counter(x.name for n in order for x in n.inputs)
        for node in order:
            if node.name in forms:
                self._tell(seen, node, forms[node.name])
                continue
            if not any(x.name in forms for x in node.inputs):
                continue
            inputs = [
                forms[x.name] if x.name in forms else self.constant_of(x) for x in node.inputs
            ]
            inputs = self.read(node, inputs)
            rule = rule_of(node)
            if not reads_shares(rule):
                inputs = self.whole(inputs)
            outcome = rule(self, node, inputs)
            form, wild = outcome.form.safe(
                self.shares.ranks if outcome.form.shared else self.ranks(node)
            )
            fresh = outcome.fresh if wild is None else [*outcome.fresh, wild]
            if not self.tokens:  # an affine form may leave what intervals do not leave
                form = replace(form, limits=self._by_intervals(node, inputs))
            ranks = max(self.ranks(x).size for x in (node, *node.inputs))
            self.costs.add(node, inputs, form.box[0].numel() * ranks)
            self.steps[node.name] = Outcome(None, fresh, outcome.linear)
            for x in node.inputs:
                readers[x.name] -= 1
                if not readers[x.name] and x.name in forms:
                    forms[x.name] = None
            if self.errors is not None:
                form = self.errors.after(node, form, outcome if wild is None else None)
            forms[node.name] = None
            forms[node.name] = form = self._refined(node, form, forms)
            self._tell(seen, node, form)
        if final.name not in forms:
            return self.constant(self.constant_of(final), final)
        return forms[final.name]

    def _symbols(
        self, leaves: list[auto_lirpa.Bound], order: list[auto_lirpa.Bound]
    ) -> dict[str, Symbols]:
        """Of all perturbed inputs; shared out among the ranks if they are many and affine. Finds
        the positions that move and how many errors are kept, too."""
        tp = self.context.collectives
        found = of_leaves(leaves, self.order, lambda x: x)
        count = sum(symbols.count for symbols in found.values())
        if found and not any(self.context.is_sharded(leaf) for leaf in leaves):
            self.window = window(
                order, order[-1], found, self.constant_of, self.context.collectives.largest
            )
        self.kept = errors_kept(self, order, leaves, count)
        if self.order > 1 or tp.size == 1 or self.kept:
            return found
        spmd.handshake(tp.group, f"a set of {count} symbols")
        if count < FEWEST * tp.size or any(self.context.is_sharded(leaf) for leaf in leaves):
            return found
        self.shares = Shares(tp, [count])
        return of_leaves(leaves, self.order, self.shares.enter)

    def _leaves(
        self, leaves: list[auto_lirpa.Bound], symbols: dict[str, Symbols]
    ) -> dict[str, Form]:
        """Their forms: of the rank's own symbols if they are shared out."""
        shares, forms, place = self.shares, {}, 0
        first = 0 if shares is None else shares.first()
        rows = self.algebra.count - 1 if shares is None else shares.rows
        for leaf in leaves:
            own = symbols[leaf.name]
            begin = min(max(place, first), first + rows)
            end = max(begin, min(place + own.count, first + rows))
            directions = own.directions(begin - place, end - begin)
            before = own.centre.new_zeros(begin - first, *own.centre.shape)
            after = own.centre.new_zeros(first + rows - end, *own.centre.shape)
            c = torch.cat((own.centre.unsqueeze(0), before, directions, after))
            c = c if self.window is None else c[:, :, self.window.first :].clone()
            box = torch.zeros_like(c[0])
            forms[leaf.name] = Form(c, box, self.length(box, leaf), shared=shares is not None)
            self.centres[leaf.name] = own.centre
            place += own.count
        return forms

    def _refined(
        self, node: auto_lirpa.Bound, form: Form, forms: Mapping[str, Form | None]
    ) -> Form:
        """The form with errors as the adjoint bounds them, where a norm reads the node; or, where
        errors are symbols, with fewer of these.

        A ball grows by the product of all norms on its way, the errors themselves hardly grow. In
        the norm that ball is multiplied by how far the vector turns. Not where gradients flow,
        which would keep the graphs of all these rows.
        """
        readers = [self.nodes[name] for name in node.output_name]
        norms = [reader for reader in readers if isinstance(reader, BoundNorm)]
        if self.errors is not None:
            others = [
                x for name, x in forms.items() if x is not None and name not in self.behind
            ]
            return self.errors.reduced(node, form, others) if norms else form
        if not norms or form.c.requires_grad or form.box.ndim < 2:
            return form
        features = self._normed(node, norms)
        rows = form.box[0, ..., 0].numel() * len(features)
        if not self.costs.affords(rows, self.algebra.count, self.options.refined_rows):
            return form
        found = self.adjoint(self, node).every_error(features)
        if len(features) < form.shape[-1]:  # a ball of some features
            found = (found[0], form.plain_ball())
        found = [torch.where(bound.isnan(), torch.inf, bound) for bound in found]
        box = torch.minimum(form.box, found[0])
        ball = torch.minimum(form.plain_ball(), torch.minimum(found[1], self.length(box, node)))
        return replace(form, box=box, ball=ball, stretch=None)

    def _normed(self, node: auto_lirpa.Bound, norms: list[auto_lirpa.Bound]) -> torch.Tensor:
        """The features of a node, of all ranks, that its norms' readers use.

        Where ranks share keys, all features are gathered and normalised, and each rank selects its
        keys of them.
        """
        readers = [self.nodes[name] for norm in norms for name in norm.output_name]
        used = torch.arange(node.output_shape[-1] * self.ranks(node).size)
        if not readers or not all(isinstance(x, BoundSelectFromRegion) for x in readers):
            return used
        chosen = [self.constant_of(reader.inputs[1]) for reader in readers]
        return self.context.collectives.gather_results(torch.cat(chosen)).unique()

    def _by_intervals(self, node: auto_lirpa.Bound, inputs: list[Any]) -> tuple:
        ends = [self.range(x) if isinstance(x, Form) else (x, x) for x in inputs]
        return without_nan(*node.interval_propagate(*ends))

    def _tell(self, seen: Any, node: auto_lirpa.Bound, form: Form) -> None:
        if seen is None:
            return
        if self.window is not None and node.name in self.window.cut:
            form = self.window.whole(node, form, self.constant_of(node))
        seen(node, form)

    def read(self, node: auto_lirpa.Bound, inputs: list[Any]) -> list[Any]:
        """The inputs as an operator reads them: see `windows`."""
        if self.window is None:
            return inputs
        return self.window.read(node, inputs, self.constant_of)

    def constant_of(self, node: auto_lirpa.Bound) -> torch.Tensor:
        """The value of a node that the perturbation does not reach."""
        if node.name not in self.constants:
            self.constants[node.name] = self.value_of(node)
        return self.constants[node.name]

    def constant(self, value: torch.Tensor, node: auto_lirpa.Bound) -> Form:
        """A value as a form."""
        zero = torch.zeros_like(value)
        return Form(value.unsqueeze(0) if self.order == 1 else torch.cat((
            value.unsqueeze(0), value.new_zeros(self.algebra.count - 1, *value.shape)
        )), zero, self.length(zero, node))

    # ------------------------------------------------------------- what rules use

    @property
    def algebra(self) -> Polynomials:
        """Of all symbols so far."""
        return self.domain.algebra

    def domain_of(self, x: Form) -> Domain:
        """The domain, as the coefficients of a form see it."""
        return SharedDomain(self.domain, self.shares) if x.shared else self.domain

    def whole(self, inputs: list[Any]) -> list[Any]:
        """Inputs of which every form has all symbols."""
        return [
            replace(x, c=self.shares.whole(x.c), shared=False)
            if isinstance(x, Form) and x.shared else x for x in inputs
        ]

    def alike(self, node: auto_lirpa.Bound, inputs: list[Any]) -> list[Any]:
        """Inputs whose forms all have all symbols or all the rank's own; at sharded nodes all."""
        forms = [x for x in inputs if isinstance(x, Form)]
        if self.context.is_sharded(node) or not any(x.shared for x in forms):
            return self.whole(inputs)
        return [
            replace(x, c=self.shares.split(x.c), shared=True)
            if isinstance(x, Form) and not x.shared else x for x in inputs
        ]

    def ranks(self, node: auto_lirpa.Bound) -> Ranks:
        """For sums over a node's features."""
        return Ranks(self.context.collectives, self.context.is_sharded(node))

    def range(self, x: Form) -> tuple[torch.Tensor, torch.Tensor]:
        """(lower, upper) of each number, [B, T..., F]."""
        low, high = self.domain_of(x).ends(x.c)
        lower, upper = low - x.box, high + x.box
        return (lower, upper) if x.limits is None else intersect((lower, upper), x.limits)

    def length(
        self, box: torch.Tensor, node: auto_lirpa.Bound, features: bool = True
    ) -> torch.Tensor:
        """The largest L2 norm over the last dimension of what a box holds, [B, T...], of all ranks'
        features (`features`; otherwise of the rank's own)."""
        if box.ndim < 2:
            return box
        squares = squared(box).sum(-1)
        return safe_root(self.ranks(node).total(squares) if features else squares)

    def head_dim(self, node: auto_lirpa.Bound) -> int:
        """The size of heads if attention reads the node, else 0."""
        for name in node.output_name:
            reader = self.nodes[name]
            if isinstance(reader, (BoundScores, BoundSoftmaxValues)):
                return reader.head_dim
            if isinstance(reader, _PASSED_ON):
                size = self.head_dim(reader)  # norms of queries and keys among them
                if size:
                    return size
        return 0

    def is_gathered(self, node: auto_lirpa.Bound) -> bool:
        """Whether the node's features are gathered on every rank."""
        readers = (self.nodes[name] for name in node.output_name)
        return any(isinstance(reader, BoundGatherFromRegion) for reader in readers)


def in_order(final: auto_lirpa.Bound) -> list[auto_lirpa.Bound]:
    """The nodes that a node is computed from, each after its inputs."""
    found: dict[str, auto_lirpa.Bound] = {}
    todo = [final]
    while todo:
        node = todo[-1]
        missing = [x for x in node.inputs if x.name not in found]
        if node.name in found or not missing:
            found.setdefault(node.name, node)
            todo.pop()
        else:
            todo += missing
    return list(found.values())


def _is_perturbed(leaf: auto_lirpa.Bound) -> bool:
    return getattr(leaf, "perturbation", None) is not None
