"""What branch and bound is to prove, what it works on, and what it finds out.

    K boxes    G goals    R rows of a goal    D domains that are bounded together
    N neurons of ReLUs on this rank, one after the other    k splits of a domain
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

Split = tuple[int, int]
"""A neuron, by its number among all of the network's ReLUs, and the sign of its pre-activation."""


@dataclass(frozen=True)
class Problem:
    """Boxes and what has to hold in them: of each goal, at every point of its box, at least one row
    `c . y` exceeds its threshold.

    All replicated. Goals of fewer rows repeat one.
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


@dataclass(frozen=True)
class SearchOptions:
    """How domains are bounded and split."""

    # most domains that are split at once
    batch: int = 128
    # steps of alpha and beta for each domain
    iterations: int = 16
    # the same for a goal's whole box
    first_iterations: int = 100
    # the same for a domain without an unstable neuron, before it is solved as a linear program
    last_iterations: int = 40
    # the same for each unstable inner neuron of a box, before anything is split; 0: not at all
    refinement_iterations: int = 20
    # step sizes of alpha, and of beta in units of A's mean size
    lr_alpha: float = 0.7
    lr_beta: float = 0.7
    # neurons that are tried for each split
    tried: int = 16
    # seconds; None: no limit
    timeout: float | None = None
    # most domains; None: no limit
    most_domains: int | None = None
    # whether the tree is kept
    keep_tree: bool = False


@dataclass
class Domain:
    """A box with splits that is not proved yet."""

    goal: int
    splits: tuple[Split, ...]
    margin: float
    """Lower bound of the best row's `c . y` minus its threshold."""
    alpha: torch.Tensor
    """[R, N], of this rank's neurons"""
    beta: torch.Tensor
    """[R, k], of all splits; those on other ranks are 0"""
    candidates: tuple[int, ...]
    """Neurons that may be split next, the most promising first."""


@dataclass(frozen=True)
class Leaf:
    """A domain that was proved."""

    goal: int
    splits: tuple[Split, ...]
    margin: float


@dataclass
class Searched:
    """What branch and bound found out.

    Attributes:
        status: "proved", "refuted" (`point` is a counterexample), "unknown" or "timeout".
        bound: smallest lower bound of a goal's margin that is known: above 0 if proved.
        margins: for each goal the same.
        domains: how many were bounded.
        open: how many were left.
        seconds: that it took.
        why: why it is unknown.
        point: where a goal fails, [inputs].
        goal: which.
        leaves: of the tree, if it was kept.
    """

    status: str
    bound: float
    margins: Sequence[float]
    domains: int
    open: int
    seconds: float
    why: str | None = None
    point: torch.Tensor | None = None
    goal: int | None = None
    leaves: list[Leaf] = field(default_factory=list)
