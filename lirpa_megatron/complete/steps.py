"""One step of a search: domains are split, and their halves bounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from lirpa_megatron.complete import branching
from lirpa_megatron.complete.bounding import Bounded, Bounder
from lirpa_megatron.complete.problem import Domain

_DIGITS = 12
"""Binary ones of margins by which domains are put in order."""


def rank(margin: float) -> float:
    """A margin as a domain's place in the order of its search: rounded down to few digits.

    The half of a domain that a split does not help has its parent's margin, up to rounding, which
    differs between tensor-parallel sizes. Among such the older one comes first.
    """
    if not math.isfinite(margin):
        return margin
    digits, power = math.frexp(margin)
    return math.ldexp(math.floor(math.ldexp(digits, _DIGITS)), power - _DIGITS)


def halves(
    bounder: Bounder, parents: Sequence[Domain], iterations: int
) -> tuple[list[Domain], Bounded] | None:
    """Both halves of each domain, split at the best of its candidates, and what bounds say of them.

    Args:
        bounder: bounds them.
        parents: domains with a candidate at least.
        iterations: steps of alpha and beta for each half.

    Returns:
        2 D domains, whose bounds and multipliers are still the parents', and their bounds; None if
        time is over, and then nothing has changed.
    """
    batch = bounder.batch(parents)
    tried = torch.tensor(
        [d.candidates for d in parents], dtype=torch.float64, device=batch.C.device
    )
    pair, chosen, over = branching.children(bounder, batch, tried[..., 0].long(), tried[..., 1])
    if over:
        return None
    both = [(d, d.candidates[i]) for d, i in zip(parents, chosen.tolist(), strict=True)]
    domains = [
        replace(d, splits=(*d.splits, (number, sign, point)))
        for sign in (1, -1) for d, (number, point) in both
    ]
    found = bounder.ascend(pair, iterations)
    return None if found.is_over else (domains, found)


def still_open(domains: Sequence[Domain], found: Bounded) -> list[Domain]:
    """Those that were not proved, as they are now; without candidates."""
    margins, batch, rest = found.margins.tolist(), found.batch, []
    slack = found.slack.tolist()
    for i, at in enumerate(found.open.tolist()):
        domain = domains[at]
        alpha = batch.alpha[:, i]
        rest.append(Domain(
            domain.goal, domain.splits, max(domain.margin, min(margins[at], domain.least)),
            alpha.half() if alpha.dtype is torch.float32 and batch.only_relus else alpha.clone(),
            batch.beta[:, i, : len(domain.splits)].clone(), (),
            batch.weights[:, i].clone(), *batch.to_keep(i), min(domain.least, slack[i]),
        ))
    return rest


def splittable(
    bounder: Bounder, domains: Sequence[Domain], found: Bounded, count: int
) -> tuple[list[Domain], list[Domain]]:
    """Open domains with the neurons to try for their next split, and those that have none.

    Args:
        bounder: that found bounds.
        domains: `still_open`.
        found: their bounds.
        count: neurons to try.
    """
    if not domains:
        return [], []
    numbers, points = branching.candidates(bounder, found, count)
    for domain, *both in zip(domains, numbers.tolist(), points.tolist(), strict=True):
        domain.candidates = tuple(zip(*both, strict=True))
    return ([d for d in domains if d.candidates[0][0] >= 0],
            [d for d in domains if d.candidates[0][0] < 0])


def finish(
    bounder: Bounder, domains: Sequence[Domain], iterations: int,
    note: Callable[[Sequence[Domain], Bounded], bool],
) -> Sequence[Domain]:
    """Domains in which the node is linear in the input, or nearly: nothing is left but multipliers,
    which are optimized, and then solved for, in networks of ReLUs alone.

    Args:
        bounder: bounds them.
        domains: without a neuron to split.
        iterations: steps, before they are solved as linear programs.
        note: told of the domains and what bounds say of them; returns whether to go on.

    Returns:
        Those that were not proved, as they are now.
    """
    solvers: list[Callable[[Any], Bounded]] = [partial(bounder.ascend, iterations=iterations)]
    if bounder.roots.only_relus:
        solvers.append(bounder.solve)
    for solve in solvers:
        found = solve(bounder.batch(domains))
        goes_on = note(domains, found)
        domains = still_open(domains, found)
        if not (domains and goes_on):
            break
    return domains
