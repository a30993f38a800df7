"""The socket between two pipeline stages of one machine: nothing is lost, and no end waits for
one that is gone. But for the last test, both ends are in this process."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ranks import pool

from lirpa_megatron.parallel.stage_links import StageLink, connect

LARGE = 2**25
"""Bytes, more than a system keeps for a reader."""


def _pair(timeout=30.0, way=lambda told: told):
    """Both ends; `way` is what becomes of the words they exchange before."""
    words = queue.Queue(), queue.Queue()
    with ThreadPoolExecutor(2) as threads:
        ends = [
            threads.submit(connect, listens, timeout,
                           lambda told, out=words[listens]: out.put(way(told)),
                           lambda into=words[not listens]: into.get(timeout=30))
            for listens in (True, False)
        ]
        return [end.result() for end in ends]


def _received(link, size):
    into = bytearray(size)
    link.receive(memoryview(into))
    return bytes(into)


def test_both_ends_send_much_before_either_reads_and_all_arrives_in_order():
    ends = _pair()
    parts = [bytes([i]) * size for i, size in enumerate((LARGE, 1, LARGE, 1000))]
    sent = [[end.send(memoryview(part)) for part in parts] for end in ends]
    assert not any(of_end[0].is_done() for of_end in sent)
    for end in ends:
        assert [_received(end, len(part)) for part in parts] == parts
    for of_end in sent:
        for each in of_end:
            each.wait()


def test_an_end_that_is_gone_ends_reading_and_writing():
    first, second = _pair()
    first.send(memoryview(b"last words"))
    sent = second.send(memoryview(bytes(LARGE)))
    del first
    assert _received(second, 10) == b"last words"
    with pytest.raises(RuntimeError, match="closed|reset"):
        _received(second, 1)
    for each in (sent, second.send(memoryview(b"more"))):
        with pytest.raises(RuntimeError, match="Broken pipe|reset"):
            each.wait()


def test_what_follows_a_message_that_was_cut_off_does_not_take_its_place():
    first, second = _pair(timeout=0.2)
    cut = first.send(memoryview(bytes(LARGE)))
    with pytest.raises(RuntimeError, match="unavailable"):
        cut.wait()
    after = first.send(memoryview(b"1" * LARGE))
    with pytest.raises(RuntimeError, match="closed"):
        _received(second, LARGE)
    with pytest.raises(RuntimeError, match="Broken pipe"):
        after.wait()


def test_an_end_that_is_silent_is_waited_for_no_longer_than_the_timeout():
    first, second = _pair(timeout=0.2)
    with pytest.raises(RuntimeError, match="unavailable"):
        _received(first, 1)
    with pytest.raises(RuntimeError, match="unavailable"):
        second.send(memoryview(bytes(LARGE))).wait()


@pytest.mark.parametrize("instead", [b"", b"/nowhere/rank"])
def test_ends_that_do_not_find_each_other_both_have_no_link(instead):
    """A folder that cannot be made, and one of another machine."""
    assert _pair(way=lambda told: instead if told.startswith(b"/") else told) == [None, None]


def test_nothing_is_left_in_the_folder_for_temporary_files():
    seen = []
    ends = _pair(way=lambda told: seen.append(told.decode()) or told)
    assert all(isinstance(end, StageLink) for end in ends)
    (path,) = (Path(told) for told in seen if told.startswith("/"))
    assert not path.parent.exists()


def _exchanged(with_socket):
    """What arrives of tensors of several types and shapes, sent both ways before any is read."""
    from megatron.core import parallel_state

    from lirpa_megatron.parallel import stage_links
    from lirpa_megatron.parallel.pipeline import Pipeline, guard

    real = stage_links.connect

    def none(listens, timeout, tell, hear):
        return real(listens, timeout, lambda told: tell(b""), hear)

    stage_links.connect = real if with_socket else none
    try:
        pipeline = Pipeline(parallel_state.get_pipeline_model_parallel_group())
        (way,) = pipeline.neighbours()
        tensors = [torch.arange(6.0).reshape(2, 3).t(), torch.zeros(()), torch.zeros(0, 4),
                   torch.tensor([True, False]), torch.full((3,), 1.5, dtype=torch.bfloat16),
                   torch.full((2**20,), 7, dtype=torch.int64)]
        for _ in range(2):
            with guard(pipeline, None, "the exchange"):
                for i in range(3):
                    pipeline.send(way, "some", {"text": "x" * 2000, "i": i}, tensors)
                for i in range(3):
                    message = pipeline.receive(way, "some")
                    assert message.fields == {"text": "x" * 2000, "i": i}
                    for got, want in zip(message.tensors, tensors, strict=True):
                        assert got.dtype == want.dtype and torch.equal(got, want)
        return [type(link).__name__ for link in pipeline._links.values()]
    finally:
        stage_links.connect = real


@pytest.mark.parametrize(("with_socket", "kind"), [(True, "StageLink"), (False, "NoneType")])
def test_messages_are_the_same_through_a_socket_and_over_gloo(with_socket, kind):
    assert pool(2, 1, 2).run(_exchanged, with_socket) == [[kind]] * 2
