"""The sentences of a JSONL file, one object a line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lirpa_megatron.errors import UserError
from lirpa_megatron.report.reader import parse


@dataclass(frozen=True)
class Item:
    """A sentence, or what is wrong with its line."""

    # "id" of the line, or its number
    name: str
    # "sentence" or "text"; None: token ids are given
    text: str | None = None
    # "ids"
    ids: tuple[int, ...] | None = None
    # "label": a class, or for next tokens the id of the right one; a text until the task says which
    # class it names
    label: int | str | None = None
    # "candidates": for each word those that may stand in its place
    candidates: tuple[tuple[str, ...], ...] | None = None
    # one line: the line is not usable
    error: str | None = None


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """The lines of a data file; a line that is wrong is an Item that says so.

    Args:
        path: JSON objects, one a line: "sentence" (or "text") or "ids"; "id", "label" and
            "candidates" if there are such.
        limit: of lines.

    Raises:
        UserError: the file cannot be read or is empty; a name that occurs twice.
    """
    try:
        # Not splitlines: a sentence may hold other separators, as U+2028.
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"data {path} cannot be read: {error.strerror}") from None
    numbered = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"data {path} is empty")
    items, seen = [], {}
    for number, line in numbered[:limit]:
        item = _item(number, line)
        if item.name in seen:
            raise UserError(
                f"data {path}, line {number}: id {item.name!r} is already used in line "
                f"{seen[item.name]}"
            )
        seen[item.name] = number
        items.append(item)
    return items


def _item(number: int, line: bytes) -> Item:
    name = f"line-{number}"
    try:
        plain = parse(line.decode("utf-8"))
        if not isinstance(plain, dict):
            raise UserError("not a JSON object")
        if plain.get("id") is not None:
            if not (_is_text(plain["id"]) or _is_id(plain["id"])):
                raise UserError("id is neither a name nor a number")
            name = str(plain["id"])
        return Item(name, **_fields(plain))
    except UserError as error:
        return Item(name, error=f"line {number}: {error}")
    except UnicodeDecodeError:
        return Item(name, error=f"line {number}: it is not text in UTF-8")
    except ValueError as error:
        return Item(name, error=f"line {number}: {error}")


def _fields(plain: dict[str, Any]) -> dict[str, Any]:
    text = plain.get("sentence", plain.get("text"))
    ids, label, candidates = plain.get("ids"), plain.get("label"), plain.get("candidates")
    if (text is None) == (ids is None):
        raise UserError("give either a 'sentence' or token 'ids'")
    if text is not None and not _is_text(text):
        raise UserError("the sentence is empty or not text")
    if ids is not None and (not isinstance(ids, list) or not ids or not all(map(_is_id, ids))):
        raise UserError("ids must be a list of whole numbers from 0 on")
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # tables with gaps write 1 as 1.0
    if label is not None and not (_is_id(label) or _is_text(label)):
        raise UserError(f"label {label!r} is not a whole number from 0 on, nor the name of a class")
    if candidates is not None:
        if text is None:
            raise UserError("candidates need a sentence")
        good = isinstance(candidates, list) and all(
            isinstance(c, list) and all(map(_is_text, c)) for c in candidates
        )
        if not good:
            raise UserError("candidates must be a list of lists of words")
        words = len(text.split())
        if len(candidates) != words:
            raise UserError(f"{len(candidates)} lists of candidates for {words} words")
        candidates = tuple(map(tuple, candidates))
    return {
        "text": text, "ids": None if ids is None else tuple(ids), "label": label,
        "candidates": candidates,
    }


def _is_text(value: Any) -> bool:
    """Not blank, and no half of a surrogate pair, which JSON can spell and UTF-8 cannot."""
    return isinstance(value, str) and bool(value.strip()) and not _SURROGATE.search(value)


_SURROGATE = re.compile("[\ud800-\udfff]")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
