"""Files of results as plain dictionaries, every field checked before anything is made of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lirpa_megatron.errors import UserError
from lirpa_megatron.report.summary import WORDS


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The results that `verify` wrote: one JSON object a line; empty lines are passed over.

    Both kinds are read: of VNN-LIB properties, and of sentences (those have a `task`).

    Raises:
        UserError: the file cannot be read, holds no result, or has a line that is not one (named
            by its number).
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"results {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"results {path} is not a text file in UTF-8") from None
    results = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                results.append(checked(line))
            except ValueError as error:
                raise UserError(
                    f"line {number} of {path} is not a result of verify: {error}"
                ) from None
    if not results:
        raise UserError(f"results {path} is empty: there is nothing to report")
    return results


def parse(line: str) -> Any:
    """A line of JSON from a stranger; ValueError says what is wrong with it."""
    if _depth(line) > _MOST_DEPTH:
        raise ValueError("it is nested too deeply")
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg}, column {error.colno})") from None


def checked(line: str) -> dict[str, Any]:
    """A line as a result of `verify`; ValueError says what is wrong with it."""
    result = parse(line)
    if not isinstance(result, dict):
        raise ValueError("it is not a JSON object")
    for name in _REQUIRED:
        if result.get(name) is None:
            raise ValueError(f"it has no {name}")
    if result["result"] not in tuple(WORDS):
        raise ValueError(f"its result is not one of {', '.join(WORDS)}")
    _check(result, _FIELDS, "its")
    for position in result.get("positions") or ():
        if not isinstance(position, dict) or position.get("position") is None:
            raise ValueError("its positions are not objects with a position")
        _check(position, _POSITION_FIELDS, "of a position, its")
        if not 0 <= position["position"] < len(result.get("tokens") or ()):
            raise ValueError(f"position {position['position']} is none of its tokens")
    return result


def _depth(line: str) -> int:
    """Of brackets outside strings. json's parser recurses, and where a library has raised Python's
    limit of recursion it ends the process instead of raising."""
    depth = deepest = 0
    for token in _STRINGS_AND_BRACKETS.findall(line):
        depth += (token in "[{") - (token in "]}")
        deepest = max(deepest, depth)
    return deepest


def _check(values: dict[str, Any], fields: dict[str, _Field], whose: str) -> None:
    for name, (noun, is_one) in fields.items():
        value = values.get(name)
        if value is not None and not is_one(value):
            raise ValueError(f"{whose} {name} is not {noun}")


def _is_number(value: Any) -> bool:
    """NaN and infinity pass here: they are shown as missing and never certify."""
    return isinstance(value, float) or (_is_whole(value) and abs(value) < 2**1000)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(is_one(item) for item in value)


_STRINGS_AND_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|[][{}]')
_MOST_DEPTH = 100
_Field = tuple[str, Callable[[Any], bool]]
_TEXT: _Field = "a text", _is_text
_NUMBER: _Field = "a number", _is_number
_WHOLE: _Field = "a whole number", _is_whole
_REQUIRED = ("network", "property", "result", "method", "seconds")
_FIELDS: dict[str, _Field] = {
    "network": _TEXT,
    "property": _TEXT,
    "method": _TEXT,
    "error": _TEXT,
    "note": _TEXT,
    "violation": _NUMBER,
    "float64_violation": _NUMBER,
    "network_file": _TEXT,
    "property_file": _TEXT,
    "task": _TEXT,
    "tensor_parallel": _WHOLE,
    "sharded_share": _NUMBER,
    "pipeline_parallel": _WHOLE,
    "seconds": ("a time", lambda value: _is_number(value) and 0 <= value < math.inf),
    "lower_bounds": (
        "a list of numbers", _list_of(lambda value: value is None or _is_number(value))
    ),
    "question": _TEXT,
    "norm": _TEXT,
    "iteration": _TEXT,
    "dtype": _TEXT,
    "rounding": _TEXT,
    "live_check": ("true or false", lambda value: isinstance(value, bool)),
    "stored_dtype": _TEXT,
    "bound": _NUMBER,
    "branching": _TEXT,
    "asked_branching": _TEXT,
    "onnx_output": _TEXT,
    "domains": _WHOLE,
    "open_domains": _WHOLE,
    "inner_domains": _WHOLE,
    "words": _TEXT,
    "shape": _TEXT,
    "tolerance": _NUMBER,
    "prompt": _TEXT,
    "label_tokens": _TEXT,
    "eps": _NUMBER,
    "order": _WHOLE,
    "splits": _WHOLE,
    "layer": _WHOLE,
    "vectors": _TEXT,
    "proved_share": _NUMBER,
    "pieces": _WHOLE,
    "tokens": ("a list of texts", _list_of(_is_text)),
    "text": _TEXT,
    "unknown_tokens": _WHOLE,
    "unknown_text": ("a list of texts", _list_of(_is_text)),
    "fixed": ("a list of positions", _list_of(_is_whole)),
    "label": _WHOLE,
    "predicted": _WHOLE,
    "label_name": _TEXT,
    "predicted_name": _TEXT,
    "margin": _NUMBER,
    "certified_radius": _NUMBER,
    "attacked_radius": _NUMBER,
    "positions": ("a list", lambda value: isinstance(value, list)),
    "peak_memory_mib": _NUMBER,
}
_POSITION_FIELDS: dict[str, _Field] = {
    "position": _WHOLE,
    "certified_radius": _NUMBER,
    "attacked_radius": _NUMBER,
    "result": ("a result", lambda value: value in tuple(WORDS)),
    "margin": _NUMBER,
}
