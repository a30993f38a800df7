"""For `make docs`: the tables of docstrings, which are reStructuredText, as Markdown.

    =====  ======          | word | meaning |
    word   meaning         |---|---|
    =====  ======    ->    | a | first line second line |
    a      first line
           second line
    =====  ======
"""

import re

import griffe

_RULE = re.compile(r"^ *=+(?: +=+)+ *$")


def markdown_tables(text: str) -> str:
    """The text with each simple table in Markdown."""
    lines, done = text.split("\n"), []
    while lines:
        line = lines.pop(0)
        if not _RULE.match(line):
            done.append(line)
            continue
        columns = [match.span() for match in re.finditer("=+", line)]
        table = []
        while lines and lines[0].strip():
            table.append(lines.pop(0))
        rules = [i for i, each in enumerate(table) if _RULE.match(each)]
        if not rules or rules[-1] != len(table) - 1:
            raise ValueError(f"a table without an end: {line}")
        rows = [[""] * len(columns)] if len(rules) == 1 else []  # a table without a heading
        for each in table[:-1]:
            cells = _cells(each, columns)
            if _RULE.match(each):
                continue
            if cells[0] or not rows:
                rows.append(cells)
            else:  # a row that goes on
                rows[-1] = [f"{a} {b}".strip() for a, b in zip(rows[-1], cells, strict=True)]
        head, *body = (f"| {' | '.join(row)} |" for row in rows)
        done += ["", head, "|---" * len(columns) + "|", *body, ""]
    return "\n".join(done)


def _cells(line: str, columns: list[tuple[int, int]]) -> list[str]:
    starts = [start for start, _ in columns]
    ends = [*starts[1:], len(line) + 1]
    cells = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    return [cell.replace("|", "\\|") for cell in cells]


class DocstringTables(griffe.Extension):
    """Rewrites every docstring that griffe reads."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown_tables(obj.docstring.value)
