"""Errors that a user sees."""


class UserError(Exception):
    """Bad input. The message is one line that names the problem and says what to do.

    The command line prints it on rank 0 and exits with status 2.
    """


class SPMDError(RuntimeError):
    """The tensor-parallel ranks do not run the same program (raised on every rank)."""


class RemoteRankError(SPMDError):
    """Another tensor-parallel rank failed; the message carries that rank's error."""


class StageError(RemoteRankError):
    """A rank of another pipeline stage failed; the message carries that rank's error."""


class ReplicaError(RemoteRankError):
    """Another replica of the model failed, and its message; or this one has lost the others."""


class BoundsError(ArithmeticError):
    """Bounds exclude the model's own output: too much rounding, or an error in a bound."""


class LiveModelError(BoundsError):
    """The graph that is bounded computes a different function than the caller's module."""
