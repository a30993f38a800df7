"""What kind of work takes a bound's time: products, memory, other ranks, Python."""

from __future__ import annotations

import contextlib
import functools
import time

PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::mv", "aten::addmv")
KINDS = ("products", "elementwise and copies", "communication", "Python and dispatch")


@contextlib.contextmanager
def by_kind():
    """Yields a dictionary, filled when the block ends: kind -> share of the block's wall time.

    By torch's profiler: matrix products; all other operators of tensors, which wait for memory;
    calls that exchange something with other ranks, or wait for them; and what is left. Where ranks
    share cores, waiting for a core counts for whatever waited.
    """
    import torch

    from lirpa_megatron.parallel import collectives, spmd

    spent, depth, shares = [0.0], [0], {}

    def timed(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            depth[0] += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1
                if depth[0] == 0:
                    spent[0] += time.perf_counter() - start

        return wrapper

    names = ("_gather_rows", "reduce_to_rows", "reduce_from", "gather_features", "largest")
    wrapped = [(collectives.Collectives, name) for name in (*names, "_begin")]
    wrapped += [(spmd.Announced, "wait"), (spmd, "poll"), (spmd, "check_replicated"),
                (spmd, "broadcast_tensor")]
    saved = [(owner, name, getattr(owner, name)) for owner, name in wrapped]
    for owner, name, function in saved:
        setattr(owner, name, timed(function))
    start = time.perf_counter()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            yield shares
    finally:
        wall = time.perf_counter() - start
        for owner, name, function in saved:
            setattr(owner, name, function)
    events = profile.key_averages()
    products = sum(e.self_cpu_time_total for e in events if e.key in PRODUCTS) / 1e6
    others = sum(e.self_cpu_time_total for e in events
                 if e.key.startswith("aten::") and e.key not in PRODUCTS) / 1e6
    wall = max(wall, products + others + spent[0])
    rest = wall - products - others - spent[0]
    shares |= dict(zip(KINDS, (x / wall for x in (products, others, spent[0], rest)), strict=True))


def table(shares: dict[str, dict[str, float]]) -> str:
    """A line for each entry: name -> kind -> share."""
    lines = [f"{'share of time':<20}" + "".join(f"{kind:>24}" for kind in KINDS)]
    for name, of_kinds in shares.items():
        lines.append(f"{name:<20}" + "".join(f"{100 * of_kinds[kind]:>23.0f}%" for kind in KINDS))
    return "\n".join(lines)
