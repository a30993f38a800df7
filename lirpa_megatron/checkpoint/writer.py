"""Writes a parallelized network as a Megatron checkpoint (torch_dist), which any TP size can read.

The checkpoint is written beside its final place and renamed when it is complete, so that a run
that is killed leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import nn

from lirpa_megatron.checkpoint.layout import COMMON, RELEASE, TRACKER
from lirpa_megatron.checkpoint.reader import NETWORK_KEY
from lirpa_megatron.checkpoint.sharding import block_of
from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.network import NetworkDescription
from lirpa_megatron.parallel import runtime, spmd


def check_output(out: Path, force: bool) -> None:
    """Raises UserError unless a checkpoint can be written to `out`."""
    if importlib.util.find_spec("psutil") is None:
        raise UserError("psutil is missing (Megatron's writer hangs without): pip install psutil")
    parent = out.parent
    if not parent.is_dir():
        raise UserError(f"cannot write {out}: folder {parent} does not exist")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {out}: no permission to write in {parent}")
    if not out.exists():
        return
    if not force:
        raise UserError(f"{out} exists already: choose another name, or give --force to replace it")
    if not (out / TRACKER).is_file():
        raise UserError(f"{out} exists and is not a checkpoint: --force replaces checkpoints only")


def save_network(
    description: NetworkDescription, model: nn.Module, out: Path, force: bool = False
) -> None:
    """Writes the checkpoint; every process calls this, and all are one tensor-parallel group.

    Args:
        description: what `model` was built from.
        model: the output of `parallelize`.
        out: directory to make.
        force: replace a checkpoint that is already there.

    Raises:
        UserError: `out` cannot be written or is there already.
    """
    save_checkpoint(out, force, _common_state(description), lambda: _sharded_state(model))


def save_checkpoint(
    out: Path, force: bool, common: dict[str, Any], sharded: Callable[[], dict[str, Any]],
    check: Callable[[Path], None] | None = None,
) -> None:
    """Writes a checkpoint; every process calls this, and all are one tensor-parallel group.

    Args:
        out: directory to make.
        force: replace a checkpoint that is already there.
        common: what is not a tensor.
        sharded: gives this rank's part of the tensors, as `dist_checkpointing.save` takes it.
        check: looks at the checkpoint where it is written first; if it raises, nothing is left.

    Raises:
        UserError: `out` cannot be written or is there already.
    """
    group = runtime.tp_group()
    if dist.get_world_size() != runtime.tp_size():
        raise UserError(
            f"writing a checkpoint takes one tensor-parallel group: start {runtime.tp_size()} "
            f"processes, not {dist.get_world_size()}"
        )
    with spmd.guard(group, "writing the checkpoint"):
        if runtime.is_rank0():
            check_output(out, force)
        out = Path(spmd.broadcast_object(str(out), group))
        with _incomplete_sibling(out) as temporary:
            directory = temporary / RELEASE
            if runtime.is_rank0():
                directory.mkdir()
            spmd.handshake(group, "the checkpoint's directory is there")
            with spmd.foreign_collectives(group):
                try:
                    dist_checkpointing.save(
                        common | sharded(), str(directory), ("torch_dist", 1)
                    )
                except OSError as error:
                    raise UserError(f"cannot write {out}: {error.strerror or error}") from None
            if runtime.is_rank0():
                # Releases from 0.19 on keep this elsewhere, where only they find it.
                if not (directory / COMMON).exists():
                    torch.save(common, directory / COMMON)
                (temporary / TRACKER).write_text(RELEASE + "\n", encoding="ascii")
            if check is not None:
                spmd.handshake(group, "the checkpoint is written")
                check(temporary)
                spmd.handshake(group, "the checkpoint is checked")
            if runtime.is_rank0():
                _move_into_place(temporary, out)


def _common_state(description: NetworkDescription) -> dict[str, Any]:
    """What is not a tensor; plain data, so that torch.load(weights_only=True) reads it."""
    return {"checkpoint_version": 3.0, "iteration": 0, NETWORK_KEY: description.to_plain()}


def _sharded_state(model: nn.Module) -> dict[str, ShardedTensor]:
    """Parameter name -> this rank's block; replicas on other ranks are not written."""
    tp_rank, tp_size = runtime.tp_rank(), runtime.tp_size()
    state = {}
    for name, parameter in model.named_parameters():
        dim = block_of(parameter, tp_rank, tp_size).partition_dim
        split = [] if dim is None else [(dim, tp_rank, tp_size)]
        replica = (0, tp_rank if dim is None else 0, 0)
        state[name] = ShardedTensor.from_rank_offsets(
            name, parameter.detach().contiguous(), *split, replica_id=replica
        )
    return state


@contextlib.contextmanager
def _incomplete_sibling(out: Path) -> Iterator[Path]:
    """A new directory beside `out`, gone at the end whatever happens; rank 0 makes and removes."""
    temporary = out.with_name(f".{out.name}.incomplete")
    if runtime.is_rank0():
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
        temporary.mkdir()
    try:
        yield temporary
    finally:
        if runtime.is_rank0():
            shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(temporary: Path, out: Path) -> None:
    if out.exists():
        replaced = out.with_name(f".{out.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
        temporary.rename(out)
        shutil.rmtree(replaced)
    else:
        temporary.rename(out)
