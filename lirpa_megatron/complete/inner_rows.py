"""Neurons in front of a ReLU as rows of that node, where passes begin: e_j and -e_j."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from lirpa_megatron.complete.agreement import unstable_numbers
from lirpa_megatron.complete.problem import Problem
from lirpa_megatron.complete.roots import OperatorPlace, Roots


@dataclass(frozen=True)
class Rows:
    """Some neurons z_j of one ReLU, of all ranks, the same ones on every rank, each with a sign: of
    G goals, the lower bounds of `sign * z_j`."""

    box: torch.Tensor
    """[G]"""
    number: torch.Tensor
    """[G]"""
    sign: torch.Tensor
    """[G], 1 or -1"""
    place: torch.Tensor
    """Among this rank's of the ReLU, [G]; outside of them where it is not `mine`."""
    mine: torch.Tensor
    """[G] bool"""
    C: torch.Tensor
    """[G, *node shape]: sign e_j, 0 where a neuron is another rank's."""

    def at(self, index: torch.Tensor) -> Rows:
        """Some of them."""
        return Rows(*(getattr(self, f.name)[index] for f in fields(self)))

    def keys(self) -> list[tuple[int, int, int]]:
        """Box, number and sign of each."""
        return list(zip(*(t.tolist() for t in (self.box, self.number, self.sign)), strict=True))


@dataclass(frozen=True)
class InnerStart:
    """The input of a ReLU as the start of passes."""

    graph: Any
    roots: Roots
    """Of the whole network. `set` changes its bounds."""
    relu: OperatorPlace
    below: Roots
    """What passes from there need."""

    def has(self, number: int) -> bool:
        """Whether this neuron is the ReLU's, on whichever rank."""
        return self.roots.operators[int(self.roots.operator_of[number])].name == self.relu.name

    def unstable(self) -> Rows:
        """Both bounds of neurons that are unstable in some box."""
        roots, relu = self.roots, self.relu
        at = slice(relu.first, relu.first + relu.size)
        unstable = (roots.lower[:, at] < 0) & (roots.upper[:, at] > 0)
        tp = self.graph.context.collectives
        box, number = unstable_numbers(tp, unstable, roots.number_of[at], relu.sharded)
        sign = torch.ones_like(box)
        return self.rows(box.repeat(2), number.repeat(2), torch.cat([sign, -sign]))

    def rows(self, box: torch.Tensor, number: torch.Tensor, sign: torch.Tensor) -> Rows:
        """The rows of neurons in boxes, [G] each."""
        relu, node = self.relu, self.graph[self.relu.name].inputs[0]
        place = self.roots.place_of[number] - relu.first
        mine = (place >= 0) & (place < relu.size)
        feature, shape = place[mine], node.output_shape[1:]
        columns = self.roots.active_columns.get(node.name)
        if columns is not None:
            live = len(columns)
            feature = feature // live * shape[-1] + columns[feature % live]
        C = self.roots.lower.new_zeros(len(box), shape.numel())
        C[mine.nonzero().flatten(), feature] = sign[mine].to(C)
        return Rows(box, number, sign, place, mine, C.view(len(box), *shape))

    def known(self, rows: Rows) -> torch.Tensor:
        """The bounds that are known, [G] float64, the same on all ranks."""
        tp = self.graph.context.collectives
        bounds = rows.C.new_zeros(len(rows.box), dtype=torch.float64)
        if self.relu.sharded or tp.rank == 0:
            mine = rows.mine
            box, where = rows.box[mine], self.relu.first + rows.place[mine]
            bounds[mine] = torch.where(
                rows.sign[mine] > 0, self.roots.lower[box, where], -self.roots.upper[box, where]
            ).double()
        return tp.reduce_from(bounds)

    def problem(self, boxes: Problem, rows: Rows, thresholds: torch.Tensor) -> Problem:
        """That each row exceeds its threshold, [G] float64, in boxes of a problem."""
        return Problem(
            boxes.low, boxes.high, tuple(rows.box.tolist()), rows.C[:, None],
            thresholds.to(rows.box.device)[:, None],
        )

    def set(self, rows: Rows, bounds: Mapping[int, float]) -> None:
        """Bounds of some of the rows; at neurons of this rank they replace what was known."""
        keys, mine = rows.keys(), rows.mine.tolist()
        places = (self.relu.first + rows.place).tolist()
        for i, bound in bounds.items():
            box, _, sign = keys[i]
            if mine[i]:
                (self.roots.lower if sign > 0 else self.roots.upper)[box, places[i]] = sign * bound


def inner_starts(graph: Any, roots: Roots) -> Iterator[InnerStart]:
    """The inputs of all ReLUs that other ReLUs lie in front of, the first layer's first.

    Of the others the bounds of interval arithmetic are exact. Each is made when it is asked for,
    with the bounds that `roots` has by then.
    """
    for relu in reversed(roots.operators):
        node = graph[relu.name].inputs[0]
        plan = graph.schedule.plan(node, spec_sharded=False)
        names = {n.name for n in plan.order}
        if any(r.name in names for r in roots.operators):
            yield InnerStart(graph, roots, relu, roots.under(plan))
