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
from lirpa_megatron.checkpoint.layout import data_directory
from lirpa_megatron.checkpoint.legacy import is_legacy
from lirpa_megatron.checkpoint.nemo import is_nemo
from lirpa_megatron.checkpoint.sharding import block_of
from lirpa_megatron.checkpoint.tensors import TensorFile
from lirpa_megatron.checkpoint.torch_dist import TorchDistWeights
from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.network import Network, NetworkDescription

NETWORK_KEY = "network"


def holds_network(directory: Path) -> bool:
    """Whether a data directory (`release` or `iter_*`) holds a network that import-onnx wrote.

    Raises:
        UserError: damaged or hostile.
    """
    if is_legacy(directory) or is_nemo(directory):
        return False
    return NETWORK_KEY in TorchDistWeights(directory).common()


def read_description(
    checkpoint: str | Path, iteration: int | str | None = None
) -> NetworkDescription:
    """The network that a checkpoint holds, without its weights.

    Args:
        checkpoint: the directory with the tracker file.
        iteration: its number, or "release"; None: what the tracker names.

    Raises:
        UserError: not a checkpoint, damaged, hostile, or not one of a network.
    """
    directory = data_directory(Path(checkpoint), iteration)
    if is_legacy(directory) or is_nemo(directory):
        raise _not_a_network(checkpoint)
    common = TorchDistWeights(directory).common()
    if NETWORK_KEY not in common:
        raise _not_a_network(checkpoint)
    try:
        return NetworkDescription.from_plain(common[NETWORK_KEY])
    except UserError as error:
        raise UserError(f"checkpoint {checkpoint}: {error}") from None


def _not_a_network(checkpoint: str | Path) -> UserError:
    return UserError(
        f"checkpoint {checkpoint} does not hold a network that import-onnx wrote, but a model of "
        "Megatron-LM: `lirpa-megatron inspect` says which, load_language_model loads it"
    )


def load_network(
    checkpoint: str | Path,
    group: dist.ProcessGroup | None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    stage: NetworkDescription | None = None,
) -> tuple[NetworkDescription, nn.Module]:
    """Builds the network from its description and reads this rank's shard of its weights.

    Every rank of the group calls this; there are no collectives.

    Args:
        checkpoint: the directory with the tracker file.
        group: the tensor-parallel group (None: one rank).
        dtype: what all is computed in; None: the types of the file, layer by layer (`Network`).
        device: of the parameters.
        stage: a pipeline stage of the checkpoint's network (`networks.stages`), whose weights alone
            are read; None: the whole network.

    Returns:
        its description, and a module x [B, n_in] -> y [B, n_out] of parallel layers, frozen.

    Raises:
        UserError: as `read_description`; a tensor that is missing, of another shape, or not finite.
    """
    description = read_description(checkpoint) if stage is None else stage
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
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
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
