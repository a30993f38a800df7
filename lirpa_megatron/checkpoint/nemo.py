"""Checkpoints of NeMo 2.0: the model is described beside the weights, in `context/model.yaml`.

    CKPT/weights/  metadata.json  .metadata  __0_0.distcp  ...    keys under `module.`
    CKPT/context/  model.yaml  io.json  nemo_tokenizer/

The file is YAML that names classes and functions; none is imported, and `io.json`, which says how
to call them, is not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lirpa_megatron.checkpoint.layout import WEIGHTS
from lirpa_megatron.checkpoint.plain_files import read_yaml
from lirpa_megatron.checkpoint.provider_fields import arguments_of, ignored_of, llama_31_scale
from lirpa_megatron.errors import UserError

NAME = "context/model.yaml"
_TRANSFORM = "model_transform"
_MODELS = r"nemo\.collections\.llm\.gpt\.model\."
_CONFIGS = re.compile(
    _MODELS + r"(base\.GPTConfig(\d+[MB])?"
    r"|llama\.(Llama|Llama2|Llama3|CodeLlama)Config(\d+B)?"
    r"|qwen2\.Qwen(2|25)Config(\w*\d[MB])?|mistral\.Mistral(Config7B|NeMoConfig12B))"
)
_SCALED = re.compile(_MODELS + r"llama\.Llama3[12]Config(\d+B)?")
_CLASSES = re.compile(
    _MODELS + r"(base\.GPTModel|llama\.LlamaModel|qwen2\.Qwen2Model|mistral\.MistralModel)"
)


def is_nemo(directory: Path) -> bool:
    """Whether a data directory is that of a NeMo checkpoint."""
    return directory.name == WEIGHTS


def read_nemo(directory: Path) -> dict[str, Any]:
    """Megatron-LM's arguments of the model whose weights lie in a directory (`weights`).

    Raises:
        UserError: no context, another kind of model, or fields that are not supported.
    """
    where = f"checkpoint file {directory.parent / NAME}"
    model, config = _content(directory, where)
    for name, names in (("its model", model), ("its config", config)):
        if not isinstance(names.get("_target_"), str):
            raise UserError(f"{where}: {name} has no class (_target_)")
    if not _CLASSES.fullmatch(model["_target_"]):
        raise UserError(f"{where}: models of the class {model['_target_'][:100]} are not supported")
    if model.get(_TRANSFORM):
        raise UserError(f"{where}: models with model_transform (adapters) are not supported")
    target, fields = config["_target_"], dict(config)
    if _SCALED.fullmatch(target):
        fields = llama_31_scale(fields, where)
    elif _CONFIGS.fullmatch(target):
        # NeMo hands no scale of its own to GPTModel.
        if fields.get("rope_scaling"):
            raise UserError(f"{where} (rope_scaling): it is not known in NeMo")
        fields |= {"rope_scaling": False, "rope_scaling_factor": 8.0}
    else:
        raise UserError(f"{where}: models of the class {target[:100]} are not supported")
    return arguments_of(fields, where)


def ignored_of_nemo(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """(fields of the config that are read and ignored, sections that are not looked at)."""
    where = f"checkpoint file {directory.parent / NAME}"
    model, config = _content(directory, where)
    fields = dict(config)
    if _SCALED.fullmatch(str(config.get("_target_"))):
        fields = llama_31_scale(fields, where)
    sections = [str(name) for name in model if name not in ("_target_", "config", _TRANSFORM)]
    return ignored_of(fields, where), sections


def _content(directory: Path, where: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What the file holds, and its config."""
    path = directory.parent / NAME
    if not path.is_file():
        raise UserError(f"{where} does not exist: it says which model the weights are of")
    model = read_yaml(path, where)
    config = model.get("config") if isinstance(model, Mapping) else None
    if not isinstance(config, Mapping):
        raise UserError(f"{where} has no section 'config'")
    return model, config
