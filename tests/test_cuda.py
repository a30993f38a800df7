"""On a GPU: the bounds of the CPU, by one rank (NCCL) and by two that share the GPU (gloo).

NCCL takes one rank for each GPU. Two ranks on one GPU talk through gloo, which runs all of the code
for CUDA tensors but NCCL's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import transformers
from models import drawn

from lirpa_megatron import (
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    at_position,
    bert_head,
    parallelize,
    perturb_tokens,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ROOT = Path(__file__).resolve().parents[1]
NETS = ("mlp", "gpt", "llama", "bert")
METHODS = ("IBP", "CROWN-IBP", "CROWN", "CROWN-Optimized")
OPTIONS = {"optimize_bound_args": {"iteration": 3, "lr_alpha": 0.1}}


def _mlp():
    net = torch.nn.Sequential(
        torch.nn.Linear(12, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16), torch.nn.ReLU(),
        torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3),
    ).double()
    for i, parameter in enumerate(net.parameters()):
        parameter.data = drawn(*parameter.shape, seed=i, scale=0.4)
    return parallelize(net)


def _bounds(name, device, options=OPTIONS):
    """method -> (lower, upper) on the CPU, of a net in float64 on the device."""
    if name == "mlp":
        net, x = _mlp().to(device), drawn(2, 12, seed=9).to(device)
        inputs = (BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=0.05)),)
    else:
        ids, _, padding, types = (x.to(device) for x in transformers.tokens())
        further = {"attention_mask": padding, "tokentype_ids": types} if name == "bert" else {}
        model = getattr(transformers, name)(torch.float64).to(device)
        net = bert_head(model, "binary") if name == "bert" else at_position(model, -1)
        inputs = perturb_tokens(net.eval(), ids, eps=0.003, **further)
    bounded = BoundedModule(net, inputs, bound_opts=options)
    found = {}
    for method in METHODS:
        with torch.set_grad_enabled(method == "CROWN-Optimized"):
            pair = bounded.compute_bounds(inputs, method=method)
        assert all(b.device.type == torch.device(device).type for b in pair)
        found[method] = [b.detach().cpu() for b in pair]
    return found


def _compare(expected, found):
    for method, (lower, upper) in expected.items():
        width = upper - lower
        assert torch.isfinite(width).all()
        for a, b in zip((lower, upper), found[method], strict=True):
            # On alpha's optimiser see docs/limits.md.
            tolerance = 1e-4 if method == "CROWN-Optimized" else 1e-10
            assert ((a - b).abs() <= tolerance * width + 1e-13).all(), method


@pytest.fixture(scope="module")
def on_cpu():
    """name -> bounds found on the CPU, by a process that has no GPU."""
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[1])\n"
        "import test_cuda\n"
        "from lirpa_megatron.parallel import runtime\n"
        "with runtime.session():\n"
        "    torch.save({n: test_cuda._bounds(n, 'cpu') for n in test_cuda.NETS}, sys.argv[2])\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bounds.pt"
        subprocess.run(
            [sys.executable, "-c", program, str(ROOT / "tests"), str(path)], check=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, cwd=ROOT,
        )
        return torch.load(path)


def test_one_rank_with_nccl_finds_the_bounds_of_the_cpu(on_cpu):
    from lirpa_megatron.parallel import runtime

    with runtime.session():
        assert torch.distributed.get_backend(runtime.tp_group()) == "nccl"
        for name in NETS:
            _compare(on_cpu[name], _bounds(name, "cuda"))


def _rank(rank, size, folder):
    """One of the ranks that share the GPU: writes what it found."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from lirpa_megatron.operators.tuning import Tuning

    torch.cuda.set_device(0)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size,
        timeout=timedelta(seconds=120),
    )
    parallel_state.initialize_model_parallel(size)
    found = {name: _bounds(name, "cuda") for name in NETS}
    tuning = Tuning(turn={"cuda": 2})  # two chunks take turns
    turns = {**OPTIONS, "tuning": tuning, "max_spec_rows": 12, "moves": "A"}
    found |= {f"{name} in turns": _bounds(name, "cuda", turns) for name in ("mlp", "gpt")}
    torch.save(found, f"{folder}/rank{rank}.pt")
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_two_ranks_on_one_gpu_find_the_bounds_of_the_cpu(on_cpu):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(2, folder), nprocs=2)
        ranks = [torch.load(f"{folder}/rank{rank}.pt") for rank in range(2)]
    for found in ranks:
        for name, bounds in found.items():
            _compare(on_cpu[name.split()[0]], bounds)
    for name, bounds in ranks[0].items():
        for method, pair in bounds.items():
            for a, b in zip(pair, ranks[1][name][method], strict=True):
                assert torch.equal(a, b), (name, method)


def _verified(folder, device):
    """The command line's results for the digits, by property."""
    output = Path(folder) / f"{device}.jsonl"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m",
        "lirpa_megatron", "verify", "--onnx", "examples/digits/digits.onnx",
        "--instances", "examples/digits/instances.csv", "--output", str(output),
    ]
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        command, env={**os.environ, **hidden}, cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    results = [json.loads(line) for line in output.read_text().splitlines()]
    return {result["property"]: result for result in results}


def test_the_command_line_gives_the_same_verdicts_on_both(tmp_path):
    expected, found = _verified(tmp_path, "cpu"), _verified(tmp_path, "cuda")
    assert expected.keys() == found.keys() and len(found) == 15
    for name, result in expected.items():
        assert result["result"] == found[name]["result"]
        for a, b in zip(result["lower_bounds"], found[name]["lower_bounds"], strict=True):
            assert abs(a - b) <= 1e-4 * max(1, abs(a))
