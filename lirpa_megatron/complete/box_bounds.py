"""Bounds of parts of boxes: one pass of CROWN for a batch, inner bounds of each part included.

    D  parts    J  goals of a box    R  rows of a goal    m  inputs that move in some box

All numbers that decide are rank 0's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.compat.full_precision import full_precision
from lirpa_megatron.complete.agreement import from_rank_zero
from lirpa_megatron.complete.bounding import ROUNDING
from lirpa_megatron.complete.inputs import box_of, input_names, shaped, that_move
from lirpa_megatron.complete.joint_rows import joint
from lirpa_megatron.complete.problem import Problem
from lirpa_megatron.complete.roots import only_of_one_variable
from lirpa_megatron.crown.clean_values import value_at
from lirpa_megatron.crown.folded_inputs import FoldedInputs, can_fold, folding

_NUMBERS = 2**23
"""Numbers that A may have at a node for all parts that are bounded at once."""
_FEW = 4
"""Parts that are bounded at once however wide a node is: rows of A go in chunks, and what a call
does beside them is done once."""
_SHARE = 2
"""Inputs that move are at most one in so many where the others are folded into a bias."""
_LEAST_SLOPE = 0.3
"""Slopes count as this share of the mean one at least: CROWN's are not those of the network."""


@dataclass(frozen=True)
class Parts:
    """Parts of boxes that are not proved."""

    box: torch.Tensor
    """[D]"""
    low: torch.Tensor
    """[D, m]"""
    high: torch.Tensor
    margins: torch.Tensor
    """Of goals the best lower bound that is known, [D, J] float64; infinity where it is proved."""
    node: torch.Tensor
    """Its number in the trees, [D]."""

    def __len__(self) -> int:
        return len(self.box)

    def at(self, index: torch.Tensor) -> Parts:
        """Some of them."""
        return Parts(*(getattr(self, f.name)[index] for f in fields(self)))

    def with_others(self, others: Parts) -> Parts:
        """These, and others behind them."""
        return Parts(*(
            torch.cat([getattr(self, f.name), getattr(others, f.name)]) for f in fields(self)
        ))

    @property
    def open(self) -> torch.Tensor:
        """[D, J] bool"""
        return self.margins < torch.inf

    @property
    def worst(self) -> torch.Tensor:
        """[D] float64"""
        return self.margins.amin(1)


@dataclass(frozen=True)
class BoundedParts:
    """What a pass says of D parts."""

    margins: torch.Tensor
    """Of each goal the best row's bound minus its threshold, or that of all its rows together
    (`joint_rows`), [D, J] float64."""
    proved: torch.Tensor
    """[D, J] bool"""
    scores: torch.Tensor
    """What a cut of an input may gain, [D, m]."""
    minimiser: torch.Tensor
    """Where the worst goal's bound is attained, [D, inputs]."""
    is_over: bool


class PartBounder:
    """Bounds parts of the boxes of a problem.

    Args:
        graph: a BoundedModule.
        problem: what is to be proved.
        most: parts that are bounded at once, at most.
        is_over: whether time is, on this rank.
    """

    def __init__(
        self, graph: Any, problem: Problem, most: int, is_over: Callable[[], bool]
    ) -> None:
        self.graph, self.problem, self.is_over = graph, problem, is_over
        self.tp = graph.context.collectives
        self.moving = that_move(problem.low, problem.high).any(0).nonzero().flatten()
        of_box: list[list[int]] = [[] for _ in problem.low]
        for goal, box in enumerate(problem.boxes):
            of_box[box].append(goal)
        J = max(map(len, of_box))
        padded = [[*own, *[own[0]] * (J - len(own))] for own in of_box]
        self.goals = torch.tensor(padded, device=problem.C.device)
        """[K, J]; those of fewer repeat one"""
        self.counts = [len(own) for own in of_box]
        self.C = problem.C[self.goals].flatten(1, 2)
        self.thresholds = problem.thresholds[self.goals]
        (self.input,) = input_names(graph)
        few = 0 < _SHARE * len(self.moving) <= problem.low.shape[1]
        self.folds = few and can_fold(graph, self.input) and only_of_one_variable(graph)
        self.most = max(1, min(most, max(_FEW, _NUMBERS // self._numbers())))

    def _numbers(self) -> int:
        """That A has for one part, in the largest of all passes, on all ranks."""
        graph, last = self.graph, self.graph[self.graph.final_name]

        def width(node: Any) -> int:
            each = math.prod(node.output_shape[1:])
            return each * (self.tp.size if graph.sharded[node.name] else 1)

        starts = {last.name: (last, self.C.shape[1])}
        for node in graph.named_nodes().values():
            if auto_lirpa.reads_bounds(node):
                starts |= {x.name: (x, width(x)) for x in node.inputs if x.from_input}
        largest = 1
        for start, rows in starts.values():
            order = graph.schedule.plan(start, spec_sharded=False).order
            known = start is not last and len(order) == 1  # interval arithmetic is exact
            widths = [width(n) for n in order if n is not start]
            largest = max(largest, 0 if known else rows * max(widths, default=1))
        return largest

    def whole(self) -> Parts:
        """The boxes; goals that a box lacks are proved."""
        K, J = self.goals.shape
        margins = self.thresholds.new_full((K, J), -torch.inf)
        for box, count in enumerate(self.counts):
            margins[box, count:] = torch.inf
        every = torch.arange(K, device=self.goals.device)
        low, high = self.problem.low[:, self.moving], self.problem.high[:, self.moving]
        return Parts(every, low, high, margins, every)

    def placed(self, parts: Parts, values: torch.Tensor) -> torch.Tensor:
        """Values of the moving inputs [D, m] -> points [D, inputs]."""
        return self._with_others(self.problem.low, parts, values)

    def _with_others(
        self, ends: torch.Tensor, parts: Parts, values: torch.Tensor
    ) -> torch.Tensor:
        points = ends[parts.box].clone()
        points[:, self.moving] = values
        return points

    def bound(self, parts: Parts) -> BoundedParts:
        """Bounds of at most `most` parts."""
        D, J = parts.margins.shape
        low = self._with_others(self.problem.low, parts, parts.low)
        high = self._with_others(self.problem.high, parts, parts.high)
        x, folded = box_of(self.graph, low, high), None
        if self.folds:  # slopes, and with them points, are those of the inputs that move
            folded = FoldedInputs.of(self.input, self.moving, low, high)
            low, high = folded.low, folded.high
        final = self.graph.final_name
        with torch.no_grad(), folding(self.graph, folded):
            found, _, A = self.graph.compute_bounds(
                x=(x,), C=self.C[parts.box], method="CROWN", bound_upper=False, return_A=True,
                needed_A_dict={final: {self.input}},
            )
        own = A[final][self.input]
        slopes, constants = own["lA"].flatten(2), own["lbias"]
        points = torch.where(slopes > 0, low[:, None], high[:, None])
        size = (slopes * points).abs().sum(2).double() + constants.abs().double()
        ends = self.thresholds[parts.box]
        margins = found.double().view(ends.shape) - ends
        rounding = ROUNDING * torch.finfo(found.dtype).eps
        sure = margins - rounding * (size.view(ends.shape) + ends.abs())
        slopes = slopes.view(D, J, -1, slopes.shape[2])
        points = points.view(slopes.shape)
        if ends.shape[2] > 1:
            all_rows = joint(slopes, constants.view(ends.shape), ends, low, high)
            sum_sure = all_rows.margins - rounding * all_rows.size
            margins = torch.cat([margins, all_rows.margins[..., None]], 2)
            sure = torch.cat([sure, sum_sure[..., None]], 2)
            points = torch.cat([points, all_rows.points[:, :, None].to(points)], 2)
        both, over = from_rank_zero(self.tp, torch.stack([margins, sure]), self.is_over())
        margins, sure = both[0].nan_to_num(nan=-torch.inf, posinf=-torch.inf), both[1]
        best, row = margins.max(2)
        proved = ((sure > 0) & margins.isfinite()).any(2) & parts.open
        best = torch.maximum(best, torch.where(parts.open, parts.margins, -torch.inf))
        left = parts.open & ~proved
        worst = torch.where(left, best, torch.inf).argmin(1)
        every = torch.arange(D, device=worst.device)
        points = points[every, worst, row[every, worst]]
        if self.folds:
            points = self.placed(parts, points)
        else:
            slopes = slopes[..., self.moving]
        scores = self._scores(slopes, left, parts.high - parts.low)
        both, _ = from_rank_zero(self.tp, torch.cat([scores, points], 1).double(), False)
        scores, points = both.to(low).split([len(self.moving), points.shape[1]], 1)
        return BoundedParts(best, proved, scores, points, over)

    def _scores(
        self, slopes: torch.Tensor, left: torch.Tensor, width: torch.Tensor
    ) -> torch.Tensor:
        """Of each moving input the most that the bound of a row of an open goal moves along it.

        The most of all rows of open goals, not of the worst one: which row will prove a part, and
        with which slopes, is open. Boxes where nothing has a slope are cut along the longest way.
        """
        if not width.shape[1]:
            return width
        steep = torch.where(left[:, :, None, None], slopes.abs().nan_to_num(), 0.0).amax((1, 2))
        steep = torch.maximum(steep, _LEAST_SLOPE * steep.mean(1, keepdim=True))
        flat = (steep.amax(1, keepdim=True) == 0).expand_as(steep)
        return torch.where(flat, 1.0, steep) * width

    def values(self, parts: Parts, points: torch.Tensor) -> torch.Tensor:
        """Margins of the graph's own outputs at points [P, inputs] of parts [P]: [P, J] float64."""
        points = shaped(self.graph, points)
        with auto_lirpa.running((points,)), full_precision(self.graph.device):
            y = value_at(self.graph, (points,)).detach().as_subclass(torch.Tensor)
        rows = torch.einsum("pso,po->ps", self.C[parts.box].double(), y.flatten(1).double())
        ends = self.thresholds[parts.box]
        margins = (rows.view(ends.shape) - ends).amax(2).nan_to_num(nan=torch.inf)
        margins, _ = from_rank_zero(self.tp, margins, False)
        return torch.where(parts.open, margins, torch.inf)
