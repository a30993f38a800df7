"""Where results are written: the output, and files beside it of replicas that work alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel.model_ranks import ModelRanks
from lirpa_megatron.verify.properties.results import Result, read_results


class Output:
    """The results of a run, each written as soon as it is there, by the first rank of a replica.

    While replicas have instances of their own, the first one writes to the output, others to
    `OUTPUT.1` and so on, which are added to the output when all are through. (To standard output
    all are written then.)

    Args:
        path: of the output; None: standard output.
        keep_bytes: how much of the file stays.
        ranks: of the network, and its replicas.
        quiet: whether nothing is written to standard output.

    Raises:
        UserError: from every method, if a file cannot be written.
    """

    def __init__(
        self, path: Path | None, keep_bytes: int, ranks: ModelRanks, quiet: bool = False
    ) -> None:
        self._path, self._keep, self._ranks, self._quiet = path, keep_bytes, ranks, quiet
        self._stream: TextIO | None = None
        self._own: TextIO | None = None
        if ranks.is_first:
            self._open()

    def write(self, result: Result) -> None:
        """A result that all replicas have."""
        if self._ranks.is_first:
            if self._stream is None:  # the replica that was the first one is dead
                if self._path is not None and self._path.exists():
                    self._keep = read_results(self._path)[1]
                self._open()
            _write(self._stream, [result])

    def write_own(self, result: Result) -> None:
        """A result that this replica has alone."""
        if self._path is None or not self._ranks.is_first_of_replica:
            return
        if self._own is None:
            self._own = self._stream
        if self._own is None:
            number = self._ranks.replicas.rank
            self._own = _opened(self._path.with_name(f"{self._path.name}.{number}"), 0)
        _write(self._own, [result])

    def gather(self, results: Sequence[Result]) -> None:
        """All results that replicas have had alone, in their order; they replace the files."""
        if self._own is not None:
            self._own.close()
        if self._ranks.is_first:
            self._open()
            _write(self._stream, results)
            for path in [] if self._path is None else parts_of(self._path):
                path.unlink()

    def close(self) -> None:
        """To be called at the end."""
        for stream in (self._stream, self._own):
            if stream not in (None, sys.stdout):
                stream.close()

    def _open(self) -> None:
        if self._path is not None:
            self._stream = _opened(self._path, self._keep)
        elif not self._quiet:
            self._stream = sys.stdout


def parts_of(output: Path) -> list[Path]:
    """The files of replicas beside the output."""
    names = re.compile(re.escape(output.name) + r"\.[1-9][0-9]*")
    return sorted(path for path in output.parent.iterdir() if names.fullmatch(path.name))


def merge_parts(output: Path) -> None:
    """Adds what replicas of a run that did not finish have written to the output."""
    for path in parts_of(output):
        kept = path.read_bytes()[: read_results(path)[1]]
        old = output.read_bytes()[: read_results(output)[1]] if output.exists() else b""
        lines = [line for line in kept.splitlines(keepends=True) if line not in old]
        try:
            output.write_bytes(old + b"".join(lines))
            path.unlink()
        except OSError as error:
            raise UserError(f"output {output} cannot be written: {error.strerror}") from None


def _opened(path: Path, keep_bytes: int) -> TextIO:
    """A file of results, cut after the part that is kept."""
    try:
        stream = path.open("a", encoding="utf-8")
        stream.truncate(keep_bytes)
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {error.strerror}") from None
    return stream


def _write(stream: TextIO | None, results: Sequence[Result]) -> None:
    if stream is not None:
        stream.write("".join(result.to_line() for result in results))
        stream.flush()
