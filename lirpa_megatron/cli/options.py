"""Arguments of the command line, from argv and from --config's YAML file."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from lirpa_megatron.cli.help import EXAMPLES, RESULTS
from lirpa_megatron.errors import UserError

# Of each group, one option at most; an option of the command line replaces the configuration's.
_MODEL_CONFIG = "Megatron's model arguments by name, to add to or replace the checkpoint's"
_WHICH_OUTPUT = "output of the ONNX graph to use, if it has several"
_EXCLUSIVE = (("load", "onnx"), ("vnnlib", "instances"), ("data", "vnnlib"), ("data", "instances"))


def launched_as_rank0() -> bool:
    """Whether this process talks to the user; known before process groups exist."""
    return os.environ.get("RANK", "0") == "0"


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, and prints on rank 0 only."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        if launched_as_rank0():
            super()._print_message(message, file)


def _number(kind: type, minimum: float, exclusive: bool = False) -> Any:
    """An argparse type: a finite number of a kind, at least (or above) a minimum."""
    wanted = f"{'above' if exclusive else 'of at least'} {minimum:g}"
    noun = "a whole number" if kind is int else "a number"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < minimum or (exclusive and value == minimum):
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} {wanted}")
        return value

    return parse


def _method(text: str) -> str:
    """An argparse type: a method under its usual name."""
    from lirpa_megatron.crown.options import check_method

    try:
        return check_method(text)
    except (ValueError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_parser(version: str) -> argparse.ArgumentParser:
    """The parser; options that are not given are absent from its result."""
    parser = _Parser(
        prog="lirpa-megatron",
        description="Certified bounds for tensor-parallel Megatron networks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lirpa-megatron {version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_imports(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_report(commands)
    return parser


def _add_command(commands: Any, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=epilog,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_imports(commands: Any) -> None:
    onnx = _add_command(
        commands, "import-onnx",
        "Convert an ONNX network to a Megatron checkpoint that any tensor-parallel size can load.",
        "example:\n  torchrun --nproc-per-node 2 -m lirpa_megatron import-onnx net.onnx checkpoint",
    )
    onnx.add_argument("net", metavar="NET", type=Path, help="NET.onnx or NET.onnx.gz")
    onnx.add_argument("--onnx-output", metavar="NAME", help=_WHICH_OUTPUT)
    folder = _add_command(
        commands, "import-hf",
        "Convert a Hugging Face language model to a Megatron checkpoint and compare their logits.",
        "example:\n  lirpa-megatron import-hf gpt2 checkpoint",
    )
    folder.add_argument("folder", metavar="FOLDER", type=Path, help="the model's folder")
    folder.add_argument("--model-config", metavar="YAML", type=Path, help=_MODEL_CONFIG)
    for parser in (onnx, folder):
        parser.add_argument("out", metavar="OUT", type=Path, help="directory to create")
        parser.add_argument(
            "--force", action="store_true", help="replace OUT if it is a checkpoint"
        )


def _iteration(text: str) -> str:
    """An argparse type: the number of an iteration, or "release"."""
    if text != "release" and not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'release'")
    return text


def _add_inspect(commands: Any) -> None:
    parser = _add_command(
        commands, "inspect",
        "Show what a Megatron checkpoint contains, what can be verified, and what that takes.",
        "example:\n  lirpa-megatron inspect checkpoint --iteration 1000 --seq-length 16",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", type=Path, help="directory with the tracker file")
    add(
        "--iteration", metavar="N", type=_iteration,
        help="iteration to read, or 'release' (default: the tracker's)",
    )
    add("--model-config", metavar="YAML", type=Path, help=_MODEL_CONFIG)
    add(
        "--seq-length", metavar="N", type=_number(int, 1),
        help="tokens per input, for the estimate (default 32)",
    )
    add(
        "--max-spec-rows", metavar="N", type=_number(int, 1),
        help="maximum rows of bounds at once, for the estimate (default: all)",
    )


def _add_verify(commands: Any) -> None:
    parser = _add_command(
        commands, "verify",
        "Verify sentences with a language model (--data), or VNN-LIB properties of a network.",
        RESULTS + EXAMPLES,
    )
    _add_sources(parser.add_argument_group("what is verified").add_argument)
    _add_question(parser.add_argument_group("sentences (with --data)").add_argument)
    _add_effort(parser.add_argument_group("how").add_argument)


def _add_sources(add: Any) -> None:
    what = "with --instances, only the rows of this network are run"
    add("--load", metavar="DIR", type=Path, help=f"Megatron or Hugging Face checkpoint; {what}")
    add("--onnx", metavar="FILE", type=Path, help=f"ONNX file of a network; {what}")
    add("--onnx-output", metavar="NAME", help=_WHICH_OUTPUT)
    add(
        "--data", metavar="JSONL", type=Path,
        help="sentences for the language model of --load, one JSON object per line: sentence or "
        "ids, and optionally id, label, candidates",
    )
    add("--vnnlib", metavar="PROP", type=Path, help="property, VNN-LIB 1.0 (.vnnlib or .gz)")
    add(
        "--instances", metavar="CSV", type=Path,
        help="rows of network,property[,seconds]; paths are relative to the file, .gz may be "
        "omitted; a bad row becomes an error in the results",
    )
    add(
        "--output", metavar="JSONL", type=Path,
        help="file of results, one JSON object per line (default: standard output)",
    )
    add("--resume", action="store_true", help="continue --output: skip the results that it has")
    add(
        "--config", metavar="YAML", type=Path,
        help="options by name, paths relative to the file; the command line takes precedence",
    )


def _add_question(add: Any) -> None:
    add(
        "--question", choices=("certify", "radius", "synonyms"),
        help="certify: does the prediction hold within --eps; radius: the largest radius within "
        "which it holds (default); synonyms: does it hold if candidates replace the words",
    )
    add("--eps", metavar="R", type=_number(float, 0), help="radius around the embeddings")
    add("--norm", choices=("inf", "2", "1"), help="norm of the radius (default inf)")
    add(
        "--words", choices=("all", "each"),
        help="perturb all words together (default), or each word while the others stay fixed",
    )
    add(
        "--shape", choices=("hull", "box"),
        help="set that contains a word's substitutes: convex hull (default) or smallest box",
    )
    add(
        "--tolerance", metavar="T", type=_number(float, 0, exclusive=True),
        help="relative precision of the radius (default 0.02)",
    )
    add(
        "--task", choices=("classification", "label-tokens", "next-token"),
        help="what is predicted (default: classification for BERT, label-tokens for GPT with "
        "--label-tokens, otherwise next-token)",
    )
    add(
        "--label-tokens", metavar="WORDS",
        help="words that stand for class 0, 1, ...: 'bad,awful|good,great'",
    )
    add(
        "--labels", metavar="NAME", nargs="+",
        help="names of class 0, 1, ..., if the data has names as labels: negative positive",
    )
    add("--prompt", metavar="TEXT", help="prompt for a GPT, containing {text} (default {text})")
    add(
        "--tokenizer", metavar="FILE", type=Path,
        help="tokenizer.json, or a vocabulary with one token per line (default: the one that lies "
        "with the checkpoint)",
    )
    add(
        "--iteration", metavar="N", type=_iteration,
        help="iteration of the checkpoint, or 'release' (default: the tracker's)",
    )
    add("--model-config", metavar="YAML", type=Path, help=_MODEL_CONFIG)
    add("--limit", metavar="N", type=_number(int, 1), help="only the first N lines of the data")


def _add_effort(add: Any) -> None:
    add(
        "--method", type=_method,
        help="IBP, CROWN-IBP, CROWN (default), CROWN-Optimized (alpha-CROWN), or auto: each of "
        "these in turn until one proves the property",
    )
    add(
        "--tensor-parallel-size", metavar="N", type=_number(int, 1),
        help="ranks that the model is sharded over (default: all processes); with --data, the "
        "remaining processes hold replicas, which share the sentences",
    )
    add(
        "--dtype", choices=("float32", "float64"),
        help="number type of the run (default: the network's)",
    )
    add(
        "--outward", action="store_true",
        help="widen bounds by a proven limit on their rounding error, so that unsat holds in real "
        "arithmetic (in float64)",
    )
    add(
        "--alpha-iterations", metavar="N", type=_number(int, 1),
        help="gradient steps of alpha-CROWN (default 20)",
    )
    add(
        "--lr-alpha", metavar="RATE", type=_number(float, 0, exclusive=True),
        help="step size of alpha-CROWN (default 0.5; 0.1 for sentences)",
    )
    add(
        "--attack-steps", metavar="N", type=_number(int, 0),
        help="gradient steps of the attack, 0 for no attack (default 40)",
    )
    add(
        "--attack-restarts", metavar="N", type=_number(int, 1),
        help="starting points of the attack (default 20)",
    )
    add(
        "--timeout", metavar="SECONDS", type=_number(float, 0, exclusive=True),
        help="time limit per input, checked between stages (default: none, or the CSV's)",
    )
    add(
        "--max-spec-rows", metavar="N", type=_number(int, 1),
        help="maximum rows of bounds at once; fewer take less memory (default: all)",
    )
    add("--seed", metavar="N", type=_number(int, 0), help="seed of the attack (default 0)")
    add(
        "--no-live-check", action="store_true",
        help="do not run the model itself to check that the bounds describe it (for models too "
        "large to run); results then say live_check: false",
    )


def _add_report(commands: Any) -> None:
    parser = _add_command(
        commands, "report",
        "Turn a file of results into a page with plots, which opens offline in any browser.",
        "example:\n  lirpa-megatron report results.jsonl --output report.html",
    )
    parser.add_argument(
        "results", metavar="RESULTS", type=Path, help="file that verify --output wrote"
    )
    parser.add_argument(
        "--output", metavar="HTML", type=Path, help="page to write (default: report.html)"
    )


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
            raise UserError(f"--{first} and --{second} exclude each other: give one of them")
    if given["command"] == "verify":
        _check_sentences(given)
    return given


def _check_sentences(given: dict[str, Any]) -> None:
    """Options of runs over sentences and over properties do not go together."""
    if "data" in given:
        if "load" not in given:
            raise UserError("--data needs the language model: give --load DIR")
        return
    parser = argparse.ArgumentParser()
    _add_question(parser.add_argument)
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
    return {name: count for name, count in names.items() if name not in ("help", "config")}


def print_error(message: str) -> None:
    """The one line that bad input gets, on rank 0."""
    if launched_as_rank0():
        line = " ".join(message.split())
        print(f"lirpa-megatron: error: {line}", file=sys.stderr, flush=True)
