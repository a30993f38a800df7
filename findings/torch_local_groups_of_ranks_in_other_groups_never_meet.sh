#!/usr/bin/env bash
# torch 2.13.0 (PyPI), Python 3.11, gloo on a CPU: two ranks that make the same group with
# `new_group(ranks, use_local_synchronization=True)` do not find each other if one of them is in more
# groups than the other.
#
# Such a group is to be made by its own ranks alone, so that ranks of other groups need not call. But
# its name, under which the ranks meet in the store, is made from the ranks and from how many groups
# the calling process is in. Where these numbers differ, as on the first and last stage of
# a pipeline, which have groups of their own, each waits under a name that the other never uses, and
# both end with an error when the timeout (default: half an hour) is over. With
# use_local_synchronization=False, which all ranks of the world have to call, the group is made.
#
# Seen:
#   the same number of groups:   made, made
#   rank 0 has one more:         timeout, timeout
#
# Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/ranks.py" <<'PYTHON'
import datetime
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = datetime.timedelta(seconds=8)


def run(rank, folder, more, results):
    dist.init_process_group(
        "gloo", rank=rank, world_size=2, init_method=f"file://{folder}/store{more}", timeout=LIMIT
    )
    if more and rank == 0:
        dist.new_group([0], use_local_synchronization=True, timeout=LIMIT)
    try:
        group = dist.new_group([0, 1], use_local_synchronization=True, timeout=LIMIT)
        x = torch.ones(1)
        dist.all_reduce(x, group=group)
        results[rank] = "made" if x.item() == 2 else "wrong"
    except Exception as error:
        results[rank] = "timeout" if "time" in str(error).lower() else repr(error)


if __name__ == "__main__":
    seen = []
    for more in (0, 1):
        with mp.Manager() as manager:
            results = manager.dict()
            mp.spawn(run, (sys.argv[1], more, results), nprocs=2)
            seen.append((results[0], results[1]))
    for text, pair in zip(("the same number of groups:", "rank 0 has one more:"), seen):
        print(f"{text:<28} {', '.join(pair)}")
    sys.exit(seen != [("made", "made"), ("timeout", "timeout")])
PYTHON
"$folder/venv/bin/python" "$folder/ranks.py" "$folder" 2>"$folder/errors" \
    || { tail -n 5 "$folder/errors"; exit 1; }
