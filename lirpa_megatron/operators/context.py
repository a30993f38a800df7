"""What operators know of the pass that is running and of the graph that it runs over."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lirpa_megatron.parallel.collectives import Collectives


class Layout:
    """What a bound graph's operators know of their surroundings while a pass runs.

    One object per BoundedModule, handed to its operators through the host's `bound_opts`.

    Attributes:
        collectives: the guarded mappings of the model's tensor-parallel group.
        spec_sharded: whether the pass that is running is spec-sharded.
        sharded: node name -> whether its value is feature-sharded.
        value_of: a node's value at the clean input.
        form_limit: numbers that a table made of forms may have.
        form_room: bytes of replicated nodes' forms that operators may yet keep whole.
        forms: node name -> its affine form, found by a pass of the present call.
        centered: the same for the scores of an attention, relative to their weighted mean.
        directions: norm's name -> what is known of <z0, x>, z0 its clean vectors (`BoundNorm`).
        know: (node, rows of vectors) -> what a pass of their own finds of them, or None; while a
            pass is at a node that may ask for that.
        unread: node name -> the operators that have yet to read its form; when all have, it is let
            go. None where they may want to read it again: gradients, alpha.
        shared_relaxations: node name -> what all rows have in common there, and its inputs.
        sizes: node name -> bytes of the rank's `sharded_relaxation` there.
        whole: node name -> all ranks' `sharded_relaxation`, while a pass that moves weights is
            there.
        active_columns: linear layer's name -> its features that the ReLU after it does not cut off.
        columns: node name -> the features that A has there in the pass that is running; all where
            there is no entry.
        entered: A of both sides as the rows of a sharded input are laid out, where a pass enters
            its features through the node that is visited; and a function that takes it apart.
        calls: functions of constants that the model calls, by their number in the graph.
    """

    def __init__(self, collectives: Collectives) -> None:
        self.collectives = collectives
        self.spec_sharded = False
        self.sharded: dict[str, bool] = {}
        self.value_of: Callable[[Any], Any] = _unknown
        self.form_limit = 0
        self.form_room = 0.0
        self.forms: dict[str, Any] = {}
        self.centered: dict[str, Any] = {}
        self.directions: dict[str, Any] = {}
        self.know: Callable[[Any, Any], Any] | None = None
        self.unread: dict[str, set[str]] | None = None
        self.shared_relaxations: dict[str, Any] = {}
        self.sizes: dict[str, int] = {}
        self.whole: dict[str, Any] = {}
        self.active_columns: dict[str, Any] = {}
        self.columns: dict[str, Any] = {}
        self.calls: list[Callable[..., Any]] = []
        self.entered: Any = None

    def forget(self) -> None:
        """Leaves what holds for one call's bounds alone."""
        found = (self.forms, self.centered, self.directions, self.shared_relaxations, self.sizes,
                 self.whole, self.active_columns)
        for known in found:
            known.clear()
        self.columns = {}
        self.unread = None

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """What belongs to the pass that is running, for the time of another one."""
        names = ("spec_sharded", "columns", "entered", "whole", "know")
        saved = {name: getattr(self, name) for name in names}
        self.columns, self.entered, self.whole, self.know = {}, None, {}, None
        try:
            yield
        finally:
            for name, value in saved.items():
                setattr(self, name, value)

    def to_be_read(self, node: str, operators: set[str]) -> None:
        """Notes which operators will read a node's form."""
        if self.unread is not None:
            self.unread[node] = operators

    def has_read(self, operator: str, nodes: Iterable[str]) -> None:
        """Notes that an operator has made of its inputs' forms what all rows have in common."""
        for name in nodes:
            if self.unread is None or operator not in self.unread.get(name, ()):
                continue
            self.unread[name].remove(operator)
            known = self.centered[name].form if name in self.centered else self.forms[name]
            if known is not None and not self.unread[name]:
                known.free()

    def __deepcopy__(self, memo: dict) -> Layout:
        return self  # process groups cannot be copied


def _unknown(node: Any) -> Any:
    raise RuntimeError(f"{node}: the graph is still being built")
