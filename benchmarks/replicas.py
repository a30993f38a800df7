"""Branch and bound by one process, by several replicas and by shards: processor and wall time.

    python benchmarks/replicas.py INSTANCES.csv [--timeout S]
    torchrun --nproc-per-node 2 benchmarks/replicas.py INSTANCES.csv [--tensor-parallel-size 2]

Each instance of the list (NETWORK,PROPERTY,SECONDS; relative to it) is decided as by `verify
--complete` with CROWN-Optimized before it. Prints the result, wall seconds, processor seconds of
all ranks together, and domains; without the time that processes need to start and to read files.
With --timeout the limit is in processor seconds of rank 0, so that other work on the machine does
not count; else it is the list's, by the clock.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist

from lirpa_megatron.parallel import runtime, spmd
from lirpa_megatron.parallel.model_ranks import ModelRanks
from lirpa_megatron.verify.properties.job import Runner
from lirpa_megatron.verify.properties.job_plan import plan_job
from lirpa_megatron.verify.properties.options import VerifyOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("instances", type=Path)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--timeout", type=float)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    runtime.initialize(tensor_parallel_size=arguments.tensor_parallel_size)
    clock = time.monotonic
    if arguments.timeout is not None:
        time.monotonic = time.process_time
    options = VerifyOptions(
        method="CROWN-Optimized", complete=True, timeout=arguments.timeout
    )
    plan = plan_job({"instances": arguments.instances}, options)
    runner = Runner(options, ModelRanks.of_megatron())
    print_rank0(f"{dist.get_world_size()} processes, TP={arguments.tensor_parallel_size}")
    print_rank0("| instance | result | wall (s) | processors (s) | domains | of inner neurons |")
    for instance in plan.instances:
        runner.prepare(instance)
        spmd.gather_objects(None, dist.group.WORLD)
        wall, own = clock(), time.process_time()
        (result,) = runner.run([instance], lambda result: None)
        wall = clock() - wall
        each = spmd.gather_objects(time.process_time() - own, dist.group.WORLD)
        print_rank0(
            f"| {result.network} {result.property} | {result.result} | {wall:.1f} | "
            f"{sum(each):.1f} = {' + '.join(f'{seconds:.1f}' for seconds in each)} | "
            f"{result.domains} | {result.inner_domains} |{result.error or ''}"
        )


def print_rank0(line: str) -> None:
    if runtime.is_rank0():
        print(line, flush=True)


if __name__ == "__main__":
    main()
