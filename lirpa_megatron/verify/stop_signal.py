"""Signals that end a run at the next good moment, so that it can be continued."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

_TWICE = 2.0
"""Seconds in which an interrupt that comes again is the same one: torchrun hands on what a terminal
has sent to all processes."""


class StopSignal:
    """Hears signals, such as SIGTERM as a scheduler sends it, which then do nothing else. (A second
    interrupt from the keyboard ends the process.) One that the process was started to ignore, as
    shells start what runs in the background, stays ignored.

    Attributes:
        received: the first signal; None: none yet.
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGTERM,)) -> None:
        self.received: int | None = None
        self._signals, self._since = signals, 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        heard = [n for n in self._signals if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._receive) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def is_received(self) -> bool:
        """Whether one has been received by this process."""
        return self.received is not None

    def _receive(self, number: int, _: Any) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > _TWICE:
            raise KeyboardInterrupt
