"""Largest singular values of weights, kept as long as the weights stay the same.

They grow with the cube of the width, like the weights' own products with some thousand tokens, and
a model is usually bounded many times. Each call compares a product of every weight with a fixed
random vector, exactly, and forgets all values if one has changed, on all ranks.
"""

from __future__ import annotations

from typing import Any

import torch

from lirpa_megatron.forward.ranks import Ranks
from lirpa_megatron.operators.affine.products import largest_eigenvalue
from lirpa_megatron.operators.numerics import ROUNDING, safe_root
from lirpa_megatron.parallel.collectives import Collectives


def lost_length(dtype: torch.dtype, n: int) -> float:
    """The largest L2 norm of n numbers whose squares all have become 0."""
    return (n * torch.finfo(dtype).smallest_normal) ** 0.5


def _singular(gram: torch.Tensor) -> torch.Tensor:
    """The root of the largest eigenvalue of [..., n, n], rounded up, also where squares of tiny
    numbers have become 0."""
    lost = lost_length(gram.dtype, gram.shape[-1] ** 2)
    return safe_root(largest_eigenvalue(gram)) * (1 + 10 * ROUNDING[gram.dtype]) + lost


class Weights:
    """What is known of a model's weights from earlier calls."""

    def __init__(self) -> None:
        self._known: dict[tuple, torch.Tensor] = {}
        self._prints: dict[str, torch.Tensor] = {}
        self._keeps = False

    def begin(self, parameters: dict[str, torch.Tensor], collectives: Collectives) -> None:
        """A call begins: forgets what was found of other weights. With gradients nothing is kept.

        Args:
            parameters: of the graph, by the names of their nodes.
            collectives: of the tensor-parallel group.
        """
        self._keeps = not torch.is_grad_enabled()
        if not self._keeps:
            self._known.clear()
            self._prints.clear()
            return
        prints = {name: _print(value) for name, value in parameters.items()}
        device = next((value.device for value in prints.values()), "cpu")
        same = prints.keys() == self._prints.keys() and all(
            torch.equal(value, self._prints[name]) for name, value in prints.items()
        )
        changed = torch.tensor(0.0 if same else 1.0, device=device)
        if collectives.largest(changed).item():
            self._known.clear()
            self._prints = prints

    def _keep(self, key: tuple, find: Any) -> torch.Tensor:
        if not self._keeps:
            return find()
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]

    def largest_singular(
        self, node: Any, w: torch.Tensor, splits: bool, joins: bool, ranks: Ranks
    ) -> torch.Tensor:
        """Of all ranks' shards of a weight together, a number, replicated.

        Args:
            node: the operator, for its name.
            w: the rank's shard [o, i], columns scaled.
            splits: sharded along o (the ranks are the output's).
            joins: sharded along i (the ranks are the input's).
            ranks: see above.
        """

        def find() -> torch.Tensor:
            if splits:
                return _singular(ranks.total(w.t() @ w))
            if joins or w.shape[0] <= w.shape[1]:
                gram = w @ w.t()
                return _singular(ranks.total(gram) if joins else gram)
            return _singular(w.t() @ w)

        return self._keep((node.name, "all"), find)

    def head_norms(self, node: Any, w: torch.Tensor, head_dim: int) -> torch.Tensor:
        """Of each head's rows of a weight [n d, i]: [n]."""

        def find() -> torch.Tensor:
            own = w.unflatten(0, (-1, head_dim))
            return _singular(own @ own.transpose(-1, -2))

        return self._keep((node.name, "heads"), find)


def _print(value: torch.Tensor) -> torch.Tensor:
    """A few numbers that another value would not have.

    The vector's numbers lie in +-[1, 2]: a change that rounding hides in the product is as small as
    rounding in the weight, too, which the allowance of `_singular` covers.
    """
    flat = value.detach().reshape(len(value) if value.ndim else 1, -1)
    generator = torch.Generator().manual_seed(0)
    vector = 2 * torch.rand(flat.shape[1], generator=generator, dtype=torch.float64) - 1
    vector = vector + torch.where(vector < 0, -1.0, 1.0)
    if not flat.is_floating_point():
        flat = flat.double()
    return flat @ vector.to(flat)
