"""What a folder says of its model and nobody looks at: for `inspect --verbose`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lirpa_megatron.checkpoint import arguments
from lirpa_megatron.checkpoint.hugging_face_config import CONFIG, ignored_of_config
from lirpa_megatron.checkpoint.nemo import NAME as NEMO
from lirpa_megatron.checkpoint.nemo import ignored_of_nemo
from lirpa_megatron.checkpoint.provider_fields import shown
from lirpa_megatron.checkpoint.run_config import NAME as RUN_CONFIG
from lirpa_megatron.checkpoint.run_config import ignored_of_run_config
from lirpa_megatron.checkpoint.source import read_source

_KNOWN, _ELSEWHERE = "known to be neutral", "not part of the model, not looked at"
_UNKNOWN = "no model is built from it"


def ignored_lines(checkpoint: Path, iteration: int | str | None = None) -> list[str]:
    """A line for each key that is read and ignored, below one that says where they stand.

    Args:
        checkpoint, iteration: as for `read_model_description`, which has accepted them.
    """
    weights, stored, source = read_source(checkpoint, iteration)
    fields: dict[str, Any] = {}
    sections: list[str] = []
    why = _KNOWN
    if source == CONFIG:
        fields = ignored_of_config(checkpoint)
    elif source == RUN_CONFIG:
        fields, sections = ignored_of_run_config(weights.directory)
    elif source == NEMO:
        fields, sections = ignored_of_nemo(weights.directory)
    elif stored is not None:
        fields, why = arguments.ignored_of(stored), _UNKNOWN
    rows = [(_printable(name), shown(value), why) for name, value in fields.items()]
    rows += [(_printable(name), "a section", _ELSEWHERE) for name in sections]
    if not rows:
        return [f"Nothing in {source} was read and ignored."]
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {value} ({reason})" for name, value, reason in sorted(rows)]
    return [f"Read and ignored, in {source}, as the function does not depend on it:", *lines]


def _printable(name: Any) -> str:
    text = str(name)[:80]
    return text if text.isprintable() else repr(text)
