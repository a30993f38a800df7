"""What a rank of a pipeline sends and how long it waits, recorded around the product's calls."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator

UP, DOWN = 1, -1


class Timeline:
    """Messages of this rank while `recorded` is entered.

    Attributes:
        events: (kind, way, seconds of the processor before and after it), kind "send" or "receive".
        waited: seconds on the clock in `Pipeline.receive`.
        expected: bytes by the formula of `crown.stage_below`: "rows", which this rank sends, and
            "answer", which the stage below sends it.
        passes: rows that this rank sent down.
    """

    def __init__(self) -> None:
        self.events: list[tuple[str, int, float, float]] = []
        self.waited, self.passes = 0.0, 0
        self.expected: Counter[str] = Counter()

    @contextlib.contextmanager
    def recorded(self, coordinates: int) -> Iterator[None]:
        """Wraps sending, receiving and asking; `coordinates`: N of affine forms."""
        from lirpa_megatron.crown.stage_below import StageBelow
        from lirpa_megatron.parallel.pipeline import Pipeline

        saved = [(owner, name, getattr(owner, name)) for owner, name in (
            (Pipeline, "send"), (Pipeline, "receive"), (StageBelow, "rows"), (StageBelow, "_ask"),
            (StageBelow, "_answered"),
        )]
        send, receive, rows, ask, answered = (found for _, _, found in saved)
        timeline = self

        def timed(kind, function):
            def call(self, way, *args, **kwargs):
                before, start = time.thread_time(), time.perf_counter()
                try:
                    return function(self, way, *args, **kwargs)
                finally:
                    if kind == "receive":
                        timeline.waited += time.perf_counter() - start
                    timeline.events.append((kind, way, before, time.thread_time()))
            return call

        def counted_rows(self, A, bias, course):
            timeline._rows(A, course, coordinates)
            return rows(self, A, bias, course)

        kinds: dict[int, str] = {}

        def counted_ask(self, what, *args, **kwargs):
            kinds[ask_number := ask(self, what, *args, **kwargs)] = what
            return ask_number

        def counted_answered(self, number, *args, **kwargs):
            found = answered(self, number, *args, **kwargs)
            if kinds[number] != "rows":  # value, interval, facts: tensors of the input's shape
                timeline.expected["answer"] += sum(
                    math.prod(x.shape) * x.element_size() for x in found
                )
            return found

        replaced = (timed("send", send), timed("receive", receive), counted_rows, counted_ask,
                    counted_answered)
        for (owner, name, _), function in zip(saved, replaced, strict=True):
            setattr(owner, name, function)
        try:
            yield
        finally:
            for owner, name, function in saved:
                setattr(owner, name, function)

    def _rows(self, A, course, coordinates: int) -> None:
        """A pass of n rows: 2 e n B (h + 1) bytes down and 2 e n B up, as the docstring says."""
        n, batch, *shape = A.either.shape
        size, sides = A.either.dtype.itemsize, sum(x is not None for x in A)
        if hasattr(A.either, "own"):  # rows of the identity: which ones
            every = A.either.all
            sent = 8 * (len(A.either.own) + (0 if every is None else len(every)))
        else:  # one A of both sides is sent once
            sent = (1 if A.lower is A.upper else sides) * size * n * batch * math.prod(shape)
        biases = sides * size * n * batch
        self.passes += n
        self.expected["rows"] += sent + biases
        self.expected["answer"] += biases
        if course.form:
            self.expected["answer"] += size * n * batch * (coordinates + 2)


def idle_shares(stages: list[dict], at_once: int = 1, calls: int = 1) -> list[float]:
    """Shares of the time that stages would wait, each with a processor of its own.

    The recorded messages are replayed: between two of them a rank takes the processor time that it
    took, and it receives a message no sooner than it was sent. What else ran on the machine, or
    that there are fewer cores than ranks, does not count.

    Args:
        stages: of each rank of one pipeline, its `events`, and `seconds` of its processor in all.
        at_once: pipelines whose ranks of one stage share its processor.
        calls: that each of them makes, one after the other, like the one recorded.
    """
    work = [_segments(stage) * calls for stage in stages]
    free, at = [0.0] * len(stages), {}
    sent: dict[tuple[int, int, int], deque] = defaultdict(deque)
    for pipeline in range(at_once):
        for s in range(len(stages)):
            at[s, pipeline] = 0, 0.0
    while at:
        possible = []
        for (s, pipeline), (i, ready) in at.items():
            kind, way, _ = work[s][i]
            arrived = sent[s + way, s, pipeline]
            if kind == "receive":
                if not arrived:
                    continue
                ready = max(ready, arrived[0])
            possible.append((max(ready, free[s]), i, pipeline, s))
        start, i, pipeline, s = min(possible)
        kind, way, seconds = work[s][i]
        if kind == "receive":
            sent[s + way, s, pipeline].popleft()
        free[s] = end = start + seconds
        at[s, pipeline] = i + 1, end
        if i + 1 == len(work[s]):
            del at[s, pipeline]
        elif work[s][i + 1][0] == "send":
            sent[s, s + work[s][i + 1][1], pipeline].append(end)
    busy = [at_once * calls * stage["seconds"] for stage in stages]
    return [1 - seconds / max(free) for seconds in busy]


def _segments(stage: dict) -> list[tuple[str, int, float]]:
    """(message, its way, seconds of the processor from it to the next one)."""
    found, last, message = [], 0.0, ("begin", 0)
    for kind, way, before, after in stage["events"]:
        now = after if kind == "send" else before  # a message is under way when `send` returns
        found.append((*message, now - last))
        message, last = (kind, way), now
    return [*found, (*message, stage["seconds"] - last)]
