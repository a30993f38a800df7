"""Bounds of domains: passes over a batch, and the ascent of alpha and beta."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lirpa_megatron.complete import planes
from lirpa_megatron.complete.agreement import from_rank_zero, mean_over_ranks
from lirpa_megatron.complete.batch import Ascent, Batch
from lirpa_megatron.complete.domain_pass import DomainPass
from lirpa_megatron.complete.linear_leaves import proposal
from lirpa_megatron.complete.narrowing import narrowed
from lirpa_megatron.complete.problem import Domain, Problem, SearchOptions, Split
from lirpa_megatron.complete.roots import Roots
from lirpa_megatron.complete.split_curve import Refit, SplitCurve
from lirpa_megatron.complete.split_relu import SplitRelu
from lirpa_megatron.complete.tightening import Tightening
from lirpa_megatron.operators.numerics import least_product

ROUNDING = 8
"""A bound proves its domain if it exceeds the threshold by more than this many units in the last
place of the sum of its terms' sizes: large beta that nearly cancel would leave rounding alone. Of
the constant, which is a sum of the pass, only its size counts."""
_DECAY = 0.98
_DROP = 0.2


@dataclass
class Bounded:
    """What a batch's ascent found.

    Attributes:
        margins: of all domains of the batch, [D] float64: the best row's best.
        proved: [D] bool.
        open: which are not, as indices [O].
        batch: these alone.
        seen: their A at each operator's output at the end, of their best rows: [O, N].
        minimiser: where the best row's bound is attained, [O, inputs].
        row: which, [O]; R is the weighted sum.
        is_over: whether time was.
        primal: the pre-activations at which the best rows' bounds are attained in the relaxation,
            averaged over the steps, [O, N]; None without steps. They are the gradients of beta, and
            their average goes to a solution of the linear program that the ascent solves.
        point: the minimisers, averaged alike, [O, inputs].
        slack: what the goals' margins are above outside of the boxes and intervals of `batch`, [O]
            float64.
    """

    margins: torch.Tensor
    proved: torch.Tensor
    open: torch.Tensor
    batch: Batch
    seen: torch.Tensor
    minimiser: torch.Tensor
    row: torch.Tensor
    is_over: bool
    primal: torch.Tensor | None = None
    point: torch.Tensor | None = None
    slack: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


class Bounder:
    """Bounds domains of one problem on a bound graph; call its methods inside `passes`.

    Args:
        graph: a BoundedModule.
        problem, roots: what the domains are of.
        options: step sizes.
        is_over: whether time is over, on this rank.
        tightens: whether domains become smaller (`tightening`), where that pays.
    """

    def __init__(
        self, graph: Any, problem: Problem, roots: Roots, options: SearchOptions,
        is_over: Callable[[], bool] = lambda: False, tightens: bool = True,
    ) -> None:
        self.graph, self.problem, self.roots, self.options = graph, problem, roots, options
        self.tp, self.is_over = graph.context.collectives, is_over
        self.units = problem.C.new_ones(len(problem), len(roots.operators))
        # of this rank's neurons, those that it counts: a replicated one is rank 0's
        self.counted = torch.ones(roots.neurons + 1, dtype=torch.bool, device=problem.C.device)
        for r in roots.operators:
            self.counted[r.at] = r.sharded or self.tp.rank == 0
        self.rounding = ROUNDING * torch.finfo(problem.C.dtype).eps
        self.tightening = Tightening(self, tightens)

    def whole(self, goals: Sequence[int]) -> Batch:
        """The goals' boxes, with CROWN's alpha."""
        return self.anew([(goal, ()) for goal in goals])

    def anew(self, domains: Sequence[tuple[int, tuple[Split, ...]]]) -> Batch:
        """Goals' boxes with splits, with CROWN's alpha and without beta."""
        empty = self.problem.C.new_zeros(self.problem.rows, 0)
        alpha = empty.new_zeros(len(empty), self.roots.neurons)
        batch = self.batch([Domain(g, splits, 0.0, alpha, empty, ()) for g, splits in domains])
        batch.alpha.copy_(batch.lines.adaptive())
        for lines in batch.curves:
            batch.alpha[..., lines.place.at] = 0.5
        return self.narrowed(batch)

    def batch(self, domains: Sequence[Domain]) -> Batch:
        """`Batch.of` of this problem."""
        own = self.tightening.ends, self.tightening.boxes
        return Batch.of(self.problem, self.roots, self.units, domains, *own)

    def narrowed(self, batch: Batch) -> Batch:
        """Domains with intervals of `narrowing`, and alpha and gamma that fit; none lower than it
        was. Domains of ReLUs alone stay as they are."""
        if not batch.curves:
            return batch
        ends = narrowed(
            self.graph, self.roots, batch.box, batch.low, batch.high, *batch.ends
        )
        after = batch.within(self.roots, torch.stack(ends))
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        visits = {
            old.place.name: Refit(
                old, new, *(t[..., old.place.at] for t in (batch.alpha, batch.gamma)), found
            ) for old, new in zip(batch.curves, after.curves, strict=True)
        }
        with torch.no_grad():
            self.run(after, batch.alpha, batch.pull(), others=visits)
        alpha, gamma = batch.alpha.clone(), batch.gamma.clone()
        for old in batch.curves:
            at = old.place.at
            alpha[..., at], gamma[..., at] = found[old.place.name]
        return replace(after, alpha=alpha, gamma=gamma)

    def measure(self, seen: torch.Tensor, goals: torch.Tensor) -> None:
        """Sets what beta is counted in: the mean size of A at each operator.

        Args:
            seen: A at operators' outputs for the goals' boxes, [G', N].
            goals: [G'].
        """
        parts = [seen[:, r.at].abs() for r in self.roots.operators]
        sums = torch.stack([p.sum(1) for p in parts], 1)
        counts = sums.new_tensor([float(r.size) for r in self.roots.operators])
        sharded = torch.tensor([r.sharded for r in self.roots.operators], device=sums.device)
        means = mean_over_ranks(self.tp, sums, counts, sharded)
        self.units[goals] = torch.where(means > 0, means, 1.0)

    def run(
        self, batch: Batch, alpha: torch.Tensor, pull: torch.Tensor,
        gamma: torch.Tensor | None = None, others: Mapping[str, Any] | None = None,
        free: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, DomainPass]:
        """One pass: its lower bounds [R', D], and the pass.

        Args:
            batch: D domains.
            alpha, pull, gamma: [R', D, N]; without gamma with the batch's.
            others: operator's name -> what is to be done at visits to it instead.
            free: [R', D, M]; None: the batch's.
        """
        roots, gamma = self.roots, batch.gamma if gamma is None else gamma
        sizes = [r.size for r in roots.operators]
        parts = zip(
            roots.operators, batch.lines.split(sizes), alpha.split(sizes, -1),
            pull.split(sizes, -1), strict=True,
        )
        splits: dict[str, Any] = {
            r.name: SplitRelu(*values) for r, *values in parts if r.curve is None
        }
        for lines in batch.curves:
            at = lines.place.at
            splits[lines.place.name] = SplitCurve(
                lines, alpha[..., at], pull[..., at], gamma[..., at]
            )
        free = batch.free if free is None else free
        splits |= {**planes.visits(roots.planes, free, batch.box), **(others or {})}
        run = DomainPass(self.graph, roots.plan, splits, batch.low, batch.high)
        lower = run.lower(batch.rows()[0])
        if batch.curves:
            run.size = run.size + self._size(batch, gamma.detach())
        return lower, run

    def _size(self, batch: Batch, gamma: torch.Tensor) -> torch.Tensor:
        """Of the terms that gamma adds to the constant, [R', D]."""
        parts = gamma.new_zeros(gamma.shape[:2])
        for lines in batch.curves:
            at = lines.place.at
            terms = least_product(gamma[..., at], lines.lower, lines.upper).abs()
            parts += (terms * self.counted[at]).sum(-1)
        return self.tp.reduce_from(parts)

    def margins(self, batch: Batch, lower: torch.Tensor, run: Any) -> tuple[Any, Any, bool]:
        """Rank 0's margins of rows [R', D] in float64, by how much they exceed rounding, and
        whether time is over."""
        _, thresholds = batch.rows()
        margins = lower.detach().double() - thresholds
        sure = margins - self.rounding * (run.size.double() + thresholds.abs())
        both = torch.stack([batch.of_best(margins), sure])
        both, over = from_rank_zero(self.tp, both, self.is_over())
        return both[0].nan_to_num(nan=-torch.inf), both[1], over

    def time_is_over(self) -> bool:
        """Whether time is over, by rank 0's clock."""
        return from_rank_zero(self.tp, self.problem.thresholds.new_zeros(1), self.is_over())[1]

    def quickly(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """With all multipliers as they are: margins [D], A at operators' outputs [R', D, N], and
        whether time is over."""
        with torch.no_grad():
            lower, run = self.run(batch, batch.alpha, batch.pull())
            margins, _, over = self.margins(batch, lower, run)
        return margins.amax(0), self._seen(run), over

    def _seen(self, run: DomainPass) -> torch.Tensor:
        return torch.cat([run.seen[r.name] for r in self.roots.operators], 2)

    def ascend(self, batch: Batch, iterations: int, decay: float = _DECAY) -> Bounded:
        """Optimizes all multipliers and weights; a domain leaves the batch when it is proved.

        Args:
            batch: D domains; its multipliers and weights are changed.
            iterations: steps; one more pass is made. Domains that stay open become smaller
                (`tightening`), if there are some.
            decay: of the step size, in each.
        """
        D, device = len(batch), batch.C.device
        best = torch.full((D,), -torch.inf, dtype=torch.float64, device=device)
        proved = torch.zeros(D, dtype=torch.bool, device=device)
        alive = torch.arange(D, device=device)
        ascent = Ascent(batch, self._scale(batch), self.options)
        over, primal, point = False, None, None
        for i in range(iterations + 1):
            steps = i < iterations
            with torch.set_grad_enabled(steps):
                leaves = {"alpha": batch.alpha, "pull": batch.pull()}
                if batch.curves:
                    leaves["gamma"] = batch.gamma
                if batch.free.shape[2]:
                    leaves["free"] = batch.free
                leaves = {k: t.detach().requires_grad_(steps) for k, t in leaves.items()}
                weights = batch.weights.detach().clone().requires_grad_(steps and batch.has_sum)
                lower, run = self.run(replace(batch, weights=weights), **leaves)
                if batch.has_sum:
                    leaves["weights"] = weights
            margins, sure, over = self.margins(batch, lower, run)
            best[alive] = torch.maximum(best[alive], margins.amax(0))
            ascent.keep(batch, margins)
            # NaN and infinity prove nothing.
            done = ((sure > 0) & margins.isfinite()).any(0)
            proved[alive[done]] = True
            done = proved[alive]
            if not steps or over or bool(done.all()):
                break
            counts = torch.where(done | ~lower.detach().isfinite(), 0.0, 1.0)
            found = torch.autograd.grad(
                (lower.nan_to_num() * counts).sum(), list(leaves.values())
            )
            to = {k: g.nan_to_num_() for k, g in zip(leaves, found, strict=True)}
            if batch.has_sum:
                to["weights"] = self._of_margins(batch, to["weights"])
            new = 3 / (i + 3)
            with torch.no_grad():
                z = to["pull"].neg_()
                x = run.minimiser.clone() if point is None else point.lerp(run.minimiser, new)
                primal, point = z if primal is None else primal.lerp(z, new), x
                to["beta"] = batch.to_beta(z)
                ascent.step(batch, to, decay**i)
            if done.sum() > _DROP * len(done):
                left = (~proved[alive]).nonzero().flatten()
                batch, alive = batch.at(left), alive[left]
                ascent.at(left)
                primal, point = primal[:, left], point[:, left]
        left = (~proved[alive]).nonzero().flatten()
        failing = None
        if self.tightening.boxes and iterations and len(left) and not over:
            failing = self.tightening.failing(batch, run, sure, self._seen(run)).at(left)
        ascent.restore(batch)
        found = self._bounded(best, proved, alive, batch, run, margins, over)
        if failing is not None:
            found = self.tightening(found, failing)
        if primal is not None:
            found.primal, found.point = primal[found.row, left], point[found.row, left]
        return found

    def _scale(self, batch: Batch) -> torch.Tensor | None:
        """What gamma is counted in, [D, N]; None without other functions than ReLUs."""
        if not batch.curves:
            return None
        units = self.units[batch.goal]
        return torch.cat([
            units[:, i, None].expand(-1, r.size) for i, r in enumerate(self.roots.operators)
        ], 1)

    def solve(self, batch: Batch) -> Bounded:
        """Domains that are linear programs, with beta from `linear_leaves`.

        The forms in the input are those of passes with beta 0 and beta 1 at one split after the
        other, in which A is linear. Rank 0 solves.

        Args:
            batch: D domains; its beta is changed.
        """
        k = batch.beta.shape[2]
        given = replace(batch, beta=torch.zeros_like(batch.beta))
        forms, constants = [], []
        with torch.no_grad():
            for j in range(-1, k):
                own = given.beta.clone()
                if j >= 0:
                    own[..., j] = 1
                _, run = self.run(batch, batch.alpha, replace(batch, beta=own).pull())
                forms.append(run.A.double())
                constants.append(run.constant.double())
            # pull was s_j u_j: the term that a pass with beta 1 has lost is s_j u_j z_j
            weights, beta, points = self._solved(
                batch, torch.stack(forms, 2), torch.stack(constants, 2)
            )
            batch.weights.copy_(weights)
            batch.beta.copy_(torch.where(batch.places < batch.alpha.shape[2], beta, 0.0))
        found = self.ascend(batch, 0)
        found.point = points[found.open]
        return found

    def _solved(
        self, batch: Batch, forms: torch.Tensor, constants: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights [R, D], beta [D, k] and points [D, inputs], from forms [R', D, k + 1, inputs]."""
        R, D, count = len(batch.C), len(batch), forms.shape[2]
        # what beta 1 has changed is the same for each row
        splits = [t[0, :, :1] - t[0, :, 1:] for t in (forms, constants)]
        rows = forms[:R, :, 0].transpose(0, 1), (constants[:R, :, 0] - batch.thresholds).t()
        used = (batch.signs != 0).double()
        found = forms.new_zeros(D, R + count - 1 + forms.shape[3])
        for d in range(D if self.tp.rank == 0 else 0):
            found[d] = torch.cat(proposal(
                *(torch.cat([row[d], split[d]]) for row, split in zip(rows, splits, strict=True)),
                used[d], batch.low[d].double(), batch.high[d].double(),
            ))
        found, _ = from_rank_zero(self.tp, found, False)
        weights, beta, points = found.split([R, count - 1, forms.shape[3]], 1)
        return weights.t().to(batch.weights), beta.to(batch.beta), points.to(batch.low)

    def _of_margins(self, batch: Batch, of_bounds: torch.Tensor) -> torch.Tensor:
        """Rank 0's gradients of margins with respect to weights [R, D], from those of bounds."""
        g = of_bounds.double().nan_to_num() - batch.thresholds
        return from_rank_zero(self.tp, g, False)[0].to(of_bounds)

    def _bounded(
        self, best: Any, proved: Any, alive: Any, batch: Batch, run: Any, margins: Any, over: bool
    ) -> Bounded:
        left = (~proved[alive]).nonzero().flatten()
        row = margins.argmax(0)[left]
        return Bounded(
            best, proved, alive[left], batch.at(left), self._seen(run)[row, left],
            run.minimiser[row, left], row, over, slack=best.new_full((len(left),), torch.inf),
        )
