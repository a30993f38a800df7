"""Files of records (`records`): written at once, and read with every field checked."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from lirpa_megatron.checkpoint.plain_files import parse_json
from lirpa_megatron.errors import UserError

FORMAT, VERSION = "lirpa_megatron record", 4


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes it at once: a file that is there is a whole one."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def read_versioned(
    path: Path, what: str, form: str, versions: Collection[int], other: str
) -> dict[str, Any]:
    """What a JSON file of ours says.

    Args:
        path: of the file.
        what: it is, in a word.
        form: its "format".
        versions: that this program reads, the newest last.
        other: what is said of a file of another format.

    Raises:
        UserError: it is not such a file.
    """
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{what} {path} is not a JSON file") from None
    if not isinstance(found, dict) or found.get("format") != form:
        raise UserError(f"{path} is not {other}")
    version = found.get("version")
    if type(version) is not int or version not in versions:
        raise UserError(f"{what} {path} has version {version}; this program reads {max(versions)}")
    return found


def read_record(path: Path) -> dict[str, Any]:
    """A record, every field that is used checked."""
    record = read_versioned(
        path, "record", FORMAT, (2, 3, VERSION), "a record of verify --record"
    )
    if record["version"] != VERSION:
        record = _of_this_version(record)
    try:
        for part in ("network", "property"):
            if not all(isinstance(record[part][k], str) for k in ("name", "file", "sha256")):
                raise TypeError
        if not isinstance(record["network"]["checkpoint"], bool):
            raise TypeError
        for pair in record["network"].get("named", ()):
            if len(pair) != 2 or not all(isinstance(value, str) for value in pair):
                raise TypeError
        for tree in record["trees"]:
            if not _are_whole([tree["box"], tree["disjunct"]]):
                raise TypeError
            for leaf in tree["leaves"]:
                bound = leaf["bound"]
                if not all(map(_is_split, leaf["splits"])):
                    raise TypeError
                if bound is not None and type(bound) not in (int, float):
                    raise TypeError
                if bound is not None and not 0 < bound < math.inf:
                    raise UserError(f"record {path} has a leaf with a bound of {bound}, which "
                                    "proves nothing")
        for tree in record["cuts"]:
            if not _are_whole([tree["box"]]) or not all(map(_is_node, tree["nodes"])):
                raise TypeError
        for claim in record["inner"]:
            splits = [split for leaf in claim["leaves"] for split in leaf]
            if not _are_whole([claim["box"], claim["neuron"], claim["sign"]]) \
                    or claim["sign"] not in (1, -1) or type(claim["bound"]) is not float \
                    or not all(map(_is_split, splits)):
                raise TypeError
    except (KeyError, TypeError, ValueError):
        raise UserError(f"record {path} is damaged: a field is missing or of a wrong kind") \
            from None
    return record


def _of_this_version(record: dict[str, Any]) -> Any:
    """A record of version 2, without cuts, or 3, whose splits have no points: they are 0; None if
    it is damaged."""
    def split(old: Any) -> Any:
        return [*old, 0.0] if isinstance(old, list) and len(old) == 2 else None

    try:
        trees = [
            {**tree, "leaves": [{**leaf, "splits": list(map(split, leaf["splits"]))}
                                for leaf in tree["leaves"]]} for tree in record["trees"]
        ]
        inner = [
            {**claim, "leaves": [list(map(split, leaf)) for leaf in claim["leaves"]]}
            for claim in record["inner"]
        ]
    except (KeyError, TypeError):
        trees = inner = None
    return {"cuts": [], **record, "version": VERSION, "trees": trees, "inner": inner}


def _is_split(split: Any) -> bool:
    return isinstance(split, list) and len(split) == 3 and _are_whole(split[:2]) \
        and type(split[2]) is float


def _is_node(node: Any) -> bool:
    if not isinstance(node, list):
        return False
    if len(node) == 3:
        return type(node[0]) is int and type(node[1]) is float and _are_whole(node[2])
    return len(node) == 2 and _are_whole(node[0]) and type(node[1]) in (float, type(None))


def _are_whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int for v in values)


def text_hash(path: Path) -> str:
    """Of what the file says, packed or not."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"property {path} cannot be read: {error}") from None
    return hashlib.sha256(data).hexdigest()
