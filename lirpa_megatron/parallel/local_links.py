"""Short messages between ranks that run on one machine, through Unix sockets.

A rank's words to the others are a few bytes, and there are as many as collectives. Over gloo each
costs ten switches between threads and 0.2 to 0.3 ms of a processor on every rank; a socket between
each two ranks costs about 0.01 ms. Ranks of several machines find no such sockets: they use gloo.

The sockets lie in folders that only their owner may enter. A rank that ends closes its ends, also
without a word, which ends the others' waiting.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LONGEST = 8192
"""Bytes of a message: a socket keeps three of them, or 60 short ones, for a rank that does not read
yet. Of long ones there is one at a time: who says one waits for what the others say."""
_NUMBER = struct.Struct("q")


class Links:
    """A socket to every other rank of a group; what is said in a round reaches all ranks.

    Every rank begins the same rounds in the same order. A round that is begun need not be waited
    for: what was said in it is passed over later.

    Args:
        rank: of this process.
        sockets: other rank -> connection that keeps the borders of messages.
    """

    def __init__(self, rank: int, sockets: Mapping[int, socket.socket]) -> None:
        self._rank, self._sockets, self._rounds = rank, dict(sockets), 0

    def begin(self, said: bytes) -> Round:
        """Tells all other ranks, without waiting for them.

        Args:
            said: at most LONGEST bytes.

        Raises:
            OSError: a rank is gone.
        """
        self._rounds += 1
        message = _NUMBER.pack(self._rounds) + said
        for link in self._sockets.values():
            link.sendall(message)
        return Round(self._rank, self._sockets, self._rounds, said)

    def __del__(self) -> None:
        _close(self._sockets)


class Round:
    """What the ranks say at one time; see `Links.begin`."""

    def __init__(
        self, rank: int, sockets: Mapping[int, socket.socket], number: int, said: bytes
    ) -> None:
        self._number, self._waits, self._said = number, dict(sockets), {rank: said}

    def is_done(self) -> bool:
        """Whether `wait` would not wait."""
        try:
            return all(self._heard(rank, waiting=False) for rank in list(self._waits))
        except OSError:  # `wait` meets it too
            return True

    def wait(self) -> list[bytes]:
        """What each rank said, in rank order.

        Raises:
            OSError: a rank is gone, or says nothing for longer than the group's timeout.
        """
        for rank in list(self._waits):
            self._heard(rank, waiting=True)
        return [said for _, said in sorted(self._said.items())]

    def _heard(self, rank: int, waiting: bool) -> bool:
        """Whether the rank's message is here, as it is after waiting."""
        link, number = self._waits[rank], 0
        while number < self._number:
            if not (waiting or _has_come(link)):
                return False
            message = link.recv(_NUMBER.size + LONGEST)
            if not message:
                raise ConnectionError("connection closed by peer")
            (number,) = _NUMBER.unpack_from(message)
        if number > self._number:
            raise ConnectionError(f"message {self._number} is lost, {number} has come")
        self._said[rank] = message[_NUMBER.size :]
        del self._waits[rank]
        return True


def _has_come(link: socket.socket) -> bool:
    poll = select.poll()
    poll.register(link, select.POLLIN)
    return bool(poll.poll(0))


def connect(
    rank: int, size: int, timeout: float, all_gather: Callable[[Any], list[Any]]
) -> Links | None:
    """Connects every two ranks of a group; all ranks call it.

    Args:
        rank: of this process.
        size: number of ranks.
        timeout: in seconds, after which a rank that says nothing counts as gone.
        all_gather: collective; gives plain data of every rank, in rank order.

    Returns:
        None, on every rank, where two of them cannot be connected: they run on several machines, or
        in containers without a common folder for temporary files.
    """
    with listening(size, timeout) as listener:
        addresses = all_gather(None if listener is None else listener.getsockname())
        sockets = _reach(rank, addresses, timeout)
        if not all(all_gather(sockets is not None)):
            _close(sockets or {})
            return None
        for _ in range(size - rank - 1):
            link, _ = listener.accept()
            link.settimeout(timeout)
            (other,) = _NUMBER.unpack(link.recv(_NUMBER.size))
            sockets[other] = link
    return Links(rank, sockets)


@contextlib.contextmanager
def listening(
    size: int, timeout: float, kind: int = socket.SOCK_SEQPACKET
) -> Iterator[socket.socket | None]:
    """A socket that other ranks can connect to, for a block; None: it cannot be made.

    Args:
        size: how many may do so before they are accepted.
        timeout: of accepting them, in seconds.
        kind: of the socket; one of messages keeps their borders.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ranks-"))
            listener = stack.enter_context(_new_socket(timeout, kind))
            listener.bind(str(Path(folder) / "rank"))
            listener.listen(size)
        except OSError:
            listener = None
        yield listener


def _reach(
    rank: int, addresses: Sequence[str | None], timeout: float
) -> dict[int, socket.socket] | None:
    """Connections to the ranks before this one; None where any rank cannot be reached."""
    if None in addresses:
        return None
    sockets: dict[int, socket.socket] = {}
    try:
        for other, address in enumerate(addresses[:rank]):
            sockets[other] = _new_socket(timeout)
            sockets[other].connect(address)
            sockets[other].sendall(_NUMBER.pack(rank))
    except OSError:
        _close(sockets)
        return None
    return sockets


def _close(sockets: Mapping[int, socket.socket]) -> None:
    for each in sockets.values():
        each.close()


def _new_socket(timeout: float, kind: int = socket.SOCK_SEQPACKET) -> socket.socket:
    new = socket.socket(socket.AF_UNIX, kind)
    new.settimeout(timeout)
    return new
