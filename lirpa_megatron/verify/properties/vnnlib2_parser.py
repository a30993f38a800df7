"""The authors' parser of VNN-LIB 2.0, here or in a process of its own, and its tree as tuples.

`vnnlib` 1.0.2 never frees what it has parsed: 28 MB are lost with each MB of text (measured). Texts
that are larger than a piece or two are parsed in a process that is replaced before it has grown
much; this file is all that it runs, and the parser all that it imports.

A formula is one of these:

    ("and" or "or", *formulas)      ("<=", ">=", "<", ">", "==" or "!=", left, right)

and an expression one of these, with the line of the leaf:

    ("+", "-" or "*", *expressions), "-" of one its negation
    ("variable", line, name, indices)       ("number", line, as written)
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

_COMPARISONS = {
    "LessEqual": "<=", "GreaterEqual": ">=", "LessThan": "<", "GreaterThan": ">", "Equal": "==",
    "NotEqual": "!=",
}
_PIECES = 8
"""Pieces that one process parses."""


def plain(node: Any) -> tuple:
    """A node of the parser's tree as tuples."""
    kind = type(node).__name__
    if kind == "Var":
        return ("variable", node.line, sys.intern(node.name), tuple(node.indices))
    if kind in ("Float", "Int"):
        return ("number", node.line, node.lexeme)
    if kind in _COMPARISONS:
        return (_COMPARISONS[kind], plain(node.lhs), plain(node.rhs))
    if kind in ("And", "Or"):
        return (kind.lower(), *map(plain, node.args))
    if kind == "Negate":
        return ("-", plain(node.expr))
    if kind == "Minus":
        return ("-", plain(node.head), *map(plain, node.rest))
    return ({"Plus": "+", "Multiply": "*"}[kind], *map(plain, node.args))


def parse(vnnlib: Any, text: str) -> tuple[str, Any]:
    """("assertions", formulas), or ("refused" or "failed", message): failed at a number."""
    try:
        query = vnnlib.parse_query_string(text)
        return "assertions", [plain(assertion.expr) for assertion in query.assertions]
    except vnnlib.VNNLibException as error:
        return "refused", str(error)
    except (IndexError, ValueError, RuntimeError) as error:
        return "failed", str(error)


class Worker:
    """`parse` in a process of its own; a context."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._parsed = 0

    def parse(self, text: str) -> tuple[str, Any]:
        """As `parse`, or ("died", why)."""
        if self._parsed == _PIECES:
            self.close()
        if self._process is None:
            # Not as a file: beside it are modules whose names the parser's would be taken for.
            command = [sys.executable, "-c", Path(__file__).read_text(encoding="utf-8")]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            pickle.dump(sys.path, self._process.stdin)
        self._parsed += 1
        try:
            pickle.dump(text, self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            return "died", f"exit status {self._process.wait()}"

    def close(self) -> None:
        if self._process is not None:
            with self._process:
                self._process.kill()
        self._process, self._parsed = None, 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve() -> None:
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sys.path[:] = pickle.load(source)
    import vnnlib

    while True:
        try:
            text = pickle.load(source)
        except EOFError:
            return
        pickle.dump(parse(vnnlib, text), sink)
        sink.flush()


if __name__ == "__main__":
    _serve()
