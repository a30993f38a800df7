"""Pipeline stages: which modules are one, and a facade whose input is another stage's output."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from lirpa_megatron.adapters import hooks
from lirpa_megatron.adapters.refusals import joined
from lirpa_megatron.adapters.registry import Copy, register
from lirpa_megatron.adapters.traceable import collectives_of, traceable
from lirpa_megatron.adapters.traced_ops import stage_input
from lirpa_megatron.adapters.views import BLOCKS, LANGUAGE_MODELS, View
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel.collectives import Collectives
from lirpa_megatron.parallel.pipeline import Pipeline
from lirpa_megatron.parallel.stage_forward import StagedForward


class PipelineStage(nn.Module):
    """This rank's part of a model whose parts lie on different ranks.

    GPTModel and BertModel of Megatron's pipeline parallelism know that they are stages; other
    modules are made stages by this class. The stages are a chain: the first takes the model's
    inputs, every other the output of the one before it, batch first, in place of the first input.

    Args:
        module: the layers of this rank.
        group: one rank of each stage, in their order; Megatron's pipeline-parallel group by
            default.

    Raises:
        UserError: no group is given, and Megatron's parallel_state is not initialised.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        if group is None and not parallel_state.model_parallel_is_initialized():
            raise UserError(
                "PipelineStage needs a process group: give one, or call "
                "parallel_state.initialize_model_parallel(pipeline_model_parallel_size=...)"
            )
        self.module = module
        group = parallel_state.get_pipeline_model_parallel_group() if group is None else group
        self.group = [group]  # in a list: modules are copied, groups cannot be
        self.train(module.training)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.module(*inputs)


class _PipelineStageFacade(nn.Module):
    """Holds the facade of the layers, so that parameters keep their names."""

    def __init__(self, stage: PipelineStage, name: str, copy: Copy) -> None:
        super().__init__()
        self.module = copy(stage.module, joined(name, "module"))
        self.train(stage.training)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.module(*inputs)


class LaterStage(nn.Module):
    """The facade of a stage after the first, with its input as an operator of its own."""

    def __init__(self, facade: nn.Module) -> None:
        super().__init__()
        self.facade = [facade]  # in a list: parameters keep their names
        self._modules = facade._modules
        self._parameters = facade._parameters
        self._buffers = facade._buffers
        self.training = facade.training

    def forward(self, hidden: torch.Tensor, *inputs: Any) -> torch.Tensor:
        return self.facade[0](stage_input(hidden), *inputs)


def pipeline_of(model: nn.Module) -> Pipeline | None:
    """The pipeline that a module is a stage of; None for a whole model.

    Raises:
        UserError: a stage without a group.
    """
    module = _inside(model)
    if isinstance(module, PipelineStage):
        return Pipeline.of(module.group[0]) if module.group[0].size() > 1 else None
    ends = _ends(module)
    if all(ends):
        return None
    group = _group_of(module)
    if group is None:
        raise UserError(
            f"{type(module).__name__} is a pipeline stage (pre_process={ends[0]}, "
            f"post_process={ends[1]}), but there is no pipeline-parallel group: initialise "
            "parallel_state with pipeline_model_parallel_size"
        )
    return Pipeline.of(group)


def place_of(model: nn.Module) -> tuple[Pipeline | None, Collectives]:
    """`pipeline_of` and `collectives_of`, the latter also for a stage without parallel layers.

    Where other stages have some, its rows are shared out as theirs are: its ranks are those of
    Megatron's tensor-parallel group, if the stages are those of its pipeline-parallel group.
    """
    pipeline, found = pipeline_of(model), collectives_of(model)
    if found.size > 1 or pipeline is None or not parallel_state.model_parallel_is_initialized():
        return pipeline, found
    own, ranks = parallel_state.get_pipeline_model_parallel_group(), dist.get_process_group_ranks
    if ranks(own) == ranks(pipeline.group):
        found = Collectives(parallel_state.get_tensor_model_parallel_group())
    return pipeline, found


def forward_of(model: nn.Module) -> nn.Module:
    """What a module, or the model that it is a stage of, computes from the model's first input, as
    a differentiable function that every rank calls alike."""
    net = traceable(model)
    pipeline, collectives = place_of(model)
    return net if pipeline is None else StagedForward(net, pipeline, collectives.group)


def check_place(model: nn.Module, pipeline: Pipeline) -> None:
    """Refuses a stage that is not what its rank's place in the pipeline says."""
    module = _inside(model)
    ends, place = _ends(module), (pipeline.is_first, pipeline.is_last)
    if not isinstance(module, PipelineStage) and ends != place:
        raise UserError(
            f"{type(module).__name__} has pre_process={ends[0]} and post_process={ends[1]}, but "
            f"its rank is stage {pipeline.stage} of {pipeline.size}"
        )


def config_of(model: nn.Module) -> dict[str, str]:
    """What the stages of one model must have in common: name -> value."""
    config = getattr(_inside(model), "config", None)
    if config is None:
        return {}
    return {
        f"{type(config).__name__}.{name}": getattr(value, "__qualname__", None) or str(value)
        for name, value in vars(config).items()
        if not name.startswith("_") and name != "num_layers" and isinstance(value, _PLAIN)
    }


_PLAIN = (bool, int, float, str, torch.dtype, type(None))


def _inside(model: nn.Module) -> nn.Module:
    module = hooks.unwrapped(model)
    while isinstance(module, View):
        module = hooks.unwrapped(module.model)
    return module


def _ends(module: nn.Module) -> tuple[bool, bool]:
    """Whether the model begins and ends in this module."""
    if not isinstance(module, (*LANGUAGE_MODELS, *BLOCKS)):
        return True, True
    return bool(module.pre_process), bool(module.post_process)


def _group_of(module: nn.Module) -> dist.ProcessGroup | None:
    groups = getattr(module, "pg_collection", None)
    group = getattr(groups, "pp", None) or getattr(module, "pp_group", None)
    if group is None and parallel_state.model_parallel_is_initialized():
        group = parallel_state.get_pipeline_model_parallel_group()
    return group


register(PipelineStage, _PipelineStageFacade)
