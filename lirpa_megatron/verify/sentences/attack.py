"""Attacks on the sharded model: perturbed embeddings by projected gradients, exchanged words.

    N  points walked as one batch        S  positions        h  hidden size

Every rank takes the same steps: points and decisions are rank 0's (broadcast), because the last
bits of a reduction may differ between ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from lirpa_megatron.parallel import spmd

Margin = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states [N, S, h] -> by how much the label wins [N]; at most 0: the attack succeeded."""

_BATCH = 256
_MOST = 4096
"""Sentences with substitutes that are tried one by one; beyond it a greedy search."""


def smallest_success(
    margin: Margin, hidden: torch.Tensor, where: torch.Tensor, norm: float, radius: float,
    steps: int, restarts: int, seed: int, group: dist.ProcessGroup | None, smaller: float = 0.02,
) -> float | None:
    """Projected gradient descent on the margin within a ball that shrinks with each success.

    Args:
        margin: of the sharded model, replicated; differentiable.
        hidden: clean [1, S, h].
        where: [S] bool, the positions that move.
        norm: inf, 2 or 1, over all moving coordinates together.
        radius: of the ball at the beginning.
        steps, restarts: of the descent; it ends after so many steps without a smaller success, and
            after 20 times as many in all. The first start is the clean point.
        seed: of the other starts.
        group: the tensor-parallel group.
        smaller: after a success at some size the ball is this share (0.005 at least) smaller than
            that; 1 ends with the first success.

    Returns:
        the size (in the norm) of the smallest perturbation met that made the margin 0 or less, at
        most the radius; None if there was none.
    """
    moving = where.to(hidden).view(1, -1, 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = 2 * torch.rand(restarts, *hidden.shape[1:], generator=generator) - 1
    drawn[0] = 0
    delta = _project(drawn.to(hidden) * moving * radius, norm, radius)
    delta = spmd.broadcast_tensor(delta, group).detach()
    best, since = math.inf, 0
    for _ in range(20 * (steps + 1)):
        delta.requires_grad_(True)
        value = margin(hidden + delta)
        with torch.no_grad():
            success = (value <= 0) & value.isfinite()
            size = torch.where(success, _size(delta, norm), math.inf).min()
        (gradient,) = torch.autograd.grad(value.sum(), delta)
        # Points and decision are rank 0's, in one broadcast.
        rate = 0.5 * radius * (1 - since / (steps + 1))
        moved = delta.detach() - rate * _steepest(gradient * moving, norm)
        packed = spmd.broadcast_tensor(torch.cat([moved.flatten(), size.to(moved)[None]]), group)
        moved, found = packed[:-1].view_as(moved).detach(), float(packed[-1])
        since += 1
        if found < best:
            best, since = found, 0
            radius = best * (1 - max(smaller, 0.005))
        if since > steps or radius <= 0:
            break
        delta = _project(moved, norm, radius)
    return best if best < math.inf else None


def _size(delta: torch.Tensor, norm: float) -> torch.Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), ord=norm, dim=1)


def _steepest(gradient: torch.Tensor, norm: float) -> torch.Tensor:
    """A direction of descent that moves by about 1 in the norm.

    For L1 the coordinate of the largest gradient moves by 1: the others, which a vertex of the ball
    does not need, are taken back by the projection.
    """
    if norm == math.inf:
        return gradient.sign()
    size = _size(gradient, math.inf if norm == 1 else norm).clamp(min=1e-30)
    return gradient / size.view(-1, 1, 1)


def _project(delta: torch.Tensor, norm: float, radius: float) -> torch.Tensor:
    """The nearest point of the ball; for L1 by Duchi et al. (2008), figure 1."""
    if norm == math.inf:
        return delta.clamp(-radius, radius)
    flat = delta.flatten(1)
    if norm == 2:
        size = _size(delta, norm).clamp(min=1e-30)
        flat = flat * (radius / size).clamp(max=1).unsqueeze(1)
    else:
        ordered = flat.abs().sort(dim=1, descending=True).values
        excess = (ordered.cumsum(1) - radius) / torch.arange(1, flat.shape[1] + 1).to(flat)
        last = ((ordered > excess).sum(1, keepdim=True) - 1).clamp(min=0)
        threshold = excess.gather(1, last).clamp(min=0)
        flat = flat.sign() * (flat.abs() - threshold).clamp(min=0)
        size = flat.abs().sum(1, keepdim=True)  # rounding must not leave the ball
        flat = flat * (radius / size.clamp(min=1e-30)).clamp(max=1)
    return flat.view_as(delta)


def find_words(
    margin: Margin, embed: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor,
    substitutes: Mapping[int, Sequence[int]], group: dist.ProcessGroup | None,
) -> list[int] | None:
    """A sentence of substitutes on which the model is wrong.

    All sentences are tried if they are at most 4096; else words are exchanged one after the other,
    each for the one that leaves the smallest margin, twice through the sentence.

    Args:
        margin: as above.
        embed: ids [N, S] -> hidden [N, S, h].
        ids: [1, S].
        substitutes: position -> ids that may stand there instead.
        group: the tensor-parallel group.

    Returns:
        its ids [S], or None.
    """
    choices = {p: [int(ids[0, p]), *others] for p, others in substitutes.items()}

    def lowest(sentences: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The sentence with the smallest margin; rank 0 decides."""
        with torch.no_grad():
            values = torch.cat([margin(embed(part)) for part in sentences.split(_BATCH)])
        values = values.nan_to_num(nan=math.inf)
        row, value = spmd.broadcast_object(
            (int(values.argmin()), float(values.min())), group
        )
        return sentences[row : row + 1], value

    places = list(choices)
    if math.prod(len(choices[p]) for p in places) <= _MOST:
        every = list(itertools.product(*choices.values()))
        sentences = ids.repeat(len(every), 1)
        sentences[:, places] = torch.tensor(every).to(ids)
        sentence, value = lowest(sentences)
    else:
        sentence, value = lowest(ids)
        for place in places * 2:
            sentences = sentence.repeat(len(choices[place]), 1)
            sentences[:, place] = torch.tensor(choices[place]).to(ids)
            sentence, value = lowest(sentences)
            if value <= 0:
                break
    return sentence[0].tolist() if value <= 0 else None
