"""What a command was given: the command line and, behind it, --config's YAML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lirpa_megatron.cli.capabilities import check_asked
from lirpa_megatron.cli.options import add_question, make_parser
from lirpa_megatron.errors import UserError

_EXCLUSIVE = (
    ("load", "onnx"), ("network", "load"), ("network", "onnx"), ("vnnlib", "instances"),
    ("query", "vnnlib"), ("query", "instances"), ("network", "instances"), ("data", "vnnlib"),
    ("data", "instances"), ("data", "query"), ("data", "network"),
)
"""Of each group, one option at most; an option of the command line replaces the configuration's."""


def parse_arguments(argv: list[str], version: str) -> dict[str, Any]:
    """Arguments given by the command line and, behind it, by --config.

    Returns:
        "command" and the given options by name; nothing for options that nobody gave.

    Raises:
        UserError: bad usage, an unreadable configuration, or an unknown key in it.
    """
    parser = make_parser(version)
    given = vars(parser.parse_args(argv))
    if "config" in given:
        configured = _from_config(parser, given["config"])
        for group in _EXCLUSIVE:
            if any(name in given for name in group):
                configured = {k: v for k, v in configured.items() if k not in group}
        given = configured | given
    for first, second in _EXCLUSIVE:
        if first in given and second in given:
            names = ["QUERY" if n == "query" else f"--{n}" for n in (first, second)]
            raise UserError(f"{names[0]} and {names[1]} exclude each other: give one of them")
    if given["command"] == "verify":
        _check_sentences(given)
    elif given["command"] == "supports":
        check_asked(given)
    return given


def _check_sentences(given: dict[str, Any]) -> None:
    """Options of runs over sentences and over properties do not go together."""
    if "data" in given:
        if "load" not in given:
            raise UserError("--data needs the language model: give --load DIR")
        if given.get("complete"):
            raise UserError("--complete decides properties of ReLU networks (--vnnlib or "
                            "--instances): leave it out with --data")
        return
    parser = argparse.ArgumentParser()
    add_question(parser.add_argument)
    names = {action.dest for action in parser._actions} - {"help"}
    for name in sorted(names & set(given)):
        raise UserError(f"--{name.replace('_', '-')} needs sentences: give --data too")


def _from_config(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """Options of a YAML file, checked as if they stood on the command line."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "not a text file"
        raise UserError(f"config {path}{where} is not valid YAML: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config {path} must map option names to values")
    known = _verify_options(parser)
    tokens = ["verify"]
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name not in known:
            raise UserError(
                f"config {path}: unknown option {key!r}; the options are {', '.join(sorted(known))}"
            )
        tokens += _as_tokens(name, value, known[name], where=f"config {path}")
    try:
        options = vars(parser.parse_args(tokens))
    except UserError as error:
        raise UserError(f"config {path}: {error}") from None
    del options["command"]
    return {
        name: path.parent / value if isinstance(value, Path) else value
        for name, value in options.items()
    }


def _as_tokens(name: str, value: Any, count: int | str | None, where: str) -> list[str]:
    """An option as on the command line; count: argparse's nargs."""
    is_flag = count == 0
    if count == "+" and isinstance(value, list) and value:
        if not any(isinstance(v, (bool, dict, list)) or v is None for v in value):
            return [f"--{name}", *map(str, value)]
    if is_flag and isinstance(value, bool):
        return [f"--{name}"] if value else []
    if is_flag or isinstance(value, (bool, dict, list)) or value is None:
        wanted = "true or false" if is_flag else "one value"
        raise UserError(f"{where}: option {name} takes {wanted}, not {value!r}")
    return [f"--{name}={value}"]


def _verify_options(parser: argparse.ArgumentParser) -> dict[str, int | str | None]:
    """Option names of `verify` that a configuration may set -> argparse's nargs; 0 is a flag."""
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    actions = commands.choices["verify"]._actions
    names = {a.option_strings[-1][2:]: a.nargs for a in actions if a.option_strings}
    # not --network: it is given once for each network
    left_out = ("help", "config", "network")
    return {name: count for name, count in names.items() if name not in left_out}
