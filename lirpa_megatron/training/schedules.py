"""Values that change with the iteration: the radius, and the share of CROWN in the bounds.

They are functions of the iteration alone, so that a run that is resumed goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from lirpa_megatron.errors import UserError


@dataclass(frozen=True)
class Ramp:
    """A value that moves from `first` to `last` over some iterations, smoothly at first.

    At the start the value grows like (step / length)^beta, and from `mid` on linearly with the
    slope reached there; `mid=0` is linear throughout. This is the schedule of Gowal et al. (2018),
    with auto_LiRPA's parameters: `Ramp(n * (start - 1), n * length, 0, max_eps)` gives at iteration
    i (from 0) what its SmoothedScheduler(max_eps, "start=..,length=..") gives for batch i + 1 of
    epochs of n batches.
    """

    # iteration at which it leaves the first value, and iterations until the last
    start: int
    length: int
    first: float
    last: float
    # share of the length that is not linear
    mid: float = 0.25
    # exponent before it, at least 2
    beta: float = 4.0

    def __post_init__(self) -> None:
        if self.length < 0:
            raise UserError(f"length is {self.length}: give 0 iterations or more")
        if not 0 <= self.mid <= 1:
            raise UserError(f"mid is {self.mid}: give a share of the length, from 0 to 1")
        if self.beta < 2:
            raise UserError(f"beta is {self.beta}: give an exponent of at least 2")

    def __call__(self, iteration: int) -> float:
        """The value at an iteration, counted from 0."""
        step = iteration - self.start
        if step <= 0:
            return self.first if self.length or step < 0 else self.last
        if step >= self.length:
            return self.last
        bend = int(self.length * self.mid)
        # Value and slope agree at the bend: alpha bend^beta + (length - bend) slope = 1, and
        # slope = alpha beta bend^(beta - 1).
        if bend == 0:
            share = step / self.length
        else:
            at_bend = bend / ((self.length - bend) * self.beta + bend)
            if step < bend:
                share = at_bend * (step / bend) ** self.beta
            else:
                share = at_bend + (1 - at_bend) * (step - bend) / (self.length - bend)
        return self.first + (self.last - self.first) * share
