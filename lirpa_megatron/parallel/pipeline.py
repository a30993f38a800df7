"""Messages between the stages of a pipeline: who sends what, in which order, and how all end.

A rank of stage s talks to the ranks of stages s - 1 and s + 1 that share its tensor-parallel rank.
Megatron's `P2PCommunicator` moves activations whose shape and type both ends know beforehand, and
its sends wait for the receiver. Here the lower stage learns from the message itself what comes, in
any number type, and a stage goes on while its messages are under way; so these are torch's own
point-to-point calls on Megatron's process group.

**On GPUs** transfers go on while a stage computes. The messages of each direction have a
communicator of their own: NCCL begins an operation of a communicator when the one before it is
done, and a send is done when the other side receives. With one for both directions a stage that
sends chunk after chunk before it takes the first answer, and one that answers a chunk before it
takes the next, would wait for each other for ever. What is received is received on a stream of its
own, as otherwise NCCL would wait for all that the receiver has begun to compute; the rest of the
computation waits for that stream alone.

Every message is announced by a header: the name of the step, plain data, and the tensors that
follow. Headers, and tensors that are not on a GPU, take a socket between the two ranks if they run
on one machine (`stage_links`), else gloo, also where the tensors run over NCCL. A receiver that
waits for another step raises `SPMDError` with what both said. In each direction messages arrive in
the order of sending.

A stage that fails tells both neighbours, in place of the message that they wait for; they fail with
its message, and tell theirs (`Pipeline.reporting`). As a stage that waits, waits for one that works
or waits in turn for a third, all end. Before they hand out their errors they read what is still
under way between them (`Pipeline.emptied`), so that the next call begins with empty channels. A
stage that dies without a word closes its connections, which ends its neighbours' waiting.
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from lirpa_megatron.compat.gloo import timeout_of
from lirpa_megatron.compat.group_names import new_group
from lirpa_megatron.errors import SPMDError, StageError, UserError
from lirpa_megatron.parallel import spmd, stage_links
from lirpa_megatron.parallel.collectives import Traffic

UP, DOWN = 1, -1
"""Towards the stage of the model's output, and of its input."""
_FAILED = "failed"
_HEADER = 1024
"""Bytes of a header that need no second message."""


@dataclass(frozen=True)
class Message:
    """What a neighbour has sent."""

    what: str
    """The step that it is for."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Plain data."""
    tensors: tuple[torch.Tensor, ...] = ()

    @property
    def described(self) -> str:
        """The step, and the tensors' shapes and types."""
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in self.tensors)
        return f"{self.what} of {shapes}" if shapes else self.what


_pipelines: weakref.WeakKeyDictionary[Any, Pipeline] = weakref.WeakKeyDictionary()


class Pipeline:
    """This rank's place in a pipeline, and its messages.

    Args:
        group: the pipeline-parallel group: one rank of each stage, in their order.

    Attributes:
        size: number of stages.
        stage: of this rank, from 0.
        traffic: messages with tensors, and the bytes of these, sent by this rank, by step.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.stage = group, group.size(), group.rank()
        self._ranks = dist.get_process_group_ranks(group)
        self._control, self._data = group, {UP: group, DOWN: group}
        self._links: dict[int, stage_links.StageLink | None] = {}
        self._arrivals = None
        if dist.get_backend(group) != "gloo":
            self._control = new_group(self._ranks, "gloo")
            self._data = {way: new_group(self._ranks, dist.get_backend(group))
                          for way in (UP, DOWN)}
            self._arrivals = torch.cuda.Stream()
        self.traffic = Traffic()
        self.depth = 0
        self._sent: dict[int, deque] = {UP: deque(), DOWN: deque()}
        self._count = {UP: 0, DOWN: 0}
        self._received = {UP: 0, DOWN: 0}
        self._told, self._heard = False, {UP: False, DOWN: False}

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Pipeline:
        """The one of a group: its counts of messages are of all that use it."""
        if group not in _pipelines:
            _pipelines[group] = cls(group)
        return _pipelines[group]

    @property
    def is_first(self) -> bool:
        """Whether the model's input is here."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether the model's output is here."""
        return self.stage == self.size - 1

    def neighbours(self) -> list[int]:
        """The directions in which there is a stage."""
        return [way for way in (DOWN, UP) if 0 <= self.stage + way < self.size]

    # ------------------------------------------------------------------ messages

    def send(
        self, way: int, what: str, fields: Mapping[str, Any] | None = None,
        tensors: Sequence[torch.Tensor] = (),
    ) -> None:
        """Begins to send; the tensors must not be changed afterwards.

        Args:
            way: UP or DOWN.
            what: the step, which the receiver waits for by name.
            fields: plain data (JSON).
            tensors: of any shape and type.
        """
        tensors = [x.detach().contiguous() for x in tensors]
        self._count[way] += 1
        described = [[str(x.dtype).removeprefix("torch."), list(x.shape)] for x in tensors]
        header = {"what": what, "fields": fields or {}, "tensors": described,
                  "has": self._received[way]}
        text = json.dumps(header).encode()
        block = len(text).to_bytes(8, "little") + text
        first = block[:_HEADER].ljust(_HEADER, b"\0")
        works = [(self._isend(way, _bytes(first), self._control), None)]
        if len(block) > _HEADER:
            works.append((self._isend(way, _bytes(block[_HEADER:]), self._control), None))
        for x in tensors:
            if x.numel():
                works.append((self._isend(way, x, self._data[way]), x))
        if tensors:
            self.traffic.add(what, sum(x.numel() * x.element_size() for x in tensors))
        self._sent[way].append((self._count[way], works))

    def receive(self, way: int, *steps: str) -> Message:
        """The next message from a neighbour.

        Args:
            way: from above (UP) or below (DOWN).
            steps: the steps that it may be for; none: any.

        Raises:
            StageError: the neighbour, or a stage behind it, failed or died.
            SPMDError: it is at another step.
        """
        message = self._receive(way)
        if message.what == _FAILED:
            self._heard[way] = True
            raise StageError(message.fields["message"])
        if steps and message.what not in steps:
            raise SPMDError(
                f"pipeline stages disagree: stage {self.stage + way} is at {message.described}, "
                f"stage {self.stage} waits for {' or '.join(steps)}"
            )
        return message

    def agree(self, what: str, value: Any) -> list[Any]:
        """Every stage's `value` (plain data) in the order of stages; all stages call it."""
        values = [] if self.is_first else list(self.receive(DOWN, what).fields["values"])
        values.append(value)
        if not self.is_last:
            self.send(UP, what, {"values": values})
            values = list(self.receive(UP, what).fields["values"])
        if not self.is_first:
            self.send(DOWN, what, {"values": values})
        return values

    def finish(self) -> None:
        """Waits until all that was sent is under way, as this process may end next."""
        for sent in self._sent.values():
            for _, works in sent:
                while works:  # gloo's can be waited for only once
                    works.pop()[0].wait()

    def _receive(self, way: int) -> Message:
        try:
            first = torch.empty(_HEADER, dtype=torch.uint8)
            self._recv(way, first, self._control)
            block = bytes(first.tolist())
            length = int.from_bytes(block[:8], "little")
            if length + 8 > _HEADER:
                rest = torch.empty(length + 8 - _HEADER, dtype=torch.uint8)
                self._recv(way, rest, self._control)
                block += bytes(rest.tolist())
            header = json.loads(block[8 : 8 + length])
            with self._arriving() as tensors:
                for dtype, shape in header["tensors"]:
                    x = torch.empty(shape, dtype=getattr(torch, dtype), device=self._device())
                    if x.numel():
                        self._recv(way, x, self._data[-way])  # sent the opposite way
                    tensors.append(x)
        except RuntimeError as error:
            self._heard[way] = True
            raise StageError(
                f"a rank of pipeline stage {self.stage + way} ended without a message (see its own "
                f"output); the connection to it is gone: {str(error).splitlines()[0]}"
            ) from error
        self._received[way] += 1
        self._let_go(way, header["has"])
        return Message(header["what"], header["fields"], tuple(tensors))

    def _let_go(self, way: int, received: int) -> None:
        """Forgets messages that the neighbour says it has received."""
        sent = self._sent[way]
        while sent and sent[0][0] <= received:
            for work, _ in sent.popleft()[1]:
                work.wait()

    def _link(self, way: int) -> stage_links.StageLink | None:
        """Made with the first message of the two ranks, as that is when both are here."""
        if way not in self._links:
            self._links[way] = None  # they find each other over gloo

            def hear() -> bytes:
                said = torch.empty(_HEADER, dtype=torch.uint8)
                self._recv(way, said, self._control)
                return bytes(said.tolist()).rstrip(b"\0")

            self._links[way] = stage_links.connect(
                way == UP, timeout_of(self._control), hear=hear,
                tell=lambda said: self._isend(way, _bytes(said.ljust(_HEADER, b"\0")),
                                              self._control).wait(),
            )
        return self._links[way]

    def _isend(self, way: int, x: torch.Tensor, group: dist.ProcessGroup) -> Any:
        try:
            link = self._link(way) if group is self._control else None
            if link is not None:
                return link.send(_memory(x))
            return dist.isend(x, self._ranks[self.stage + way], group=group)
        except RuntimeError as error:
            self._heard[way] = True
            raise StageError(
                f"the connection to pipeline stage {self.stage + way} is gone: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def _recv(self, way: int, x: torch.Tensor, group: dist.ProcessGroup) -> None:
        link = self._link(way) if group is self._control else None
        if link is not None:
            link.receive(_memory(x))
            return
        dist.recv(x, self._ranks[self.stage + way], group=group)

    @contextlib.contextmanager
    def _arriving(self) -> Iterator[list[torch.Tensor]]:
        """Tensors that the block receives: on a GPU while computations that have begun go on."""
        tensors: list[torch.Tensor] = []
        if self._arrivals is None:
            yield tensors
            return
        with torch.cuda.stream(self._arrivals):
            yield tensors
        computing = torch.cuda.current_stream()
        computing.wait_stream(self._arrivals)
        for x in tensors:
            x.record_stream(computing)

    def _device(self) -> torch.device:
        if self._control is self.group:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    # ------------------------------------------------------------------ failures

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """A block that all stages enter: an error in it is told to both neighbours at once.

        It belongs inside the tensor-parallel group's `spmd.guard`: ranks of this stage may wait for
        ranks of another, which have to hear of it first.
        """
        if self.depth > 1:
            yield
            return
        try:
            yield
        except Exception as error:
            self._tell(error)
            raise

    @contextlib.contextmanager
    def emptied(self) -> Iterator[None]:
        """Around the `spmd.guard`: after an error the channels are read until they are empty."""
        self.depth += 1
        try:
            yield
        except Exception as error:
            if self.depth == 1:
                self._tell(error)
                self._drain()
            raise
        finally:
            self.depth -= 1

    def _tell(self, error: Exception) -> None:
        if self._told:
            return
        self._told = True
        kind = "" if isinstance(error, UserError | SPMDError) else f"{type(error).__name__}: "
        text = f"{kind}{error}"
        if not isinstance(error, StageError):
            text = f"pipeline stage {self.stage} failed: {text}"
        for way in self.neighbours():
            with contextlib.suppress(RuntimeError):
                self.send(way, _FAILED, {"message": text})

    def _drain(self) -> None:
        for way in self.neighbours():
            while not self._heard[way]:
                with contextlib.suppress(StageError):
                    self._heard[way] |= self._receive(way).what == _FAILED
            for _, works in self._sent[way]:
                for work, _ in works:
                    with contextlib.suppress(RuntimeError):
                        work.wait()
            self._sent[way].clear()
            self._count[way] = self._received[way] = 0
            self._heard[way] = False
        self._told = False


@contextlib.contextmanager
def guard(
    pipeline: Pipeline | None, group: dist.ProcessGroup | None, what: str
) -> Iterator[None]:
    """`spmd.guard` over all stages: if one rank of the model fails in the block, all ranks fail.

    Args:
        pipeline: of this rank; None: one stage.
        group: its tensor-parallel group.
        what: name of the block, for messages.

    Raises:
        StageError: a rank of another stage failed in the block.
        RemoteRankError, SPMDError: as `spmd.guard`.
    """
    if pipeline is None:
        with spmd.guard(group, what):
            yield
        return
    with telling(pipeline, group, what):
        yield
        if pipeline.depth == 1:
            pipeline.agree(f"the end of {what}", None)
            pipeline.finish()


@contextlib.contextmanager
def telling(
    pipeline: Pipeline, group: dist.ProcessGroup | None, what: str
) -> Iterator[None]:
    """`guard` where not all stages are in one block: none waits at its end for the others."""
    with pipeline.emptied(), spmd.guard(group, what), pipeline.reporting():
        yield


def _bytes(block: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(block), dtype=torch.uint8)


def _memory(x: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor of any type, not copied."""
    return memoryview(x.reshape(-1).view(torch.uint8).numpy())
