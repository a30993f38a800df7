"""What branch and bound is to prove, what it works on, and what it finds out.

    K boxes    G goals    R rows of a goal    R' with their weighted sum
    D domains that are bounded together
    N neurons on this rank that can be split, one operator's after the other's
    k splits of a domain
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lirpa_megatron.complete.cut_tree import CutTree

if TYPE_CHECKING:
    from lirpa_megatron.complete.state import SearchState

Split = tuple[int, int, float]
"""(j, s, p): s (z_j - p) >= 0 for the pre-activation z_j of neuron j, by its number among all of
the network's that can be split (`roots.Roots`). s is 1 or -1. p is 0 at a ReLU; elsewhere a number
that float32 has, and so every type."""


@dataclass(frozen=True)
class Problem:
    """Boxes and what has to hold in them: of each goal, at every point of its box, at least one row
    `c . y` exceeds its threshold.

    All replicated. Goals of fewer rows repeat one.

    A goal of several rows is bounded as each of them, and as a weighted sum of all: where
    sum_r w_r (c_r . y - t_r) > 0 with weights w >= 0, at least one of its terms is. Domains have
    weights of their own, which are optimized together with alpha and beta. (The rows' negations are
    constraints on the outputs, w their multipliers, so that in a domain where the network is
    linear the best of them decide.)
    """

    low: torch.Tensor
    """[K, inputs]"""
    high: torch.Tensor
    boxes: tuple[int, ...]
    """Of each goal its box."""
    C: torch.Tensor
    """[G, R, outputs]"""
    thresholds: torch.Tensor
    """[G, R] float64"""

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def rows(self) -> int:
        """R', the rows that are bounded: R, and their weighted sum if R > 1."""
        R = self.C.shape[1]
        return R + (R > 1)


@dataclass(frozen=True)
class SearchOptions:
    """How domains are bounded and split."""

    # what is split: "relu", "nonlinear" (any function of one variable), "input" (the boxes are cut)
    # or "auto" (`strategy.chosen`)
    branching: str = "auto"
    # most domains that are split at once
    batch: int = 128
    # most parts of boxes that are bounded at once
    box_batch: int = 512
    # steps of alpha and beta for each domain
    iterations: int = 16
    # the same for a goal's whole box
    first_iterations: int = 100
    # the same for a domain without an unstable neuron, before it is solved as a linear program
    last_iterations: int = 40
    # the same for each bound of an unstable inner neuron of a box; 0: they are left as they are
    refinement_iterations: int = 20
    # most domains for each of these bounds where they are split first, after a search that was not
    # enough; four times as many after each search that follows, and more in early layers. 0: they
    # are not split
    refinement_domains: int = 32
    # of these domains: how many are split at once, steps of alpha and beta for each (one more each
    # time), and neurons tried for each split
    inner_batch: int = 512
    inner_iterations: int = 3
    inner_tried: int = 1
    # step sizes of alpha, and of beta in units of A's mean size
    lr_alpha: float = 0.7
    lr_beta: float = 0.7
    # the same of other functions than ReLUs: of alpha, and of gamma in the same units
    lr_alpha_nonlinear: float = 0.1
    lr_gamma: float = 0.1
    # the same of alpha of operators that are not split
    lr_planes: float = 0.1
    # the same of the weights of a goal's rows
    lr_weights: float = 0.1
    # neurons that are tried for each split; in networks with other functions than ReLUs
    tried: int = 16
    tried_nonlinear: int = 1
    # seconds; None: no limit
    timeout: float | None = None
    # most domains; None: no limit
    most_domains: int | None = None
    # whether the tree is kept
    keep_tree: bool = False
    # asked beside the clock whether to end, on each rank; rank 0's answer counts
    stop: Callable[[], bool] = lambda: False
    # what an earlier search has left
    start: SearchState | None = None

    def is_over(self, seconds: float) -> bool:
        """Whether a search of so many seconds is to end, by this rank's clock."""
        return self.stop() or (self.timeout is not None and seconds > self.timeout)


@dataclass
class Domain:
    """A box with splits that is not proved yet."""

    goal: int
    splits: tuple[Split, ...]
    margin: float
    """Lower bound of the best row's `c . y` minus its threshold."""
    alpha: torch.Tensor
    """[R', N], of this rank's neurons"""
    beta: torch.Tensor
    """[R', k], of all splits; those on other ranks are 0"""
    candidates: tuple[tuple[int, float], ...]
    """Neurons that may be split next, the most promising first, and where."""
    weights: torch.Tensor | None = None
    """[R], of the sum of rows; None: equal ones."""
    gamma: torch.Tensor | None = None
    """[R', N], in networks with other functions than ReLUs; None: 0."""
    ends: torch.Tensor | None = None
    """Intervals of pre-activations that alpha and gamma are for, [2, N]; None: the box's, cut at
    the splits."""
    pace: torch.Tensor | None = None
    """What steps of alpha, beta and gamma are multiplied with, [R']; None: 1."""
    free: torch.Tensor | None = None
    """Alpha of operators that are not split, [R', M]; None: 1/2."""
    box: torch.Tensor | None = None
    """The part of the box in which the goal may fail, [2, inputs]; None: all of it."""
    least: float = math.inf
    """What the goal's margin is above in the rest of the box, and outside of `ends`."""


@dataclass(frozen=True)
class Leaf:
    """A domain that was proved."""

    goal: int
    splits: tuple[Split, ...]
    margin: float


@dataclass(frozen=True)
class Claim:
    """A bound of an inner neuron: `sign * z` of the neuron `number` is at least `bound` in a box,
    because it is in each of the leaves, which cover it."""

    box: int
    number: int
    sign: int
    bound: float
    leaves: tuple[tuple[Split, ...], ...]


@dataclass
class Searched:
    """What branch and bound found out.

    Attributes:
        status: "proved", "refuted" (`point` is a counterexample), "unknown" or "timeout".
        bound: smallest lower bound of a goal's margin that is known: above 0 if proved.
        margins: for each goal the same.
        domains: how many were bounded.
        open: how many were left.
        inner_domains: how many were bounded for inner neurons' bounds.
        seconds: that it took.
        why: why it is unknown.
        point: where a goal fails, as `exploring.Confirm` has given it.
        goal: which.
        leaves: of the trees, if they were kept.
        claims: bounds of inner neurons that they rest on, if they were kept.
        branching: what was split, "relu", "nonlinear" or "input".
        cuts: where boxes were cut, if trees were kept.
        state: where it was, if trees were kept and something was left.
    """

    status: str
    bound: float
    margins: Sequence[float]
    domains: int
    open: int
    seconds: float
    why: str | None = None
    point: Any = None
    goal: int | None = None
    leaves: list[Leaf] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    inner_domains: int = 0
    branching: str = "relu"
    cuts: list[CutTree] = field(default_factory=list)
    state: SearchState | None = None
