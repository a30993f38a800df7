"""The files of a run over sentences: what it reads, the results it adds to, their summary."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lirpa_megatron.errors import UserError
from lirpa_megatron.report.summary import summarise
from lirpa_megatron.verify.properties.job_plan import check_writable
from lirpa_megatron.verify.properties.output import parts_of
from lirpa_megatron.verify.sentences.results import read_results


@dataclass(frozen=True)
class Files:
    """Where a run reads and writes."""

    load: Path
    data: Path
    # tokenizer.json or a vocabulary; None: one of these in the checkpoint's folder, if it is there
    tokenizer: Path | None = None
    model_config: Path | None = None
    # None: standard output
    output: Path | None = None
    resume: bool = False


def check_output(files: Files) -> None:
    """Raises UserError unless the run can write its output without harm to other files."""
    output = files.output
    if output is None:
        if files.resume:
            raise UserError("--resume needs --output, the file to continue")
        return
    check_writable(output)
    summary = _summary_of(output)
    if output.name == summary.name:
        raise UserError(f"output {output} has the name of the summary: choose another")
    for path in (files.data, files.tokenizer, files.model_config):
        for written in (output, summary):
            if path is not None and path.exists() and written.exists() and path.samefile(written):
                raise UserError(
                    f"{path} is an input, and {written} would overwrite it: choose another name"
                )
    parts = parts_of(output)
    if parts and not files.resume:
        raise UserError(
            f"{parts[0]} has results of a run that did not finish: give --resume to keep them, or "
            "remove it"
        )


class ResultsFile:
    """Where one replica writes its results: the output, or a file of its own beside it.

    Args:
        files: of the run.
        replica: 0 for the output itself, from 1 on for `OUTPUT.1`, ...

    Raises:
        UserError: from every method, if the file cannot be written.
    """

    def __init__(self, files: Files, replica: int) -> None:
        self._stream, self._name = sys.stdout, "standard output"
        if files.output is None:
            return
        path = files.output
        path = path if replica == 0 else path.with_name(f"{path.name}.{replica}")
        keep = 0  # the part of the file that stays
        if replica == 0 and files.resume and path.exists():
            keep = read_results(path)[1]
        self._name = f"output {path}"
        with self._told():
            self._stream = path.open("a", encoding="utf-8")
            self._stream.truncate(keep)

    def write(self, line: str) -> None:
        """Writes a line; it is in the file when this returns."""
        with self._told():
            self._stream.write(line)
            self._stream.flush()

    def close(self) -> None:
        if self._stream is not sys.stdout:
            with self._told():
                self._stream.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._name} cannot be written: {error.strerror}") from None


def merge_parts(output: Path) -> None:
    """Adds what replicas have written to the output, and removes their files."""
    parts = parts_of(output)
    if not parts:
        return
    kept = [output, *parts] if output.exists() else parts
    lines = [
        line for path in kept
        for line in path.read_bytes()[: read_results(path)[1]].splitlines(keepends=True)
    ]
    # A merge that was cut off has left its parts, and their lines are in the output already.
    _replace(output, b"".join(dict.fromkeys(lines)))
    for path in parts:
        path.unlink()


def write_summary(output: Path, results: list[dict[str, Any]]) -> None:
    """Writes `summary.json` beside the output."""
    text = json.dumps(summarise(results), indent=2, allow_nan=False) + "\n"
    _replace(_summary_of(output), text.encode())


def _summary_of(output: Path) -> Path:
    return output.with_name("summary.json")


def _replace(path: Path, content: bytes) -> None:
    """Writes a whole file or none."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
