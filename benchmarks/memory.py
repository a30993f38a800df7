"""What the benchmarks' processes run with, and how much memory they have in use."""

from __future__ import annotations

import ctypes
import os
import threading
import time


def environment() -> dict[str, str]:
    """For a worker, whatever the mode: one thread, and memory that is given back.

    glibc gives blocks of 128 KiB to 32 MiB, the larger the longer a process runs, back to the
    system and takes new pages for the next tensor, which costs up to half of the time and differs
    from run to run; here blocks of up to 64 MiB are kept, as GPUs' allocators do. MKL keeps what
    products of some shape needed once (60 MiB of a transformer's, on every rank); here it does not,
    which is no slower.
    """
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
        "MALLOC_MMAP_THRESHOLD_": str(2**26), "MALLOC_TRIM_THRESHOLD_": str(2**30),
        "MKL_DISABLE_FAST_MM": "1",
    }


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of <malloc.h>."""

    _fields_ = [
        (name, ctypes.c_size_t) for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]


def in_use() -> float:
    """MiB that this process has allocated and not freed; its resident set without glibc 2.33."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return (found.uordblks + found.hblkhd) / 2**20


class PeakMemory:
    """The most that this process has in use, in MiB, seen by a thread every millisecond.

    Args:
        on_gpu: whether it is the GPU's memory that counts, as torch has allocated it.
    """

    def __init__(self, on_gpu: bool = False) -> None:
        self._gpu = None
        if on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self._gpu, self._allocated = torch.cuda, torch.cuda.memory_allocated()
            return
        self._before, self._most, self._stop = in_use(), 0.0, False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop:
            self._most = max(self._most, in_use())
            time.sleep(0.001)

    def stop(self) -> float:
        """The peak above what was in use at first."""
        if self._gpu is not None:
            return (self._gpu.max_memory_allocated() - self._allocated) / 2**20
        self._stop = True
        self._thread.join()
        return self._most - self._before
