"""The network under test: sharded, with its bounds and its forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lirpa_megatron.adapters.parallelize import parallelize
from lirpa_megatron.adapters.traceable import traceable
from lirpa_megatron.bounded_module import BoundedModule
from lirpa_megatron.checkpoint.reader import load_network, read_description
from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.network import (
    DTYPES,
    INPUT,
    STORED_DTYPES,
    Network,
    NetworkDescription,
)
from lirpa_megatron.networks.normalisation import Normalisation, normalisation, outward, through
from lirpa_megatron.networks.onnx_import import read_onnx
from lirpa_megatron.verify.properties.property import OutputRow, Region

_HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Loaded:
    """A network ready to be verified; used for every property of the same file."""

    # structure and name
    description: NetworkDescription
    # differentiable forward pass of the sharded layers, x [R, n_in] -> y [R, n_out], replicated:
    # in the number types of the file; those of half precision in what bounds are computed in
    forward: nn.Module
    # an empty tensor with the dtype that bounds are computed in, and the device
    like: torch.Tensor
    # the network in the number types that it is stored in, for confirming a counterexample:
    # x [R, n_in] of any float type -> y [R, n_out]; `forward` itself where that is the same
    stored_forward: nn.Module
    # torch's name without "torch.", for instance "float16": the coarsest that the file computes in
    stored_dtype: str
    # in the types of the file, for `box`
    network: Network
    # its arithmetic at the input, which bounds do not go through but the box does
    normalisation: Normalisation | None
    # makes the bounded module of a part of the network, from `box` to a layer
    bounded_to: Callable[[str], BoundedModule]
    # makes the sharded network with its weights in a type, for computing in it
    build: Callable[[torch.dtype], nn.Module]

    @property
    def dtype(self) -> str:
        """What bounds are computed in, by torch's name without "torch."."""
        return str(self.like.dtype).removeprefix("torch.")

    @property
    def input_dtype(self) -> torch.dtype:
        """What the network as stored reads."""
        return STORED_DTYPES[self.description.input_dtype or self.description.dtype]

    @functools.cached_property
    def float64_forward(self) -> nn.Module:
        """The same weights, all computed in float64; every rank asks for it at the same time."""
        return traceable(self.build(torch.float64).requires_grad_(False).eval())

    def box(self, region: Region) -> tuple[torch.Tensor, torch.Tensor]:
        """x_L and x_U [1, n] of the input of `bounded`, which contain what the region's box does
        to it; for use with `bounded` alone.

        Raises:
            UserError: it overflows.
        """
        ends = through(self.network, self.normalisation, region.lower, region.upper)
        lower, upper = outward(*ends, self.like.dtype)
        return lower[None].to(self.like.device), upper[None].to(self.like.device)

    def bounded_for(self, rows: Sequence[OutputRow]) -> BoundedModule:
        """The bounded module whose outputs these rows are to be bounded on.

        Where the network ends in one softmax, a row that compares two outputs, Y_i - Y_j <= 0,
        says the same of what enters the softmax, where bounds are tighter; of the outputs of a
        LogSoftmax also Y_i - Y_j <= d does.
        """
        logarithm = self.description.layers[-1].op == "logsoftmax"
        if self._ends_in_softmax and all(_compares(row, any_bound=logarithm) for row in rows):
            return self._scores
        return self.bounded

    @functools.cached_property
    def bounded(self) -> BoundedModule:
        """Bounds of the outputs, from where `box` is."""
        return self.bounded_to(self.description.layers[-1].name)

    @functools.cached_property
    def _scores(self) -> BoundedModule:
        return self.bounded_to(self.description.layers[-1].inputs[0])

    @property
    def _ends_in_softmax(self) -> bool:
        last = self.description.layers[-1]
        return last.op in ("softmax", "logsoftmax") and last.attributes["size"] == last.n_out


def load(
    path: Path,
    is_checkpoint: bool,
    dtype: str | None,
    bound_opts: dict[str, Any],
    group: dist.ProcessGroup | None,
    output: str | None = None,
) -> Loaded:
    """Reads an ONNX file or a checkpoint and shards it over the group.

    Args:
        path: NET.onnx[.gz], or a checkpoint's directory.
        is_checkpoint: which of the two.
        dtype: a key of DTYPES; None: the least that holds what is stored.
        bound_opts: options of `BoundedModule`.
        group: the tensor-parallel group.
        output: which output of an ONNX graph; None: its only one.

    Raises:
        UserError: whatever is wrong with the file.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if _has_cuda() else "cpu"
    if is_checkpoint:
        description = read_description(path)

        def build(types: torch.dtype | None) -> Network:
            return load_network(path, group, types, device)[1]
    else:
        imported = read_onnx(path, output)
        description = imported.description

        def build(types: torch.dtype | None) -> Network:
            network = Network.from_weights(description, imported.weights, types)
            return parallelize(network, tp_group=group).to(device)

    computed = DTYPES[dtype or description.bounds_dtype]
    stored = build(None).requires_grad_(False).eval()
    same = description.computes_in_one_type and STORED_DTYPES[description.dtype] == computed
    network = stored if same else build(computed).requires_grad_(False).eval()
    like = torch.empty(0, dtype=computed, device=device)
    part = normalisation(description)
    reads = (INPUT,) if part is None else part.border

    def bounded_to(layer: str) -> BoundedModule:
        model = network.part(reads, layer)
        example = like.new_zeros(1, model.n_in)
        try:
            return BoundedModule(model, example, bound_opts=bound_opts, device=str(like.device))
        except NotImplementedError as error:
            raise UserError(f"network {description.name} cannot be bounded: {error}") from None

    stored_forward = traceable(stored)
    forward = traceable(network) if description.dtype in _HALF else stored_forward
    loaded = Loaded(
        description, forward, like, stored_forward, description.dtype, stored, part, bounded_to,
        build,
    )
    loaded.bounded_for(())  # what cannot be bounded is said now
    return loaded


def _compares(row: OutputRow, any_bound: bool) -> bool:
    """Whether a row is a (Y_i - Y_j) <= 0, or any number."""
    values = list(row.coefficients.values())
    return len(values) == 2 and sum(values) == 0 and (any_bound or row.bound == 0)


def _has_cuda() -> bool:
    # The CPU shim replaces functions of torch.cuda, not this one.
    return torch.cuda.is_available()
