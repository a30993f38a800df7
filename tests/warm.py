"""What a process does once, however many bounds follow: done before ranks are forked.

Tables of tangent points, torch's lists of what can be overridden, modules that are imported late.
"""

from __future__ import annotations

import torch
from network_cases import NETS, Case, sharded_bounds


def up() -> None:
    """Bounds of a small network; without threads, which a forked process would not have."""
    torch.set_num_threads(1)
    before = torch.get_rng_state()
    for dtype in (torch.float64, torch.float32):
        sharded_bounds(NETS["mixed"], [Case("CROWN", True)], dtype)
    torch.set_default_dtype(torch.float32)
    torch.set_rng_state(before)
