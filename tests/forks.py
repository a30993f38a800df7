"""New processes for tests in milliseconds, forked from one that has imported the libraries.

Torch, megatron-core and auto_LiRPA take seconds of processor time to import. Two such parents
serve a test run and all its workers, one for rank 0 and one for all other ranks: each has a hash
seed of its own, so that the order of sets differs between ranks as it does under torchrun.

Run as a program, this file is a parent: it listens at the address given, and for each task
(an address, a key, a function and its arguments) it forks a child that connects to that address and
calls the function with its end of the connection. It ends when nobody is connected any more.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import current_process
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any, NoReturn

IMPORTED = (
    "torch.distributed.checkpoint", "megatron.core.models.gpt", "megatron.core.models.bert",
    "megatron.core.dist_checkpointing", "lirpa_megatron.cli.commands",
    "lirpa_megatron.bounded_module", "lirpa_megatron.checkpoint.language_model",
    "lirpa_megatron.verify.properties.job", "lirpa_megatron.verify.sentences.job",
    "lirpa_megatron.networks.onnx_import", "lirpa_megatron.training", "hypothesis",
)


_cores = os.sched_getaffinity(0)
"""Of the whole test run."""


def share_cores() -> None:
    """Makes switching between ranks cheaper, for this process and all that it starts.

    A collective of small tensors is a dozen switches between threads. Under SCHED_BATCH a thread
    that wakes another runs on until it waits itself, which saves a third of them; and the ranks of
    a pytest-xdist worker stay on its own share of the cores, near each other's caches.
    """
    with contextlib.suppress(PermissionError):  # some containers forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    own = sorted(_cores)[int(worker) :: int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))]
    os.sched_setaffinity(0, own or _cores)


@dataclass
class Child:
    """A process and this end of the connection to it."""

    pid: int
    pipe: Connection

    @property
    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        if self.alive:
            os.kill(self.pid, signal.SIGKILL)


class Parent:
    """A process that has imported the libraries and forks; the first worker to need it starts it.

    Args:
        address: of its socket, the same for all workers.
    """

    def __init__(self, address: Path) -> None:
        self.folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)
        self.count = 0
        with address.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self.pipe = Client(str(address), "AF_UNIX")
            except OSError:  # nobody listens, or not any more
                address.unlink(missing_ok=True)
                self._start(address)
                self.pipe = Client(str(address), "AF_UNIX")

    def _start(self, address: Path) -> None:
        process = subprocess.Popen(
            [sys.executable, __file__, str(address)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        os.sched_setaffinity(process.pid, _cores)  # it serves all workers
        while not address.exists():
            if process.poll() is not None:
                raise RuntimeError(f"tests/forks.py ended with status {process.returncode}")
            time.sleep(0.01)

    def fork(self, function: Callable, *args: Any) -> Child:
        """A new process that calls `function(pipe, *args)`, and the other end of its pipe."""
        self.count += 1
        key = bytes(current_process().authkey)  # torch shares tensors with those who know it
        with Listener(str(self.folder / str(self.count)), "AF_UNIX") as listener:
            call = pickle.dumps((function, args))
            self.pipe.send((listener.address, key, os.sched_getaffinity(0), call))
            return Child(self.pipe.recv(), listener.accept())


@functools.cache
def _folder() -> Path:
    """Of the parents' sockets: one for all workers of a test run."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        return Path(tempfile.mkdtemp())
    folder = Path(tempfile.gettempdir()) / f"forks-{run}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@functools.cache
def _parent(number: int) -> Parent:
    return Parent(_folder() / f"parent-{number}")


def fork(rank: int, function: Callable, *args: Any) -> Child:
    """A new process for a rank; see `Parent.fork`."""
    return _parent(min(rank, 1)).fork(function, *args)


@dataclass
class Ended:
    """What processes that ran to their end left."""

    returncode: int
    """0 if all are, else that of one that failed."""
    stdout: str
    """Of all ranks, in their order."""
    stderr: str


def launch(size: int, function: Callable, *args: Any, timeout: float = 300.0) -> Ended:
    """Calls a function in new processes that see torchrun's variables, as torchrun's do.

    For what is not about torchrun itself, whose processes import everything anew.

    Args:
        size: number of processes; 1 is a plain process, without the variables.
        function: its result is the exit status if it is an integer.
        timeout: in seconds, after which all are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    children = []
    for rank in range(size):
        of_rank = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(of_rank if size > 1 else {})}
        children.append(fork(rank, _launched, variables, os.getcwd(), function, args))
    end = time.monotonic() + timeout
    said = []
    for rank, child in enumerate(children):
        try:
            if not wait([child.pipe], max(0.0, end - time.monotonic())):
                raise TimeoutError(f"rank {rank} did not end in {timeout} s")
            said.append(child.pipe.recv())
        except (EOFError, TimeoutError) as error:
            for each in children:
                each.kill()
            said.append((-9, "", f"rank {rank}: {error!r}\n"))
    statuses = [status for status, _, _ in said]
    return Ended(next((s for s in statuses if s), 0), "".join(s[1] for s in said),
                 "".join(s[2] for s in said))


def _launched(
    pipe: Connection, variables: dict[str, str], folder: str, function: Callable, args: tuple
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    files = [tempfile.TemporaryFile() for _ in range(2)]  # also what other languages write
    for number, file in enumerate(files, 1):
        os.dup2(file.fileno(), number)
    try:
        result = function(*args)
        status = result if isinstance(result, int) else 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read().decode())
    pipe.send((status, *texts))


def _be_a_parent(address: Path) -> None:
    gc.disable()  # it would go through all that is imported, again and again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core's, on optional packages
        for name in IMPORTED:
            importlib.import_module(name)
        importlib.import_module("warm").up()
    gc.collect()
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children leave nothing behind
    with socket.socket(socket.AF_UNIX) as server:
        hidden = address.with_suffix(".bound")
        server.bind(str(hidden))
        server.listen()
        hidden.rename(address)  # found only now, when it answers
        workers: list[Connection] = []
        while True:
            for ready in wait([server, *workers]):
                if ready is server:
                    workers.append(Connection(server.accept()[0].detach()))
                    continue
                try:
                    task = ready.recv()
                except EOFError:
                    workers.remove(ready)
                    continue
                pid = os.fork()
                if not pid:
                    for inherited in (server, *workers):
                        inherited.close()
                    _be_a_child(*task)
                ready.send(pid)
            if not workers:
                break
    with contextlib.suppress(OSError):  # a worker may be about to start another one
        address.unlink()
        address.with_suffix(".lock").unlink()
        address.parent.rmdir()


def _be_a_child(where: str, key: bytes, cores: set[int], call: bytes) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.sched_setaffinity(0, cores)
    current_process().authkey = key
    random.seed()
    with Client(where, "AF_UNIX") as own:
        try:
            function, args = pickle.loads(call)  # imports the module of the function
            function(own, *args)
        except BaseException:
            traceback.print_exc()
    os._exit(0)


if __name__ == "__main__":
    _be_a_parent(Path(sys.argv[1]))
