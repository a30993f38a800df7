"""Sets of few dimensions: the segment between two inputs, and directions around one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.errors import UserError
from lirpa_megatron.problem.perturbations import PerturbationSegments


def segment(a: torch.Tensor, b: torch.Tensor) -> auto_lirpa.BoundedTensor:
    """All inputs a + s (b - a), 0 <= s <= 1, such as what lies between two sentences' embeddings.

    Args:
        a, b: [B, *shape], replicated. Samples in which they are equal stay as they are.

    Returns:
        The middle, perturbed: a set of one dimension.

    Raises:
        UserError: different shapes, or numbers that are not floating point or not finite.
    """
    a, b = (_plain(end, name) for end, name in ((a, "a"), (b, "b")))
    if a.shape != b.shape or a.dtype != b.dtype:
        raise UserError(
            f"segment: its ends are {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}: "
            "give two inputs of the same shape"
        )
    return _perturbed((a + b) / 2, ((b - a) / 2).unsqueeze(1))


def directions(
    x: torch.Tensor, vectors: torch.Tensor | Sequence[torch.Tensor],
    radii: float | Sequence[float] | torch.Tensor = 1.0, positions: Iterable[int] | None = None,
) -> auto_lirpa.BoundedTensor:
    """All inputs x + t_1 D_1 + ... + t_d D_d with |t_i| <= r_i.

    Args:
        x: [B, *shape], replicated.
        vectors: D, d of them, each [*shape]; or [h] for inputs [B, S, h]: the same change at all
            positions, as in activation steering.
        radii: r, one number or d of them.
        positions: where vectors [h] are added (negative ones count from the end); None: everywhere.

    Raises:
        UserError: vectors of another size, zero or not finite; radii below 0; positions that do
            not exist.
    """
    x = _plain(x, "x")
    D = _stacked(vectors).to(x)
    shape = x.shape[1:]
    if D.ndim == 2 and len(shape) == 2 and D.shape[1:] == shape[1:]:
        where = _where(positions, shape[0]).to(x)
        D = where.view(1, -1, 1) * D.unsqueeze(1)
    elif positions is not None:
        raise UserError("directions: positions are for vectors [h] of inputs [B, S, h]")
    if D.shape[1:] != shape:
        raise UserError(
            f"directions: the vectors have {_size(vectors)} numbers, the input has "
            f"{shape[-1]} at each position (shape {tuple(shape)})"
        )
    for i, vector in enumerate(D):
        if not bool(vector.isfinite().all()):
            raise UserError(f"directions: vector {i} has numbers that are not finite")
        if not bool(vector.any()):
            raise UserError(f"directions: vector {i} is zero, which is no direction")
    sizes = torch.as_tensor(radii, dtype=torch.float64)
    if tuple(sizes.shape) not in ((), (len(D),)):
        raise UserError(
            f"directions: radii have shape {tuple(sizes.shape)}: give a number, or one for each of "
            f"the {len(D)} vectors"
        )
    if not bool(((sizes >= 0) & (sizes < math.inf)).all()):
        raise UserError(f"directions: radii must be at least 0 and finite, not {sizes.tolist()}")
    scaled = D * sizes.expand(len(D)).to(D).view(-1, *[1] * len(shape))
    return _perturbed(x, scaled.expand(len(x), *scaled.shape))


def _plain(x: torch.Tensor, name: str) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.ndim < 2:
        kind = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise UserError(f"{name} is {kind}: give numbers [B, ...], for words their embeddings")
    if not bool(x.isfinite().all()):
        raise UserError(f"{name} has numbers that are not finite")
    return x.as_subclass(torch.Tensor)


def _stacked(vectors: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """[d, ...]."""
    if not isinstance(vectors, torch.Tensor):
        shapes = {tuple(vector.shape) for vector in vectors}
        if len(shapes) != 1:
            raise UserError(
                f"directions: the vectors have {len(shapes)} different shapes"
                if shapes else "directions: there are no vectors"
            )
        vectors = torch.stack(list(vectors))
    if vectors.ndim < 2 or not len(vectors):
        raise UserError(f"directions: vectors have shape {tuple(vectors.shape)}: give [d, ...]")
    return vectors


def _size(vectors: torch.Tensor | Sequence[torch.Tensor]) -> int:
    return int(vectors[0].shape[-1])


def _where(positions: Iterable[int] | None, length: int) -> torch.Tensor:
    if positions is None:
        return torch.ones(length)
    where = torch.zeros(length)
    for position in positions:
        if not isinstance(position, int) or not -length <= position < length:
            raise UserError(
                f"positions: there is no position {position!r} in a sequence of {length}"
            )
        where[position] = 1.0
    return where


def _perturbed(x: torch.Tensor, D: torch.Tensor) -> auto_lirpa.BoundedTensor:
    # keeps the graph, unlike its constructor
    bounded = x.as_subclass(auto_lirpa.BoundedTensor)
    bounded.ptb = PerturbationSegments(x, D)
    return bounded
