"""Writes a Hugging Face folder as a Megatron checkpoint, and checks what it wrote."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel

from lirpa_megatron.checkpoint.description import ModelDescription
from lirpa_megatron.checkpoint.estimates import parameter_count
from lirpa_megatron.checkpoint.hugging_face import HuggingFaceWeights
from lirpa_megatron.checkpoint.language_model import load_language_model, read_model_description
from lirpa_megatron.checkpoint.plain_forward import plain_logits
from lirpa_megatron.checkpoint.source import HUGGING_FACE_WRITER, arguments_in_force
from lirpa_megatron.checkpoint.writer import save_checkpoint
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel import runtime, spmd

_TOKENS = 7
_SMALL = 2**28
"""Parameters up to which the written model is compared in float64 (2 GiB), above it in float32."""
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Of the largest logit. gelu_new of GPT-2 and Megatron's tanh GELU differ by 2e-9 a layer; float32
has to carry the logits of dozens of layers, and a wrong mapping is out by far more."""


def import_hugging_face(
    folder: Path, out: Path, force: bool = False, overrides: Mapping[str, Any] | None = None
) -> tuple[ModelDescription, float]:
    """Writes `out` (torch_dist, in the stored number type); every process calls this.

    Args:
        folder: with config.json and model.safetensors.
        out: directory to make.
        force: replace a checkpoint that is already there.
        overrides: Megatron's argument names with values that replace the folder's.

    Returns:
        the description, and the largest difference between the logits of the written checkpoint and
        of the folder (`plain_forward`), relative to the largest logit.

    Raises:
        UserError: the folder is not of a supported model, `out` cannot be written, or the logits
            differ, in which case nothing is left at `out`.
    """
    group = runtime.tp_group()
    found: list[float] = []
    with spmd.guard(group, "reading the folder"):
        weights = HuggingFaceWeights(folder)
        stored = read_model_description(folder, overrides=overrides).stored.dtype
        description, model = load_language_model(
            folder, group, getattr(torch, stored), overrides=overrides
        )
        values = arguments_in_force(folder, overrides)
    values |= {
        "tensor_model_parallel_size": runtime.tp_size(), "pipeline_model_parallel_size": 1,
        "padded_vocab_size": description.vocabulary_rows(runtime.tp_size()),
        "no_rope_freq": None, "qk_l2_norm": False, "use_mup": False,
    }
    common = {
        "args": argparse.Namespace(**values), "checkpoint_version": 3.0, "iteration": 0,
        "writer": HUGGING_FACE_WRITER,
    }
    data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)

    def sharded() -> dict[str, Any]:
        return {"model": model.sharded_state_dict(metadata={"dp_cp_group": data_parallel})}

    def check(written: Path) -> None:
        small = parameter_count(description) <= _SMALL
        dtype = torch.float64 if small else torch.float32
        _, again = load_language_model(written, group, dtype)
        found.append(_difference(again, weights, description))
        if not found[0] <= _TOLERANCE[dtype]:
            raise UserError(
                f"folder {folder}: the logits of what was written differ from the folder's by "
                f"{found[0]:.1e} of the largest: it is not what config.json says, or an error "
                "of this program"
            )

    save_checkpoint(out, force, common, sharded, check)
    return description, found[0]


def _difference(
    model: GPTModel, weights: HuggingFaceWeights, description: ModelDescription
) -> float:
    """Largest difference of the logits of a few tokens, of the largest logit."""
    count = min(_TOKENS, description.max_position_embeddings,
                description.attention_window or _TOKENS)
    tokens = weights.files.shape(weights.words())[0]
    ids = (torch.arange(count) * 7919 + 3) % tokens
    with torch.no_grad():
        got = model(ids[None], torch.arange(count)[None], None)[0, :, :tokens].double()
    want = plain_logits(weights, ids)
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-300)).item()
