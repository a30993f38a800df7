"""Features of all ranks: many tensors in one collective.

A *tree* is a tensor, None, a plain value, or a tuple, list or dataclass of trees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lirpa_megatron.parallel.collectives import Collectives


def mapped(tree: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """The tree with each of its tensors replaced by what the function makes of it, in order."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(mapped(part, function) for part in tree)
    if dataclasses.is_dataclass(tree):
        parts = {f.name: mapped(getattr(tree, f.name), function) for f in dataclasses.fields(tree)}
        return type(tree)(**parts)
    return tree


def tensors(tree: Any) -> list[torch.Tensor]:
    """The tree's tensors, in the order of `mapped`."""
    found: list[torch.Tensor] = []
    mapped(tree, found.append)
    return found


def packed_bytes(tree: Any, dtype: torch.dtype) -> int:
    """Bytes of one rank's part of `begin_gather_whole`."""
    return sum(x.numel() * _sent_as(x, dtype).itemsize for x in tensors(tree))


def begin_gather_whole(
    collectives: Collectives, trees: Sequence[tuple[Any, int]], dtype: torch.dtype
) -> Callable[[], list[Any]]:
    """The features of all ranks side by side, to be used differently on each rank.

    Args:
        collectives: of the ranks, which pass trees of equal shapes.
        trees: (tree, dimension of its tensors that runs over the rank's features).
        dtype: of the numbers; truth values go as such numbers, whole numbers as what they are.

    Returns:
        A function that waits for the trees with the features of rank 0, 1, ... along that
        dimension; gradients are summed over ranks (`Collectives.gather_rows`).
    """
    parts = [(x, dim % x.ndim) for tree, dim in trees for x in tensors(tree)]
    sent = []
    for kind in sorted({_sent_as(x, dtype) for x, _ in parts}, key=str):
        chosen = [i for i, (x, _) in enumerate(parts) if _sent_as(x, dtype) == kind]
        flat = torch.cat([parts[i][0].to(kind).flatten() for i in chosen])
        sent.append((chosen, collectives.begin_gather_rows(flat.unsqueeze(0))))

    def finish() -> list[Any]:
        whole: list[torch.Tensor | None] = [None] * len(parts)
        for chosen, received in sent:
            pieces = received().split([parts[i][0].numel() for i in chosen], 1)
            for i, piece in zip(chosen, pieces, strict=True):
                x, dim = parts[i]
                ranks = piece.unflatten(1, x.shape).movedim(0, dim)
                whole[i] = ranks.flatten(dim, dim + 1).to(x.dtype)
        found = iter(whole)
        return [mapped(tree, lambda _: next(found)) for tree, _ in trees]

    return finish


def _sent_as(x: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if x.is_floating_point() or x.dtype == torch.bool else x.dtype
