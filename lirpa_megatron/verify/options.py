"""Options that runs over properties and over sentences have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lirpa_megatron.errors import UserError


@dataclass(frozen=True)
class RunOptions:
    """How bounds are computed and attacks are run; fields are named as command-line options."""

    # method of the bounds, one of lirpa_megatron.METHODS, forward, forward+backward or auto
    method: str = "CROWN"
    # of the forward methods: degree of the polynomials (`OwnOptions.order`)
    order: int = 1
    # most cuts of a set of few dimensions into pieces that are bounded one by one; 0: none
    splits: int = 0
    # a key of networks.network.DTYPES; None: what is stored (of a checkpoint, at least float32)
    dtype: str | None = None
    # gradient steps of alpha-CROWN
    alpha_iterations: int = 20
    # step size of alpha-CROWN
    lr_alpha: float = 0.5
    # gradient steps of the attack; 0: no attack
    attack_steps: int = 40
    # starting points of the attack
    attack_restarts: int = 20
    # seed of the attack's starting points
    seed: int = 0
    # seconds for each instance or sentence; None: no limit, or what instances.csv says
    timeout: float | None = None
    # most rows of A that a rank carries at once; None: all
    max_spec_rows: int | None = None
    # do not compare the model's own forward with its bounds (`OwnOptions.check_live`)
    no_live_check: bool = False
    # bounds that hold in real arithmetic (`lirpa_megatron.rounding`), in float64
    outward: bool = False

    def __post_init__(self) -> None:
        if self.outward and self.dtype is None:
            object.__setattr__(self, "dtype", "float64")

    @property
    def rounding(self) -> str:
        """`OwnOptions.rounding`."""
        return "outward" if self.outward else "nearest"

    def check(self) -> None:
        """Raises UserError for options that do not go together."""
        if self.order > 1 and not self.method.startswith("forward"):
            raise UserError(f"--order {self.order} is of the forward methods: add --method forward")
        if self.order > 8:
            raise UserError(f"--order {self.order}: choose a degree from 1 to 8")
        if self.outward and self.dtype != "float64":
            raise UserError(
                f"--outward computes bounds in float64, --dtype says {self.dtype}: leave it out"
            )

    def bound_opts(self) -> dict[str, Any]:
        """Options of `BoundedModule`."""
        return {
            "max_spec_rows": self.max_spec_rows,
            "order": self.order,
            "rounding": self.rounding,
            "check_live": not self.no_live_check,
            "optimize_bound_args": {"iteration": self.alpha_iterations, "lr_alpha": self.lr_alpha},
        }
