"""The worker processes of benchmarks end with their parent, however that ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT

SCRIPT = """
import os, sys, time
sys.path.insert(0, {folder!r})
from workers import launch, start

def worker(task):
    open(task["file"], "w").write(str(os.getpid()))
    time.sleep(60)

start(lambda: launch(__file__, {{"file": sys.argv[1]}}, 1, None, None), worker)
"""


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def waited_for(condition):
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_worker_ends_with_its_benchmark(tmp_path, number):
    script, file = tmp_path / "sleeper.py", tmp_path / "pid"
    script.write_text(SCRIPT.format(folder=str(ROOT / "benchmarks")))
    benchmark = subprocess.Popen([sys.executable, str(script), str(file)])
    try:
        assert waited_for(lambda: file.exists() and file.read_text())
        assert is_running(file.read_text())
    finally:
        benchmark.send_signal(number)
        benchmark.wait()
    assert waited_for(lambda: not is_running(file.read_text()))


@pytest.fixture
def of_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_what_a_profile_times_exists(of_benchmarks):
    from transformer_models import profiled

    with profiled() as spent:
        pass
    assert not spent


def test_published_results_that_do_not_exist_are_named(of_benchmarks, tmp_path):
    from vnncomp import published

    with pytest.raises(SystemExit, match=r"none\.csv does not exist"):
        published(tmp_path / "none.csv")
