"""Plots as inline SVG, coloured by the page's style sheet (classes `proved`, `attack`, `open`).

Colours are never the only sign: what is proved is filled, an attack is a tick or a dashed line, and
every mark has a title with its numbers.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lirpa_megatron.report.markup import Markup, element, join
from lirpa_megatron.report.summary import at_least, at_most

WIDTH = 720.0
LEFT, RIGHT = 180.0, 20.0
# Up to so many bars have a name each; more than that share a fixed height.
NAMED_BARS = 60
_ROW, _UNNAMED_HEIGHT, _AXIS = 20.0, 900.0, 42.0
# Of a bar's name, in columns of text: East Asian characters take two.
_LABEL_COLUMNS = 22
# Beyond this, and below its inverse, the arithmetic of an axis would overflow.
_HUGE = 1e300


@dataclass(frozen=True)
class Interval:
    """What is known of an input's radius: it is at least `certified`, and below `attacked`."""

    name: str
    certified: float | None
    attacked: float | None


def interval_bars(intervals: Sequence[Interval], unit: str) -> Markup:
    """A bar for each input: proved up to the certified radius, open up to the attacked one."""
    most = max((v for i in intervals for v in (i.certified, i.attacked) if v), default=1.0)
    axis = _Axis(0.0, most * 1.05, LEFT, WIDTH - RIGHT)
    row, rows = _row_height(len(intervals)), []
    for index, interval in enumerate(intervals):
        certified, attacked = interval.certified or 0.0, interval.attacked
        y, height = index * row + row * 0.15, row * 0.7
        end = axis.high if attacked is None else attacked
        marks = [
            _bar(axis, min(certified, end), end, y, height, "open"),
            _bar(axis, 0.0, certified, y, height, "proved"),
        ]
        if attacked is not None:
            x = axis.place(attacked)
            marks.append(element(
                "line", x1=x, x2=x, y1=y, y2=y + height, class_="attack", stroke_width=3
            ))
        broken = "no attack succeeded" if attacked is None else f"attacked {at_most(attacked)}"
        title = f"{interval.name}: certified {at_least(interval.certified)}, {broken}"
        rows.append(_row(title, interval.name, marks, y + height / 2, row))
    return _bars(rows, row, axis, unit, f"Certified and attacked {unit} of each input")


def value_bars(values: Sequence[tuple[str, float]], unit: str) -> Markup:
    """A bar from 0 for each value; those above 0 prove something."""
    low = min(0.0, *(v for _, v in values)) * 1.05
    high = max(0.0, *(v for _, v in values)) * 1.05
    axis = _Axis(low, high if high > low else 1.0, LEFT, WIDTH - RIGHT)
    row, rows = _row_height(len(values)), []
    for index, (name, value) in enumerate(values):
        y, height = index * row + row * 0.15, row * 0.7
        kind = "proved" if value > 0 else "open"
        marks = [_bar(axis, min(0.0, value), max(0.0, value), y, height, kind)]
        rows.append(_row(f"{name}: {at_least(value)}", name, marks, y + height / 2, row))
    zero = axis.place(0.0)
    line = element("line", x1=zero, x2=zero, y1=0, y2=row * len(values), class_="axis")
    rows[-1] = join((rows[-1], line))
    return _bars(rows, row, axis, unit, f"{unit} of each input")


def accuracy_steps(curve: dict[str, Any], unit: str, share_of: str) -> Markup:
    """Two step curves: what is certified at each radius, and what attacks leave possible.

    Args:
        curve: of `summary.accuracy_curve`.
        unit: of the radius.
        share_of: what the vertical axis counts.
    """
    ends = [end for name in ("certified", "limit") for end, _ in curve[name]]
    x = _Axis(0.0, max(ends, default=1.0) * 1.05, 70.0, WIDTH - RIGHT)
    y = _Axis(0.0, 1.0, 290.0, 15.0)
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = y.place(tick)
        parts.append(element("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        label = f"{tick:.0%}"
        parts.append(element("text", label, x=x.start - 8, y=at + 4, text_anchor="end"))
    for name, last, style in (
        ("limit", curve["limit_end"], "attack dashed"),
        ("certified", 0.0, "proved-line"),
    ):
        points, start = [], 0.0
        for end, share in curve[name]:
            points += [(start, share), (end, share)]
            start = end
        points += [(start, last), (x.high, last)]
        path = "M" + "L".join(f"{x.place(a):.2f} {y.place(b):.2f}" for a, b in points)
        if name == "certified":
            area = f"{path}L{x.end:.2f} {y.start:.2f}L{x.start:.2f} {y.start:.2f}Z"
            parts.append(element("path", d=area, class_="proved", fill_opacity="0.25"))
        words, shown = ("certified", at_least) if name == "certified" else ("not attacked", at_most)
        steps = ", ".join(f"{share:.1%} up to {shown(end)}" for end, share in curve[name])
        beyond = f"{last:.1%} beyond"
        title = f"{words}: {f'{steps}, ' if steps else ''}{beyond}"
        parts.append(element(
            "path", element("title", title), d=path, class_=style, fill="none", stroke_width=2.5
        ))
    label = f"{share_of} against {unit}"
    height = y.start + _AXIS
    return _svg(height, label, [*parts, *_scale(x, 15.0, y.start, unit)])


class _Axis:
    """Values from low to high on pixels from start to end, with round ticks."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = max(low, -_HUGE), min(max(high, low + 1 / _HUGE), _HUGE)
        self.start, self.end = start, end

    def place(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten, about five of them."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def _row_height(count: int) -> float:
    return _ROW if count <= NAMED_BARS else _UNNAMED_HEIGHT / count


def _bar(axis: _Axis, low: float, high: float, y: float, height: float, kind: str) -> Markup:
    x = axis.place(low)
    return element("rect", x=x, y=y, width=axis.place(high) - x, height=height, class_=kind)


def _row(title: str, name: str, marks: list[Markup], middle: float, row: float) -> Markup:
    if row == _ROW:
        label = element("text", _shortened(name), x=LEFT - 8, y=middle + 4, text_anchor="end")
        marks = [label, *marks]
    return element("g", element("title", title), *marks, class_="row")


def _shortened(name: str) -> str:
    columns = 0
    for index, character in enumerate(name):
        columns += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if columns > _LABEL_COLUMNS:
            return name[: max(index - 1, 0)] + "…"
    return name


def _bars(rows: list[Markup], row: float, axis: _Axis, unit: str, label: str) -> Markup:
    bottom = row * len(rows) + 4
    return _svg(bottom + _AXIS, label, [*_scale(axis, 0.0, bottom, unit), *rows])


def _scale(axis: _Axis, top: float, bottom: float, unit: str) -> list[Markup]:
    """The horizontal axis below `bottom`, with grid lines up to `top`."""
    parts = []
    for tick in axis.ticks():
        x = axis.place(tick)
        parts.append(element("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"))
        parts.append(element("text", f"{tick:.6g}", x=x, y=bottom + 16, text_anchor="middle"))
    parts.append(element(
        "line", x1=axis.start, x2=axis.end, y1=bottom, y2=bottom, class_="axis"
    ))
    middle = (axis.start + axis.end) / 2
    parts.append(element("text", unit, x=middle, y=bottom + 34, text_anchor="middle"))
    return parts


def _svg(height: float, label: str, parts: Sequence[str]) -> Markup:
    svg = element(
        "svg", element("title", label), *parts,
        viewBox=f"0 0 {WIDTH:g} {height:g}", role="img", aria_label=label,
    )
    return element("div", svg, class_="plot")
