#!/usr/bin/env bash
# megatron-core 0.16.1 (PyPI) with torch 2.13.0, two processes, gloo, CPU:
# `reduce_from_tensor_model_parallel_region` does not sum a tensor that is not contiguous.
#
# Each rank gives a tensor of ones; the sum over two ranks is 2. A contiguous tensor comes back as
# 2 (and the caller's own tensor is overwritten in place); its transpose comes back as 1, without a
# warning: a contiguous copy is reduced and dropped. The backward pass of
# `copy_to_tensor_model_parallel_region` goes through the same function, and autograd often hands it
# a gradient that is not contiguous: the gradient of x.sum() is an expanded number, so it is 1
# where the sum over ranks is 2, while (x * ones).sum() has the right one.
#
# Seen on each rank:
#   contiguous 2.0, input afterwards 2.0, transposed 1.0
#   gradient of (x * ones).sum() 2.0, of x.sum() 1.0
#
# Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy packaging megatron-core==0.16.1
cat >"$folder/ranks.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)

dist.init_process_group("gloo")
parallel_state.initialize_model_parallel(2)
x = torch.ones(3, 2)
total = reduce_from_tensor_model_parallel_region(x)
turned = reduce_from_tensor_model_parallel_region(torch.ones(2, 3).t())
gradients = []
for factor in (torch.ones(3, 2), None):
    leaf = torch.ones(3, 2, requires_grad=True)
    y = copy_to_tensor_model_parallel_region(leaf)
    (y.sum() if factor is None else (y * factor).sum()).backward()
    gradients.append(leaf.grad[0, 0].item())
if dist.get_rank() == 0:
    print(f"contiguous {total[0, 0]}, input afterwards {x[0, 0]}, transposed {turned[0, 0]}")
    print(f"gradient of (x * ones).sum() {gradients[0]}, of x.sum() {gradients[1]}")
seen = total.eq(2).all() and x.eq(2).all() and turned.eq(1).all() and gradients == [2.0, 1.0]
dist.destroy_process_group()
sys.exit(0 if seen else "changed: sums over ranks no longer depend on the memory layout")
PYTHON
"$folder/venv/bin/torchrun" --nproc-per-node 2 "$folder/ranks.py" 2>"$folder/errors" || {
    tail -n 5 "$folder/errors"
    exit 1
}
