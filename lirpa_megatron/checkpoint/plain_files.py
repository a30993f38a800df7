"""YAML and JSON files of a folder that may come from a stranger: plain data, of limited size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lirpa_megatron.errors import UserError

_LARGEST = 2**24
"""Bytes. Files that describe a model have some kilobytes, an index of weights a few megabytes."""
_DEEPEST = 100
"""Collections inside collections; such files have ten."""


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds; tags of Python objects are refused and nothing is built of them."""
    import yaml

    text = _text(path, what)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise UserError(f"{what} is nested more than {_DEEPEST} deep")
        return yaml.safe_load(text)
    except yaml.constructor.ConstructorError as error:
        reason = error.problem or "of an unknown tag"
        raise UserError(f"{what} is refused: {reason}") from None
    except (yaml.YAMLError, RecursionError, ValueError):
        raise UserError(f"{what} is not valid YAML") from None


def read_json(path: Path, what: str) -> Any:
    """What a JSON file holds."""
    try:
        return parse_json(_text(path, what))
    except ValueError:
        raise UserError(f"{what} is not valid JSON") from None


def parse_json(text: str, **options: Any) -> Any:
    """As json.loads, which overflows the stack of the process where brackets are deep enough.

    Raises:
        ValueError: not JSON, or nested too deep.
    """
    depth = 0
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', text, re.DOTALL):
        depth += (found[0] in "[{") - (found[0] in "]}")
        if depth > _DEEPEST:
            raise json.JSONDecodeError(f"nested more than {_DEEPEST} deep", text, found.start())
    return json.loads(text, **options)


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
