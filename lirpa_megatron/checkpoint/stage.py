"""A pipeline stage of a checkpoint's model: its layers, and their names in the whole model."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core import parallel_state

from lirpa_megatron.checkpoint.description import ModelDescription
from lirpa_megatron.crown.stage_split import balanced_split
from lirpa_megatron.errors import UserError

_LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
_WORDS, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Stage:
    """Layers `first` to `end` (not included) of a model; the whole model where it is all of them.

    Each stage is built as a model of its own layers, counted from 0, with the embedding on the
    first stage and the output layer on the last. Tied embeddings are stored once, and read on both.
    """

    first: int
    end: int
    is_first: bool = True
    is_last: bool = True

    @property
    def layers(self) -> int:
        """How many."""
        return self.end - self.first

    def name_in_model(self, name: str, tied: bool) -> str:
        """A parameter's name in the whole model.

        Args:
            name: on this stage.
            tied: whether the output layer's weight is the embedding's.
        """
        if tied and name == _OUTPUT and not self.is_first:
            return _WORDS
        found = _LAYER.fullmatch(name)
        if found is None:
            return name
        return f"{found[1]}{int(found[2]) + self.first}{found[3]}"

    def has(self, name: str, tied: bool) -> bool:
        """Whether a parameter of the whole model is on this stage."""
        found = _LAYER.fullmatch(name)
        if found is not None:
            return self.first <= int(found[2]) < self.end
        if name.startswith("embedding."):
            return self.is_first or (self.is_last and tied and name == _WORDS)
        return self.is_last


def split_layers(layers: int, stages: int, given: Sequence[int] | None = None) -> list[int]:
    """How many layers each stage has.

    Args:
        layers: of the model.
        stages: pipeline-parallel size.
        given: the caller's choice; None: balanced for verification.

    Raises:
        UserError: more stages than layers, a choice that does not add up.
    """
    if stages > layers:
        raise UserError(
            f"pipeline-parallel size {stages} is more than the model's {layers} layers: choose at "
            f"most {layers}"
        )
    if given is None:
        return balanced_split(layers, stages)
    if len(given) != stages:
        raise UserError(
            f"--pipeline-layers has {len(given)} numbers, the pipeline {stages} stages: give one "
            "for each"
        )
    if sum(given) != layers or min(given) < 1:
        raise UserError(
            f"--pipeline-layers {','.join(map(str, given))} adds up to {sum(given)}, but the model "
            f"has {layers} layers: give each stage one at least, and all of them together"
        )
    return list(given)


def stages_of(counts: Sequence[int]) -> list[Stage]:
    """All stages, from how many layers each has."""
    ends = list(itertools.accumulate(counts))
    return [
        Stage(end - count, end, i == 0, i == len(counts) - 1)
        for i, (count, end) in enumerate(zip(counts, ends, strict=True))
    ]


def own_stage(description: ModelDescription, given: Sequence[int] | None = None) -> Stage:
    """This rank's stage, by Megatron's pipeline-parallel group."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    rank = parallel_state.get_pipeline_model_parallel_rank()
    return stages_of(split_layers(description.num_layers, stages, given))[rank]
