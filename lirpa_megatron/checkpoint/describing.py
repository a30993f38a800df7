"""The description of a model from its arguments, checked against the stored tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lirpa_megatron.checkpoint import arguments
from lirpa_megatron.checkpoint.description import (
    HYBRID,
    ModelDescription,
    ParameterDescription,
    StoredForm,
)
from lirpa_megatron.checkpoint.hugging_face import FORMAT as HUGGING_FACE
from lirpa_megatron.checkpoint.hybrid import PATTERN
from lirpa_megatron.checkpoint.nemo import is_nemo
from lirpa_megatron.checkpoint.source import Weights
from lirpa_megatron.errors import UserError

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def describe(
    kind: str, values: dict[str, Any], overrides: dict[str, Any], weights: Weights,
    sizes: tuple[int | None, int | None], checkpoint: Path, source: str,
) -> ModelDescription:
    """What the checked arguments and the shapes of the stored tensors say of the model.

    Args:
        kind: "GPT" or "BERT".
        values: of `arguments.merged`.
        overrides: those of the caller, which alone may cut or add rows of the vocabulary.
        weights: the stored tensors.
        sizes: tensor- and pipeline-parallel, that they were written with; None: unknown.
        checkpoint: for messages.
        source: what holds the arguments.

    Raises:
        UserError: arguments and tensors contradict each other, or a model that is not supported.
    """
    where, found = str(checkpoint), weights.names()
    activation, gated = arguments.activation(values, where)
    words = "embedding.word_embeddings.weight"
    if words not in found:
        raise UserError(f"checkpoint {checkpoint} has no tensor {words}")
    rows = weights.shape(words, ParameterDescription((), 0))[0]
    bert, layers = kind == "BERT", values[PATTERN]
    if bert and layers is not None:
        raise UserError(f"checkpoint {checkpoint}: a BERT model has no hybrid layers")
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
        kind=kind if layers is None else HYBRID, layers=layers, **{name: values[name] for name in (
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


def check_tensors(description: ModelDescription, weights: Weights, checkpoint: Path) -> None:
    """Raises UserError for tensors that are missing, left over, or of another shape."""
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
