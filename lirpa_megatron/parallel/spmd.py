"""Agreement between ranks: one program, the same collectives, one error for all.

A tensor-parallel computation hangs when one rank leaves it (an exception) or takes another branch
(a decision from values it alone holds). Two things prevent that here:

* Every collective of this package is preceded by a *handshake*: an all-reduce of three integers in
  which each rank says which collective it is about to enter (a checksum of name, shape, dtype). If
  the ranks do not say the same, every rank raises `SPMDError` with what each one said.
* `guard` wraps a computation. A rank that fails inside takes part in the handshake that the others
  are waiting in, says that it failed, and hands them its message; they raise `RemoteRankError`.

A collective that is to run while the ranks compute is `announced`: its handshake starts, and the
collective begins when that is found to be done, at the latest before the next handshake, so that
all ranks begin in the same order. A rank that fails in between begins it all the same, because the
others have its word.

The handshake never waits for the GPU: it runs through sockets between ranks of one machine
(`local_links`), and over gloo, also where the data runs over NCCL, between several. A rank that
dies without a word closes its connections, which ends the others' handshake too.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
import struct
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from lirpa_megatron.compat.gloo import timeout_of
from lirpa_megatron.compat.group_names import new_group
from lirpa_megatron.errors import (
    RemoteRankError,
    ReplicaError,
    SPMDError,
    StageError,
    UserError,
)
from lirpa_megatron.parallel import local_links
from lirpa_megatron.parallel.checksums import check_same, checksums

_controls: weakref.WeakKeyDictionary[Any, _Control] = weakref.WeakKeyDictionary()
_NUMBERS = struct.Struct("3q")


class _Control:
    """The handshake channel of one tensor-parallel group (of more than one rank)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.depth = 0
        self.in_foreign_code = False
        self.announced: Announced | None = None
        if dist.get_backend(group) == "gloo":
            self._group = weakref.ref(group)  # the registry is keyed weakly by the same group
        else:
            ranks = dist.get_process_group_ranks(group)
            own = new_group(ranks, "gloo")
            self._group = lambda: own

    @functools.cached_property
    def _links(self) -> local_links.Links | None:
        """Made at the first handshake, as that is when all ranks are here."""
        timeout = timeout_of(self._group())
        return _or_gone(
            lambda: local_links.connect(self.rank, self.size, timeout, self._gather_by_gloo)
        )

    def start(self, values: list[int]) -> Callable[[], Any]:
        """The largest of each number over ranks, when the function that is returned is called.

        It has the attribute `is_done`, a function that says whether it would not wait.
        """
        if self._links is not None:
            said = _or_gone(lambda: self._links.begin(_NUMBERS.pack(*values)))

            def heard() -> list[int]:
                everyone = map(_NUMBERS.unpack, _or_gone(said.wait))
                return [max(numbers) for numbers in zip(*everyone, strict=True)]

            heard.is_done = said.is_done
            return heard
        tensor = torch.tensor(values, dtype=torch.int64)

        def run() -> Any:
            with _talking():
                return dist.all_reduce(
                    tensor, op=dist.ReduceOp.MAX, group=self._group(), async_op=True
                )

        work = _or_gone(run)

        def finish() -> list[int]:
            _or_gone(work.wait)
            return tensor.tolist()

        finish.is_done = work.is_completed
        return finish

    def all_gather(self, value: Any) -> list[Any]:
        """Plain data of every rank, in rank order."""
        if self._links is not None:
            data = pickle.dumps(value)
            short = data if len(data) <= local_links.LONGEST else b""
            everyone = _or_gone(lambda: self._links.begin(short).wait())
            if all(everyone):
                return [pickle.loads(said) for said in everyone]
        return self._gather_by_gloo(value)

    def _gather_by_gloo(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.size
        with _talking():
            dist.all_gather_object(gathered, value, group=self._group())
        return gathered

    def handshake(self, step: str) -> None:
        self.settle()
        self.check(step, self.start(_said(step))())

    def settle(self) -> None:
        """What has been announced begins now."""
        if self.announced is not None:
            self.announced.settle()

    def check(self, step: str, found: list[int]) -> None:
        """Raises unless all ranks said `step`; `found` is the largest of what they said."""
        (failed, high, low), (_, tag, _) = found, _said(step)
        if failed:
            messages = [(r, m) for r, m in enumerate(self.all_gather(None)) if m is not None]
            rank, message = messages[0]
            raise RemoteRankError(f"tensor-parallel rank {rank} failed: {message}")
        if (high, low) != (tag, -tag):
            said = _differences(self.all_gather(step))
            raise SPMDError(f"tensor-parallel ranks disagree: {said}")

    def report_failure(self, message: str) -> None:
        """Joins the handshake that the other ranks wait in, and tells them why this one leaves."""
        with contextlib.suppress(RuntimeError, SPMDError):  # the others are gone, or failed too
            if self.announced is not None:
                self.announced.wait()
            self.start([1, 0, 0])()
            self.all_gather(message)


class Announced:
    """A collective to come: its handshake is under way.

    Args:
        control: of the group.
        step: the collective, with the shapes that the ranks must share.
        begin: begins it, and returns something with `wait()`.
    """

    def __init__(self, control: _Control, step: str, begin: Callable[[], Any]) -> None:
        control.settle()
        self._control, self._step, self._begin = control, step, begin
        self._finish, self._work = control.start(_said(step)), None
        control.announced = self

    def poll(self) -> None:
        """Begins if the handshake is done."""
        if self._work is None and self._finish.is_done():
            self.settle()

    def settle(self) -> None:
        """Begins, after the handshake.

        Raises:
            RemoteRankError, SPMDError: as `handshake`.
        """
        if self._work is None:
            self._control.announced = None
            self._control.check(self._step, self._finish())
            self._work = self._begin()

    def wait(self) -> None:
        """Until the collective is done."""
        self.settle()
        self._work.wait()


_talks = 0


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    global _talks
    _talks += 1
    try:
        yield
    finally:
        _talks -= 1


def is_talking() -> bool:
    """Whether the collective that begins now is one of this module's own."""
    return _talks > 0


def _said(step: str) -> list[int]:
    tag = zlib.crc32(step.encode())
    return [0, tag, -tag]


def _or_gone(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except (OSError, RuntimeError) as error:
        raise RemoteRankError(
            "a tensor-parallel rank ended without a message (see its own output); "
            f"the connection to it is gone: {str(error).splitlines()[0]}"
        ) from error


def _differences(said: list[str]) -> str:
    return "; ".join(f"rank {rank} is at {step}" for rank, step in enumerate(said))


def _control(group: dist.ProcessGroup | None) -> _Control | None:
    if group is None or group.size() == 1:
        return None
    if group not in _controls:
        _controls[group] = _Control(group)
    return _controls[group]


def handshake(group: dist.ProcessGroup | None, step: str) -> None:
    """Every rank is about to do `step`, or every rank raises.

    Args:
        group: the tensor-parallel group.
        step: what comes next, with the shapes that the ranks must share.

    Raises:
        RemoteRankError: another rank failed inside its `guard`.
        SPMDError: the ranks are at different steps.
    """
    control = _control(group)
    if control is not None:
        control.handshake(step)


def announce(group: dist.ProcessGroup, step: str, begin: Callable[[], Any]) -> Announced:
    """A collective of more than one rank that runs while the ranks compute; see `Announced`."""
    control = _control(group)
    assert control is not None
    return Announced(control, step, begin)


def poll(group: dist.ProcessGroup | None) -> None:
    """Begins what has been announced, if all ranks have."""
    control = _control(group)
    if control is not None and control.announced is not None:
        control.announced.poll()


@contextlib.contextmanager
def guard(group: dist.ProcessGroup | None, what: str) -> Iterator[None]:
    """A block that every rank of the group enters: if one rank fails in it, all ranks fail.

    Nested guards cost nothing. The failing rank raises its own error; the others raise
    `RemoteRankError` with its message.

    Args:
        group: the tensor-parallel group; None or one rank: no guard is needed.
        what: name of the block, for messages.

    Raises:
        RemoteRankError: another rank failed in the block.
        SPMDError: the ranks did not do the same in the block.
    """
    control = _control(group)
    if control is None or control.depth > 0:
        yield
        return
    control.depth += 1
    control.announced = None
    try:
        yield
        control.handshake(f"the end of {what}")
    except (ReplicaError, StageError) as error:
        control.report_failure(str(error))
        raise
    except SPMDError:
        raise  # every rank has it already
    except Exception as error:
        if not control.in_foreign_code:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            control.report_failure(f"{kind}{error}")
        raise
    finally:
        control.depth -= 1
        control.in_foreign_code = False


@contextlib.contextmanager
def foreign_collectives(group: dist.ProcessGroup | None) -> Iterator[None]:
    """A part of a guarded block whose collectives are another library's, without handshakes.

    A rank that fails in it cannot reach the others: they are in a collective of that library. It
    leaves without waiting, and they end when its process does (torchrun ends them at once).
    """
    control = _control(group)
    if control is None:
        yield
        return
    control.in_foreign_code = True
    yield  # left set by an exception: the guard around looks at it
    control.in_foreign_code = False


def broadcast_object(value: Any, group: dist.ProcessGroup | None) -> Any:
    """Rank 0's `value` (plain data) on every rank of the group."""
    control = _control(group)
    if control is None:
        return value
    control.handshake("broadcast_object")
    return control.all_gather(value if control.rank == 0 else None)[0]


def gather_objects(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's `value` (plain data), in rank order, on every rank of the group."""
    control = _control(group)
    if control is None:
        return [value]
    control.handshake("gather_objects")
    return control.all_gather(value)


def broadcast_tensor(x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Rank 0's values in the graph of this rank's replicated `x` (gradient: identity)."""
    return _FromRankZero.apply(x, group)


class _FromRankZero(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        if group is None or group.size() == 1:
            return x.view_as(x)
        handshake(group, f"broadcast of {tuple(x.shape)} {x.dtype}")
        y = x.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(y, dist.get_global_rank(group, 0), group=group)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def check_replicated(
    group: dist.ProcessGroup | None, values: Mapping[str, torch.Tensor | str | None], remedy: str
) -> None:
    """Raises on every rank when a value that must be replicated differs between ranks.

    Args:
        group: the tensor-parallel group.
        values: name -> tensor (compared bit by bit, through a checksum), text, or None.
        remedy: what the user can do, for the message.

    Raises:
        SPMDError: naming the values and the ranks that differ from rank 0.
    """
    control = _control(group)
    if control is None:
        return
    mine = checksums(values)
    control.handshake("check of replicated values")
    check_same(control.all_gather(mine), "tensor-parallel ranks", remedy)
