"""The coefficients A of a backward pass, and the bounds it computes, for both sides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class RowBounds:
    """Bounds of the rows that this rank carried.

    Attributes:
        lower, upper: concrete bounds [rows, B]; None if not requested.
        lA, uA: input node name -> coefficients [rows, B, *input shape].
        lbias, ubias: the constant terms [rows, B], without the inputs' share.
        off: "lower", "upper" -> by how much the bounds were widened, with outward rounding.
        form: rows of the affine form [rows, B, N + 2] (`crown.affine_forms`), if requested.
    """

    lower: torch.Tensor | None
    upper: torch.Tensor | None
    lbias: torch.Tensor | None
    ubias: torch.Tensor | None
    lA: dict[str, torch.Tensor] = field(default_factory=dict)
    uA: dict[str, torch.Tensor] = field(default_factory=dict)
    off: dict[str, torch.Tensor] = field(default_factory=dict)
    form: torch.Tensor | None = None


@dataclass
class LowerUpper:
    """A value for the lower and the upper side; None for a side that was not requested.

    Both sides are the same object until an operator makes them differ.
    """

    lower: Any = None
    upper: Any = None

    def add(self, lower: Any, upper: Any) -> None:
        """Adds a term to each side."""
        shared = upper is lower and self.upper is self.lower
        self.lower = _plus(self.lower, lower)
        self.upper = self.lower if shared else _plus(self.upper, upper)

    def map(self, function: Callable[[Any], Any]) -> LowerUpper:
        """Applies `function` to both sides, once if they are the same object; None stays None."""
        lower = None if self.lower is None else function(self.lower)
        if self.upper is self.lower:
            return LowerUpper(lower, lower)
        return LowerUpper(lower, None if self.upper is None else function(self.upper))

    def dense(self) -> LowerUpper:
        """Both sides as dense tensors."""
        return self.map(dense)

    @property
    def either(self) -> Any:
        """The lower side, or the upper one if there is no lower side."""
        return self.upper if self.lower is None else self.lower

    def __iter__(self) -> Iterator[Any]:
        return iter((self.lower, self.upper))


@dataclass(frozen=True)
class Propagated:
    """What an operator passes on to its inputs in a backward pass.

    Attributes:
        A: the coefficients of each input, [R, B, *input shape]; both sides None for an input that
            gets none. Inputs beyond the last entry get none either.
        bias: [R, B] for each side; None or 0 if there is none.
    """

    A: tuple[LowerUpper, ...]
    bias: LowerUpper = field(default_factory=LowerUpper)


def _plus(total: Any, term: Any) -> Any:
    if total is None or term is None:
        return term if total is None else total
    return dense(total) + dense(term)


@dataclass(frozen=True)
class IdentityRows:
    """Rows of the identity at a start node, not materialised.

    Attributes:
        own: this rank's rows as indices into the node's flattened output, [n].
        all: the rows of all ranks in rank order, [p n], for a replicated start node whose operator
            needs them (without communication); otherwise None.
        shape: shape of A, [n, B, *node shape].
        dtype, device: those of A.
    """

    own: torch.Tensor
    all: torch.Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def dense(self) -> torch.Tensor:
        """The rows as a tensor [n, B, *node shape], expanded over the batch."""
        n, batch, *node_shape = self.shape
        rows = torch.zeros(n, math.prod(node_shape), dtype=self.dtype, device=self.device)
        rows.scatter_(1, self.own.unsqueeze(1), 1.0)
        return rows.view(n, 1, *node_shape).expand(n, batch, *node_shape)


def stack_sides(lA: Any, uA: Any) -> tuple[torch.Tensor, Any]:
    """lA and uA as one tensor [R, sides, ...], and a function that splits such a tensor."""
    if lA is None or uA is None:
        one = lA if lA is not None else uA
        if lA is not None:
            return one.unsqueeze(1), lambda A: (A[:, 0], None)
        return one.unsqueeze(1), lambda A: (None, A[:, 0])
    return torch.stack((lA, uA), dim=1), lambda A: (A[:, 0], A[:, 1])


def dense(A: Any) -> torch.Tensor:
    """A as a dense tensor."""
    return A.dense() if isinstance(A, IdentityRows) else A
