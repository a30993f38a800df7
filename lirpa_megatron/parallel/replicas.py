"""Work that replicas of a model share out, and that the others take over where one is killed.

A *replica* is one copy of the model: its tensor-parallel ranks. All replicas run the same program
on the same data and know the same of it; what is expensive is shared out (`Replicas.share`):

1. Every replica deals the items to those that are left, in the same way, and works on its own.
2. Each tells all others what came of it: a rank talks to the ranks of other replicas that have its
   place in theirs, as they have the same parts of sharded tensors.
3. They agree whom all have heard. The items of a replica that is gone are dealt again.

So nothing is lost with a replica but what it was working on, and none runs dry while there are
items: they are dealt anew each time. Replicas wait for each other at the end of each share.

*Errors.* A replica in which a rank fails says so in place of its result, and all end with its
message (`Replicas.guard`). *Deaths.* A rank that dies without a word closes its connections; a
replica of which a rank is dead is no longer heard, and the ranks that it had besides leave. Who has
been heard is agreed on in two steps, within each replica and between those that are left, so that
after one death all that are left deal alike. Where several replicas die in the same share those
that are left may disagree; they notice, and end with an error.

Words are torch's point-to-point messages over gloo, on one machine or several. A replica that hears
nothing from another for longer than the group's timeout ends with an error and leaves, as gloo has
closed the connection then: if the other one was only late, it goes on, and not both do. (Where a
connection breaks between two that live, each takes the other for dead and does all of the work.)
"""

from __future__ import annotations

import contextlib
import io
import pickle
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from lirpa_megatron.errors import ReplicaError, SPMDError, UserError
from lirpa_megatron.parallel import spmd

Item = TypeVar("Item")
Result = TypeVar("Result")

_HEADER = 4096
"""Bytes of a message that need no second one."""
_SAID, _FAILED, _GONE, _WORKING = "said", "failed", "gone", "working"


class Replicas:
    """This rank's place among the replicas.

    Args:
        group: the ranks with this one's place in each replica; None: there is one.
        tp: the tensor-parallel group of this replica; None: one rank.
        device: where tensors that others have sent are put.

    Attributes:
        size: how many there were at first.
        rank: which this one is.
        members: those that are left; none if this one has lost a rank, or left.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, tp: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tp, self.device = tp, device
        self.size, self.rank = (1, 0) if group is None else (group.size(), group.rank())
        self.members = tuple(range(self.size))
        self._depth = self._epoch = self._round = 0
        self._leaves, self._closed = False, set()
        self._sent: dict[int, deque] = {r: deque() for r in self.members}
        if self.size > 1:
            self._ranks = dist.get_process_group_ranks(group)
            self._group = group
            if dist.get_backend(group) != "gloo":
                self._group = dist.new_group(
                    self._ranks, backend="gloo", use_local_synchronization=True
                )

    @classmethod
    def of_megatron(cls) -> Replicas:
        """Those of Megatron's parallel_state: its data-parallel group."""
        if not parallel_state.model_parallel_is_initialized():
            return ALONE
        group = parallel_state.get_data_parallel_group()
        if group.size() == 1:
            return ALONE
        if group not in _known:
            device = "cpu"
            if torch.cuda.is_available():
                device = torch.device("cuda", torch.cuda.current_device())
            _known[group] = cls(
                group, parallel_state.get_tensor_model_parallel_group(), device
            )
        return _known[group]

    @property
    def is_first(self) -> bool:
        """Whether this is the first of those that are left."""
        return self.members[:1] == (self.rank,)

    # --------------------------------------------------------------------- sharing

    def share(
        self, what: str, items: Sequence[Item], work: Callable[[list[Item]], Result],
        at_least: int = 1, state: Callable[[], bytes] | None = None,
    ) -> list[tuple[list[Item], Result]]:
        """Deals items to the replicas; all of them call it alike, inside `guard`.

        Args:
            what: name of the work, for messages.
            items: the same on every replica.
            work: does some of them; the result is plain data and tensors. Every rank of a replica
                calls it alike, and keeps its own parts of sharded tensors.
            at_least: how many items are worth a replica's while.
            state: says what the items are, where their `repr` does not. Replicas that do not say
                the same would lose items.

        Returns:
            All shares, each with its result, the same on every replica.

        Raises:
            ReplicaError: another replica failed.
            SPMDError: the replicas are at different steps.
        """
        left, parts = list(items), []
        while left:
            if len(self.members) == 1:
                parts.append((left, work(left)))
                break
            dealt = self._deal(left, at_least)
            own = dealt.get(self.rank)
            same = state() if state is not None else repr(left).encode()
            step = f"{what} {zlib.crc32(same):08x} of {len(left)}"
            heard = self._exchange(step, None if own is None else work(own))
            parts += [(share, heard[r]) for r, share in dealt.items() if r in heard]
            left = [x for r, share in dealt.items() if r not in heard for x in share]
        if sum(len(share) for share, _ in parts) != len(items):
            raise AssertionError("an item was lost")
        return parts

    def first(self, what: str, work: Callable[[], Result]) -> Result:
        """What comes of work that one replica does for all."""
        ((_, result),) = self.share(what, [None], lambda _: work())
        return result

    def gather(self, what: str, value: Any) -> dict[int, Any]:
        """What each replica that is left says; inside `guard`."""
        return self._exchange(what, value) if self.size > 1 else {self.rank: value}

    def working(self) -> None:
        """Says that this replica is at work of its own, to those that may wait for it."""
        for r in self._others():
            self._send(r, _packed((self._epoch, _WORKING, "", None)))

    def _deal(self, items: list[Item], at_least: int) -> dict[int, list[Item]]:
        count = max(1, min(len(self.members), len(items) // at_least))
        return {r: items[i::count] for i, r in enumerate(self.members[:count])}

    def _exchange(self, what: str, result: Any) -> dict[int, Any]:
        """What the replicas say that all of those left have heard; they are the members then."""
        if not self.members:
            raise ReplicaError("this replica has lost a rank or left: the others go on without it")
        self._round += 1
        step = f"{what}, round {self._round} of replicas {list(self.members)}"
        heard = self._said_by_all(step, result)
        common = self._in_all_places(set(heard))
        if len(self.members) > 2:
            views = self._said_by_all(f"{step}: who was heard", sorted(common)).values()
            common = self._in_all_places(common.intersection(*views))
        if self.rank not in common:
            raise ReplicaError("the connection to other replicas is gone: they go on without this "
                               "one")
        self.members = tuple(sorted(common))
        return {r: heard[r] for r in self.members}

    def _in_all_places(self, heard: set[int]) -> set[int]:
        """Of these, the ones that all ranks of this replica have heard."""
        return heard.intersection(*spmd.gather_objects(sorted(heard), self.tp))

    def _said_by_all(self, step: str, value: Any) -> dict[int, Any]:
        others = self._others()
        message = _packed((self._epoch, _SAID, step, value)) if others else b""
        for r in others:
            self._send(r, message)
        heard = {self.rank: value}
        for r in others:
            said = self._receive(r, step)
            if said is not None:
                heard[r] = said[0]
        return heard

    def _others(self) -> list[int]:
        return [r for r in self.members if r != self.rank and r not in self._closed]

    # -------------------------------------------------------------------- messages

    def _send(self, replica: int, message: bytes) -> None:
        parts = [message[:_HEADER].ljust(_HEADER, b"\0")]
        if len(message) > _HEADER:
            parts.append(message[_HEADER:])
        try:
            works = []
            for part in parts:
                x = torch.frombuffer(bytearray(part), dtype=torch.uint8)
                works.append((dist.isend(x, self._ranks[replica], group=self._group), x))
            self._sent[replica].append(works)
        except RuntimeError:
            self._closed.add(replica)

    def _receive(self, replica: int, step: str) -> tuple[Any] | None:
        """What a replica says at a step; None: it is gone."""
        while True:
            try:
                message = self._message(replica)
            except RuntimeError as error:
                if "timed out" in str(error).lower():
                    self._leaves = True
                    self._closed.add(replica)
                    raise ReplicaError(
                        f"replica {replica} has said nothing for longer than the group's timeout"
                    ) from None
                self._closed.add(replica)
                return None
            epoch, kind, said, value = message
            if epoch < self._epoch or kind == _WORKING:
                continue  # what is older is of a block that has ended with an error
            if kind == _GONE:
                self._closed.add(replica)
                return None
            if kind == _FAILED:
                raise ReplicaError(said)
            if (epoch, said) != (self._epoch, step):
                raise SPMDError(f"replicas disagree: replica {replica} is at {said}, replica "
                                f"{self.rank} at {step}")
            self._let_go(replica)
            return (value,)

    def _message(self, replica: int) -> tuple[int, str, str, Any]:
        first = torch.empty(_HEADER, dtype=torch.uint8)
        dist.recv(first, self._ranks[replica], group=self._group)
        block = first.numpy().tobytes()
        length = int.from_bytes(block[:8], "little")
        if length + 8 > _HEADER:
            rest = torch.empty(length + 8 - _HEADER, dtype=torch.uint8)
            dist.recv(rest, self._ranks[replica], group=self._group)
            block += rest.numpy().tobytes()
        return _Unpickler(io.BytesIO(block[8 : 8 + length]), self.device).load()

    def _let_go(self, replica: int) -> None:
        """Forgets messages before the last: who answers has read them."""
        sent = self._sent[replica]
        while len(sent) > 1:
            for work, _ in sent.popleft():
                with contextlib.suppress(RuntimeError):
                    work.wait()

    # ---------------------------------------------------------------------- errors

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """A block that all replicas enter: if one fails in it, all do, with its message.

        The ranks of this replica guard themselves inside (`spmd.guard`). Nested ones cost nothing.

        Args:
            what: name of the block, for messages.

        Raises:
            ReplicaError: another replica failed in the block.
        """
        if self.size == 1 or self._depth:
            yield
            return
        self._depth, self._round = 1, 0
        self._epoch += 1
        try:
            yield
            self._exchange(f"the end of {what}", None)
        except Exception as error:
            self._tell(error)
            raise
        finally:
            self._depth = 0

    def _tell(self, error: Exception) -> None:
        kind = "" if isinstance(error, UserError | SPMDError) else f"{type(error).__name__}: "
        text = f"{kind}{error}"
        if not isinstance(error, ReplicaError):
            text = f"replica {self.rank} failed: {text}"
        try:
            spmd.handshake(self.tp, "the end of a block that failed")
        except SPMDError:  # a rank of this replica is dead
            self._leaves = True
        told = _GONE if self._leaves else _FAILED
        message = _packed((self._epoch, told, text, None))
        for r in self._others():
            self._send(r, message)
        if self._leaves:
            self.members = ()


_known: weakref.WeakKeyDictionary[Any, Replicas] = weakref.WeakKeyDictionary()
ALONE = Replicas()
"""One replica."""


def _packed(message: Any) -> bytes:
    """Its length in eight bytes, and its pickle with tensors as arrays."""
    buffer = io.BytesIO()
    buffer.write(bytes(8))
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(message)
    data = buffer.getvalue()
    return (len(data) - 8).to_bytes(8, "little") + data[8:]


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, device: torch.device | str) -> None:
        super().__init__(file)
        self._device = device

    def persistent_load(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
