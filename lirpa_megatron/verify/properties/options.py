"""Options of a verification run and their defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.properties.attack import AttackOptions


@dataclass(frozen=True)
class VerifyOptions:
    """What to compute for each instance."""

    # method of the bounds, one of lirpa_megatron.METHODS or auto
    method: str = "CROWN"
    # a key of network.DTYPES; None: what the network is stored in
    dtype: str | None = None
    # which output of an ONNX graph; None: its only one
    onnx_output: str | None = None
    # gradient steps of alpha-CROWN
    alpha_iterations: int = 20
    # step size of alpha-CROWN
    lr_alpha: float = 0.5
    # gradient steps of the attack; 0: no attack
    attack_steps: int = 40
    # starting points of the attack
    attack_restarts: int = 20
    # seconds for each instance; None: what instances.csv says, or no limit
    timeout: float | None = None
    # most rows of A that a rank carries at once; None: all
    max_spec_rows: int | None = None
    # seed of the attack's starting points
    seed: int = 0
    # the model's own forward is not compared with its bounds (`OwnOptions.check_live`)
    no_live_check: bool = False
    # bounds that hold in real arithmetic (`lirpa_megatron.rounding`), in float64
    outward: bool = False

    def __post_init__(self) -> None:
        if self.outward and self.dtype not in (None, "float64"):
            raise UserError(
                f"--outward computes bounds in float64, --dtype says {self.dtype}: leave it out"
            )
        if self.outward:
            object.__setattr__(self, "dtype", "float64")

    @property
    def rounding(self) -> str:
        """`OwnOptions.rounding`."""
        return "outward" if self.outward else "nearest"

    def attack(self) -> AttackOptions:
        return AttackOptions(
            steps=self.attack_steps, restarts=self.attack_restarts, seed=self.seed
        )

    def bound_opts(self) -> dict[str, Any]:
        """Options of `BoundedModule`."""
        return {
            "max_spec_rows": self.max_spec_rows,
            "rounding": self.rounding,
            "check_live": not self.no_live_check,
            "optimize_bound_args": {"iteration": self.alpha_iterations, "lr_alpha": self.lr_alpha},
        }
