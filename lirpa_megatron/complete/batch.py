"""A batch of domains as tensors, with alpha and beta and the state of their optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lirpa_megatron.complete.problem import Domain, Problem, SearchOptions
from lirpa_megatron.complete.roots import Roots
from lirpa_megatron.complete.split_relu import Lines

_STEPS = 4096


@dataclass(frozen=True)
class Batch:
    """D domains on this rank. Index N of a neuron stands for one that another rank has."""

    goal: torch.Tensor
    """[D]"""
    box: torch.Tensor
    """[D]"""
    C: torch.Tensor
    """[R, D, outputs]"""
    thresholds: torch.Tensor
    """[R, D] float64"""
    weights: torch.Tensor
    """Of the sum of rows, [R, D]."""
    low: torch.Tensor
    """[D, inputs]"""
    high: torch.Tensor
    lines: Lines
    """Of [D, N]."""
    places: torch.Tensor
    """Of split neurons among this rank's: [D, k]."""
    signs: torch.Tensor
    """Of splits: [D, k]; 0 where a domain has fewer."""
    units: torch.Tensor
    """What beta is counted in: [D, k]."""
    alpha: torch.Tensor
    """[R', D, N]"""
    beta: torch.Tensor
    """[R', D, k]"""

    def __len__(self) -> int:
        return len(self.goal)

    @classmethod
    def of(
        cls, problem: Problem, roots: Roots, units: torch.Tensor, domains: Sequence[Domain]
    ) -> Batch:
        """The tensors of some domains.

        Args:
            problem, roots: that they are of.
            units: what beta is counted in, by goal and ReLU: [G, ReLUs].
            domains: D of them.
        """
        device, like = problem.C.device, problem.C
        goal = torch.tensor([d.goal for d in domains], device=device)
        box = torch.tensor([problem.boxes[d.goal] for d in domains], device=device)
        most = max(len(d.splits) for d in domains)
        padded = [(*d.splits, *[(-1, 0)] * (most - len(d.splits))) for d in domains]
        splits = torch.tensor(padded, dtype=torch.int64, device=device).view(len(domains), most, 2)
        numbers, signs = splits[..., 0], splits[..., 1].to(like)
        places = roots.place_of[numbers]  # the last entry, for -1, is N
        own_signs = like.new_zeros(len(domains), roots.neurons + 1).scatter(1, places, signs)
        lines = Lines.of(roots.lower[box], roots.upper[box], own_signs[:, :-1])
        R = problem.C.shape[1]
        weights = like.new_full((R, len(domains)), 1 / R)
        beta = like.new_zeros(problem.rows, len(domains), most)
        for i, d in enumerate(domains):
            beta[:, i, : d.beta.shape[1]] = d.beta
            if d.weights is not None:
                weights[:, i] = d.weights
        alpha = torch.stack([d.alpha for d in domains], 1).to(like)
        units = units[goal[:, None], roots.relu_of[numbers]]
        return cls(
            goal, box, problem.C[goal].transpose(0, 1), problem.thresholds[goal].t(), weights,
            problem.low[box], problem.high[box], lines, places, signs, units, alpha, beta,
        )

    def at(self, index: torch.Tensor) -> Batch:
        """Some of the domains."""
        first = {name: getattr(self, name)[index] for name in (
            "goal", "box", "low", "high", "places", "signs", "units"
        )}
        second = {name: getattr(self, name)[:, index] for name in (
            "C", "thresholds", "weights", "alpha", "beta"
        )}
        return Batch(**first, **second, lines=self.lines.map(lambda t: t[index]))

    def split(
        self, roots: Roots, numbers: torch.Tensor, signs: torch.Tensor, units: torch.Tensor,
        A: torch.Tensor | None = None,
    ) -> Batch:
        """With one more split in each domain.

        With A, beta of the new split begins where this neuron's term is at least the parent's: the
        line alpha z of a neuron with A > 0 becomes z or 0, and beta = A (1 - alpha) or A alpha
        makes alpha z of it again. Without A it begins at 0.

        Args:
            roots: the roots.
            numbers: of the neurons, [D].
            signs: [D]
            units: as for `of`.
            A: at all neurons' outputs, [R', D, N].
        """
        place = roots.place_of[numbers][:, None]
        sign = signs.to(self.signs)[:, None]
        here = place < roots.neurons
        index = place.clamp(max=roots.neurons - 1)
        unit = units[self.goal, roots.relu_of[numbers]][:, None]

        def put(old: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            value = torch.where(here, value.to(old.dtype), old.gather(1, index))
            return old.scatter(1, index, value)

        lines, on = self.lines, (sign > 0).to(self.lines.on)
        zero = torch.zeros_like(on)
        beta = self.alpha.new_zeros(*self.alpha.shape[:2], 1)
        if A is not None:
            each = index.expand(len(A), -1, -1)
            alpha = self.alpha.gather(2, each)
            beta = A.gather(2, each).clamp(min=0) * torch.where(sign > 0, 1 - alpha, alpha)
            beta = torch.where(here, beta / unit, 0.0)
        return replace(
            self,
            lines=Lines(
                put(lines.on, on), put(lines.unstable, zero), put(lines.upper_slope, on),
                put(lines.intercept, zero),
            ),
            places=torch.cat([self.places, place], 1),
            signs=torch.cat([self.signs, sign], 1),
            units=torch.cat([self.units, unit], 1),
            beta=torch.cat([self.beta, beta], 2),
        )

    @property
    def has_sum(self) -> bool:
        """Whether a weighted sum of rows is bounded, too."""
        return len(self.C) > 1

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that are bounded [R', D, outputs], and their thresholds [R', D] float64.

        Weights count as multiples of 1 / 4096, and so have few digits: a sum of rows of small
        numbers is exact in float32. Gradients pass by that.
        """
        if not self.has_sum:
            return self.C, self.thresholds
        w = self._counted()
        C, ends = (w[..., None] * self.C).sum(0), (w.detach().double() * self.thresholds).sum(0)
        return torch.cat([self.C, C[None]]), torch.cat([self.thresholds, ends[None]])

    def _counted(self) -> torch.Tensor:
        w = self.weights
        return w + ((w.detach() * _STEPS).round() / _STEPS - w.detach())

    def of_best(self, margins: torch.Tensor) -> torch.Tensor:
        """Margins of rows and of their sum [R', D] -> lower bounds of the best row's.

        Rounded weights sum to W, which need not be 1, and the best row's margin is at least that of
        the sum divided by W. Where all weights are 0 the sum's is of the splits alone: above 0 if
        they contradict each other, and no bound of a row otherwise.
        """
        if not self.has_sum:
            return margins
        total, of_sum = self._counted().detach().double().sum(0), margins[-1]
        nothing = torch.where(of_sum > 0, of_sum, -torch.inf)
        best = torch.where(total > 0, of_sum / total, nothing)
        return torch.cat([margins[:-1], best[None]])

    def pull(self) -> torch.Tensor:
        """s_j beta_j at split neurons, 0 elsewhere: [R', D, N]."""
        R, D, _ = self.beta.shape
        whole = self.beta.new_zeros(R, D, self.alpha.shape[2] + 1)
        terms = self.beta * (self.signs * self.units)
        return whole.scatter(2, self.places.expand(R, -1, -1), terms)[..., :-1]

    def to_beta(self, z: torch.Tensor) -> torch.Tensor:
        """The bounds' gradients with respect to beta, [R', D, k], from those with respect to minus
        `pull`, [R', D, N]."""
        here = self.places < z.shape[2]
        index = torch.where(here, self.places, 0).expand(len(z), -1, -1)
        return -z.gather(2, index) * torch.where(here, self.signs * self.units, 0.0)


class Ascent:
    """Adam on alpha, beta and weights, upwards, within alpha in [0, 1], beta >= 0, weights >= 0 of
    sum 1.

    Of each domain on its own: what others do does not change its steps.
    """

    def __init__(self, batch: Batch, options: SearchOptions) -> None:
        self.rates = options.lr_alpha, options.lr_beta, options.lr_weights
        self.means = [torch.zeros_like(t) for t in (batch.alpha, batch.beta, batch.weights)]
        self.squares = [torch.zeros_like(t) for t in self.means]
        self.steps = 0

    def at(self, index: torch.Tensor) -> None:
        """Some of the domains."""
        self.means = [t[:, index] for t in self.means]
        self.squares = [t[:, index] for t in self.squares]

    def step(self, batch: Batch, gradients: Sequence[torch.Tensor], decay: float) -> None:
        """Changes `batch.alpha` and `batch.beta` in place, and `batch.weights` where gradients of
        them are given."""
        self.steps += 1
        first, second = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        values = batch.alpha, batch.beta, batch.weights
        for i, (value, g) in enumerate(zip(values, gradients, strict=False)):
            self.means[i].lerp_(g, 0.1)
            self.squares[i].mul_(0.999).addcmul_(g, g, value=0.001)
            size = (self.squares[i] / second).sqrt_().add_(1e-8)
            value.addcdiv_(self.means[i], size, value=self.rates[i] * decay / first)
        batch.alpha.clamp_(0, 1)
        batch.beta.clamp_(min=0)
        if len(gradients) > 2:
            w = batch.weights.clamp_(min=0)
            w.div_(w.sum(0).clamp(min=torch.finfo(w.dtype).tiny))
