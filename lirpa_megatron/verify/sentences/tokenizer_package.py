"""What tokenizers of other packages need: the package, and the settings beside their file."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from lirpa_megatron.checkpoint.plain_files import parse_json
from lirpa_megatron.errors import UserError


def package(path: Path, why: str, name: str = "tokenizers") -> Any:
    """The package that a tokenizer's file needs; raises UserError with what installs it."""
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"{path} {why} the {name} package: pip install {name}, or give a vocabulary file of "
            "whole words"
        )
    return importlib.import_module(name)


def config_beside(path: Path, names: dict[str, tuple[type, ...]]) -> dict[str, Any]:
    """Settings of `tokenizer_config.json` by name, which have one of the types; none of null."""
    beside = path.with_name("tokenizer_config.json")
    if not beside.is_file():
        return {}
    try:
        config = parse_json(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{beside}, beside tokenizer {path}, is not JSON") from None
    if not isinstance(config, dict) or any(
        name in config and not isinstance(config[name], kinds) for name, kinds in names.items()
    ):
        raise UserError(f"{beside}: {' and '.join(names)} must be {_kinds(names)}")
    return {name: config[name] for name in names if config.get(name) is not None}


def _kinds(names: dict[str, tuple[type, ...]]) -> str:
    texts = {str: "text", bool: "true or false"}
    return ", ".join(dict.fromkeys(texts[kinds[0]] for kinds in names.values()))
