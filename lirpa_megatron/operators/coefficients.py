"""Coefficients A of a backward pass and the bounds that it finds, for the lower and upper side."""

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
        lower, upper: concrete bounds [rows, B]; None where not asked for.
        lA, uA: input node name -> coefficients [rows, B, *input shape].
        lbias, ubias: the constant terms [rows, B], without the inputs' share.
        off: "lower", "upper" -> what the bounds were widened by, where rounding counts.
    """

    lower: torch.Tensor | None
    upper: torch.Tensor | None
    lbias: torch.Tensor | None
    ubias: torch.Tensor | None
    lA: dict[str, torch.Tensor] = field(default_factory=dict)
    uA: dict[str, torch.Tensor] = field(default_factory=dict)
    off: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class LowerUpper:
    """A value for the lower and for the upper side; None where a side has none.

    The two sides stay one object for as long as nothing made them differ.
    """

    lower: Any = None
    upper: Any = None

    def add(self, lower: Any, upper: Any) -> None:
        """Adds a term to each side."""
        shared = upper is lower and self.upper is self.lower
        self.lower = _plus(self.lower, lower)
        self.upper = self.lower if shared else _plus(self.upper, upper)

    def map(self, function: Callable[[Any], Any]) -> LowerUpper:
        """`function` of both sides, once where they are one object (and None of None)."""
        lower = None if self.lower is None else function(self.lower)
        if self.upper is self.lower:
            return LowerUpper(lower, lower)
        return LowerUpper(lower, None if self.upper is None else function(self.upper))

    def dense(self) -> LowerUpper:
        """Both sides as tensors."""
        return self.map(dense)

    @property
    def either(self) -> Any:
        """The lower side, or the upper one where there is no lower."""
        return self.upper if self.lower is None else self.lower

    def __iter__(self) -> Iterator[Any]:
        return iter((self.lower, self.upper))


@dataclass(frozen=True)
class Propagated:
    """What leaves an operator towards its inputs in a backward pass.

    Attributes:
        A: for each input its coefficients [R, B, *input shape]; without sides where none leave.
            Inputs beyond the last entry get none.
        bias: [R, B] for each side; None or 0 where there is none.
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
        own: this rank's rows, indices into the node's flattened output, [n].
        all: every rank's rows in rank order, [p n] (for a replicated start node whose operator
            needs them all: no rank has to be asked), or None.
        shape: shape of A, [n, B, *node shape].
        dtype, device: of the A that they stand for.
    """

    own: torch.Tensor
    all: torch.Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def dense(self) -> torch.Tensor:
        """The rows as a tensor [n, B, *node shape] (expanded over the batch)."""
        n, batch, *node_shape = self.shape
        rows = torch.zeros(n, math.prod(node_shape), dtype=self.dtype, device=self.device)
        rows.scatter_(1, self.own.unsqueeze(1), 1.0)
        return rows.view(n, 1, *node_shape).expand(n, batch, *node_shape)


def stack_sides(lA: Any, uA: Any) -> tuple[torch.Tensor, Any]:
    """lA and uA as one tensor [R, sides, ...], and a function that takes them apart again."""
    if lA is None or uA is None:
        one = lA if lA is not None else uA
        if lA is not None:
            return one.unsqueeze(1), lambda A: (A[:, 0], None)
        return one.unsqueeze(1), lambda A: (None, A[:, 0])
    return torch.stack((lA, uA), dim=1), lambda A: (A[:, 0], A[:, 1])


def dense(A: Any) -> torch.Tensor:
    """A as a tensor."""
    return A.dense() if isinstance(A, IdentityRows) else A
