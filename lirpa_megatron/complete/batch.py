"""A batch of domains as tensors, with alpha and beta and the state of their optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lirpa_megatron.complete.problem import Domain, Problem, SearchOptions
from lirpa_megatron.complete.roots import Roots
from lirpa_megatron.complete.split_curve import CurveLines, cut_lines, ends_of, fitted, lines_of
from lirpa_megatron.complete.split_relu import Lines

_STEPS = 4096
_NOISE = 256
"""Units in the last place."""
_VALUES = "alpha", "beta", "gamma", "free", "weights"
"""What is optimized."""
_SLOWER, _FASTER, _SLOWEST = 0.6, 2.0, 0.05
"""How a domain's `pace` changes for its halves: after steps of which none was better than what they
began with, and after others; and the least it becomes."""


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
    """Of [D, N]; at other functions than ReLUs without meaning, but not unstable."""
    curves: tuple[CurveLines, ...]
    """Of these functions."""
    ends: torch.Tensor
    """Intervals of pre-activations, where domains keep their own: [2, D, N], else [2, D, 0]."""
    places: torch.Tensor
    """Of split neurons among this rank's: [D, k]."""
    signs: torch.Tensor
    """Of splits of ReLUs: [D, k]; 0 where a domain has fewer."""
    units: torch.Tensor
    """What beta is counted in: [D, k]."""
    alpha: torch.Tensor
    """[R', D, N]"""
    beta: torch.Tensor
    """[R', D, k]"""
    gamma: torch.Tensor
    """Of other functions' neurons: [R', D, N], or [R', D, 0] where ReLUs are all there is."""
    pace: torch.Tensor
    """Where ReLUs are not all that is not linear what steps are multiplied with: [R', D]."""
    free: torch.Tensor
    """Alpha of operators that are not split, [R', D, M]."""
    own_boxes: bool
    """Whether domains keep boxes of their own."""

    def __len__(self) -> int:
        return len(self.goal)

    @classmethod
    def of(
        cls, problem: Problem, roots: Roots, units: torch.Tensor, domains: Sequence[Domain],
        own_ends: bool = False, own_boxes: bool = False,
    ) -> Batch:
        """The tensors of some domains.

        Args:
            problem, roots: that they are of.
            units: what beta is counted in, by goal and operator: [G, operators].
            domains: D of them.
            own_ends, own_boxes: whether each keeps its own intervals and box.
        """
        device, like = problem.C.device, problem.C
        goal = torch.tensor([d.goal for d in domains], device=device)
        box = torch.tensor([problem.boxes[d.goal] for d in domains], device=device)
        most = max(len(d.splits) for d in domains)
        padded = [(*d.splits, *[(-1, 0, 0)] * (most - len(d.splits))) for d in domains]
        splits = torch.tensor(padded, dtype=torch.float64, device=device)
        numbers, signs, points = splits.view(len(domains), most, 3).unbind(2)
        numbers, signs, points = numbers.long(), signs.to(like), points.to(like)
        places = roots.place_of[numbers]  # the last entry, for -1, is N
        own_signs = like.new_zeros(len(domains), roots.neurons + 1).scatter(1, places, signs)
        ends, given = like.new_zeros(2, len(domains), 0), (roots.lower[box], roots.upper[box])
        if roots.curves or own_ends:
            ends = given = ends_of(roots, box, places, signs, points)
            for i, d in enumerate(domains):
                if d.ends is not None:  # cut at the splits, too
                    ends[:, i] = d.ends
        low, high = problem.low[box], problem.high[box]
        for i, d in enumerate(domains):
            if d.box is not None:
                low[i], high[i] = d.box
        lines, curves = _lines(roots, given, own_signs[:, :-1])
        signs = torch.where(roots.of_curve[numbers], 0.0, signs)
        R = problem.C.shape[1]
        weights = like.new_full((R, len(domains)), 1 / R)
        beta = like.new_zeros(problem.rows, len(domains), most)
        for i, d in enumerate(domains):
            beta[:, i, : d.beta.shape[1]] = d.beta
            if d.weights is not None:
                weights[:, i] = d.weights
        alpha = torch.stack([d.alpha for d in domains], 1).to(like)
        gamma = like.new_zeros(*alpha.shape[:2], alpha.shape[2] if curves else 0)
        for i, d in enumerate(domains):
            if d.gamma is not None:
                gamma[:, i] = d.gamma
        pace = like.new_ones(alpha.shape[:2])
        for i, d in enumerate(domains):
            if d.pace is not None:
                pace[:, i] = d.pace
        free = like.new_full((*alpha.shape[:2], roots.free), 0.5)
        for i, d in enumerate(domains):
            if d.free is not None:
                free[:, i] = d.free
        units = units[goal[:, None], roots.operator_of[numbers]]
        return cls(
            goal, box, problem.C[goal].transpose(0, 1), problem.thresholds[goal].t(), weights,
            low, high, lines, curves, ends, places, signs, units, alpha, beta, gamma, pace,
            free, own_boxes,
        )

    def at(self, index: torch.Tensor) -> Batch:
        """Some of the domains."""
        first = {name: getattr(self, name)[index] for name in (
            "goal", "box", "low", "high", "places", "signs", "units"
        )}
        second = {name: getattr(self, name)[:, index] for name in (
            "C", "thresholds", "weights", "ends", "alpha", "beta", "gamma", "pace", "free"
        )}
        curves = tuple(lines.at(index) for lines in self.curves)
        return Batch(
            **first, **second, lines=self.lines.map(lambda t: t[index]), curves=curves,
            own_boxes=self.own_boxes,
        )

    def split(
        self, roots: Roots, numbers: torch.Tensor, signs: torch.Tensor, points: torch.Tensor,
        units: torch.Tensor, A: torch.Tensor | None = None,
    ) -> Batch:
        """With one more split in each domain.

        With A, alpha, beta and gamma of the new split begin where this neuron's term is at least
        the parent's. At a ReLU the line alpha z of a neuron with A > 0 becomes z or 0, and beta = A
        (1 - alpha) or A alpha makes alpha z of it again; for others see `split_curve.fitted`.
        Without A beta begins at 0, and the others as they were.

        Args:
            roots: the roots.
            numbers: of the neurons, [D].
            signs: [D]
            points: where, [D].
            units: as for `of`.
            A: at all neurons' outputs, [R', D, N].
        """
        place = roots.place_of[numbers][:, None]
        sign, point = signs.to(self.signs)[:, None], points.to(self.low)[:, None]
        here = place < roots.neurons
        index = place.clamp(max=roots.neurons - 1)
        unit = units[self.goal, roots.operator_of[numbers]][:, None]

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
            # those of no ReLU are not unstable
            beta = torch.where(here & lines.unstable.gather(1, index), beta / unit, 0.0)
        curves, ends, alpha, gamma = self.curves, self.ends, self.alpha, self.gamma
        if ends.shape[2]:
            low, high = (end.gather(1, index) for end in ends)
            low = torch.where(sign > 0, torch.maximum(low, point), low)
            high = torch.where(sign < 0, torch.minimum(high, point), high)
            ends = torch.stack([put(ends[0], low), put(ends[1], torch.maximum(low, high))])
        if curves:
            curves = cut_lines(curves, place, sign, point)
            if A is not None:
                alpha, gamma = fitted(self.curves, curves, place, A, alpha, gamma)
        return replace(
            self,
            lines=Lines(
                put(lines.on, on), put(lines.unstable, zero), put(lines.upper_slope, on),
                put(lines.intercept, zero),
            ),
            curves=curves, ends=ends,
            places=torch.cat([self.places, place], 1),
            signs=torch.cat([
                self.signs, torch.where(roots.of_curve[numbers][:, None], 0.0, sign)
            ], 1),
            units=torch.cat([self.units, unit], 1),
            alpha=alpha, beta=torch.cat([self.beta, beta], 2), gamma=gamma,
        )

    @property
    def only_relus(self) -> bool:
        """Whether ReLUs are all that is not linear."""
        return not (self.curves or self.free.shape[2])

    def to_keep(self, i: int) -> Iterator[torch.Tensor | None]:
        """Gamma, intervals, pace, free alpha and box of one domain, where it has its own."""
        yield self.gamma[:, i].clone() if self.curves else None
        yield self.ends[:, i].clone() if self.ends.shape[2] else None
        for value in (self.pace, self.free):
            yield None if self.only_relus else value[:, i].clone()
        yield torch.stack([self.low[i], self.high[i]]) if self.own_boxes else None

    def within(self, roots: Roots, ends: torch.Tensor) -> Batch:
        """With narrower intervals [2, D, N]."""
        own_signs = self.low.new_zeros(len(self), roots.neurons + 1)
        own_signs = own_signs.scatter(1, self.places, self.signs)
        lines, curves = _lines(roots, ends, own_signs[:, :-1])
        return replace(self, lines=lines, curves=curves, ends=ends)

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


def _lines(
    roots: Roots, ends: Any, signs: torch.Tensor
) -> tuple[Lines, tuple[CurveLines, ...]]:
    """From intervals [2, D, N] and signs of ReLUs' splits [D, N]."""
    lines = Lines.of(*ends, signs)
    curves = lines_of(roots, ends) if roots.curves else ()
    for curve in curves:
        lines.unstable[:, curve.place.at] = False
    return lines, curves


def _above(margins: torch.Tensor, others: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Whether margins are larger by more than rounding, which differs between ranks' sums."""
    return margins > others + _NOISE * torch.finfo(dtype).eps * (1 + others.abs())


class Ascent:
    """Adam on alpha, beta, gamma, free alpha and weights, upwards, within alpha in [0, 1], beta >=
    0, weights >= 0 of sum 1.

    Of each domain on its own: what others do does not change its steps.

    Args:
        batch: of which.
        scale: what gamma is counted in, [D, N]; None where ReLUs are all there is.
        options: step sizes.
    """

    def __init__(
        self, batch: Batch, scale: torch.Tensor | None, options: SearchOptions
    ) -> None:
        self.rates: list[Any] = [
            options.lr_alpha, options.lr_beta, 0.0, options.lr_planes, options.lr_weights
        ]
        self.only_relus, self.has_curves = batch.only_relus, scale is not None
        if scale is not None:
            share = torch.ones_like(batch.lines.on[0])
            for lines in batch.curves:
                share[lines.place.at] = options.lr_alpha_nonlinear / options.lr_alpha
            self.rates[0], self.rates[2] = options.lr_alpha * share, options.lr_gamma * scale
        self.means = [torch.zeros_like(t) for t in self._values(batch)]
        self.squares = [torch.zeros_like(t) for t in self.means]
        self.steps = 0
        self._best: list[torch.Tensor] = []

    @staticmethod
    def _values(batch: Batch) -> list[torch.Tensor]:
        return [getattr(batch, name) for name in _VALUES]

    def keep(self, batch: Batch, margins: torch.Tensor) -> None:
        """In networks that are not linear but for ReLUs: notes the values of each row's best bound
        so far, by its margins [R', D].

        (Where ReLUs are all there is the last ones are hardly worse, and copies take time.)
        """
        if self.only_relus:
            return
        now = [margins, *self._values(batch)]
        if not self._best:
            self._best = [t.clone() for t in now]
            self._first = margins
            return
        better = _above(margins, self._best[0], batch.low.dtype)
        each = better[..., None]
        masks = better, each, each, each, each, better[-1:]
        for best, new, mask in zip(self._best, now, masks, strict=True):
            torch.where(mask, new, best, out=best)

    def restore(self, batch: Batch) -> None:
        """Gives the batch what was noted.

        Where no step was better than the first values, the domain's halves get smaller ones: in
        narrow domains large multipliers nearly cancel each other, and steps that are right
        elsewhere throw them out of balance.
        """
        if self._best and self.steps:
            rose = _above(self._best[0], self._first, batch.low.dtype)
            batch.pace.mul_(torch.where(rose, _FASTER, _SLOWER)).clamp_(_SLOWEST, 1.0)
        for value, best in zip(self._values(batch), self._best[1:], strict=False):
            value.copy_(best)

    def at(self, index: torch.Tensor) -> None:
        """Some of the domains."""
        self.means = [t[:, index] for t in self.means]
        self.squares = [t[:, index] for t in self.squares]
        self._best = [t[:, index] for t in self._best]
        if self._best:
            self._first = self._first[:, index]
        if self.has_curves:
            self.rates[2] = self.rates[2][index]

    def step(
        self, batch: Batch, gradients: Mapping[str, torch.Tensor], decay: float
    ) -> None:
        """Changes the batch's values in place, those whose gradients are given."""
        self.steps += 1
        first, second = 1 - 0.9**self.steps, 1 - 0.999**self.steps
        for i, name in enumerate(_VALUES):
            value, g = getattr(batch, name), gradients.get(name)
            if g is None:
                continue
            self.means[i].lerp_(g, 0.1)
            self.squares[i].mul_(0.999).addcmul_(g, g, value=0.001)
            size = (self.squares[i] / second).sqrt_().add_(1e-8)
            mean, rate = self.means[i], self.rates[i]
            if not self.only_relus and i < 4:
                mean, rate = mean * (rate * batch.pace[..., None]), 1.0
            value.addcdiv_(mean, size, value=rate * decay / first)
        batch.alpha.clamp_(0, 1)
        batch.free.clamp_(0, 1)
        batch.beta.clamp_(min=0)
        if "weights" in gradients:
            w = batch.weights.clamp_(min=0)
            w.div_(w.sum(0).clamp(min=torch.finfo(w.dtype).tiny))
