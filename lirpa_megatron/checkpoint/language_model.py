"""GPT, LLaMA-like and BERT models from Megatron-LM's checkpoints, at any tensor-parallel size.

The checkpoint may come from a stranger: nothing in it runs (see `inert` and `metadata`). The model
is built from the arguments that the checkpoint holds, and each rank reads its own block of each
tensor, whatever sizes the checkpoint was written with. There are no collectives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import nn

from lirpa_megatron.checkpoint import arguments, names
from lirpa_megatron.checkpoint.description import (
    ModelDescription,
    ParameterDescription,
    StoredForm,
)
from lirpa_megatron.checkpoint.hugging_face import FORMAT as HUGGING_FACE
from lirpa_megatron.checkpoint.hugging_face import HuggingFaceWeights
from lirpa_megatron.checkpoint.hugging_face_config import CONFIG, is_hugging_face
from lirpa_megatron.checkpoint.hybrid import PairedLayers, as_gpt
from lirpa_megatron.checkpoint.layout import data_directory
from lirpa_megatron.checkpoint.legacy import LegacyWeights, is_legacy
from lirpa_megatron.checkpoint.model_builder import build
from lirpa_megatron.checkpoint.nemo import NAME as NEMO
from lirpa_megatron.checkpoint.nemo import is_nemo, read_nemo
from lirpa_megatron.checkpoint.reader import NETWORK_KEY
from lirpa_megatron.checkpoint.run_config import NAME as RUN_CONFIG
from lirpa_megatron.checkpoint.run_config import read_run_config
from lirpa_megatron.checkpoint.torch_dist import TorchDistWeights
from lirpa_megatron.errors import UserError

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_OLDEST, _NEWEST = 2.0, 3.0
_PARSER = "Megatron-LM's arguments"
HUGGING_FACE_WRITER = "lirpa-megatron import-hf"
"""What `import-hf` puts under `writer`: the arguments beside it are complete."""


class Weights(Protocol):
    """Stored tensors under the names of the local layer spec; full (unsharded) shapes."""

    directory: Path
    format: str

    def names(self) -> set[str]: ...

    def shape(self, name: str, parameter: ParameterDescription | None = None
              ) -> tuple[int, ...]: ...

    def dtypes(self) -> set[torch.dtype]: ...

    def read(self, name: str, parameter: ParameterDescription, offsets: list[int],
             sizes: list[int], dtype: torch.dtype) -> torch.Tensor: ...

    def common(self) -> dict[str, Any]: ...

    def parallel_sizes(self) -> tuple[int | None, int | None]: ...

    def drop_copy_of_embeddings(self) -> None: ...


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
) -> tuple[ModelDescription, GPTModel | BertModel]:
    """Builds Megatron's model and reads this rank's shard of its weights.

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

    Returns:
        the description, and GPTModel or BertModel in eval mode, parameters frozen, made of the
        local layer spec; its output layer gathers the logits (parallel_output=False).

    Raises:
        UserError: as `read_model_description`; a model that does not fit the TP size (both
            numbers), unreadable tensors, NaN or infinite values.
    """
    description, weights = _open(checkpoint, iteration, overrides)
    if dtype is None:
        stored = getattr(torch, description.stored.dtype)
        dtype = stored if stored in (torch.float32, torch.float64) else torch.float32
    model = build(description, group, dtype)
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    described = description.parameters()
    built = dict(model.named_parameters())
    if set(built) != set(described):
        raise UserError(
            "this release of megatron-core builds another model than the checkpoint's: "
            f"{', '.join(sorted(set(built) ^ set(described))[:5])}"
        )
    for name, parameter in built.items():
        value = _read_shard(weights, description, name, described[name], rank, size, dtype)
        if value.shape != parameter.shape:
            raise UserError(
                f"tensor {name}: this release of megatron-core expects {list(parameter.shape)} on "
                f"a rank, the checkpoint's model has {list(value.shape)}"
            )
        _replace_parameter(model, name, value.to(device))
    # Without the window, which longer inputs would meet: the adapters refuse these.
    model.attention_window = description.attention_window
    return description, model


def _open(
    checkpoint: str | Path, iteration: int | str | None, overrides: Mapping[str, Any] | None
) -> tuple[ModelDescription, Weights]:
    checkpoint, overrides = Path(checkpoint), dict(overrides or {})
    weights, stored, source = _source(checkpoint, iteration)
    kind = names.kind_of(weights.names(), str(checkpoint))
    values = arguments.merged(stored, overrides, str(checkpoint), source == _PARSER)
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
    description = _describe(kind, values, overrides, weights, sizes, checkpoint, source)
    _check_tensors(description, weights, checkpoint)
    return description, weights


def _source(
    checkpoint: Path, iteration: int | str | None
) -> tuple[Weights, dict[str, Any] | None, str]:
    """The stored tensors, the arguments (None: there are none), and what holds these."""
    if is_hugging_face(checkpoint):
        if iteration is not None:
            raise UserError(f"Hugging Face folder {checkpoint} has no iterations: give none")
        folder = HuggingFaceWeights(checkpoint)
        return folder, folder.arguments, CONFIG
    directory = data_directory(checkpoint, iteration)
    weights: Weights = (LegacyWeights if is_legacy(directory) else TorchDistWeights)(directory)
    if is_nemo(directory):
        return weights, read_nemo(directory), NEMO
    common = weights.common()
    if NETWORK_KEY in common:
        raise UserError(
            f"checkpoint {checkpoint} holds a network that import-onnx wrote, not a GPT or BERT "
            "model of Megatron-LM"
        )
    version = common.get("checkpoint_version", _NEWEST)
    if type(version) not in (int, float) or not _OLDEST <= version <= _NEWEST:
        raise UserError(
            f"checkpoint {checkpoint} has checkpoint_version {version!r}; known are "
            f"{_OLDEST} to {_NEWEST}"
        )
    stored, source = _arguments_of(common, checkpoint), _PARSER
    if stored is not None and common.get("writer") == HUGGING_FACE_WRITER:
        source = HUGGING_FACE_WRITER
    paired = None if stored is None else as_gpt(stored, str(checkpoint))
    if paired is not None:
        return PairedLayers(weights), paired, source
    run_config = read_run_config(directory) if stored is None else None
    return (weights, run_config, RUN_CONFIG) if run_config else (weights, stored, source)


def arguments_in_force(
    checkpoint: str | Path, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Megatron-LM's arguments of a checkpoint, all that a model is built from, checked."""
    _, stored, source = _source(Path(checkpoint), None)
    return arguments.merged(stored, dict(overrides or {}), str(checkpoint), source == _PARSER)


def _arguments_of(common: Mapping[str, Any], checkpoint: Path) -> dict[str, Any] | None:
    """The Namespace `args` as a dictionary; None if there is none."""
    if common.get("args") is None:
        return None
    found = getattr(common["args"], "state", common["args"])
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UserError(f"checkpoint {checkpoint}: its arguments are malformed")
    return found


def _describe(
    kind: str, values: dict[str, Any], overrides: dict[str, Any], weights: Weights,
    sizes: tuple[int | None, int | None], checkpoint: Path, source: str,
) -> ModelDescription:
    where, found = str(checkpoint), weights.names()
    activation, gated = arguments.activation(values, where)
    words = "embedding.word_embeddings.weight"
    if words not in found:
        raise UserError(f"checkpoint {checkpoint} has no tensor {words}")
    rows = weights.shape(words, ParameterDescription((), 0))[0]
    bert = kind == "BERT"
    if bert and (values["position_embedding_type"] != "learned_absolute"
                 or values["normalization"] != "LayerNorm"):
        raise UserError(
            f"checkpoint {checkpoint}: BERT models with position_embedding_type="
            f"{values['position_embedding_type']} and normalization={values['normalization']} are "
            "not supported, only with learned_absolute and LayerNorm"
        )
    window = None if values["window_size"] is None else values["window_size"][0] + 1
    if bert and window is not None:
        raise UserError(f"checkpoint {checkpoint}: BERT models with windows are not supported")
    types = "embedding.tokentype_embeddings.weight"
    stored = StoredForm(
        format=weights.format,
        iteration=_iteration(weights),
        dtype=_stored_dtype(weights, checkpoint),
        tensor_parallel=sizes[0], pipeline_parallel=sizes[1], vocabulary_rows=rows,
        described_by=source,
    )
    return ModelDescription(
        kind=kind, **{name: values[name] for name in (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
            "num_query_groups", "kv_channels", "vocab_size", "max_position_embeddings",
            "position_embedding_type", "rotary_percent", "rotary_base", "rotary_interleaved",
            "rope_scaling_factor", "normalization", "layernorm_epsilon", "add_bias_linear",
            "add_qkv_bias", "qk_layernorm", "softmax_scale", "glu_linear_offset", "seq_length",
        )},
        padded_vocab_size=_padded(values["vocab_size"], rows, overrides, where),
        rope_scaling=values["use_rope_scaling"],
        seq_len_interpolation_factor=values["rotary_seq_len_interpolation_factor"],
        zero_centered_gamma=values["layernorm_zero_centered_gamma"],
        activation=activation, gated=gated,
        tied=not values["untie_embeddings_and_output_weights"],
        num_tokentypes=weights.shape(types, ParameterDescription(()))[0]
        if bert and types in found else 0,
        binary_head=bert and "binary_head.weight" in found,
        attention_window=window,
        stored=stored,
    )


def _padded(tokens: int | None, rows: int, overrides: dict[str, Any], where: str) -> int:
    """Rows of the word embeddings to use: those stored, or what the overrides ask for."""
    if tokens is not None and tokens > rows:
        raise UserError(
            f"checkpoint {where}: vocab_size {tokens} exceeds the {rows} rows of its embeddings"
        )
    wanted = overrides.get("padded_vocab_size")
    if wanted is None:
        return rows
    if wanted < rows and (tokens is None or wanted < tokens):
        raise UserError(
            f"checkpoint {where}: padded_vocab_size {wanted} would cut rows of tokens (stored are "
            f"{rows} rows, of which {'an unknown number' if tokens is None else tokens} are tokens)"
        )
    return wanted


def _iteration(weights: Weights) -> str:
    name = weights.directory.name
    if weights.format == HUGGING_FACE or is_nemo(weights.directory):
        return "none"
    return str(int(name[len("iter_"):])) if name.startswith("iter_") else name


def _stored_dtype(weights: Weights, checkpoint: Path) -> str:
    dtypes = weights.dtypes()
    for dtype in dtypes:
        if dtype not in _DTYPES:
            raise UserError(
                f"checkpoint {checkpoint} stores weights in {dtype}, which is not supported"
            )
    # The widest: all are exactly representable in it, but for bfloat16 beside float16.
    widest = next(dtype for dtype in _DTYPES if dtype in dtypes)
    if {torch.bfloat16, torch.float16} <= dtypes and widest in (torch.bfloat16, torch.float16):
        widest = torch.float32
    return str(widest).removeprefix("torch.")


def _check_tensors(description: ModelDescription, weights: Weights, checkpoint: Path) -> None:
    described, found = description.parameters(), weights.names()
    missing = sorted(set(described) - found)
    if missing:
        raise UserError(
            f"checkpoint {checkpoint} has no tensor {missing[0]}, which its arguments ask for "
            f"({len(missing)} missing)"
        )
    extra = sorted(found - set(described))
    if extra:
        raise UserError(
            f"checkpoint {checkpoint} has the tensor {extra[0]}, which its arguments do not ask "
            f"for ({len(extra)} left over): the model is not what they say"
        )
    rows = description.stored.vocabulary_rows
    for name, parameter in described.items():
        shape = parameter.shape
        wanted = (rows, *shape[1:]) if parameter.vocabulary else shape
        stored = weights.shape(name, parameter)
        if stored != wanted:
            raise UserError(
                f"tensor {name} of checkpoint {checkpoint} has shape {list(stored)}, its arguments "
                f"ask for {list(wanted)}"
            )


def _read_shard(
    weights: Weights, description: ModelDescription, name: str, parameter: ParameterDescription,
    rank: int, size: int, dtype: torch.dtype,
) -> torch.Tensor:
    """A rank's part of a parameter."""
    shape = list(parameter.shape)
    if parameter.vocabulary:
        shape[0] = description.vocabulary_rows(size)
    pieces = []
    for start, length in _intervals(parameter, shape, rank, size):
        offsets, sizes = [0] * len(shape), list(shape)
        if parameter.partition_dim is not None:
            offsets[parameter.partition_dim], sizes[parameter.partition_dim] = start, length
        if parameter.vocabulary:
            stored = min(description.stored.vocabulary_rows, description.padded_vocab_size)
            pieces.append(_read_padded(weights, name, parameter, offsets, sizes, stored, dtype))
        else:
            pieces.append(weights.read(name, parameter, offsets, sizes, dtype))
    value = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    if parameter.norm_weight and description.zero_centered_gamma:
        value = value + 1
    return value


def _intervals(
    parameter: ParameterDescription, shape: list[int], rank: int, size: int
) -> Iterator[tuple[int, int]]:
    """(start, length) along the sharded dimension of what a rank holds: gate and up, or one."""
    if parameter.partition_dim is None:
        yield 0, 0
        return
    total = shape[parameter.partition_dim]
    halves = 2 if parameter.gated else 1
    length = total // halves // size
    for half in range(halves):
        yield half * (total // halves) + rank * length, length


def _read_padded(
    weights: Weights, name: str, parameter: ParameterDescription, offsets: list[int],
    sizes: list[int], stored: int, dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of the vocabulary; those from `stored` on are zeros."""
    value = torch.zeros(sizes, dtype=dtype)
    rows = max(0, min(stored - offsets[0], sizes[0]))
    if rows:
        value[:rows] = weights.read(name, parameter, offsets, [rows, *sizes[1:]], dtype)
    return value


def _replace_parameter(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Puts a value where the parameter was on the meta device, with the same attributes."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    attributes = vars(getattr(owner, attribute))
    parameter = nn.Parameter(value, requires_grad=False)
    vars(parameter).update(attributes)
    setattr(owner, attribute, parameter)
