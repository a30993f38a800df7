"""The text of VNN-LIB 2.0 files: what is checked before their authors' parser sees it, and pieces.

The parser (`vnnlib` 1.0.2) needs 52 times a text's size (measured; 6 GB for the largest files of
competitions, 124 MB), so it is given pieces: the declarations with some of the assertions, or with
some of the operands of an `and` or `or` that is large by itself.

It reads without a word what is not in the standard: an index [0.7] as [0], [-1] as it is, a shape
[2.5] as [2], 2.0e3 as a number and a variable e3, and of a text with a NUL character what stands
before it. It recurses as deep as parentheses are nested. All this is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lirpa_megatron.verify.properties.vnnlib2_errors import no_number
from lirpa_megatron.verify.properties.vnnlib_syntax import VnnlibError, shown

PIECE = 2**20
"""Characters given to the parser at once, about."""
_MAX_DEPTH = 200
_BLOCK = 2**22
_SPACE = r"(?:\s|;[^\r\n]*(?:[\r\n]|\Z))*"
_HEAD = re.compile(_SPACE + r"\(\s*(vnnlib-version|declare-network)(?![\w-])")
_VERSION = re.compile(_SPACE + r"\(vnnlib-version\s*(<\s*(\d{1,9})\.(\d{1,9})\s*>)?")
_BAD_INDEX = re.compile(r"\[(?!\s*(?:\d+\s*(?:,\s*\d+\s*)*)?\])[^\]\n]{0,40}\]?")
_JOINED_TO_A_WORD = re.compile(r"(?<![\w.])[+-]?\d[\d.]*[A-Za-z_][\w.+-]*")
_CONNECTIVE = re.compile(r"\(\s*(and|or)(?![\w-])")

Span = tuple[int, int]


def is_version_2(text: str) -> bool:
    """Whether a file begins as those of VNN-LIB 2.0 do."""
    return _HEAD.match(text) is not None


@dataclass(frozen=True)
class QueryText:
    """A file's text without comments, whose parentheses match."""

    text: str
    # what the parser is given before each piece: version and networks
    header: str
    # where each assertion begins and ends
    assertions: tuple[Span, ...]

    def line(self, position: int) -> int:
        return self.text.count("\n", 0, position) + 1

    def formula(self, assertion: Span) -> Span:
        """What is asserted."""
        begin = self.text.find("(", assertion[0] + 1, assertion[1])
        # (assert X), X without parentheses: the parser will say what is wrong
        return (begin, self.text.rfind(")", begin, assertion[1] - 1) + 1) if begin > 0 else (0, 0)

    def operands(self, formula: Span) -> tuple[str, list[Span]] | None:
        """Word and operands of an `and` or `or` all of whose operands are in parentheses."""
        match = _CONNECTIVE.match(self.text, *formula)
        if match is None:
            return None
        begins, ends = _expressions(self.text, match.end(), formula[1] - 1)
        edges = zip([match.end(), *ends], [*begins, formula[1] - 1], strict=True)
        if any(self.text[a:b].strip() for a, b in edges):
            return None
        return match[1], list(zip(begins, ends, strict=True))


def query_text(text: str) -> QueryText:
    """Checks a file's text.

    Raises:
        VnnlibError: another version, what the parser would read as something else or fails on
            without saying where, parentheses that do not match.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
    if "\0" in text:
        raise VnnlibError(_line(text, text.index("\0")), "it has a NUL character")
    if ";" in text or '"' in text:
        text = re.sub(r'"[^"\n]*"|;[^\n]*', _without_meaning, text)
    if not text.isascii():
        found = re.search(r"[^\x00-\x7f]", text)
        raise VnnlibError(_line(text, found.start()), f"unexpected character {found[0]!r}")
    text = _as_version_2_0(text)
    found = _BAD_INDEX.search(text)
    if found:
        raise VnnlibError(
            _line(text, found.start()), f"{shown(found[0])} is no list of whole numbers"
        )
    found = _JOINED_TO_A_WORD.search(text)
    if found:
        raise VnnlibError(_line(text, found.start()), no_number(found[0]))
    begins, ends = _expressions(text, 0, len(text))
    first = next((i for i, b in enumerate(begins) if text.startswith("(assert", b)), None)
    if first is None:
        raise VnnlibError(_line(text, len(text.rstrip())), "it has no assertion")
    spans = tuple(zip(begins[first:], ends[first:], strict=True))
    for begin, _ in spans:
        if not text.startswith("(assert", begin):
            raise VnnlibError(
                _line(text, begin), "expected (assert ...): networks are declared first"
            )
    for end, begin in zip(ends[first:], [*begins[first + 1 :], len(text)], strict=True):
        rest = text[end:begin].split(maxsplit=1)
        if rest:
            raise VnnlibError(_line(text, text.index(rest[0], end)),
                              f"expected '(', found {shown(rest[0])}")
    return QueryText(text, text[: begins[first]], spans)


def grouped(spans: list[Span]) -> Iterator[list[Span]]:
    """Neighbours together, as many as make a piece; one that is larger is alone."""
    group: list[Span] = []
    for span in spans:
        if group and span[1] - group[0][0] > PIECE:
            yield group
            group = []
        group.append(span)
    if group:
        yield group


def _without_meaning(match: re.Match[str]) -> str:
    """Nothing for a comment; a string, without what would look like syntax."""
    return "" if match[0][0] == ";" else re.sub(r"[^\s\"]", "_", match[0])


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _as_version_2_0(text: str) -> str:
    """The version as the parser expects it: minor ones change nothing that is there."""
    match = _VERSION.match(text)
    if match is None or match[1] is None:
        raise VnnlibError(
            _line(text, len(text) - len(text.lstrip())), "expected (vnnlib-version <2.0>) first"
        )
    if int(match[2]) != 2:
        raise VnnlibError(
            _line(text, match.start(1)),
            f"version {match[2]}.{match[3]} is not supported: 1.0 (without this line) and 2.0 are",
        )
    return text[: match.start(1)] + "<2.0>" + text[match.end(1) :]


def _expressions(text: str, begin: int, end: int) -> tuple[list[int], list[int]]:
    """Where the outermost parentheses of a part of the text open, and where they have closed."""
    depth, begins, ends = 0, [], []
    for start in range(begin, end, _BLOCK):
        block = np.frombuffer(text[start : min(start + _BLOCK, end)].encode("ascii"), np.uint8)
        opens, closes = block == ord("("), block == ord(")")
        depths = depth + np.cumsum(opens.astype(np.int32) - closes)
        for wrong, message in (
            (depths < 0, "')' without its '('"),
            (depths > _MAX_DEPTH, f"nested deeper than {_MAX_DEPTH} parentheses"),
        ):
            if wrong.any():
                raise VnnlibError(_line(text, start + int(wrong.argmax())), message)
        begins += (start + np.flatnonzero(opens & (depths == 1))).tolist()
        ends += (start + 1 + np.flatnonzero(closes & (depths == 0))).tolist()
        depth = int(depths[-1]) if len(depths) else depth
    if depth:
        raise VnnlibError(
            _line(text, begins[-1]), "'(' is never closed (is the file truncated?)"
        )
    return begins, ends
