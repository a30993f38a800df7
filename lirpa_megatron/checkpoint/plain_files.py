"""YAML and JSON files of a folder that may come from a stranger: plain data, of limited size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lirpa_megatron.errors import UserError

_LARGEST = 2**24
"""Bytes. Files that describe a model have some kilobytes, an index of weights a few megabytes."""


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds; tags of Python objects are refused and nothing is built of them."""
    import yaml

    text = _text(path, what)
    try:
        return yaml.safe_load(text)
    except yaml.constructor.ConstructorError as error:
        reason = error.problem or "of an unknown tag"
        raise UserError(f"{what} is refused: {reason}") from None
    except (yaml.YAMLError, RecursionError, ValueError):
        raise UserError(f"{what} is not valid YAML") from None


def read_json(path: Path, what: str) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(_text(path, what))
    except (ValueError, RecursionError):
        raise UserError(f"{what} is not valid JSON") from None


def _text(path: Path, what: str) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(f"{what} has more than {_LARGEST} bytes, which is not believable")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{what} does not exist") from None
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} is not a text file") from None
