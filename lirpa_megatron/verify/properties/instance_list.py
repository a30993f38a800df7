"""Instances to verify, and the rows of instances.csv that say which."""

from __future__ import annotations

import ast
import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.files import find_file, read_text, stem
from lirpa_megatron.verify.properties.sources import Named

# What a column's name may be in a first line that is no row: words without the dot of a file name.
_NAME = re.compile(r"[\w -]*[A-Za-z][\w -]*(\s*[(\[][\w ]*[)\]])?")


@dataclass(frozen=True)
class Instance:
    """A network and a property of it."""

    # network's name, as results call it
    network: str
    # NET.onnx[.gz], or a checkpoint's directory
    network_path: Path
    # which of the two
    is_checkpoint: bool
    # property's name, as results call it
    property: str
    # PROP.vnnlib[.gz]
    property_path: Path
    # seconds; None: no limit
    timeout: float | None = None
    # why it cannot be verified: its row is wrong
    error: str | None = None
    # networks by the names that the property (VNN-LIB 2.0) has for them; none: network_path alone
    named: Named = ()

    @property
    def files(self) -> tuple[str, str]:
        """Network and property as results tell files of one name apart: with their folder."""
        networks = dict.fromkeys(tail(path) for _, path in self.named)
        return "+".join(networks) or tail(self.network_path), tail(self.property_path)


@dataclass(frozen=True)
class Row:
    """A row of instances.csv; paths are not looked up yet."""

    line: int
    # as written
    network: str
    property: str
    # relative to the file's folder
    network_path: Path
    property_path: Path
    timeout: float | None = None
    # what is wrong with it, without the line
    error: str | None = None
    # of a list of pairs, the networks by their names in the property
    named: Named = ()


def read_rows(path: Path) -> list[Row]:
    """Rows of instances.csv: network, property and, if there is a limit, seconds.

    Paths are relative to the file's folder. Left out are empty lines, comments (#) and a first line
    of column names. `inf` and an empty cell are no limit. A row that is not like this is a Row with
    an error.

    Raises:
        UserError: unreadable, or no rows.
    """
    text = read_text(path, "instances").replace("\r\n", "\n").replace("\r", "\n")
    rows: list[Row] = []
    is_first = True
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip() or content.lstrip().startswith("#"):
            continue
        cells = _cells(content)
        header, is_first = is_first and _is_header(path.parent, cells), False
        if not header:
            rows.append(_row(path.parent, line, content, cells))
    if not rows:
        raise UserError(f"instances file {path} is empty")
    return rows


def _cells(content: str) -> list[str]:
    """The cells of a line; a list of networks, quoted or not, is one cell."""
    listed = re.match(r"\s*(\[[^\]]*\])\s*(?:,|$)", content)
    first = []
    if listed:
        first, content = [listed[1]], content[listed.end() :]
    try:
        cells = next(csv.reader([content], skipinitialspace=True), [])
    except csv.Error:
        return [content]
    cells = [cell.strip() for cell in (*first, *cells)]
    if len(cells) > 2:
        cells[-1] = re.sub(r"(^|\s+)#.*$", "", cells[-1])
    while len(cells) > 3 and not cells[-1]:  # commas at the end
        cells.pop()
    return cells


def _is_header(folder: Path, cells: Sequence[str]) -> bool:
    return len(cells) >= 2 and all(map(_NAME.fullmatch, cells)) and not any(
        (folder / cell).exists() for cell in cells[:2]
    )


def _row(folder: Path, line: int, content: str, cells: list[str]) -> Row:
    def wrong(why: str) -> Row:
        network, prop = (cell.replace("\0", "?") for cell in [*cells, "", ""][:2])
        prop = prop or f"line-{line}"
        if network.startswith(("[", "(")):  # a list is no file's name
            network = f"networks-line-{line}"
        return Row(line, network, prop, folder / network, folder / prop, None, why)

    if not 2 <= len(cells) <= 3 or not cells[0] or not cells[1]:
        return wrong(f"expected network,property,seconds, found {content.strip()[:200]!r}")
    named: Named = ()
    if cells[0].startswith(("[", "(")):
        pairs = _listed(cells[0])
        if pairs is None:
            return wrong(f"{cells[0][:200]!r} is neither a network nor a list of (name, network)")
        names = [name for name, _ in pairs]
        if len(pairs) > 1 and (len(set(names)) < len(names) or "" in names):
            return wrong(
                f"{cells[0][:200]!r}: each network needs a name of its own, as in "
                "[('f', 'a.onnx'), ('g', 'b.onnx')]"
            )
        cells[0] = "+".join(dict.fromkeys(network for _, network in pairs))
        named = tuple((name, folder / network) for name, network in pairs if name)
    paths = [path for _, path in named] or [folder / cells[0]]
    if any("\0" in cell for cell in cells):
        return wrong("it has a NUL character")
    seconds = cells[2] if len(cells) == 3 else ""
    try:
        timeout = float(seconds) if seconds else math.inf
    except ValueError:
        return wrong(f"{seconds!r} is not a number of seconds")
    if not timeout > 0:
        return wrong(f"the time limit {seconds} must be positive")
    return Row(
        line, cells[0], cells[1], paths[0], folder / cells[1],
        timeout if math.isfinite(timeout) else None, named=named,
    )


def _listed(cell: str) -> list[tuple[str, str]] | None:
    """The pairs of [('f', 'a.onnx'), ('g', 'b.onnx')], in quotes or not; None if it is none. A
    network alone has the name ""."""
    try:
        value = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pairs = re.findall(r"\(\s*([^(),]+?)\s*,\s*([^(),]+?)\s*\)", cell)
        bare = re.sub(r"\([^()]*\)", "", cell).strip("[]() ,")
        return pairs if pairs and not bare else None
    if isinstance(value, tuple) and all(isinstance(v, str) for v in value):
        value = [value]
    if not isinstance(value, (list, tuple)):
        return None
    pairs = [(v if isinstance(v, (list, tuple)) else ("", v)) for v in value]
    if not all(len(pair) == 2 and all(isinstance(v, str) for v in pair) for pair in pairs):
        return None
    return [(name, network) for name, network in pairs] or None


def looked_up(path: Path, row: Row, needs_network: bool = True) -> Row:
    """The row with the paths of its files, or with the error that one does not exist.

    Args:
        path: of instances.csv, for the error.
        row: of it.
        needs_network: whether its network's file is read.
    """
    error, network, prop, named = row.error, row.network_path, row.property_path, row.named
    if error is None:
        try:
            prop = find_file(prop, "property")
            if needs_network:
                network = find_file(network, "network")
                named = tuple((name, find_file(path, "network")) for name, path in named)
        except (UserError, OSError) as failure:
            error = str(failure)
    if error is not None:
        error = f"instances file {path}, line {row.line}: {error}"
    return Row(row.line, row.network, row.property, network, prop, row.timeout, error, named)


def same_file(path: Path) -> Path:
    """What a path is recognised by, whether the file is there or not, compressed or not."""
    return path.resolve().with_name(path.resolve().name.removesuffix(".gz"))


def tail(path: Path) -> str:
    """A file with its folder."""
    return "/".join(path.resolve().parts[-2:])


def names_of(paths: Iterable[Path]) -> dict[Path, str]:
    """Names of files without extensions; those of one name have as much of their folders before it
    as tells them apart."""
    by_stem: dict[str, dict[Path, list[Path]]] = {}
    for path in paths:
        by_stem.setdefault(stem(path), {}).setdefault(path.resolve(), []).append(path)
    names: dict[Path, str] = {}
    for name, files in by_stem.items():
        for depth in range(max(len(file.parts) for file in files)):
            labels = {f: "/".join([*f.parts[:-1][len(f.parts) - 1 - depth :], name]) for f in files}
            if len(set(labels.values())) == len(files):
                break
        else:  # NET.onnx beside NET.onnx.gz
            labels = {file: str(file) for file in files}
        names |= {path: labels[file] for file, written in files.items() for path in written}
    return names
