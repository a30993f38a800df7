"""Positions that stand still: a causal model is propagated from the first word that moves on.

Below a causal mask the values at the positions before that word are constants. From the perturbed
input on, nodes therefore have the positions from `first` on alone, [B, T - first, ...] instead of
[B, T, ...]; attention gets its keys and values of the other positions from the clean pass.

==========================  ===================================================================
operator                    what it reads
==========================  ===================================================================
position by position        the positions from `first` on, also of constants
scores                      queries from `first` on (or one), keys of all positions
softmax(s) v                those rows of the mask, values of all positions
selection of a position     a position counted from `first`
==========================  ===================================================================

There is no window, and `first` is 0, where an operator is not in this table, where the output has
all positions, and where a query before `first` may see a later key: for it to be blind, the later
keys must be masked and, with a finite fill, some score of its clean pass be at least fill + 200.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from lirpa_megatron.forward.form import Form
from lirpa_megatron.forward.inputs import Symbols
from lirpa_megatron.operators.attention.scores import BoundScores
from lirpa_megatron.operators.attention.softmax_values import BoundSoftmaxValues
from lirpa_megatron.operators.elementwise.activations import BoundCurve
from lirpa_megatron.operators.elementwise.extremes import BoundMaximum
from lirpa_megatron.operators.elementwise.product import BoundProduct
from lirpa_megatron.operators.linear.borders import (
    BoundGatherFromRegion,
    BoundScatterToRegion,
    BoundSelectFromRegion,
)
from lirpa_megatron.operators.linear.local import LocalLinear
from lirpa_megatron.operators.linear.positions import BoundRotary, BoundSelectPosition
from lirpa_megatron.operators.linear.sums import BoundCombine, BoundScale
from lirpa_megatron.operators.norm.norm import BoundNorm

_WITH_WEIGHTS = (LocalLinear, BoundNorm, BoundSelectFromRegion)
"""Their constants have no positions."""
_BY_POSITION = (
    *_WITH_WEIGHTS, BoundCurve, BoundMaximum, BoundProduct, BoundGatherFromRegion,
    BoundScatterToRegion, BoundRotary, BoundCombine, BoundScale,
)
_OF_HOST = {f"Bound{x}" for x in ("Linear", "Relu", "Tanh", "Sigmoid", "Mul", "Add", "Sub", "Neg")}
_ONCE = 2**22
"""Numbers of directions that are looked at at a time."""

Value = Callable[[Any], torch.Tensor]


class Window:
    """The positions that move.

    Args:
        first: of them.
        cut: names of the nodes that have these positions alone.
    """

    def __init__(self, first: int, cut: frozenset[str]) -> None:
        self.first, self.cut = first, cut

    def of(self, node: Any, value: torch.Tensor) -> torch.Tensor:
        """A node's value, its window if it has one."""
        return value[:, self.first :] if node.name in self.cut else value

    def place(self, node: Any) -> int:
        """What a selection of a position selects of its input."""
        source = node.inputs[0]
        place = node.position % source.output_shape[1]
        return place - self.first if source.name in self.cut else place

    def read(self, node: Any, inputs: Sequence[Any], value_of: Value) -> list[Any]:
        """The inputs as an operator reads them.

        Args:
            node: the operator.
            inputs: forms or values of the nodes that move, in their windows; constants, whole.
            value_of: a node's value at the clean input.
        """
        sources = list(zip(node.inputs, inputs, strict=True))
        if isinstance(node, BoundScores):
            (_, q), keys = sources
            return [q, self._all(*keys, value_of)]
        if isinstance(node, BoundSoftmaxValues):
            (scores, s), values, *mask = sources
            masks = [m[..., self.first :, :] for _, m in mask] if scores.name in self.cut else [
                m for _, m in mask
            ]
            return [s, self._all(*values, value_of), *masks]
        if node.name not in self.cut or isinstance(node, _WITH_WEIGHTS):
            return list(inputs)
        return [
            x if source.name in self.cut else _rows_of(x, self.first, node.output_shape[1])
            for source, x in sources
        ]

    def _all(self, source: Any, x: Any, value_of: Value) -> Any:
        """A form or value at all positions."""
        if source.name not in self.cut:
            return x
        value = value_of(source)
        if isinstance(x, Form):
            return self.whole(source, x, value)
        return torch.cat((value[:, : self.first], x), 1)

    def whole(self, node: Any, x: Form, value: torch.Tensor) -> Form:
        """A form with the positions that stand still before the others.

        Args:
            node: of the form, with a window.
            x: the form.
            value: of the node at the clean input.
        """
        n = self.first
        if isinstance(node, BoundScores):
            return self._whole_scores(x, value)
        still = value[:, :n]
        c = torch.cat((
            torch.cat((still.unsqueeze(0), still.new_zeros(len(x.c) - 1, *still.shape))), x.c
        ), 2)
        return replace(
            x, c=c, box=F.pad(x.box, (0, 0, n, 0)), ball=F.pad(x.ball, (n, 0)),
            heads=None if x.heads is None else F.pad(x.heads, (0, 0, n, 0)),
            source=x.source and (x.source[0], F.pad(x.source[1], (n, 0))),
        )


    def _whole_scores(self, x: Form, value: torch.Tensor) -> Form:
        """The same of scores [B, n, Q, S]; those that a mask hides are unbounded."""
        still = value[..., : self.first, :]
        c = torch.cat((
            torch.cat((still.unsqueeze(0), still.new_zeros(len(x.c) - 1, *still.shape))), x.c
        ), 3)
        box = F.pad(x.box, (0, 0, self.first, 0))
        box[..., : self.first, self.first :] = torch.inf  # of keys that move
        return Form(c, box, F.pad(x.ball, (self.first, 0), value=torch.inf))


def _rows_of(x: torch.Tensor, first: int, length: int) -> torch.Tensor:
    """A constant [..., T, F] from a position on."""
    return x[..., first:, :] if x.ndim > 1 and x.shape[-2] == length else x


def window(
    order: Sequence[Any], final: Any | None, symbols: Mapping[str, Symbols], value_of: Value,
    largest: Callable[[torch.Tensor], torch.Tensor],
) -> Window | None:
    """The window of a pass; None: all positions may move.

    Args:
        order: the nodes of the pass, each after its inputs, the last one after all.
        final: the node that is bounded, which has all positions; None: it may have a window.
        symbols: of the perturbed inputs, by name.
        value_of: a node's value at the clean input.
        largest: of all ranks' numbers.
    """
    leaves = {node.name: node for node in order if node.name in symbols}
    shapes = {tuple(node.output_shape) for node in leaves.values()}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 3:
        return None
    length = shape[1]
    first = min(_still(own, value_of(leaves[name]), length) for name, own in symbols.items())
    cut = cut_nodes(order, frozenset(leaves), length, first) if 0 < first < length else None
    if cut is None or not _blind(order, cut, first, value_of):
        first = 0
    if final is not None and cut is not None and final.name in cut:
        first = 0
    own = value_of(order[-1]).new_full((), length - first)
    first = length - int(largest(own))
    return Window(first, cut) if first else None


def _still(own: Symbols, clean: torch.Tensor, length: int) -> int:
    """How many positions of an input do not move; 0 where gradients flow to the centre but not
    to the clean input, which stands in for it."""
    if own.centre.requires_grad and own.centre.grad_fn is not clean.grad_fn:
        return 0
    moves = (own.centre != clean).any(-1).any(0)
    step = max(1, _ONCE // clean.numel())
    for at in range(0, own.count, step):
        if moves[0]:
            return 0
        moves = moves | own.directions(at, min(step, own.count - at)).any(-1).any(0).any(0)
    places = moves.nonzero().flatten()
    return int(places[0]) if len(places) else length


def cut_nodes(
    order: Sequence[Any], leaves: frozenset[str], length: int, first: int
) -> frozenset[str] | None:
    """The nodes that have a window; None if some operator is not made for one."""
    cut, moving = set(leaves), set(leaves)
    for node in order:
        if node.name in moving or not any(x.name in moving for x in node.inputs):
            continue
        moving.add(node.name)
        read = [x.name in cut for x in node.inputs]
        if not any(read):
            continue
        if isinstance(node, BoundSelectPosition):
            if node.position % length < first:
                return None
            continue
        if isinstance(node, BoundScores):
            if not (read[0] or node.inputs[0].output_shape[1] == 1):
                return None
            if read[0]:
                cut.add(node.name)
            continue
        if isinstance(node, BoundSoftmaxValues):
            if read[0] and node.query >= 0 or any(read[2:]):
                return None
            if read[0]:
                cut.add(node.name)
            continue
        scores = any(isinstance(x, BoundScores) for x in node.inputs)
        by_position = isinstance(node, _BY_POSITION) or type(node).__name__ in _OF_HOST
        alike = all(
            r or x.name not in moving for x, r in zip(node.inputs, read, strict=True)
        )
        shape = tuple(node.output_shape or ())
        if scores or not by_position or not alike or len(shape) != 3 or shape[1] != length:
            return None
        cut.add(node.name)
    return frozenset(cut)


def _blind(order: Sequence[Any], cut: frozenset[str], first: int, value_of: Value) -> bool:
    """Whether the queries before `first` see no later key."""
    for node in order:
        if not isinstance(node, BoundSoftmaxValues) or node.inputs[0].name not in cut:
            continue
        if len(node.inputs) < 3:
            return False
        scores = value_of(node.inputs[0])[..., :first, :]
        masked = node._masks(value_of(node.inputs[2]))[..., :first, :].expand(scores.shape)
        most = scores.masked_fill(masked, -torch.inf).amax(-1)
        if not bool(masked[..., first:].all()) or not bool((most >= node.fill + 200).all()):
            return False
        if not bool(most.isfinite().all()):
            return False
    return True
