"""Results of a run: one JSON object a line, written as each instance finishes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lirpa_megatron.errors import UserError
from lirpa_megatron.report.reader import checked

# VNN-COMP's words: holds, violated, not decided, out of time, failed.
RESULT_WORDS = ("unsat", "sat", "unknown", "timeout", "error")
# Notes shown below the table.
_NOTES = 10


@dataclass(frozen=True)
class Result:
    """What is known about one instance."""

    # network's name
    network: str
    # property's name
    property: str
    # one of RESULT_WORDS
    result: str
    # method of the bounds
    method: str
    # for each output constraint in file order; positive: it cannot happen; None: not bounded
    lower_bounds: list[float | None]
    # number of tensor-parallel ranks
    tensor_parallel: int
    # wall-clock time of the instance
    seconds: float
    # a violating input, if result is "sat"
    counterexample: list[float] | None = None
    # by how much the counterexample violates the property: the least of its disjunct's constraints,
    # by the outputs of the network as stored, and of its weights in float64
    violation: float | None = None
    float64_violation: float | None = None
    # the files, each with its folder: two of one name are not the same
    network_file: str | None = None
    property_file: str | None = None
    # which output of an ONNX graph, if it was said
    onnx_output: str | None = None
    # what the weights are stored in, and what bounds were computed in
    stored_dtype: str | None = None
    dtype: str | None = None
    # "outward" if bounds were widened by their rounding error; else it is left out
    rounding: str | None = None
    # degree of a forward method's polynomials; left out where it is 1
    order: int | None = None
    # most cuts of a set of few inputs; left out where there were none
    splits: int | None = None
    # with splits: the share of the set's volume that is proved, and the pieces that it was cut into
    proved_share: float | None = None
    pieces: int | None = None
    # share of the linear layers' weights that the ranks split; the others are on each of them
    sharded_share: float | None = None
    # number of pipeline stages; left out where there is one
    pipeline_parallel: int | None = None
    # False if the model's own forward was not compared with its bounds; else it is left out
    live_check: bool | None = None
    # with --complete, where bounds and the attack did not decide: the smallest bound of what was
    # split, how many domains were bounded, and how many were left; and what was split: "relu", or
    # "input" for the boxes of inputs
    branching: str | None = None
    # what was asked for by --branching; left out if nothing was
    asked_branching: str | None = None
    bound: float | None = None
    domains: int | None = None
    open_domains: int | None = None
    # how many domains were bounded for tighter bounds of inner neurons
    inner_domains: int | None = None
    # what a reader must know, if there is such: why a property holds whatever the network does, or
    # why a point that seemed a counterexample is none
    note: str | None = None
    # what went wrong, if result is "error"
    error: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What `--resume` recognises an instance by."""
        return self.network, self.property, self.method

    def to_line(self) -> str:
        optional = (
            "error", "note", "rounding", "live_check", "pipeline_parallel", "branching",
            "asked_branching", "bound", "domains", "open_domains", "inner_domains", "onnx_output",
            "order", "splits", "proved_share", "pieces", "sharded_share",
        )
        fields = {k: v for k, v in vars(self).items() if k not in optional or v is not None}
        return json.dumps(fields, allow_nan=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Result:
        """Raises ValueError or TypeError for anything but a result."""
        plain = checked(line)
        if plain["result"] not in RESULT_WORDS or plain.get("tensor_parallel") is None:
            raise ValueError("not of a property")
        return cls(**plain)


def read_results(path: Path) -> tuple[list[Result], int]:
    """Results of an earlier run, for `--resume`.

    Returns:
        the results, and the size in bytes of the part to keep: a killed run may leave half a line
        at the end, which is dropped.

    Raises:
        UserError: a line, other than half a last one, is not a result.
    """
    data = path.read_bytes()
    kept = data[: data.rfind(b"\n") + 1]
    results = []
    for number, line in enumerate(kept.splitlines(), start=1):
        try:
            results.append(Result.from_line(line.decode("utf-8")))
        except (ValueError, TypeError):
            raise UserError(
                f"line {number} of {path} is not a result of verify: remove it or choose another "
                "--output"
            ) from None
    return results, len(kept)


def summary_table(results: Sequence[Result]) -> str:
    """Counts of result words and total time, one line for each network and method, then notes.

    "least violation": of its counterexamples, see `Result.violation`.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.network, result.method), []).append(result)
    lines = [["network", "method", "TP", *RESULT_WORDS, "least violation", "seconds"]]
    for (network, method), members in groups.items():
        counts = [str(sum(m.result == word for m in members)) for word in RESULT_WORDS]
        sizes = "/".join(str(size) for size in sorted({m.tensor_parallel for m in members}))
        seconds = f"{sum(m.seconds for m in members):.1f}"
        violations = [m.violation for m in members if m.violation is not None]
        least = f"{min(violations):.3g}" if violations else "-"
        lines.append([network, method, sizes, *counts, least, seconds])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    table = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    notes = [f"{r.network} {r.property}: {r.result}, {r.note}" for r in results if r.note]
    more = [f"and {len(notes) - _NOTES} more notes"] if len(notes) > _NOTES else []
    return "\n".join([*table, *notes[:_NOTES], *more])
