"""Options of a run over properties and their defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lirpa_megatron.verify.options import RunOptions
from lirpa_megatron.verify.properties.attack import AttackOptions


@dataclass(frozen=True)
class VerifyOptions(RunOptions):
    """What to compute for each instance."""

    # which output of an ONNX graph; None: its only one
    onnx_output: str | None = None
    # how many of the network's parts each pipeline stage has; None: balanced
    pipeline_layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()

    def attack(self) -> AttackOptions:
        return AttackOptions(
            steps=self.attack_steps, restarts=self.attack_restarts, seed=self.seed
        )
