"""A socket between two neighbouring pipeline stages of one machine, for all that they send.

Over gloo, through TCP, 160 chunks of rows of 1 MiB and their answers of half of that cost 0.8 and
0.4 s of the processors of the two ranks, through a Unix socket 0.05 s. Stages of several machines
find no such socket: they use gloo.

The socket lies in a folder that only its owner may enter. A rank that ends closes its end, also
without a word, which ends the other's waiting.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
from collections.abc import Callable

from lirpa_megatron.parallel.local_links import listening

_BUFFER = 2**22
"""Bytes that the system is asked to keep for a reader; it may keep fewer."""


class Sent:
    """Data that is on its way.

    Args:
        rest: what the socket has not taken yet.
    """

    def __init__(self, rest: memoryview) -> None:
        self.rest, self._error, self._done = rest, None, threading.Event()

    def end(self, error: OSError | None = None) -> None:
        """The socket has taken it, or never will."""
        self.rest, self._error = self.rest[:0], error
        self._done.set()

    def is_done(self) -> bool:
        """Whether `wait` would not wait."""
        return self._done.is_set()

    def wait(self) -> None:
        """Until the memory that was sent may be changed.

        Raises:
            RuntimeError: the other end is gone.
        """
        self._done.wait()
        if self._error is not None:
            raise RuntimeError(str(self._error)) from self._error


class StageLink:
    """One end of the socket. Sending does not wait for the reader.

    What does not fit into the system's buffer is written by a thread, so that two ranks can send
    to each other before either of them reads.

    Args:
        link: a connected stream socket.
        timeout: seconds of silence after which the other end counts as gone.
    """

    def __init__(self, link: socket.socket, timeout: float) -> None:
        self._link, self._last = link, None
        self._queue: queue.SimpleQueue[Sent | None] | None = None
        link.settimeout(None)  # python's own timeouts would wait in writes that must not
        seconds = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            link.setsockopt(socket.SOL_SOCKET, option, seconds)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)

    def send(self, data: memoryview) -> Sent:
        """Begins to send bytes, which must not be changed before they are."""
        sent, taken = Sent(data), 0
        if self._last is None or self._last.is_done():
            with contextlib.suppress(OSError):  # full, or gone, as the thread will find
                taken = self._link.send(data, socket.MSG_DONTWAIT)
        if taken == len(data):
            sent.end()
            return sent
        sent.rest = data[taken:]
        if self._queue is None:
            self._queue = queue.SimpleQueue()
            writes = threading.Thread(target=_write, args=(self._link, self._queue), daemon=True)
            writes.start()
        self._last = sent
        self._queue.put(sent)
        return sent

    def receive(self, into: memoryview) -> None:
        """Waits for as many bytes as there is room for.

        Raises:
            RuntimeError: the other end is gone.
        """
        while into:
            try:
                read = self._link.recv_into(into, 0, socket.MSG_WAITALL)
            except OSError as error:
                raise RuntimeError(str(error)) from error
            if not read:
                raise RuntimeError("connection closed by peer")
            into = into[read:]

    def __del__(self) -> None:
        if self._queue is not None:
            self._queue.put(None)
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._link.close()


def _write(link: socket.socket, waiting: queue.SimpleQueue[Sent | None]) -> None:
    while (sent := waiting.get()) is not None:
        try:
            link.sendall(sent.rest)
        except OSError as error:
            with contextlib.suppress(OSError):  # part is lost: what follows must not take its place
                link.shutdown(socket.SHUT_RDWR)
            sent.end(error)
        else:
            sent.end()


def connect(
    listens: bool, timeout: float, tell: Callable[[bytes], None], hear: Callable[[], bytes]
) -> StageLink | None:
    """Connects two ranks, which both call it.

    Args:
        listens: of one of them.
        timeout: as for `StageLink`.
        tell: gives the other one a few bytes.
        hear: waits for what it tells.

    Returns:
        None, on both, where they cannot be connected: they run on two machines, or in containers
        without a common folder for temporary files.
    """
    if listens:
        with listening(1, timeout, socket.SOCK_STREAM) as listener:
            tell(b"" if listener is None else listener.getsockname().encode())
            if hear() != b"connected":
                return None
            link, _ = listener.accept()
            return StageLink(link, timeout)
    address = hear().decode()
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.connect(address)
    except OSError:
        link.close()
        tell(b"not connected")
        return None
    tell(b"connected")
    return StageLink(link, timeout)
