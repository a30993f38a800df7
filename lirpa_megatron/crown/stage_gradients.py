"""Gradients of passes that go through several pipeline stages.

A pass of the stage above is part of the graph of gradients on both stages. It is cut at the border:
what is received is a leaf here, what is sent back is tied to it there. In the backward pass the
stage above asks for the gradients of each pass in turn. Bounds and affine forms of this stage's own
nodes, which all those passes read, are leaves as well for as long as it serves (`Cut`), so that
each pass goes back no further than to them; at the end one backward pass goes on from there.

Gradients are accumulated where they arise, in the parameters' `grad`, when each rank calls
`backward` on what it was given: `torch.autograd.grad` would return those of one stage alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.crown.graph import Call


@dataclass(eq=False)
class Session:
    """What a stage has served for one set of bounds, as long as gradients can reach these."""

    number: int
    """The same on all stages."""
    tape: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=list)
    """(received, sent back) of each answer."""
    cut: Cut | None = None
    gone_back: bool = False
    """Whether its gradients are complete."""


class Served(torch.autograd.Function):
    """The bounds of the model on a stage that does not have its output."""

    @staticmethod
    def forward(
        ctx: Any, serve: Callable[[], None], session: Session, anchor: torch.Tensor,
        *bounds: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.serve, ctx.session = serve, session
        return tuple(b.view_as(b) for b in bounds)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, ...]:
        if not ctx.session.gone_back:  # several sessions of one backward pass go back together
            ctx.serve()
        return (None,) * (3 + len(grads))


class _InPlaceOf(torch.autograd.Function):
    """Values whose gradients go back through others'."""

    @staticmethod
    def forward(
        ctx: Any, count: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*tensors[:count])
        return tuple(x.view_as(x) for x in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        zeros = [torch.zeros_like(x) for x in ctx.saved_tensors]
        return (None, *zeros, *(None for _ in grads))


def in_place_of(
    served: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The values, with the gradients of bounds that a stage has served."""
    if not any(x.requires_grad for x in served):
        return tuple(values)
    return _InPlaceOf.apply(len(served), *served, *values)


class Handed(torch.autograd.Function):
    """The bounds of the model on its last stage: gradients begin here, and end with a word."""

    @staticmethod
    def forward(
        ctx: Any, begin: Callable[[int], None], number: int, anchor: torch.Tensor,
        *bounds: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.begin, ctx.number = begin, number
        return tuple(b.view_as(b) for b in bounds)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.begin(ctx.number)
        return (None, None, None, *grads)


class Cut:
    """While a stage serves, what its passes read of its own nodes' bounds are leaves.

    A context manager; `go_on` continues the backward pass from them.
    """

    def __init__(self, graph: Call) -> None:
        self.graph = graph
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._known: dict[int, torch.Tensor] = {}

    def _leaf(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.requires_grad or x.is_leaf:
            return x
        if id(x) not in self._known:
            leaf = x.detach().requires_grad_()
            self._pairs.append((x, leaf))
            self._known[id(x)] = leaf
        return self._known[id(x)]

    def __enter__(self) -> Cut:
        graph, call = self.graph, self.graph.call
        self._saved: list[tuple[Any, str, Any]] = []
        for node in graph.named_nodes().values():
            if isinstance(node, auto_lirpa.BoundParams):
                continue
            for name in ("lower", "upper"):
                value = getattr(node, name, None)
                leaf = self._leaf(value)
                if leaf is not value:
                    self._saved.append((node, name, value))
                    setattr(node, name, leaf)
            pair = getattr(node, "interval", None)
            if pair is not None and type(pair) is tuple:
                leaves = tuple(self._leaf(x) for x in pair)
                if any(a is not b for a, b in zip(leaves, pair, strict=True)):
                    self._saved.append((node, "interval", pair))
                    node.interval = leaves
        self._tables = call.forms, call.centered, call.directions
        call.forms, call.centered, call.directions = (
            {name: found.mapped(self._leaf) for name, found in table.items()}
            for table in self._tables
        )
        call.shared_relaxations.clear()
        return self

    def __exit__(self, *_: Any) -> None:
        call = self.graph.call
        for node, name, value in self._saved:
            setattr(node, name, value)
        call.forms, call.centered, call.directions = self._tables
        call.shared_relaxations.clear()

    def go_on(self) -> None:
        """The backward pass from the leaves' gradients."""
        reached = [(x, leaf.grad) for x, leaf in self._pairs if leaf.grad is not None]
        if reached:
            # What leads to the model's inputs may be shared with other calls.
            torch.autograd.backward(*zip(*reached, strict=True), retain_graph=True)

