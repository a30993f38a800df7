"""The syntax of VNN-LIB files: SMT-LIB's parentheses, words and numbers, each with its line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

_TOKEN = re.compile(
    r'(?P<skip>[ \t\f]+|;[^\n]*)|(?P<newline>\n)|(?P<paren>[()])'
    r'|(?P<text>"[^"]*")|(?P<quoted>\|[^|]*\|)|(?P<open>["|])|(?P<word>[^\s();"|]+)'
)
_NUMBER = re.compile(r"([+-]?)(\d+)?(?:\.(\d*))?(?:[eE]([+-]?\d{1,9}))?", re.ASCII)
_VARIABLE = re.compile(r"([XY])_(0|[1-9]\d{0,8})", re.ASCII)
_MAX_DEPTH = 200
# Digits of a number, and largest power of ten: a double has 17 of those, and up to 308.
_MAX_DIGITS = 1000
_MAX_EXPONENT = 2000

# A parsed expression: a word or a list of expressions, with the line where it begins.
Expression = tuple["str | list[Expression]", int]
# ("X" or "Y", index)
Variable = tuple[str, int]


class VnnlibError(Exception):
    """A problem at a line of the file; becomes a UserError with the file's name."""

    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line = line


def read_expressions(text: str) -> Iterator[Expression]:
    """The top-level expressions of the file, read without recursion.

    Lines may end as on any system. A quoted symbol that is a variable, |X_0|, is that variable, as
    SMT-LIB has it; other quoted symbols and strings are words that begin with their quote.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    line = 1
    stack: list[tuple[list[Expression], int]] = []
    for token in _TOKEN.finditer(text):
        kind, value = token.lastgroup, token.group()
        if kind == "newline":
            line += 1
        elif value == "(":
            stack.append(([], line))
            if len(stack) > _MAX_DEPTH:
                raise VnnlibError(line, f"nested deeper than {_MAX_DEPTH} parentheses")
        elif value == ")":
            if not stack:
                raise VnnlibError(line, "')' without its '('")
            done = stack.pop()
            if stack:
                stack[-1][0].append(done)
            else:
                yield done
        elif kind == "open":
            raise VnnlibError(line, f"the quotation {value} is never closed")
        elif kind != "skip":
            if not stack:
                raise VnnlibError(line, f"expected '(', found {shown(value)}")
            word = value
            if kind == "quoted" and _VARIABLE.fullmatch(value[1:-1]):
                word = value[1:-1]
            stack[-1][0].append((word, line))
            line += value.count("\n")
    if stack:
        raise VnnlibError(stack[-1][1], "'(' is never closed (is the file truncated?)")


def shown(value: str | list) -> str:
    """A word for an error: one line, not long."""
    if not isinstance(value, str):
        return "'('" if value else "'()'"
    word = " ".join(value.split())
    return repr(word if len(word) <= 60 else word[:57] + "...")


def variable(word: str) -> Variable | None:
    match = _VARIABLE.fullmatch(word)
    return (match[1], int(match[2])) if match else None


def number(word: str, line: int) -> Fraction | None:
    """The exact value of a decimal number; None if the word is none."""
    match = _NUMBER.fullmatch(word)
    if match is None:
        return _no_number(word, line)
    sign, whole, fraction, exponent = match.groups()
    if whole is None and not fraction:
        return None
    digits = (whole or "") + (fraction or "")
    power = int(exponent or 0)
    if len(digits) > _MAX_DIGITS:
        raise VnnlibError(line, f"number {word[:20]}... has more than {_MAX_DIGITS} digits")
    value = int(digits)
    if value == 0:
        return Fraction(0)
    if power > _MAX_EXPONENT:
        raise VnnlibError(line, f"number {word} is too large")
    if power < -_MAX_EXPONENT:
        raise VnnlibError(line, f"number {word} is too small: at most 10^-{_MAX_EXPONENT} is read")
    power -= len(fraction or "")
    exact = Fraction(value * 10**power) if power >= 0 else Fraction(value, 10**-power)
    if not is_representable(exact):
        raise VnnlibError(line, f"number {word} is too large")
    return -exact if sign == "-" else exact


def _no_number(word: str, line: int) -> None:
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", word):
        raise VnnlibError(line, f"number {shown(word)} has too large an exponent")


def is_representable(value: Fraction) -> bool:
    """Whether float64 has numbers of this size."""
    try:
        float(value)
    except OverflowError:
        return False
    return True
