"""`run_config.yaml`, with which Megatron-Bridge describes the model of a checkpoint.

    OUT/latest_train_state.pt  latest_checkpointed_iteration.txt
    OUT/iter_0000010/  run_config.yaml  train_state.pt  tokenizer/  metadata.json  .metadata  ...

The file is YAML without Python's tags; it names classes and functions, of which none is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lirpa_megatron.checkpoint.plain_files import read_yaml
from lirpa_megatron.checkpoint.provider_fields import arguments_of, ignored_of, llama_31_scale
from lirpa_megatron.errors import UserError

NAME = "run_config.yaml"
_PROVIDERS = re.compile(
    r"megatron\.bridge\.models\.gpt_provider\.GPT(Model)?Provider\w*"
    r"|megatron\.bridge\.models\.gpt(\.\w+)?\.(Bridge)?GPTModelConfig"
    r"|megatron\.training\.models\.gpt\.GPTModelConfig"
    r"|megatron\.bridge\.models\.mistral\.mistral_provider\.MistralModelProvider"
    r"|megatron\.bridge\.models\.llama\.llama_provider"
    r"\.(Llama|Llama2|Llama3|CodeLlama)ModelProvider(\d+B)?"
    r"|megatron\.bridge\.models\.qwen\.qwen_provider\.Qwen(2|25|3)ModelProvider(\w*\d[MB])?"
)
_SCALED = re.compile(
    r"megatron\.bridge\.models\.llama\.llama_provider\.Llama3[12]ModelProvider(\d+B)?"
)
"""Providers that scale the rotary frequencies themselves, with fields of their own."""
_HYBRIDS = re.compile(
    r"megatron\.bridge\.models\.(mamba\.mamba_provider\.Mamba|hybrid\.hybrid_provider\.Hybrid)"
    r"ModelProvider"
    r"|megatron\.bridge\.models\.(mamba\.mamba_builder\.Mamba|hybrid\.hybrid_builder\.Hybrid)"
    r"ModelConfig"
    r"|megatron\.training\.models\.hybrid\.HybridModelConfig"
)
"""Providers of HybridModel: read if all layers are attention or MLP."""

_ELSEWHERE = ("peft", "mixed_precision_quantization", "quant_recipe")
"""Sections beside `model` that change the function, where they are set."""


def read_run_config(directory: Path) -> dict[str, Any] | None:
    """Megatron-LM's arguments of the model in a directory (`iter_*`); None without the file.

    Raises:
        UserError: not such a file, another kind of model, or fields that are not supported.
    """
    path = directory / NAME
    if not path.is_file():
        return None
    where = f"checkpoint file {path}"
    content = _content(path, where)
    for section in _ELSEWHERE:
        if content.get(section):
            raise UserError(f"{where}: models with {section} are not supported")
    target = content["model"].get("_target_")
    if not isinstance(target, str):
        raise UserError(f"{where}: its model has no class (_target_)")
    fields = dict(content["model"])
    if _HYBRIDS.fullmatch(target):
        return arguments_of(fields, where, hybrid=True)
    if _SCALED.fullmatch(target):
        fields = llama_31_scale(fields, where)
    elif not _PROVIDERS.fullmatch(target):
        raise UserError(f"{where}: models of the class {target[:100]} are not supported")
    return arguments_of(fields, where)


def ignored_of_run_config(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """(fields of the model that are read and ignored, sections that are not looked at).

    Args:
        directory: of a file that `read_run_config` has accepted.
    """
    where = f"checkpoint file {directory / NAME}"
    content = _content(directory / NAME, where)
    fields, target = dict(content["model"]), content["model"]["_target_"]
    if _SCALED.fullmatch(target):
        fields = llama_31_scale(fields, where)
    sections = [str(name) for name in content if name not in ("model", *_ELSEWHERE)]
    return ignored_of(fields, where, bool(_HYBRIDS.fullmatch(target))), sections


def _content(path: Path, where: str) -> Mapping[str, Any]:
    """What the file holds: sections, `model` among them."""
    content = read_yaml(path, where)
    model = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping):
        raise UserError(f"{where} has no section 'model'")
    return content
