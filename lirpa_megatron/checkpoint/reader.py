"""A network from a Megatron checkpoint that may come from a stranger, at any tensor-parallel size.

Megatron's own `dist_checkpointing.load` is not used: it unpickles what the files say. Here
`.metadata` goes through a restricted unpickler, `common.pt` through torch.load with
weights_only=True, and each rank reads its own block of each tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lirpa_megatron.adapters.parallelize import parallelize
from lirpa_megatron.checkpoint.inert import read_inert
from lirpa_megatron.checkpoint.layout import COMMON, data_directory
from lirpa_megatron.checkpoint.sharding import block_of
from lirpa_megatron.checkpoint.tensors import TensorFile
from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.network import Network, NetworkDescription

NETWORK_KEY = "network"


def read_description(checkpoint: str | Path) -> NetworkDescription:
    """The network that a checkpoint holds, without its weights.

    Raises:
        UserError: not a checkpoint, damaged, hostile, or not one of a network.
    """
    directory = data_directory(Path(checkpoint))
    common = _read_common(directory / COMMON)
    try:
        return NetworkDescription.from_plain(common.get(NETWORK_KEY))
    except UserError as error:
        raise UserError(f"checkpoint {checkpoint}: {error}") from None


def load_network(
    checkpoint: str | Path,
    group: dist.ProcessGroup | None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[NetworkDescription, nn.Module]:
    """Builds the network from its description and reads this rank's shard of its weights.

    Every rank of the group calls this; there are no collectives.

    Args:
        checkpoint: the directory with the tracker file.
        group: the tensor-parallel group (None: one rank).
        dtype: of the parameters; None: the stored one.
        device: of the parameters.

    Returns:
        the description, and a module x [B, n_in] -> y [B, n_out] of parallel layers, frozen.

    Raises:
        UserError: as `read_description`; a tensor that is missing, of another shape, or not finite.
    """
    description = read_description(checkpoint)
    tensors = TensorFile(data_directory(Path(checkpoint)))
    _check_shapes(description, tensors, checkpoint)
    with torch.device("meta"):
        network = Network(description, dtype)
    model = parallelize(network, tp_group=group)
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    for name, parameter in dict(model.named_parameters()).items():
        block = block_of(parameter, rank, size)
        value = tensors.read(name, block.offsets, block.sizes, parameter.dtype)
        _replace_parameter(model, name, value.to(device))
    return description, model


def _check_shapes(description: NetworkDescription, tensors: TensorFile, checkpoint: Any) -> None:
    for name, expected in description.weight_shapes().items():
        found = tensors.shape(name)
        if found is None:
            raise UserError(f"checkpoint {checkpoint} has no tensor {name}")
        if found != expected:
            raise UserError(
                f"tensor {name} of checkpoint {checkpoint} has shape {list(found)}, "
                f"its network needs {list(expected)}"
            )


def _replace_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Puts a value where the parameter was on the meta device, with the same attributes."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    attributes = vars(getattr(owner, attribute))
    parameter = nn.Parameter(value, requires_grad=False)
    vars(parameter).update(attributes)
    setattr(owner, attribute, parameter)


def _read_common(path: Path) -> dict[str, Any]:
    """The content of `common.pt`; nothing in it is run."""
    common = read_inert(path, str(path))
    if not isinstance(common, dict):
        raise UserError(f"checkpoint file {path} is corrupt (it holds no dictionary)")
    return common
