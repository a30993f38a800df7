"""What the parser of VNN-LIB 2.0 says is wrong, as one line with the literal it is about."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal, InvalidOperation
from typing import NoReturn

from lirpa_megatron.verify.properties.vnnlib_syntax import VnnlibError, shown

_SYNTAX = re.compile(r"syntax error at line (\d+), column (\d+): '(.*)'", re.DOTALL)
_WORD = re.compile(r"[\w.+-]+", re.ASCII)
_NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)
_OTHER_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_MOST_DIGITS = 40
_SMALLEST = 2.0**-1022
"""Positive number with all its digits in float64."""


class Explainer:
    """Lines of a file for a text made of its header and a piece.

    Args:
        text: what the parser was given.
        begin: line of that text where the piece begins.
        line: line of the file where the piece begins.
    """

    def __init__(self, text: str, begin: int, line: int) -> None:
        self._text, self._begin, self._line = text, begin, line

    def explain(self, message: str) -> NoReturn:
        """Raises VnnlibError for a message of the parser's."""
        found = _SYNTAX.search(message)
        if found:
            self._syntax(int(found[1]), int(found[2]), found[3])
        try:
            first = json.loads(message)["errors"][0]
            line, symbol = self.in_file(int(first.get("line", 1))), str(first["offendingSymbol"])
            what, hint = str(first["message"]), str(first["hint"])
        except (ValueError, LookupError, TypeError, AttributeError):
            raise VnnlibError(self._line, " ".join(message.split())[:300]) from None
        if re.fullmatch(r"-?\d+", symbol) and first.get("errorCode") == "TypeMismatch":
            raise VnnlibError(
                line, f"{shown(symbol)} is a whole number beside variables of a floating-point "
                f"type: write {symbol[:_MOST_DIGITS]}.0"
            )
        raise VnnlibError(line, f"{what}: {shown(symbol)}. {hint}")

    def explain_number(self, message: str) -> NoReturn:
        """Raises VnnlibError for a number that the parser cannot hold."""
        for match in _NUMBER.finditer(self._text):
            word, value = match[0], float(match[0])
            digits = word.strip("-0.")
            too_large = abs(value) >= 2**63 if match[1] is None else math.isinf(value)
            if too_large or (digits and abs(value) < _SMALLEST):
                size = "large" if too_large else "small"
                line = self.in_file(self._text.count("\n", 0, match.start()) + 1)
                raise VnnlibError(
                    line, f"number {shown(word)} is too {size} for the parser of VNN-LIB 2.0"
                )
        raise VnnlibError(self._line, f"its parser failed: {message}")

    def in_file(self, line: int) -> int:
        return line if line < self._begin else line - self._begin + self._line

    def _syntax(self, line: int, column: int, token: str) -> NoReturn:
        source = self._text.split("\n", line)[line - 1] if line else ""
        words = [m for m in _WORD.finditer(source) if m.start() <= column <= m.end() - 1]
        word = words[0][0] if words else token or ")"
        where = self.in_file(line)
        raise VnnlibError(where, no_number(word))


def no_number(word: str) -> str:
    """What is wrong with a word that does not belong where it is, perhaps a number."""
    if not _OTHER_NUMBER.fullmatch(word) or _NUMBER.fullmatch(word):
        return f"VNN-LIB 2.0 does not allow {shown(word)} here"
    advice = _plain(word)
    return f"VNN-LIB 2.0 has no numbers like {shown(word)}" + (
        f": write {advice}" if advice else ""
    )


def _plain(word: str) -> str | None:
    """A number as the grammar has it, if it is short."""
    try:
        value = Decimal(word)
        if abs(value.adjusted()) > _MOST_DIGITS:
            return None
        written = format(value, "f")
    except (InvalidOperation, ValueError):
        return None
    return written if "." in written else written + ".0"
