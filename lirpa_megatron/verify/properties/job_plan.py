"""All checks of a run's arguments in one place, before any work, and what then is to be done."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lirpa_megatron.checkpoint.reader import read_description
from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.files import find_file, stem
from lirpa_megatron.verify.properties.instance_list import (
    Instance,
    Row,
    looked_up,
    names_of,
    read_rows,
    same_file,
)
from lirpa_megatron.verify.properties.options import VerifyOptions
from lirpa_megatron.verify.properties.output import merge_parts, parts_of
from lirpa_megatron.verify.properties.results import Result, read_results
from lirpa_megatron.verify.properties.search_files import is_of, read_search, search_files


@dataclass(frozen=True)
class JobPlan:
    """What a run does."""

    # to be verified, in order
    instances: list[Instance]
    # whether the network was named, so that its errors end the run
    one_network: bool
    # whether the property was named, so that its errors end the run
    one_property: bool
    # file of results; None: standard output
    output: Path | None = None
    # how much of the file stays (--resume)
    keep_bytes: int = 0
    # results already there (--resume)
    done: list[Result] = field(default_factory=list)
    # searches that were ended, by their files (--resume)
    searches: dict[Path, dict[str, Any]] = field(default_factory=dict)


def plan_job(arguments: dict[str, Any], options: VerifyOptions) -> JobPlan:
    """Checks the arguments of `verify` (rank 0 does this for all).

    Args:
        arguments: the options that were given, by name.
        options: those of them that say what to compute.

    Raises:
        UserError: the first thing that is wrong. A row of instances.csv that is wrong is an
            instance with an error, unless all are.
    """
    instances = _instances(arguments, options)
    output, keep_bytes, done, searches = arguments.get("output"), 0, [], {}
    if output is not None:
        check_writable(output)
        parts = parts_of(output)
        if parts and not arguments.get("resume"):
            raise UserError(
                f"{parts[0]} has results of a run that did not finish: give --resume to keep them, "
                "or remove it"
            )
    if options.record is not None:
        if not options.complete or "instances" in arguments:
            raise UserError("--record writes the proof of one property: give --complete and "
                            "--vnnlib")
        if options.splits:
            raise UserError("--record does not write proofs of pieces of the input: leave out "
                            "--splits")
        check_writable(options.record)
    if options.searches is not None:
        check_writable(options.searches)
        if not arguments.get("resume"):
            _check_no_search(options.searches, instances)
    if arguments.get("resume"):
        if output is None and options.record is None:
            raise UserError("--resume needs --output, the file to continue, or --record")
        if options.searches is not None:
            searches = {path: read_search(path) for path in search_files(options.searches)}
        for path, found in searches.items() if "instances" not in arguments else ():
            if not is_of(found, instances[0]):  # it would be removed in the end
                raise UserError(f"search {path} is of property {found['property']['file']} of "
                                f"network {found['network']['file']}: remove it to begin anew")
        if output is not None:
            merge_parts(output)
        if output is not None and output.exists():
            earlier, keep_bytes = read_results(output)
            going_on = [i for i in instances if any(is_of(s, i) for s in searches.values())]
            done = [r for r in earlier if any(_is_of(r, i, options) for i in instances)]
            done = [r for r in done if r.result != "timeout"
                    or not any(_is_of(r, i, options) for i in going_on)]
    return JobPlan(
        [i for i in instances if not any(_is_of(r, i, options) for r in done)],
        one_network=any(name in arguments for name in ("load", "onnx", "network")),
        one_property="instances" not in arguments,
        output=output,
        keep_bytes=keep_bytes,
        done=done,
        searches=searches,
    )


def _check_no_search(path: Path, instances: list[Instance]) -> None:
    """Raises UserError if the run would overwrite or remove what is left of an earlier search."""
    for file in search_files(path):
        found = read_search(file)
        if any(is_of(found, instance) for instance in instances):
            raise UserError(f"search {file} was ended before it was through: give --resume to go "
                            "on with it, or remove it to begin anew")
        raise UserError(f"search {file} is of property {found['property']['file']} of network "
                        f"{found['network']['file']}: move it away, or write somewhere else")


def _is_of(result: Result, instance: Instance, options: VerifyOptions) -> bool:
    """Whether an earlier result is this instance's; files of one name in two folders are two."""
    if result.key != (instance.network, instance.property, options.result_method):
        return False
    asked = (options.rounding, options.order, options.splits, options.branching,
             options.onnx_output, options.no_live_check)
    had = (result.rounding or "nearest", result.order or 1, result.splits or 0,
           result.asked_branching or "auto", result.onnx_output, result.live_check is False)
    if had != asked or not _is_in(result, options.dtype):
        return False
    known = result.network_file, result.property_file
    return all(a in (None, b) for a, b in zip(known, instance.files, strict=True))


def _is_in(result: Result, dtype: str | None) -> bool:
    """Whether bounds were computed in a dtype, or if none is asked for, in no less than the one
    that is chosen then."""
    if result.dtype is None or dtype is not None:
        return result.dtype in (None, dtype)
    return (result.stored_dtype, result.dtype) != ("float64", "float32")


def _instances(arguments: dict[str, Any], options: VerifyOptions) -> list[Instance]:
    named = _named_network(arguments)
    for option in ("vnnlib", "query"):
        if option in arguments:
            prop = find_file(arguments[option], "property")
            if "network" in arguments:
                return [_of_networks(arguments["network"], prop, options)]
            if named is None:
                what = "--vnnlib" if option == "vnnlib" else "a query"
                raise UserError(f"{what} needs the network: give --load DIR or --onnx FILE, or "
                                "--network NAME=FILE for each")
            return [Instance(*named, stem(prop), prop, options.timeout)]
    if "instances" not in arguments:
        raise UserError("nothing to verify: give --vnnlib PROP or --instances CSV")
    path = arguments["instances"]
    rows = read_rows(path)
    if named is not None:
        rows = _rows_of(named, rows, path)
    rows = [looked_up(path, row, needs_network=named is None) for row in rows]
    wrong = [row.error for row in rows if row.error is not None]
    if len(wrong) == len(rows):
        others = f" (and so are {len(wrong) - 1} more rows, which are all)" * (len(wrong) > 1)
        raise UserError(f"{wrong[0]}{others}")
    paths = [[path for _, path in row.named] or [row.network_path] for row in rows]
    networks = names_of(path for some in paths for path in some)
    properties = names_of(row.property_path for row in rows)
    return [
        Instance(
            *(named or (_network_name(row, networks), row.network_path, False)),
            properties[row.property_path], row.property_path, options.timeout or row.timeout,
            row.error, () if named else row.named,
        )
        for row in rows
    ]


def _of_networks(
    networks: list[tuple[str, Path]], prop: Path, options: VerifyOptions
) -> Instance:
    """A property of networks that are given by name, all ONNX files or all checkpoints."""
    names = [name for name, _ in networks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--network {twice}=FILE is given twice")
    kinds = {path.is_dir() for _, path in networks}
    if len(kinds) > 1:
        raise UserError("--network: give ONNX files or checkpoints, not one of each")
    is_checkpoint = kinds.pop()
    named = tuple(
        (name, path if is_checkpoint else find_file(path, "network")) for name, path in networks
    )
    stems = names_of(path for _, path in named)
    label = "+".join(dict.fromkeys(stems[path] for _, path in named))
    return Instance(
        label, named[0][1], is_checkpoint, stem(prop), prop, options.timeout, named=named
    )


def _network_name(row: Row, names: dict[Path, str]) -> str:
    paths = [path for _, path in row.named] or [row.network_path]
    return "+".join(dict.fromkeys(names[path] for path in paths))


def _rows_of(named: tuple[str, Path, bool], rows: list[Row], path: Path) -> list[Row]:
    """The rows of a network: of that file, or for a checkpoint of a file of its network's name; and
    those that are too wrong to say whose they are."""
    name, file, is_checkpoint = named
    alike = [row for row in rows if row.error is None and stem(row.network_path) == name]
    if is_checkpoint:
        chosen, of = alike, f"network {name}"
        files = {same_file(row.network_path): row.network for row in alike}
        if len(files) > 1:
            raise UserError(
                f"checkpoint {file} holds network {name}, but instances file {path} has rows of "
                f"several files with that name: {', '.join(sorted(files.values())[:5])}; move the "
                "rows of one of them to a separate file"
            )
    else:
        own = same_file(file)
        chosen, of = [row for row in rows if same_file(row.network_path) == own], f"network {name}"
        chosen = [row for row in chosen if row.error is None]
        if alike and not chosen:
            others = ", ".join(sorted({str(row.network_path) for row in alike})[:5])
            of = f"network {file} (those of {name} are of {others})"
    if not chosen:
        networks = sorted({stem(row.network_path) for row in rows if row.error is None})
        raise UserError(
            f"instances file {path} has no rows for {of}; its networks are {', '.join(networks)}"
        )
    keep = {row.line for row in chosen} | {row.line for row in rows if row.error is not None}
    return [row for row in rows if row.line in keep]


def _named_network(arguments: dict[str, Any]) -> tuple[str, Path, bool] | None:
    """Name, path and whether it is a checkpoint, of --load or --onnx."""
    if "load" in arguments:
        return read_description(arguments["load"]).name, arguments["load"], True
    if "onnx" in arguments:
        path = find_file(arguments["onnx"], "network")
        return stem(path), path, False
    return None


def check_writable(path: Path) -> None:
    """Raises UserError unless a file of results can be written there."""
    if path.is_dir():
        raise UserError(f"output {path} is a directory")
    if not path.parent.is_dir():
        raise UserError(f"output {path} cannot be written: folder {path.parent} does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"output {path} cannot be written: permission denied")
