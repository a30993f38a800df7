"""The ranks that hold one model together: tensor-parallel ones, of all pipeline stages; and its
replicas."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from lirpa_megatron.parallel import pipeline as pipelines
from lirpa_megatron.parallel import runtime, spmd
from lirpa_megatron.parallel.pipeline import Pipeline
from lirpa_megatron.parallel.replicas import ALONE as ALONE_REPLICA
from lirpa_megatron.parallel.replicas import Replicas
from lirpa_megatron.parallel.stage_forward import from_first_stage


@dataclass(frozen=True)
class ModelRanks:
    """This rank's place among those that hold one model.

    Attributes:
        group: the tensor-parallel group; None: one rank.
        pipeline: of this rank; None: one stage.
        replicas: of the model.
    """

    group: dist.ProcessGroup | None = None
    pipeline: Pipeline | None = None
    replicas: Replicas = ALONE_REPLICA

    @classmethod
    def of_megatron(cls) -> ModelRanks:
        """By Megatron's parallel_state."""
        pipeline = None
        if runtime.pp_size() > 1:
            pipeline = Pipeline.of(parallel_state.get_pipeline_model_parallel_group())
        return cls(runtime.tp_group(), pipeline, Replicas.of_megatron())

    @property
    def size(self) -> int:
        """Tensor-parallel ranks of each stage."""
        return 1 if self.group is None else self.group.size()

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return 1 if self.pipeline is None else self.pipeline.size

    @property
    def is_first_of_replica(self) -> bool:
        """Whether this rank is the first of those that hold the model."""
        is_first = self.group is None or self.group.rank() == 0
        return is_first and (self.pipeline is None or self.pipeline.is_first)

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of the first replica that is left: it writes results."""
        return self.is_first_of_replica and self.replicas.is_first

    def guard(self, what: str) -> contextlib.AbstractContextManager[None]:
        """`parallel.pipeline.guard` over these ranks."""
        return pipelines.guard(self.pipeline, self.group, what)

    def broadcast_object(self, value: Any, what: str = "a decision") -> Any:
        """The first rank's `value` (plain data) on every rank."""
        value = spmd.broadcast_object(value, self.group)
        return value if self.pipeline is None else self.pipeline.agree(what, value)[0]

    def broadcast_tensor(self, x: torch.Tensor, what: str = "the first rank's tensor"
                         ) -> torch.Tensor:
        """The first rank's values of a replicated tensor on every rank, without gradients."""
        x = spmd.broadcast_tensor(x.detach(), self.group)
        return from_first_stage(self.pipeline, what, x)


ALONE = ModelRanks()
"""One process that holds the whole model."""
