"""Operators that are not split, in passes over domains: attention, norms, products of two nodes.

What a domain's splits leave of a box lies in the box, so that every plane that bounds <A, y> on the
box's bounds of the operator's inputs holds in each of its domains. The operator's relaxation
(`Operator.relaxation`: centers, ranges, affine forms) is made once, from what alpha-CROWN's call
has found out of its inputs; a row of A of a domain chooses its plane on it with alpha of its own,
which is optimized as that of functions is: in [0, 1], 1/2 is the plane without alpha.

Shapes: R rows of A, D domains of K boxes, M numbers of alpha of all such operators on this rank.
A relaxation has the batch of the boxes, so that domains are put in order of boxes: m of each at
most, whose rows are R m rows of A, zeros where a box has fewer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.affine.form import AffineForm, LinearFormBounds
from lirpa_megatron.operators.coefficients import LowerUpper, Propagated
from lirpa_megatron.operators.context import CallState, InputView, OperatorInputs, Visit
from lirpa_megatron.operators.optimizable import OptimizableOperator

_NUMBERS = 2**25
"""Numbers of one table that a relaxation makes of A of all domains."""


@dataclass(frozen=True)
class NodeFacts:
    """What a call has found out of a node: bounds [K, *node shape], and perhaps its affine form and
    bounds relative to a weighted mean."""

    lower: torch.Tensor
    upper: torch.Tensor
    form: AffineForm | None = None
    centered: LinearFormBounds | None = None


@dataclass
class Facts:
    """The same of all inputs of operators that are not split; plain data, which replicas send."""

    nodes: dict[str, NodeFacts] = field(default_factory=dict)
    directions: dict[str, LinearFormBounds] = field(default_factory=dict)
    """Operator's name -> bounds of its `directions()`."""
    alpha: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Operator's name -> shape of a row's alpha, [*without the batch]."""


@dataclass(frozen=True)
class Planes:
    """An operator that is not split."""

    node: Any
    inputs: OperatorInputs
    relaxation: Any
    shape: tuple[int, ...]
    """Of a row's alpha in one box."""
    first: int
    """Of this rank's numbers of alpha, the first one."""
    boxes: int
    """K"""

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def size(self) -> int:
        """Numbers of alpha."""
        return torch.Size(self.shape).numel()

    @property
    def at(self) -> slice:
        """Its alpha, on this rank."""
        return slice(self.first, self.first + self.size)


@dataclass(frozen=True)
class PlanesVisit:
    """What one visit of a pass to such an operator is given."""

    planes: Planes
    alpha: torch.Tensor
    """[R, D, numbers], in [0, 1]"""
    box: torch.Tensor
    """[D]"""

    def bound_backward(self, A: LowerUpper) -> Propagated:
        """A [R, D, *node shape] of the lower side -> A at its inputs, and the bias [R, D]."""
        node, own = self.planes.node, self.planes
        order = _Order.of(self.box, own.boxes)
        rows = order.by_box(A.lower)
        move = (2 * self.alpha - 1) * node.alpha_range
        move = order.by_box(move).unflatten(-1, own.shape)
        visit = Visit(
            inputs=own.inputs, rows=len(rows), alpha=(move, move), gathered=own.relaxation
        )
        found = node.bound_backward(LowerUpper(rows, None), visit)

        def of_domains(x: Any) -> Any:
            return order.of_domains(x, len(A.lower)) if isinstance(x, torch.Tensor) else None

        return Propagated(
            tuple(LowerUpper(of_domains(A_x.lower), None) for A_x in found.A),
            LowerUpper(of_domains(found.bias.lower), None),
        )


@dataclass(frozen=True)
class _Order:
    """Domains by box."""

    place: torch.Tensor | None
    """[D], of a domain's entry among [m, K]; None: K is 1 and m is D."""
    most: int
    """m"""
    boxes: int

    @classmethod
    def of(cls, box: torch.Tensor, boxes: int) -> _Order:
        if boxes == 1:
            return cls(None, len(box), 1)
        same = box[:, None] == box
        before = same.tril(-1).sum(1)  # of the same box
        return cls(before * boxes + box, int(before.max()) + 1, boxes)

    def by_box(self, x: torch.Tensor) -> torch.Tensor:
        """[R, D, ...] -> [R m, K, ...]."""
        if self.place is not None:
            whole = x.new_zeros(len(x), self.most * self.boxes, *x.shape[2:])
            x = whole.index_copy(1, self.place, x)
        return x.reshape(len(x) * self.most, self.boxes, *x.shape[2:])

    def of_domains(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """[R m, K, ...] -> [R, D, ...]."""
        x = x.reshape(rows, self.most * self.boxes, *x.shape[2:])
        return x if self.place is None else x.index_select(1, self.place)


def has_planes(node: auto_lirpa.Bound) -> bool:
    """Whether an operator of the graph that is not linear can be passed with planes of boxes."""
    return isinstance(node, OptimizableOperator)


@contextmanager
def noting(graph: Any, nodes: list[Any]) -> Iterator[Facts]:
    """Notes what the calls of a block have found out of the inputs of operators.

    Args:
        graph: a BoundedModule.
        nodes: the operators.
    """
    facts = Facts()

    def note(call: CallState) -> None:
        for node in nodes:
            for x in node.inputs:
                if x.perturbed:
                    facts.nodes[x.name] = NodeFacts(
                        x.lower.detach(), x.upper.detach(), _detached(call.forms.get(x.name)),
                        _detached(call.centered.get(x.name)),
                    )
            if node.name in call.directions:
                facts.directions[node.name] = _detached(call.directions[node.name])
            facts.alpha[node.name] = tuple(node.alpha_shape()[1:])

    ended = graph.context.ended
    ended.append(note)
    try:
        yield facts
    finally:
        ended.remove(note)


def planes_of(graph: Any, nodes: list[Any], facts: Facts, boxes: int) -> tuple[Planes, ...]:
    """The operators with their relaxations; every rank calls it alike.

    Args:
        graph: a BoundedModule that was run on the boxes.
        nodes: the operators.
        facts: of their inputs.
        boxes: how many.
    """
    found, first, context = [], 0, graph.context
    call = CallState(method="CROWN", form_limit=graph.own_options.form_limit, rereads=True)
    with torch.no_grad():
        for node in nodes:
            views = []
            for x in node.inputs:
                known = facts.nodes.get(x.name)
                if known is None:
                    value = context.value_of(x)
                    known = NodeFacts(value, value)
                views.append(InputView(
                    x, known.lower, known.upper, known.form, known.centered, context.value_of
                ))
            inputs = OperatorInputs(tuple(views), call, facts.directions.get(node.name))
            planes = Planes(
                node, inputs, node.relaxation(inputs), facts.alpha[node.name], first, boxes
            )
            found.append(planes)
            first += planes.size
    return tuple(found)


def most_domains(planes: tuple[Planes, ...]) -> int:
    """How many domains a pass may have, so that no relaxation makes tables beyond bearing; the same
    on every rank."""
    most = _NUMBERS
    for p in planes:
        form = p.inputs[0].form
        columns = None if form is None else form.A.shape[-1]
        most = min(most, _NUMBERS // max(1, p.node.numbers_at_once(1, columns, p.inputs.call)))
    return max(1, most)


def under(planes: tuple[Planes, ...], names: set[str]) -> tuple[Planes, ...]:
    """Those of some operators, numbered anew."""
    found, first = [], 0
    for p in planes:
        if p.name in names:
            found.append(replace(p, first=first))
            first += p.size
    return tuple(found)


def visits(
    planes: tuple[Planes, ...], alpha: torch.Tensor, box: torch.Tensor
) -> Mapping[str, PlanesVisit]:
    """Operator's name -> what a pass is given there.

    Args:
        planes: of a graph.
        alpha: [R, D, M].
        box: [D].
    """
    return {p.name: PlanesVisit(p, alpha[..., p.at], box) for p in planes}


def _detached(x: Any) -> Any:
    return None if x is None else x.mapped(torch.Tensor.detach)
