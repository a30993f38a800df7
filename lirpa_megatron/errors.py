"""Errors that a user sees."""


class UserError(Exception):
    """Bad input. The message is one clear line that names the thing and says what to do.

    The command line prints it on rank 0 and ends with status 2; a library user catches it.
    """


class SPMDError(RuntimeError):
    """The tensor-parallel ranks do not run the same program (raised on every rank)."""


class RemoteRankError(SPMDError):
    """Another tensor-parallel rank failed; the message carries that rank's error."""


class BoundsError(ArithmeticError):
    """Bounds exclude what the model itself computes: too much rounding, or an error in a bound."""


class LiveModelError(BoundsError):
    """What is bounded is not the function that the caller's own module computes."""
