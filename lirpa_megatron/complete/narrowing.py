"""What splits say of other neurons: interval arithmetic forward through the network.

The boxes' bounds of a later layer hold in every domain, but where intervals of an earlier layer
have become narrow, interval arithmetic from these may be tighter; the intersection of both holds in
the domain, too. In wide layers it changes nothing; it is what makes branch and bound of small
networks end, as intervals of all layers shrink with those of the first.

The host's and this package's own `interval_propagate` do it, which communicate as in IBP: every
rank calls it alike, with intervals of its own neurons.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lirpa_megatron.complete.roots import Roots

Interval = tuple[torch.Tensor, torch.Tensor]


def narrowed(
    graph: Any, roots: Roots, box: torch.Tensor, low: torch.Tensor, high: torch.Tensor,
    lower: torch.Tensor, upper: torch.Tensor,
) -> Interval:
    """Intervals of all neurons of this rank in domains, [D, N] each.

    Args:
        graph: a BoundedModule.
        roots: the numbering.
        box: which the domains are of, [D].
        low, high: these boxes, [D, inputs].
        lower, upper: what is known, [D, N], cut at the domains' splits.

    Returns:
        `lower` and `upper`, or tighter ones. Where both contradict each other, by rounding or
        because a domain is empty, they stay as they were.
    """
    lower, upper = lower.clone(), upper.clone()
    places = {r.name: r for r in roots.operators}
    (leaf,) = roots.plan.leaves
    shape = (len(low), *leaf.output_shape[1:])
    known: dict[str, Interval] = {leaf.name: (low.view(shape), high.view(shape))}
    whole_box = {x.name: (x.lower, x.upper) for p in roots.planes for x in p.inputs.views
                 if x.perturbed}

    def of(node: Any) -> Interval:
        if node.name not in known:
            value = graph.get_forward_value(node)
            return value, value
        return known[node.name]

    with torch.no_grad():
        for node in reversed(roots.plan.order):
            if node.name in known:
                continue
            place = places.get(node.name)
            if place is None:
                own = tuple(node.interval_propagate(*map(of, node.inputs)))
                if node.name in whole_box:
                    own = _both(own, *(end[box] for end in whole_box[node.name]))
                known[node.name] = own
                continue
            x = node.inputs[0]
            columns = roots.active_columns.get(x.name)
            ends = []
            own = [t.flatten(1) for t in _chosen(of(x), columns)]
            both = torch.maximum(lower[:, place.at], own[0].nan_to_num(nan=-math.inf)), \
                torch.minimum(upper[:, place.at], own[1].nan_to_num(nan=math.inf))
            crossed = both[0] > both[1]
            for whole, new, at in zip((lower, upper), both, of(x), strict=True):
                whole[:, place.at] = torch.where(crossed, whole[:, place.at], new)
                ends.append(_put(at, columns, whole[:, place.at]))
            known[node.name] = tuple(node.interval_propagate(tuple(ends)))
    return lower, upper


def _both(own: Interval, lower: torch.Tensor, upper: torch.Tensor) -> Interval:
    """What two intervals have in common; the second one where that is nothing."""
    least = torch.maximum(lower, own[0].nan_to_num(nan=-math.inf))
    most = torch.minimum(upper, own[1].nan_to_num(nan=math.inf))
    crossed = least > most
    return torch.where(crossed, lower, least), torch.where(crossed, upper, most)


def _chosen(ends: Interval, columns: torch.Tensor | None) -> Interval:
    if columns is None:
        return ends
    return ends[0].index_select(-1, columns), ends[1].index_select(-1, columns)


def _put(
    whole: torch.Tensor, columns: torch.Tensor | None, values: torch.Tensor
) -> torch.Tensor:
    """Values [D, n] in the place of those of a node, or of some of its features."""
    if columns is None:
        return values.view(whole.shape)
    return whole.index_copy(-1, columns, values.view(*whole.shape[:-1], len(columns)))
