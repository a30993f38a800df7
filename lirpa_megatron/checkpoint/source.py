"""What a folder is: its stored tensors, and the arguments that say which model they are.

The folder may come from a stranger: nothing in it runs (see `safe_unpickle` and `metadata`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from lirpa_megatron.checkpoint import arguments
from lirpa_megatron.checkpoint.description import ParameterDescription
from lirpa_megatron.checkpoint.hugging_face import HuggingFaceWeights
from lirpa_megatron.checkpoint.hugging_face_config import CONFIG, is_hugging_face
from lirpa_megatron.checkpoint.layout import data_directory
from lirpa_megatron.checkpoint.legacy import LegacyWeights, is_legacy
from lirpa_megatron.checkpoint.nemo import NAME as NEMO
from lirpa_megatron.checkpoint.nemo import is_nemo, read_nemo
from lirpa_megatron.checkpoint.reader import NETWORK_KEY
from lirpa_megatron.checkpoint.run_config import NAME as RUN_CONFIG
from lirpa_megatron.checkpoint.run_config import read_run_config
from lirpa_megatron.checkpoint.torch_dist import TorchDistWeights
from lirpa_megatron.errors import UserError

_OLDEST, _NEWEST = 2.0, 3.0
PARSER = "Megatron-LM's arguments"
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


def read_source(
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
    stored, source = _arguments_of(common, checkpoint), PARSER
    if stored is not None and common.get("writer") == HUGGING_FACE_WRITER:
        source = HUGGING_FACE_WRITER
    run_config = read_run_config(directory) if stored is None else None
    return (weights, run_config, RUN_CONFIG) if run_config else (weights, stored, source)


def arguments_in_force(
    checkpoint: str | Path, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Megatron-LM's arguments of a checkpoint, all that a model is built from, checked."""
    _, stored, source = read_source(Path(checkpoint), None)
    return arguments.merged(stored, dict(overrides or {}), str(checkpoint), source == PARSER)


def _arguments_of(common: Mapping[str, Any], checkpoint: Path) -> dict[str, Any] | None:
    """The Namespace `args` as a dictionary; None if there is none."""
    if common.get("args") is None:
        return None
    found = getattr(common["args"], "state", common["args"])
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise UserError(f"checkpoint {checkpoint}: its arguments are malformed")
    return found
