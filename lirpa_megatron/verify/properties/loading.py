"""The network under test: sharded, with its bounds and its forward pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lirpa_megatron.adapters.parallel_plan import plan_layers
from lirpa_megatron.adapters.parallelize import parallelize
from lirpa_megatron.adapters.stages import PipelineStage
from lirpa_megatron.adapters.traceable import traceable
from lirpa_megatron.bounded_module import BoundedModule
from lirpa_megatron.checkpoint.reader import load_network
from lirpa_megatron.checkpoint.stage import split_layers
from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.network import (
    DTYPES,
    INPUT,
    STORED_DTYPES,
    Network,
    NetworkDescription,
)
from lirpa_megatron.networks.normalisation import Normalisation, normalisation, outward, through
from lirpa_megatron.networks.stages import parts_of, stage_of, width_of
from lirpa_megatron.networks.wiring import Wiring, wired, wired_network
from lirpa_megatron.parallel.model_ranks import ALONE, ModelRanks
from lirpa_megatron.parallel.stage_forward import StagedForward, from_first_stage
from lirpa_megatron.verify.properties.property import OutputRow, Region
from lirpa_megatron.verify.properties.sources import Source, read_source

_HALF = ("float16", "bfloat16")


@dataclass(frozen=True)
class Loaded:
    """A network ready to be verified; used for every property of the same file.

    Over pipeline stages, each has the layers of its own; functions and bounds are of the whole
    network, and every rank calls them alike.
    """

    # structure and name, of the whole network
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
    # this stage's, in the types of the file, for `box`
    network: Network
    # its arithmetic at the input, which bounds do not go through but the box does
    normalisation: Normalisation | None
    # makes the bounded module of a part of the network, from `box` to a layer
    bounded_to: Callable[[str], BoundedModule]
    # makes the sharded network's forward with its weights in a type, for computing in it
    forward_in: Callable[[torch.dtype], nn.Module]
    # that hold the network
    ranks: ModelRanks = ALONE
    # share of the linear layers' weights that tensor parallelism splits; None without it
    sharded_share: float | None = None

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
        return self.forward_in(torch.float64)

    def box(self, region: Region) -> tuple[torch.Tensor, torch.Tensor]:
        """x_L and x_U [1, n] of the input of `bounded`, which contain what the region's box does
        to it; for use with `bounded` alone.

        Raises:
            UserError: it overflows.
        """
        pipeline, ends = self.ranks.pipeline, None
        if pipeline is None or pipeline.is_first:
            both = through(self.network, self.normalisation, region.lower, region.upper)
            ends = torch.stack(outward(*both, self.like.dtype)).to(self.like.device)
        lower, upper = from_first_stage(pipeline, "the box", ends)
        return lower[None], upper[None]

    def image(self, point: np.ndarray) -> torch.Tensor:
        """Where the normalisation takes an input [n_in]: [n] float64, on the CPU; needs all of the
        network in one stage.
        """
        return through(self.network, self.normalisation, point, point)[0].double().cpu()

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
    ranks: ModelRanks = ALONE,
    output: str | None = None,
    pipeline_layers: Sequence[int] | None = None,
) -> Loaded:
    """Reads an ONNX file or a checkpoint and shards it; see `load_sources`.

    Args:
        path: NET.onnx[.gz], or a checkpoint's directory.
        is_checkpoint: which of the two.
        dtype, bound_opts, ranks, pipeline_layers: as there.
        output: which output of an ONNX graph; None: its only one.
    """
    source = read_source(path, is_checkpoint, output)
    return load_sources([source], None, dtype, bound_opts, ranks, pipeline_layers)


def load_sources(
    sources: Sequence[Source],
    wiring: Wiring | None,
    dtype: str | None,
    bound_opts: dict[str, Any],
    ranks: ModelRanks = ALONE,
    pipeline_layers: Sequence[int] | None = None,
) -> Loaded:
    """Shards a network over the ranks, which all call this.

    Args:
        sources: its parts, of which one may be there twice.
        wiring: how they are put together; None: there is one, as it is.
        dtype: a key of DTYPES; None: the least that holds what is stored.
        bound_opts: options of `BoundedModule`.
        ranks: that are to hold the network.
        pipeline_layers: how many of the network's parts (`networks.stages`) each pipeline stage
            has; None: balanced for verification.

    Raises:
        UserError: whatever is wrong with the file; stages that the network cannot be split into.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if _has_cuda() else "cpu"
    description = sources[0].description
    if wiring is not None:
        description = wired([source.description for source in sources], wiring)
        if ranks.pipeline is not None or pipeline_layers is not None:
            raise UserError(
                "a property that relates inputs to outputs or compares networks runs in one "
                "pipeline stage: leave out --pipeline-parallel-size"
            )
    own = _own_stage(description, ranks, pipeline_layers)

    def build_source(source: Source, layers: NetworkDescription, types: Any) -> Network:
        if source.imported is None:
            return load_network(source.path, ranks.group, types, device, layers)[1]
        network = Network.from_weights(layers, source.imported.weights, types)
        return parallelize(network, tp_group=ranks.group).to(device)

    def build(types: torch.dtype | None) -> Network:
        if wiring is None:
            network = build_source(sources[0], own, types)
        else:
            made = {id(s): build_source(s, s.description, types) for s in sources}
            parts = [made[id(s)] for s in sources]
            network = wired_network(description, parts, wiring, types, device)
        return network.requires_grad_(False).eval()

    def forward_of(network: Network) -> nn.Module:
        net = traceable(network)
        return net if ranks.pipeline is None else StagedForward(net, ranks.pipeline, ranks.group)

    computed = DTYPES[dtype or description.bounds_dtype]
    stored = build(None)
    same = description.computes_in_one_type and STORED_DTYPES[description.dtype] == computed
    network = stored if same else build(computed)
    like = torch.empty(0, dtype=computed, device=device)
    part = normalisation(description)
    reads = (INPUT,) if part is None else part.border
    example = like.new_zeros(1, width_of(description, reads))

    def bounded_to(layer: str) -> BoundedModule:
        model: nn.Module = network
        if ranks.pipeline is None:
            model = network.part(reads, layer)
        else:
            first, last = ranks.pipeline.is_first, ranks.pipeline.is_last
            end = layer if last else own.layers[-1].name
            model = PipelineStage(network.part(reads if first else (INPUT,), end))
        try:
            return BoundedModule(model, example, bound_opts=bound_opts, device=str(like.device))
        except NotImplementedError as error:
            raise UserError(f"network {description.name} cannot be bounded: {error}") from None

    stored_forward = forward_of(stored)
    forward = forward_of(network) if description.dtype in _HALF else stored_forward
    loaded = Loaded(
        description, forward, like, stored_forward, description.dtype, stored, part, bounded_to,
        lambda types: forward_of(build(types)), ranks, _sharded_share(own, ranks),
    )
    loaded.bounded_for(())  # what cannot be bounded is said now
    return loaded


def _own_stage(
    description: NetworkDescription, ranks: ModelRanks, given: Sequence[int] | None
) -> NetworkDescription:
    """The layers of this rank's pipeline stage, as a network."""
    if ranks.pipeline is None and given is None:
        return description
    parts = len(parts_of(description))
    if ranks.stages > parts:
        raise UserError(
            f"pipeline-parallel size {ranks.stages} is more than the {parts} parts that network "
            f"{description.name} can be cut into (before linear layers where a single value is "
            f"handed on): choose at most {parts}"
        )
    counts = split_layers(parts, ranks.stages, given)
    return stage_of(description, counts, 0 if ranks.pipeline is None else ranks.pipeline.stage)


def _sharded_share(description: NetworkDescription, ranks: ModelRanks) -> float | None:
    """Of this stage's layers: what `parallelize` splits, by the numbers in the weights."""
    if ranks.size == 1:
        return None
    with torch.device("meta"):
        plan = plan_layers(Network(description), ranks.size)
    sizes = description.weight_shapes()
    split = whole = 0
    for name, decision in plan.items():
        size = math.prod(sizes[f"{name}.weight"])
        whole += size
        split += size if decision.kind != "replicated" else 0
    return round(split / whole, 4) if whole else 0.0


def _compares(row: OutputRow, any_bound: bool) -> bool:
    """Whether a row is a (Y_i - Y_j) <= 0, or any number."""
    values = list(row.coefficients.values())
    return len(values) == 2 and sum(values) == 0 and (any_bound or row.bound == 0)


def _has_cuda() -> bool:
    # The CPU shim replaces functions of torch.cuda, not this one.
    return torch.cuda.is_available()
