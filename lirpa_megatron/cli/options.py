"""The commands and their options."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NoReturn

from lirpa_megatron.cli.capabilities import NAME, add_capabilities
from lirpa_megatron.cli.help import EXAMPLES, RESULTS
from lirpa_megatron.cli.terminal import launched_as_rank0
from lirpa_megatron.errors import UserError

_MODEL_CONFIG = "Megatron's model arguments by name, to add to or replace the checkpoint's"
_WHICH_OUTPUT = "output of the ONNX graph to use, if it has several"


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, and prints on rank 0 only."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        if launched_as_rank0():
            super()._print_message(message, file)


def _layers(text: str) -> list[int]:
    """An argparse type: numbers of layers, as in '4,4,2,2'."""
    number = _number(int, 1)
    return [number(part.strip()) for part in text.split(",")]


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


def _path_if_given(text: str) -> Path | str:
    """An argparse type; argparse converts the mark of an absent positional argument too."""
    return text if text == argparse.SUPPRESS else Path(text)


def _named_file(text: str) -> tuple[str, Path]:
    """An argparse type: NAME=FILE."""
    name, _, file = text.partition("=")
    if not name.strip() or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name.strip(), Path(file)


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
    parser.add_argument("--name", action="version", version=NAME, help="show the program's name")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_imports(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_check(commands)
    _add_report(commands)
    add_capabilities(_add_command(
        commands, "supports", "Say what is supported, as the VNN-LIB standard asks verifiers.",
        "example:\n  lirpa-megatron supports --onnx-operators",
    ))
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
    add(
        "--verbose", action="store_true",
        help="also list what the folder says and the model does not depend on",
    )


def _add_verify(commands: Any) -> None:
    parser = _add_command(
        commands, "verify",
        "Verify sentences with a language model (--data), or VNN-LIB properties of a network.",
        RESULTS + EXAMPLES,
    )
    _add_sources(parser.add_argument_group("what is verified").add_argument)
    add_question(parser.add_argument_group("sentences (with --data)").add_argument)
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
    add("--vnnlib", metavar="PROP", type=Path, help="property, VNN-LIB 1.0 or 2.0 (.vnnlib or .gz)")
    add(
        "query", metavar="QUERY", nargs="?", type=_path_if_given,
        help="as --vnnlib, but print what the VNN-LIB standard says: sat, unsat, unknown or "
        "timed-out, and the values of all variables if it is sat",
    )
    add(
        "--network", metavar="NAME=FILE", action="append", type=_named_file,
        help="file of a network that the property (VNN-LIB 2.0) declares; once for each",
    )
    add(
        "--instances", metavar="CSV", type=Path,
        help="rows of network,property[,seconds]; paths are relative to the file, .gz may be "
        "omitted; a bad row becomes an error in the results",
    )
    add(
        "--output", metavar="JSONL", type=Path,
        help="file of results, one JSON object per line (default: standard output)",
    )
    add(
        "--resume", action="store_true",
        help="continue --output: skip the results that it has, and go on with a search of "
        "--complete that was ended",
    )
    add(
        "--config", metavar="YAML", type=Path,
        help="options by name, paths relative to the file; the command line takes precedence",
    )


def add_question(add: Any) -> None:
    """The options of runs over sentences alone."""
    add(
        "--question", choices=("certify", "radius", "synonyms", "direction"),
        help="certify: does the prediction hold within --eps; radius: the largest radius within "
        "which it holds (default); synonyms: does it hold if candidates replace the words; "
        "direction: how far (or whether within --eps) hidden states may move along --vectors",
    )
    add("--eps", metavar="R", type=_number(float, 0), help="radius around the embeddings")
    add(
        "--vectors", metavar="FILE", type=Path,
        help="with --question direction: vectors [d, hidden] in a file .npy, .json or .safetensors",
    )
    add(
        "--layer", metavar="L", type=_number(int, 0),
        help="with --question direction: the layer (from 0) whose input moves (default 0: the "
        "embeddings)",
    )
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
        help="tokenizer.json, tokenizer.model of sentencepiece, or a vocabulary with one token per "
        "line (default: the one that lies with the checkpoint)",
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
        "these in turn until one proves the property; or forward: cheaper than CROWN in deep "
        "models, and forward+backward",
    )
    add(
        "--complete", action="store_true",
        help="properties: branch and bound on what bounds and the attack leave open, until it is "
        "decided or --timeout is over; ReLUs, other functions of one variable or the box of few "
        "inputs are split",
    )
    add(
        "--branching", choices=("auto", "relu", "nonlinear", "input"),
        help="what --complete splits: relu (beta-CROWN), nonlinear (intervals of all functions of "
        "one variable: tanh, GELU, ...), input (the box is cut, for few inputs), or auto "
        "(default): relu, but input where at most 8 inputs move and ReLUs are many, and for a "
        "while where at most 16 move; of other networks input where at most 16 move, else "
        "nonlinear",
    )
    add(
        "--record", metavar="JSON", type=Path,
        help="with --complete and --vnnlib: file for the proof of a property that holds, which "
        "`check` verifies",
    )
    add(
        "--order", metavar="P", type=_number(int, 1),
        help="with --method forward: degree of the polynomials, above 1 for sets of few dimensions "
        "(default 1)",
    )
    add(
        "--splits", metavar="N", type=_number(int, 0),
        help="cut a set of at most 16 dimensions up to N times and bound its pieces, until all of "
        "it is proved: for --question direction and synonyms, and for properties of few inputs "
        "(default 0)",
    )
    add(
        "--tensor-parallel-size", metavar="N", type=_number(int, 1),
        help="ranks that the model is sharded over (default: all processes); with --data and "
        "--complete, the remaining processes hold replicas, which share the work",
    )
    add(
        "--pipeline-parallel-size", metavar="P", type=_number(int, 1),
        help="pipeline stages that the model's layers are split over (default 1); each has as many "
        "processes as --tensor-parallel-size",
    )
    add(
        "--pipeline-layers", metavar="N,N,...", type=_layers,
        help="layers of each pipeline stage, linear ones of an imported network (default: split so "
        "that all have the same work)",
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
        help="gradient steps of the attack, 0 for no attack (default 40; with both defaults, "
        "and at most 16 inputs that move, 300 steps from 300 points follow)",
    )
    add(
        "--attack-restarts", metavar="N", type=_number(int, 1),
        help="starting points of the attack (default 20)",
    )
    add(
        "--timeout", metavar="SECONDS", type=_number(float, 0, exclusive=True),
        help="time limit per input, checked between stages, and all the time with --complete "
        "(default: none, or the CSV's)",
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


def _add_check(commands: Any) -> None:
    parser = _add_command(
        commands, "check",
        "Prove a record of verify --complete --record again, leaf by leaf, in float64.",
        "example:\n  lirpa-megatron check proof.json",
    )
    add = parser.add_argument
    add("record", metavar="RECORD", type=Path, help="file that verify --record wrote")
    where = "(default: where the record says)"
    add("--onnx", metavar="FILE", type=Path, help=f"ONNX file of the network {where}")
    add("--load", metavar="DIR", type=Path, help=f"checkpoint of the network {where}")
    add("--onnx-output", metavar="NAME", help=_WHICH_OUTPUT)
    add("--vnnlib", metavar="PROP", type=Path, help=f"the property {where}")


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
