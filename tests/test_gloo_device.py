"""The process groups of a rank share one device of gloo's, and keep their own timeouts."""

from __future__ import annotations

import os
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from forks import launch
from ranks import TIMEOUT, pool

from lirpa_megatron.compat import gloo
from lirpa_megatron.parallel import runtime


def loops():
    """Threads of this process that look for gloo's messages."""
    names = Counter(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    return names["gloo_tcp_loop"]


def _loops_of_a_program():
    first = loops()
    runtime.initialize()
    print(first, loops())
    dist.barrier()  # rank 0 has the store, which the other may still need


def test_a_process_has_one_thread_for_the_messages_of_all_groups():
    ended = launch(2, _loops_of_a_program)
    assert (ended.returncode, ended.stdout) == (0, "0 1\n" * 2), ended.stderr


def _timeouts():
    groups = list(dist.distributed_c10d._world.pg_map)
    backends = (group._get_backend(torch.device("cpu")) for group in groups)
    return Counter(backend.options._timeout.total_seconds() for backend in backends)


def test_groups_keep_their_timeouts():
    for found in pool(2).run(_timeouts):
        assert found[TIMEOUT] == 1 and sum(found.values()) > 10  # Megatron has its own


def test_interfaces_that_the_user_names_stay_torchs_affair(monkeypatch):
    own = dist.ProcessGroupGloo.__init__
    with gloo.one_device():
        assert dist.ProcessGroupGloo.__init__ is not own
    assert dist.ProcessGroupGloo.__init__ is own
    monkeypatch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
    with gloo.one_device():
        assert dist.ProcessGroupGloo.__init__ is own


def test_a_timeout_of_a_group_is_that_of_its_options():
    store = dist.HashStore()
    with gloo.one_device():
        group = dist.ProcessGroupGloo(store, 0, 1, timedelta(seconds=7))
        other = dist.ProcessGroupGloo(store, 0, 1, timeout=timedelta(seconds=8))
    found = [each.options._timeout.total_seconds() for each in (group, other)]
    assert found == [7, 8]
