"""What forward forms need of other pipeline stages, as plain data and tensors.

Forms go up as hidden states do: the form of a stage's output is that of the input of the stage
above, with the symbols that it is a polynomial in. Rows of margins go down: the errors that lower
stages made are bounded there, by the row that has arrived at their output (`adjoint`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lirpa_megatron.forward.domains import Group
from lirpa_megatron.forward.form import Form

_PARTS = ("c", "box", "ball", "stretch", "heads")


@dataclass(frozen=True)
class FarForm:
    """The form of a stage's input, and what the run below leaves to the one above."""

    form: Form
    groups: list[Group]
    """Of all symbols so far."""
    symbols_left: int
    """How many errors may still become symbols."""
    tokens: bool
    """Whether values have tokens."""
    shares: list[int] = field(default_factory=list)
    """Blocks of symbols, where these are shared out among the ranks of a stage (`shares`)."""
    costs: tuple[int, int] = (0, 0)
    """Of the pass so far, and of rows (`costs`)."""
    kept: int = 0
    """How many errors go from layer to layer as symbols (`error_symbols`)."""
    set_groups: int = 0
    """How many of the groups are the set's."""

    def packed(self) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """(plain data, tensors) for a message."""
        form = self.form
        if form.scores is not None:
            raise NotImplementedError("a pipeline stage that ends in attention scores")
        given = {name: getattr(form, name) for name in _PARTS}
        given |= dict(zip(("lower", "upper"), form.limits or (None, None), strict=True))
        fields = {
            "parts": [name for name, value in given.items() if value is not None],
            "groups": [[g.kind, g.size, g.count] for g in self.groups],
            "symbols_left": self.symbols_left, "tokens": self.tokens,
            "shares": self.shares, "shared": form.shared, "costs": list(self.costs),
            "kept": self.kept, "set_groups": self.set_groups,
        }
        return fields, [value for value in given.values() if value is not None]

    @classmethod
    def unpacked(cls, fields: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> FarForm:
        """Inverse of `packed`."""
        given = dict(zip(fields["parts"], tensors, strict=True))
        lower, upper = given.pop("lower", None), given.pop("upper", None)
        limits = None if lower is None else (lower, upper)
        form = Form(**given, limits=limits, shared=fields["shared"])
        groups = [Group(*group) for group in fields["groups"]]
        return cls(
            form, groups, fields["symbols_left"], fields["tokens"], list(fields["shares"]),
            tuple(fields["costs"]), fields["kept"], fields["set_groups"],
        )
