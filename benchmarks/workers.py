"""The processes of benchmarks: every mode runs in some of its own, which end at a time limit."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory import environment as one_thread

_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of linux/prctl.h"""


def start(main: Callable[[], None], worker: Callable[[dict], Any]) -> None:
    """Runs a benchmark, or in a process that `launch` started its worker, and prints the result."""
    if "--worker" in sys.argv:
        print(json.dumps(worker(json.loads(sys.argv[-1]))), flush=True)
    else:
        main()


def printed(text: str) -> list[dict]:
    """The JSON objects in what ranks printed; two ranks may write into one line."""
    results, at, decoder = [], text.find("{"), json.JSONDecoder()
    while at >= 0:
        result, end = decoder.raw_decode(text, at)
        results.append(result)
        at = text.find("{", end)
    return results


def environment(auto_lirpa: str | None) -> dict[str, str]:
    """For a worker, with auto_LiRPA from a folder."""
    found = one_thread()
    if auto_lirpa and Path(auto_lirpa).is_dir():
        paths = [str(Path(auto_lirpa).resolve()), os.environ.get("PYTHONPATH")]
        found["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return found


def launch(script: str, task: dict, ranks: int, limit: float | None, auto_lirpa: str | None):
    """Runs `script --worker TASK` with some ranks; see `start`.

    Returns:
        The JSON object that each rank printed; None past the time limit in seconds.

    Raises:
        SystemExit: a rank failed, with the end of its messages.
    """
    command = [sys.executable, "-W", "ignore"]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [script, "--worker", json.dumps(task)]
    process = subprocess.Popen(
        command, env=environment(auto_lirpa), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True, preexec_fn=_end_with(os.getpid(), ranks > 1),
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM if ranks > 1 else signal.SIGKILL)
        process.communicate()
        return None
    results = printed(out)
    if process.returncode != 0 or len(results) != ranks:
        raise SystemExit(f"{task} failed:\n{err[-2000:]}")
    return results


def _end_with(parent: int, is_launcher: bool) -> Callable[[], None] | None:
    """For a new process: has it ended when its parent ends, however that happens; a launcher in a
    way that lets it end its ranks. Only Linux can."""
    if not sys.platform.startswith("linux"):
        return None
    libc, number = ctypes.CDLL(None), signal.SIGTERM if is_launcher else signal.SIGKILL

    def ask() -> None:
        libc.prctl(_PARENT_DEATH_SIGNAL, number)
        if os.getppid() != parent:  # it has ended in between
            os._exit(1)

    return ask


def result(script: str, task: dict, limit: float, auto_lirpa: str | None) -> Any:
    """What one process found, or an end of the benchmark that says that it took too long."""
    ranks = launch(script, task, 1, limit, auto_lirpa)
    if ranks is None:
        raise SystemExit(f"not done in {limit:g} seconds")
    return ranks[0]["result"]


def host_version(auto_lirpa: str | None) -> str:
    """The version of auto_LiRPA that workers will use."""
    code = "from lirpa_megatron.compat import auto_lirpa; print(auto_lirpa.VERSION)"
    command = [sys.executable, "-W", "ignore", "-c", code]
    out = subprocess.run(command, env=environment(auto_lirpa), capture_output=True, text=True)
    if out.returncode != 0:
        raise SystemExit(out.stderr[-2000:])
    return out.stdout.split()[-1]
