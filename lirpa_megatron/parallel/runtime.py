"""Process groups for the command line and the examples: torchrun, or a plain python process."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from lirpa_megatron.compat import gloo, megatron_cpu
from lirpa_megatron.errors import UserError


@gloo.one_device()
def initialize(
    tensor_parallel_size: int | None = None, timeout: timedelta = timedelta(minutes=30),
    pipeline_parallel_size: int = 1,
) -> None:
    """Sets up torch.distributed and Megatron's parallel_state; installs the CPU shim.

    Under torchrun all processes take part (NCCL with CUDA, otherwise gloo). A plain python process
    is one rank and needs no launcher. Anything already initialised is left alone. On a CPU,
    `shutdown` is called automatically when the program ends.

    Args:
        tensor_parallel_size: ranks of each stage of a model; all processes by default, divided by
            the number of stages. The remaining processes are data-parallel replicas.
        timeout: time after which a collective fails if a peer never enters it.
        pipeline_parallel_size: stages of a model.

    Raises:
        UserError: the sizes do not divide the number of processes (both numbers).
    """
    cuda = torch.cuda.is_available()
    if not cuda:
        megatron_cpu.install()
    if not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl" if cuda else "gloo"
        if not cuda:
            # An interpreter that ends with gloo's threads still there now and then aborts.
            atexit.register(shutdown)
        if "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    if parallel_state.model_parallel_is_initialized():
        return
    world = dist.get_world_size()
    stages = pipeline_parallel_size
    if stages < 1 or world % stages != 0:
        raise UserError(
            f"pipeline-parallel size {stages} does not divide the number of processes {world}: "
            f"start a multiple of {max(stages, 1)} processes (torchrun --nproc-per-node) or choose "
            "another size"
        )
    size = world // stages if tensor_parallel_size is None else tensor_parallel_size
    if stages > 1 and (size < 1 or world % (size * stages) != 0):
        raise UserError(
            f"tensor-parallel size {size} x pipeline-parallel size {stages} does not divide the "
            f"number of processes {world}: start a multiple of {max(size, 1) * stages} processes "
            "(torchrun --nproc-per-node) or choose other sizes"
        )
    if size < 1 or world % size != 0:
        raise UserError(
            f"tensor-parallel size {size} does not divide the number of processes {world}: start "
            f"a multiple of {max(size, 1)} processes (torchrun --nproc-per-node) or choose "
            "another size"
        )
    parallel_state.initialize_model_parallel(size, stages)


def shutdown() -> None:
    """Takes down what `initialize` set up."""
    atexit.unregister(shutdown)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    megatron_cpu.uninstall()


@contextlib.contextmanager
def session(
    tensor_parallel_size: int | None = None, pipeline_parallel_size: int = 1
) -> Iterator[None]:
    """`initialize` for a block, `shutdown` after it."""
    initialize(tensor_parallel_size, pipeline_parallel_size=pipeline_parallel_size)
    try:
        yield
    finally:
        shutdown()


def tp_group() -> dist.ProcessGroup | None:
    """Megatron's tensor-parallel group; None when parallel_state is not initialised."""
    if not parallel_state.model_parallel_is_initialized():
        return None
    return parallel_state.get_tensor_model_parallel_group()


def tp_size() -> int:
    """Number of tensor-parallel ranks (1 when nothing is initialised)."""
    group = tp_group()
    return 1 if group is None else group.size()


def tp_rank() -> int:
    """This process's tensor-parallel rank (0 when nothing is initialised)."""
    group = tp_group()
    return 0 if group is None else group.rank()


def pp_size() -> int:
    """Number of pipeline stages (1 when nothing is initialised)."""
    if not parallel_state.model_parallel_is_initialized():
        return 1
    return parallel_state.get_pipeline_model_parallel_world_size()


def pp_rank() -> int:
    """This process's pipeline stage (0 when nothing is initialised)."""
    if not parallel_state.model_parallel_is_initialized():
        return 0
    return parallel_state.get_pipeline_model_parallel_rank()


def dp_rank() -> int:
    """The replica that this process belongs to (0 when nothing is initialised)."""
    if not parallel_state.model_parallel_is_initialized():
        return 0
    return parallel_state.get_data_parallel_rank()


def is_rank0() -> bool:
    """Whether this process is the one of all that talks to the user."""
    return not dist.is_initialized() or dist.get_rank() == 0
