"""All checks of a run's arguments in one place, before any work, and what then is to be done."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lirpa_megatron.checkpoint.reader import read_description
from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.files import find_file, stem
from lirpa_megatron.verify.options import VerifyOptions
from lirpa_megatron.verify.results import Result, read_results
from lirpa_megatron.verify.runner import Instance, read_instances


@dataclass(frozen=True)
class Plan:
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


def make_plan(arguments: dict[str, Any], options: VerifyOptions) -> Plan:
    """Checks the arguments of `verify` (rank 0 does this for all).

    Args:
        arguments: the options that were given, by name.
        options: those of them that say what to compute.

    Raises:
        UserError: the first thing that is wrong.
    """
    instances = _instances(arguments, options)
    output, keep_bytes, done = arguments.get("output"), 0, []
    if output is not None:
        check_writable(output)
    if arguments.get("resume"):
        if output is None:
            raise UserError("--resume needs --output: it goes on with that file")
        if output.exists():
            earlier, keep_bytes = read_results(output)
            _check_names(instances)
            wanted = {(i.network, i.property, options.method) for i in instances}
            done = [result for result in earlier if result.key in wanted]
    finished = {result.key for result in done}
    return Plan(
        [i for i in instances if (i.network, i.property, options.method) not in finished],
        one_network="load" in arguments or "onnx" in arguments,
        one_property="vnnlib" in arguments,
        output=output,
        keep_bytes=keep_bytes,
        done=done,
    )


def _instances(arguments: dict[str, Any], options: VerifyOptions) -> list[Instance]:
    named = _named_network(arguments)
    if "vnnlib" in arguments:
        if named is None:
            raise UserError("--vnnlib needs the network: give --load DIR or --onnx FILE")
        prop = find_file(arguments["vnnlib"], "property")
        return [Instance(*named, prop, options.timeout)]
    if "instances" not in arguments:
        raise UserError("nothing to verify: give --vnnlib PROP or --instances CSV")
    rows = read_instances(arguments["instances"])
    if named is not None:
        chosen = [row for row in rows if stem(row[0]) == named[0]]
        if not chosen:
            networks = ", ".join(sorted({stem(row[0]) for row in rows}))
            raise UserError(
                f"instances file {arguments['instances']} has no rows for network {named[0]}; "
                f"its networks are {networks}"
            )
        return [Instance(*named, prop, options.timeout or limit) for _, prop, limit in chosen]
    paths = {network: find_file(network, "network") for network, _, _ in rows}
    return [
        Instance(stem(network), paths[network], False, prop, options.timeout or limit)
        for network, prop, limit in rows
    ]


def _named_network(arguments: dict[str, Any]) -> tuple[str, Path, bool] | None:
    """Name, path and whether it is a checkpoint, of --load or --onnx."""
    if "load" in arguments:
        return read_description(arguments["load"]).name, arguments["load"], True
    if "onnx" in arguments:
        path = find_file(arguments["onnx"], "network")
        return stem(path), path, False
    return None


def _check_names(instances: list[Instance]) -> None:
    """Results name files without folders; --resume must not take one file for another."""
    seen: dict[tuple[str, str], Instance] = {}
    for instance in instances:
        other = seen.setdefault((instance.network, instance.property), instance)
        if other.network_path != instance.network_path:
            paths = f"{other.network_path} and {instance.network_path}"
        elif other.property_path != instance.property_path:
            paths = f"{other.property_path} and {instance.property_path}"
        else:
            continue
        raise UserError(f"--resume cannot tell {paths} apart: they have the same name")


def check_writable(path: Path) -> None:
    """Raises UserError unless a file of results can be written there."""
    if path.is_dir():
        raise UserError(f"output {path} is a directory")
    if not path.parent.is_dir():
        raise UserError(f"output {path} cannot be written: folder {path.parent} does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"output {path} cannot be written: permission denied")
