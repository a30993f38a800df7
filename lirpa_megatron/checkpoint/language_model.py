"""GPT, LLaMA-like and BERT models from Megatron-LM's checkpoints, at any tensor-parallel size.

The checkpoint may come from a stranger: nothing in it runs (see `source`). The model is built from
the arguments that the checkpoint holds, and each rank reads its own block of each tensor, whatever
sizes the checkpoint was written with. There are no collectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.parallel_state import model_parallel_is_initialized as is_initialized
from torch import nn

from lirpa_megatron.checkpoint import arguments, names
from lirpa_megatron.checkpoint.describing import check_tensors, describe
from lirpa_megatron.checkpoint.description import ModelDescription
from lirpa_megatron.checkpoint.model_builder import build
from lirpa_megatron.checkpoint.shards import read_shard
from lirpa_megatron.checkpoint.source import PARSER, Weights, read_source
from lirpa_megatron.checkpoint.stage import Stage, own_stage
from lirpa_megatron.compat.megatron_hybrid import HybridModel
from lirpa_megatron.errors import UserError


def read_model_description(
    checkpoint: str | Path,
    iteration: int | str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ModelDescription:
    """The model that a checkpoint holds, without its weights; needs no process groups.

    Args:
        checkpoint: the directory with the tracker file, or a Hugging Face folder.
        iteration: its number, or "release"; None: what the tracker names.
        overrides: Megatron's argument names with values that replace the checkpoint's
            (`arguments.read_model_config` reads them from a file). A `padded_vocab_size` above the
            stored one adds rows of zeros, one below it cuts padding, never a token's row.

    Raises:
        UserError: not a checkpoint of such a model, damaged, hostile, not supported (by name), or
            tensors that are missing, left over, or of another shape.
    """
    return _open(checkpoint, iteration, overrides)[0]


def load_language_model(
    checkpoint: str | Path,
    group: dist.ProcessGroup | None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    iteration: int | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    pipeline_layers: Sequence[int] | None = None,
) -> tuple[ModelDescription, GPTModel | HybridModel | BertModel]:
    """Builds Megatron's model and reads this rank's shard of its weights.

    With a pipeline-parallel group of several ranks each builds and reads its own stage, whatever
    the stages that the checkpoint was written with.

    Every rank of the group calls this, after `runtime.initialize`; there are no collectives. The
    vocabulary has `description.vocabulary_rows(TP size)` rows: those of the checkpoint and, where
    the TP size does not divide them, rows of zeros, whose logits are 0 and no token's.

    Args:
        checkpoint: as for `read_model_description`.
        iteration: as for `read_model_description`.
        overrides: as for `read_model_description`.
        group: Megatron's tensor-parallel group (None: one rank).
        dtype: of the parameters; None: the stored one, or float32 for bfloat16 and float16 (whose
            weights are exactly representable in it).
        device: of the parameters.
        pipeline_layers: how many layers each pipeline stage has; None: balanced for verification
            (`crown.stage_split`).

    Returns:
        the description, and GPTModel or BertModel in eval mode, parameters frozen, made of the
        local layer spec; its output layer gathers the logits (parallel_output=False).

    Raises:
        UserError: as `read_model_description`; a model that does not fit the TP size (both
            numbers), or the pipeline; unreadable tensors, NaN or infinite values.
    """
    description, weights = _open(checkpoint, iteration, overrides)
    if dtype is None:
        stored = getattr(torch, description.stored.dtype)
        dtype = stored if stored in (torch.float32, torch.float64) else torch.float32
    stage = own_stage(description, pipeline_layers) if is_initialized() else None
    model = build(description, group, dtype, stage)
    stage = stage or Stage(0, description.num_layers)
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    described = {
        name: parameter for name, parameter in description.parameters().items()
        if stage.has(name, description.tied)
    }
    own = {stage.name_in_model(name, description.tied): name for name, _ in
           model.named_parameters()}
    built = {name: model.get_parameter(local) for name, local in own.items()}
    if set(built) != set(described):
        raise UserError(
            "this release of megatron-core builds another model than the checkpoint's: "
            f"{', '.join(sorted(set(built) ^ set(described))[:5])}"
        )
    # The largest first: of what is read at a time, a second copy is held.
    for name, parameter in sorted(built.items(), key=lambda item: -item[1].numel()):
        value = read_shard(weights, description, name, described[name], rank, size, dtype)
        if value.shape != parameter.shape:
            raise UserError(
                f"tensor {name}: this release of megatron-core expects {list(parameter.shape)} on "
                f"a rank, the checkpoint's model has {list(value.shape)}"
            )
        _replace_parameter(model, own[name], value.to(device))
    # Without the window, which longer inputs would meet: the adapters refuse these.
    model.attention_window = description.attention_window
    return description, model


def _open(
    checkpoint: str | Path, iteration: int | str | None, overrides: Mapping[str, Any] | None
) -> tuple[ModelDescription, Weights]:
    checkpoint, overrides = Path(checkpoint), dict(overrides or {})
    weights, stored, source = read_source(checkpoint, iteration)
    kind = names.kind_of(weights.names(), str(checkpoint))
    values = arguments.merged(stored, overrides, str(checkpoint), source == PARSER)
    if stored is None:
        source = "the model config"
    if not values["untie_embeddings_and_output_weights"]:
        weights.drop_copy_of_embeddings()
    # How it was written is no property of the model, and may be unknown.
    sizes = weights.parallel_sizes()
    if sizes == (None, None):
        keys = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        sizes = tuple((stored or {}).get(key) for key in keys)
        sizes = tuple(size if type(size) is int else None for size in sizes)
    description = describe(kind, values, overrides, weights, sizes, checkpoint, source)
    check_tensors(description, weights, checkpoint)
    return description, weights


def _replace_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Puts a value where the parameter was on the meta device, with the same attributes."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    attributes = vars(getattr(owner, attribute))
    parameter = nn.Parameter(value, requires_grad=False)
    vars(parameter).update(attributes)
    setattr(owner, attribute, parameter)
