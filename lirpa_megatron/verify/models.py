"""The network under test: sharded, with its bounds and its forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lirpa_megatron.adapters.parallelize import parallelize
from lirpa_megatron.adapters.traceable import traceable
from lirpa_megatron.bounded_module import BoundedModule
from lirpa_megatron.checkpoint.reader import load_network
from lirpa_megatron.networks.network import DTYPES, Network, NetworkDescription
from lirpa_megatron.networks.onnx_import import read_onnx
from lirpa_megatron.verify.property import OutputRow, Region
from lirpa_megatron.verify.specification import outward_box


@dataclass(frozen=True)
class Loaded:
    """A network ready to be verified; used for every property of the same file."""

    # structure and name
    description: NetworkDescription
    # differentiable forward pass of the sharded layers, x [R, n_in] -> y [R, n_out], replicated
    forward: nn.Module
    # bounds of the same layers
    bounded: BoundedModule
    # an empty tensor with the dtype that bounds are computed in, and the device
    like: torch.Tensor
    # the network in the number types that it is stored in, for confirming a counterexample:
    # x [R, n_in] of any float type -> y [R, n_out]; `forward` itself where that is the same
    stored_forward: nn.Module
    # torch's name without "torch.", for instance "float16"
    stored_dtype: str

    @property
    def dtype(self) -> str:
        """What bounds are computed in, by torch's name without "torch."."""
        return str(self.like.dtype).removeprefix("torch.")

    def box(self, region: Region) -> tuple[torch.Tensor, torch.Tensor]:
        """x_L and x_U [1, n] of the input of `bounded`, which contain what the region's box does
        to it; for use with `bounded` alone."""
        return outward_box(region, self.like.dtype, self.like.device)

    def bounded_for(self, rows: Sequence[OutputRow]) -> BoundedModule:
        """The bounded module whose outputs these rows are to be bounded on."""
        return self.bounded


def load(
    path: Path,
    is_checkpoint: bool,
    dtype: str | None,
    bound_opts: dict[str, Any],
    group: dist.ProcessGroup | None,
) -> Loaded:
    """Reads an ONNX file or a checkpoint and shards it over the group.

    Args:
        path: NET.onnx[.gz], or a checkpoint's directory.
        is_checkpoint: which of the two.
        dtype: a key of DTYPES; None: what is stored.
        bound_opts: options of `BoundedModule`.
        group: the tensor-parallel group.

    Raises:
        UserError: whatever is wrong with the file.
    """
    torch_dtype = None if dtype is None else DTYPES[dtype]
    device = torch.device("cuda", torch.cuda.current_device()) if _has_cuda() else "cpu"
    if is_checkpoint:
        description, model = load_network(path, group, torch_dtype, device)
    else:
        imported = read_onnx(path)
        description = imported.description
        network = Network.from_weights(description, imported.weights)
        model = parallelize(network.to(dtype=torch_dtype), tp_group=group).to(device)
    model.requires_grad_(False).eval()
    parameter = next(model.parameters())
    like = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    example = like.new_zeros(1, description.n_in)
    bounded = BoundedModule(model, example, bound_opts=bound_opts, device=str(like.device))
    forward = traceable(model)
    return Loaded(description, forward, bounded, like, forward, description.dtype)


def _has_cuda() -> bool:
    # The CPU shim replaces functions of torch.cuda, not this one.
    return torch.cuda.is_available()
