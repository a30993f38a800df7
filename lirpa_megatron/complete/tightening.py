"""Smaller boxes and narrower intervals of domains, after each ascent, from what it has found.

Where few inputs move, the bound of a domain says in which part of its box the goal may fail at
all (`violations`); and the bounds of inner neurons are found anew for that part, layer after layer,
by a row e_j and one -e_j for each unstable neuron, with the lines of the domain's splits. A
domain's halves begin with its box and its intervals. So splits of one layer narrow those that
follow, and what is nearly proved becomes small.

The proof of a half is then one of the part of it where the goal may fail; in the rest the goal
holds by what was found before (`Domain.least`). `check` finds all of it again on its way from the
root to a leaf.

Every rank has the same boxes and bounds: rank 0's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from lirpa_megatron.complete.agreement import from_rank_zero, unstable_numbers
from lirpa_megatron.complete.batch import Batch
from lirpa_megatron.complete.domain_pass import DomainPass
from lirpa_megatron.complete.inner_rows import InnerStart
from lirpa_megatron.complete.inputs import that_move
from lirpa_megatron.complete.roots import OperatorPlace
from lirpa_megatron.complete.split_relu import SplitRelu
from lirpa_megatron.complete.violations import Halfspaces, least, shrunk

if TYPE_CHECKING:
    from lirpa_megatron.complete.bounding import Bounded, Bounder

_INPUTS, _NEURONS = 64, 1024
"""Inputs that move and neurons of all ranks, up to which it pays."""
_SLACK = 2.0**-6
"""How much of what a bound lacks is kept as a margin of what is cut off."""
_NUMBERS = 2**22
"""Numbers of A that are at once in a pass."""


@dataclass(frozen=True)
class Failing:
    """Where the goals of D domains may fail."""

    halfspaces: Halfspaces
    slack: torch.Tensor
    """What the goals' margins are above elsewhere, [D] float64."""
    needed: torch.Tensor
    """Whether a row's bound uses a neuron's upper line, [D, N] bool."""

    def at(self, index: torch.Tensor) -> Failing:
        """Some of the domains."""
        both = Halfspaces(self.halfspaces.A[:, index], self.halfspaces.d[:, index])
        return Failing(both, self.slack[index], self.needed[index])


class Tightening:
    """What a `Bounder` does with open domains.

    Args:
        bounder: of a problem.
        wanted: whether it does anything at all. Bounds of inner neurons end where they are good
            enough, not at a proof: where there is more than one best alpha or beta, as in what is
            left of a box, these would differ between tensor-parallel sizes.

    Attributes:
        boxes: whether domains have boxes of their own.
        ends: whether they have intervals.
    """

    def __init__(self, bounder: Bounder, wanted: bool) -> None:
        self.bounder, roots, problem = bounder, bounder.roots, bounder.problem
        moving = int(that_move(problem.low, problem.high).any(0).sum())
        self.boxes = wanted and 0 < moving <= _INPUTS
        few = len(roots.operator_of) - 1 <= _NEURONS
        self.ends = self.boxes and few and roots.only_relus
        self._starts: list[tuple[InnerStart, tuple[OperatorPlace, ...]]] = []

    def failing(self, batch: Batch, run: DomainPass, sure: torch.Tensor, seen: torch.Tensor
                ) -> Failing:
        """What a pass says of D domains.

        Args:
            batch: the domains, with the weights of the pass.
            run: the pass.
            sure: its margins by how much they exceed rounding, [R', D] float64.
            seen: A at all neurons' outputs, [R', D, N].
        """
        thresholds = batch.rows()[1]
        lacks = -sure
        wrong = self.bounder.rounding * (run.size.double() + thresholds.abs())
        slack = _SLACK * lacks
        used = (lacks > 0) & lacks.isfinite() & (wrong < lacks)
        if batch.has_sum:
            used[-1] &= batch.weights.sum(0) > 0.5
        d = run.constant.double() - thresholds - wrong - slack
        found = Halfspaces.of(run.A, torch.where(used, d, torch.nan))
        least_slack = torch.where(used, slack, torch.inf).amin(0) / 2
        return Failing(found, least_slack, (seen < 0).any(0))

    def __call__(self, found: Bounded, failing: Failing) -> Bounded:
        """What an ascent has found, with smaller open domains."""
        batch = found.batch
        box = torch.stack(shrunk(failing.halfspaces, batch.low, batch.high)).double()
        packed = torch.cat([box.flatten(), failing.slack])
        packed, _ = from_rank_zero(self.bounder.tp, packed, False)
        low, high = packed[: box.numel()].view_as(box).to(batch.low)
        batch = replace(batch, low=low, high=high)
        if self.ends:
            batch = self._with_ends(batch, failing)
        return replace(found, batch=batch, slack=packed[box.numel() :])

    def _with_ends(self, batch: Batch, failing: Failing) -> Batch:
        """With narrower intervals of unstable neurons."""
        roots, tp = self.bounder.roots, self.bounder.tp
        if not self._starts:
            self._starts = [*self._made()]
        for start, below in self._starts:
            at = start.relu.at
            wanted = batch.lines.unstable[:, at]
            if start.relu is roots.operators[0]:  # rows are the goals' alone
                wanted = wanted & failing.needed[:, at]
            _, numbers = unstable_numbers(
                tp, wanted.any(0, keepdim=True), roots.number_of[at], start.relu.sharded
            )
            if not len(numbers):
                continue
            bounds = self._bounds(start, below, numbers, batch, failing.halfspaces)
            bounds, _ = from_rank_zero(tp, bounds, False)
            place = roots.place_of[numbers]
            mine = place < roots.neurons
            place, (low, high) = place[mine], bounds[:, mine].to(batch.low)
            old = batch.ends[:, :, place]
            low, high = torch.maximum(old[0], low.t()), torch.minimum(old[1], high.t())
            new = torch.where(low <= high, torch.stack([low, high]), old)
            ends = batch.ends.clone()
            ends[:, :, place] = new
            batch = batch.within(roots, ends)
        return batch

    def _made(self) -> Any:
        """The inputs of all ReLUs, the first layer's first, and the ReLUs in front of each."""
        graph, roots = self.bounder.graph, self.bounder.roots
        for relu in reversed(roots.operators):
            plan = graph.schedule.plan(graph[relu.name].inputs[0], spec_sharded=False)
            names = {node.name for node in plan.order}
            below = tuple(r for r in roots.operators if r.name in names)
            yield InnerStart(graph, roots, relu, replace(roots, plan=plan)), below

    def _bounds(
        self, start: InnerStart, below: tuple[OperatorPlace, ...], numbers: torch.Tensor,
        batch: Batch, halfspaces: Halfspaces,
    ) -> torch.Tensor:
        """Lower and upper bounds of neurons [n] in D domains: [2, n, D] float64."""
        graph = self.bounder.graph
        # where nothing lies in front, rows are the same in all domains
        low, high = batch.low, batch.high
        if not below:
            low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)
        splits = {}
        for r in below:
            lines = batch.lines.map(lambda t, r=r: t[:, r.at])
            splits[r.name] = SplitRelu(lines, lines.adaptive(), lines.on.new_zeros(()))
        widest = max(low.shape[1], len(self.bounder.roots.operator_of) - 1)
        step = max(1, _NUMBERS // (len(low) * widest * 2))
        found = []
        with torch.no_grad():
            for some in numbers.split(step):
                sign = torch.ones_like(some)
                rows = start.rows(
                    torch.zeros_like(some).repeat(2), some.repeat(2), torch.cat([sign, -sign])
                )
                run = DomainPass(graph, start.below.plan, splits, low, high)
                C = rows.C[:, None].expand(-1, len(low), *rows.C.shape[1:])
                run.lower(C)
                wrong = self.bounder.rounding * run.size.double()
                bounds = least(run.A, run.constant, halfspaces, batch.low, batch.high) - wrong
                found.append(bounds.view(2, len(some), -1))
        below_z, above = torch.cat(found, 1)
        return torch.stack([below_z, -above]).nan_to_num(nan=0.0)
