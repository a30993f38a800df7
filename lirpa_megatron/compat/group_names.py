"""Process groups that only their own ranks make, under names that these agree on.

`torch.distributed.new_group(use_local_synchronization=True)` names a group by its ranks and by how
many groups the calling process is in. On the stages of a pipeline these numbers differ (Megatron's
embedding groups have the first and the last stage alone), so that ranks look for each other under
different names, and wait for ever.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

_made: Counter[tuple[int, ...]] = Counter()


def new_group(ranks: Sequence[int], backend: str) -> dist.ProcessGroup:
    """A further group of some ranks; all of them call it, as often and in the same order."""
    _made[tuple(ranks)] += 1
    said = f"lirpa_megatron {list(ranks)} {_made[tuple(ranks)]}"
    torchs_own = c10d._hash_ranks_to_str
    c10d._hash_ranks_to_str = lambda _: hashlib.sha1(said.encode()).hexdigest()
    try:
        return dist.new_group(ranks, backend=backend, use_local_synchronization=True)
    finally:
        c10d._hash_ranks_to_str = torchs_own
