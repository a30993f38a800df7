"""HTML and SVG elements. Whatever is not `Markup` already is text, and is escaped."""

from __future__ import annotations

import html
import re
from typing import Any

# Not allowed in HTML: control characters, halves of surrogate pairs, noncharacters.
_FORBIDDEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


class Markup(str):
    """A piece of HTML that is complete and safe as it is."""


def text(value: str) -> Markup:
    """Any text, inert between tags and in quoted attributes."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(_FORBIDDEN.sub("\ufffd", value), quote=True))


def element(tag: str, *children: str, **attributes: Any) -> Markup:
    """`<tag attributes>children</tag>`.

    Args:
        children: text, escaped, or Markup.
        attributes: `class_` is class, `aria_label` is aria-label; None leaves an attribute out;
            floats are rounded to hundredths.
    """
    parts = [tag]
    for name, value in attributes.items():
        if value is not None:
            shown = f"{value:.2f}" if isinstance(value, float) else str(value)
            parts.append(f'{name.rstrip("_").replace("_", "-")}="{text(shown)}"')
    if tag in _VOID:
        return Markup(f"<{' '.join(parts)}>")
    return Markup(f"<{' '.join(parts)}>{''.join(map(text, children))}</{tag}>")


def join(pieces: Any, separator: str = "") -> Markup:
    return Markup(separator.join(map(text, pieces)))


_VOID = ("meta",)
