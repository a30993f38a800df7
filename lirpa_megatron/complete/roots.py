"""Bounds of the boxes themselves: what every domain's lines are made from.

They are alpha-CROWN's, computed once. A domain keeps them and cuts them at its splits (z_j >= 0:
the lower bound becomes 0 or more), as alpha-beta-CROWN does by default.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.complete import planes
from lirpa_megatron.complete.agreement import from_rank_zero
from lirpa_megatron.complete.inputs import box_of, check_inputs
from lirpa_megatron.complete.problem import Problem
from lirpa_megatron.crown.placement import PassPlan
from lirpa_megatron.crown.relu_sparsity import live_columns
from lirpa_megatron.errors import UserError
from lirpa_megatron.operators.elementwise.activations import BoundCurve
from lirpa_megatron.operators.elementwise.curves import Curve
from lirpa_megatron.operators.elementwise.intervals import within
from lirpa_megatron.parallel.replicas import ALONE, Replicas

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class OperatorPlace:
    """Where the neurons of an operator that is split are among those of all of them."""

    name: str
    first: int
    """Of this rank's neurons, the first one; those inactive in all boxes are left out."""
    size: int
    sharded: bool
    curve: Curve | None = None
    """Its function; None of a ReLU."""

    @property
    def at(self) -> slice:
        """Its neurons, on this rank."""
        return slice(self.first, self.first + self.size)


@dataclass(frozen=True)
class Roots:
    """The boxes' bounds at operators that are split, and the numbering of neurons.

    A neuron's number counts those of all operators before it, in the order of the pass, on all
    ranks: it is the same at every tensor-parallel size. `place_of` [numbers + 1] gives its place
    among this rank's N neurons, or N where another rank has it; `number_of` [N] is the reverse.
    """

    plan: PassPlan
    operators: tuple[OperatorPlace, ...]
    active_columns: dict[str, torch.Tensor]
    """As in `CallState`."""
    lower: torch.Tensor
    """[K, N], of pre-activations; so is `upper`."""
    upper: torch.Tensor
    number_of: torch.Tensor
    place_of: torch.Tensor
    operator_of: torch.Tensor
    """Which operator a number belongs to, [numbers + 1]."""
    margins: torch.Tensor
    """[G, R] float64: alpha-CROWN's bounds of the goals, minus thresholds."""
    planes: tuple[planes.Planes, ...] = ()
    """Operators that are not linear and not split."""

    @functools.cached_property
    def of_curve(self) -> torch.Tensor:
        """Whether a number is of a neuron of no ReLU, [numbers + 1]; the last one is none's."""
        curve = torch.tensor([r.curve is not None for r in self.operators])
        found = curve.to(self.operator_of.device)[self.operator_of]
        found[-1] = False
        return found

    @property
    def neurons(self) -> int:
        """N."""
        return self.lower.shape[1]

    @property
    def curves(self) -> tuple[OperatorPlace, ...]:
        """The operators that are split and no ReLUs."""
        return tuple(r for r in self.operators if r.curve is not None)

    @property
    def only_relus(self) -> bool:
        """Whether ReLUs are all that is not linear."""
        return not (self.curves or self.planes)

    @property
    def free(self) -> int:
        """M, numbers of alpha of operators that are not split, on this rank."""
        return sum(p.size for p in self.planes)

    def check_point(self, number: int, point: float) -> None:
        """Raises ValueError where a ReLU is split elsewhere than at 0, or another function at a
        number that float32 lacks."""
        if self.operators[int(self.operator_of[number])].curve is None and point != 0:
            raise ValueError(f"neuron {number} is a ReLU's, which is split at 0, not at {point}")
        if not abs(point) < _LARGEST or struct.unpack("f", struct.pack("f", point))[0] != point:
            raise ValueError(f"neuron {number} is split at {point}, which no number of float32 is")

    def under(self, plan: PassPlan) -> Roots:
        """What passes from another start node need: its operators alone."""
        names = {node.name for node in plan.order if node is not plan.start}
        under, chosen, first = [], [], 0
        for r in self.operators:
            if r.name in names:
                under.append(replace(r, first=first))
                chosen.append(torch.arange(r.first, r.first + r.size))
                first += r.size
        index = torch.cat(chosen).to(self.number_of.device)
        number_of = self.number_of[index]
        place_of = torch.full_like(self.place_of, first)
        place_of[number_of] = torch.arange(first, device=index.device)
        old = [i for i, r in enumerate(self.operators) if r.name in names]
        operator_of = torch.zeros_like(self.operator_of)
        for new, i in enumerate(old):
            operator_of[self.operator_of == i] = new
        return replace(
            self, plan=plan, operators=tuple(under), lower=self.lower[:, index],
            upper=self.upper[:, index], number_of=number_of, place_of=place_of,
            operator_of=operator_of, planes=planes.under(self.planes, names),
        )


def bound_roots(
    graph: Any, problem: Problem, is_over: Callable[[], bool] = lambda: False,
    replicas: Replicas = ALONE,
) -> Roots:
    """Bounds the boxes with a BoundedModule, by alpha-CROWN.

    Args:
        graph: the BoundedModule.
        problem: boxes and goals.
        is_over: whether time is, on this rank; what has been found by then is used.
        replicas: of which one does it for all.

    Raises:
        UserError: the graph cannot be split, by name.
    """
    final = graph[graph.final_name]
    check_nonlinear(graph)
    C, rows = _rows_of_boxes(problem)
    check_inputs(graph, "branch and bound: ")
    x = box_of(graph, problem.low, problem.high)
    others = [node for node in graph.named_nodes().values() if _keeps_planes(node)]
    here = False

    def alpha_crown() -> tuple[torch.Tensor, dict[str, Any], planes.Facts]:
        nonlocal here
        here = True
        with _until(graph, is_over), planes.noting(graph, others) as facts:
            found, _ = graph.compute_bounds(
                x=(x,), C=C, method="CROWN-Optimized", bound_upper=False
            )
        return found.detach().double(), _of_inner_nodes(graph, _plan(graph, final)), facts

    found, inner, facts = replicas.first("bounds of boxes", alpha_crown)
    if not here:  # the graph has to know which inputs are perturbed
        graph.compute_bounds(x=(x,), C=C, method="IBP", bound_upper=False)
    plan = _plan(graph, final)
    names = {node.name for node in plan.order}
    others = [node for node in others if node.name in names and node.perturbed]
    own = planes.planes_of(graph, others, facts, len(problem.low))
    return _numbered(graph, plan, rows.of(found) - problem.thresholds, inner, own)


def _plan(graph: Any, final: auto_lirpa.Bound) -> PassPlan:
    return graph.schedule.plan(final, spec_sharded=False)


def _of_inner_nodes(
    graph: Any, plan: PassPlan
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Bounds of each operator's input, this rank's, [K, *node shape], by the operator's name."""
    inner = {}
    for node in plan.order:
        if _is_split(node):
            x = node.inputs[0]
            lower, upper = x.lower.detach(), x.upper.detach()
            if is_curve(node) and node.curve.limited:  # as its own relaxation does
                lower, upper = within(x, lower, upper, gradients=False)
            inner[node.name] = lower.nan_to_num(nan=-torch.inf), upper.nan_to_num(nan=torch.inf)
    return inner


@contextlib.contextmanager
def _until(graph: Any, is_over: Callable[[], bool]) -> Iterator[None]:
    """While the host optimises alpha, it stops when time is over."""
    options, tp = graph.bound_opts["optimize_bound_args"], graph.context.collectives
    saved = options["stop_criterion_func"]

    def stop(lower: torch.Tensor) -> torch.Tensor:
        nothing = torch.zeros(1, dtype=torch.float64, device=lower.device)
        _, over = from_rank_zero(tp, nothing, is_over())
        return torch.full((len(lower), 1), over, device=lower.device)

    options["stop_criterion_func"] = stop
    try:
        yield
    finally:
        options["stop_criterion_func"] = saved


def check_setting(graph: Any, where: str) -> None:
    """Raises UserError, which begins with `where`, for what no kind of branching supports."""
    if graph.stages is not None:
        raise UserError(f"{where}pipeline stages are not supported; use tensor parallelism")
    if graph.rounding is not None:
        raise UserError(f"{where}outward rounding is not supported; leave it out")
    if graph.sharded[graph.final_name]:
        raise UserError(f"{where}the output has to be gathered (gather_output=True)")


def is_curve(node: auto_lirpa.Bound) -> bool:
    """Whether a node is f(x) of one variable, for each element, whose intervals can be cut."""
    return isinstance(node, BoundCurve) and len(node.inputs) == 1


def _is_split(node: auto_lirpa.Bound) -> bool:
    return type(node) is auto_lirpa.BoundRelu or is_curve(node)


def only_of_one_variable(graph: Any) -> bool:
    """Whether all that is not linear can be split."""
    nodes = graph.named_nodes().values()
    return all(map(_is_split, filter(auto_lirpa.reads_bounds, nodes)))


def check_graph(graph: Any) -> None:
    """Raises UserError unless all that is not linear are ReLUs."""
    where = "branch and bound splits ReLUs: "
    check_setting(graph, where)
    for node in graph.named_nodes().values():
        if type(node) is not auto_lirpa.BoundRelu and auto_lirpa.reads_bounds(node):
            raise UserError(f"{where}the network has a {_kind(node)}, which is neither linear nor "
                            "a ReLU")


def check_nonlinear(graph: Any) -> None:
    """Raises UserError unless something can be split, and all else that is not linear has planes.
    """
    where = "branch and bound splits functions of one variable: "
    check_setting(graph, where)
    nodes = [n for n in graph.named_nodes().values() if auto_lirpa.reads_bounds(n)]
    for node in nodes:
        if not _is_split(node) and not planes.has_planes(node):
            raise UserError(f"{where}the network has a {_kind(node)}, which is neither linear nor "
                            "such a function, and of which no planes are known")
    if nodes and not any(map(_is_split, nodes)):
        raise UserError(f"{where}the network has no such function, but a {_kind(nodes[0])}")


def _keeps_planes(node: auto_lirpa.Bound) -> bool:
    """Whether a node that is not linear is not split."""
    return auto_lirpa.reads_bounds(node) and not _is_split(node)


def _kind(node: auto_lirpa.Bound) -> str:
    return type(node).__name__.removeprefix("Bound")


def _rows_of_boxes(problem: Problem) -> tuple[torch.Tensor, _Rows]:
    """All goals' rows by box: C [K, S, outputs]; and where to find a goal's among them."""
    boxes = torch.tensor(problem.boxes)
    of_box: list[list[int]] = [[] for _ in range(len(problem.low))]
    for goal, box in enumerate(problem.boxes):
        of_box[box].append(goal)
    R = problem.C.shape[1]
    most = max(map(len, of_box)) * R
    C = problem.C.new_zeros(len(problem.low), most, problem.C.shape[2])
    first = torch.zeros(len(boxes), dtype=torch.int64)
    for box, goals in enumerate(of_box):
        if not goals:
            raise ValueError(f"box {box} has no goal")
        for i, goal in enumerate(goals):
            C[box, i * R : (i + 1) * R] = problem.C[goal]
            first[goal] = i * R
        C[box, len(goals) * R :] = C[box, 0]
    device = problem.C.device
    columns = first[:, None] + torch.arange(R)
    return C, _Rows(boxes.to(device), columns.to(device))


@dataclass(frozen=True)
class _Rows:
    boxes: torch.Tensor
    columns: torch.Tensor

    def of(self, found: torch.Tensor) -> torch.Tensor:
        """[K, S] -> [G, R]."""
        return found[self.boxes[:, None], self.columns]


def _numbered(
    graph: Any, plan: PassPlan, margins: torch.Tensor,
    inner: Mapping[str, tuple[torch.Tensor, torch.Tensor]], own: tuple[planes.Planes, ...],
) -> Roots:
    """Collects the operators' bounds; columns inactive at ReLUs are left out as in every pass."""
    tp, between = graph.context.collectives, graph.intermediate.relus
    linear_of = {relu.name: linear for linear, relu in between.items()}
    operators, active, lowers, uppers, numbers, operator_of = [], {}, [], [], [], []
    local = total = 0
    for node in plan.order:
        if not _is_split(node):
            continue
        sharded = graph.sharded[node.inputs[0].name]
        lower, upper = inner[node.name]
        shape = list(lower.shape[1:])
        whole = [*shape[:-1], shape[-1] * tp.size] if sharded else shape
        number = torch.arange(total, total + _count(whole), device=lower.device).view(whole)
        if sharded:
            number = number.chunk(tp.size, -1)[tp.rank]
        linear = linear_of.get(node.name)
        if linear is not None:
            columns = live_columns(upper, None if sharded else tp)
            if columns is not None:
                active[linear] = columns
                lower, upper, number = (
                    t.index_select(-1, columns) for t in (lower, upper, number)
                )
        curve = node.curve if is_curve(node) else None
        operators.append(OperatorPlace(node.name, local, number.numel(), sharded, curve))
        operator_of += [len(operators) - 1] * _count(whole)
        lowers.append(lower.flatten(1))
        uppers.append(upper.flatten(1))
        numbers.append(number.flatten())
        local, total = local + number.numel(), total + _count(whole)
    if not operators:
        raise UserError("branch and bound splits ReLUs and other functions: the network has none")
    number_of = torch.cat(numbers)
    place_of = torch.full((total + 1,), local, device=number_of.device)
    place_of[number_of] = torch.arange(local, device=number_of.device)
    return Roots(
        plan, tuple(operators), active, torch.cat(lowers, 1), torch.cat(uppers, 1), number_of,
        place_of, torch.tensor([*operator_of, 0], device=number_of.device), margins, own,
    )


def neuron_count(graph: Any) -> int:
    """How many neurons a graph has that can be split, on all ranks."""
    total = 0
    for node in graph.named_nodes().values():
        if _is_split(node):
            x = node.inputs[0]
            each = _count(list(x.output_shape[1:]))
            total += each * (graph.context.collectives.size if graph.sharded[x.name] else 1)
    return total


def _count(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
