"""Options of a run over properties and their defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lirpa_megatron.complete.problem import SearchOptions
from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.options import RunOptions
from lirpa_megatron.verify.properties.attack import AttackOptions

BRANCH_AND_BOUND = "branch-and-bound"

_FEW_INPUTS, _FEW_BOXES, _HARD = 16, 8, 300
"""Where so few inputs move and so few boxes are left, as many steps from as many points follow an
attack of the default effort."""
_HARD_PRODUCTS = 2**34
"""Products that such an attack may take: a few seconds, after which bounds of parts find more."""


@dataclass(frozen=True)
class VerifyOptions(RunOptions):
    """What to compute for each instance."""

    # which output of an ONNX graph; None: its only one
    onnx_output: str | None = None
    # how many of the network's parts each pipeline stage has; None: balanced
    pipeline_layers: Sequence[int] | None = None
    # branch and bound on what bounds and the attack leave open
    complete: bool = False
    # what it splits, one of `strategy.BRANCHING`
    branching: str = "auto"
    # file for the record of a proved property
    record: Path | None = None
    # file of results: what is left of a search that is ended lies beside it or the record
    output: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()
        if self.branching != "auto" and not self.complete:
            raise UserError("--branching says what --complete splits: give --complete too")
        if self.complete and self.outward:
            raise UserError(
                "--complete has no --outward: branch and bound does not widen its bounds by their "
                "rounding error; leave one of them out"
            )

    @property
    def result_method(self) -> str:
        """What results say of how they were found."""
        return BRANCH_AND_BOUND if self.complete else self.method

    @property
    def searches(self) -> Path | None:
        """Where what is left of a search is written; None: nowhere."""
        beside = self.record or self.output
        if beside is None or not self.complete:
            return None
        return beside.with_name(f"{beside.name}.search")

    def search(self, seconds: float | None) -> SearchOptions:
        """Options of branch and bound with some time left."""
        return SearchOptions(
            timeout=seconds, keep_tree=self.searches is not None, branching=self.branching
        )

    def attacks(self, moving: int, targets: int, weights: int) -> list[AttackOptions]:
        """Attacks to be tried, one after the other.

        Args:
            moving: how many inputs move.
            targets: how many boxes are attacked.
            weights: how many the whole network has.
        """
        if not self.attack_steps:
            return []
        own = AttackOptions(steps=self.attack_steps, restarts=self.attack_restarts, seed=self.seed)
        as_usual = own == AttackOptions(seed=self.seed)
        cheap = weights * targets * _HARD**2 <= _HARD_PRODUCTS
        if as_usual and cheap and moving <= _FEW_INPUTS and targets <= _FEW_BOXES:
            return [own, replace(own, steps=_HARD, restarts=_HARD)]
        return [own]
