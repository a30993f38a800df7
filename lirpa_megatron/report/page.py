"""The report: one HTML page that stands alone, without scripts or anything from a network."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lirpa_megatron.errors import UserError
from lirpa_megatron.report import charts, heat_map
from lirpa_megatron.report.markup import Markup, element
from lirpa_megatron.report.style import STYLE
from lirpa_megatron.report.summary import (
    WORDS,
    accuracy_curve,
    asks_radius,
    at_least,
    at_most,
    attacked_radius,
    certified_radius,
    figure,
    groups_of,
    is_certified,
    is_wrong,
    margin,
    number,
    summarise,
    summary_rows,
)

# Names of a table's columns whose cells are numbers.
_NUMERIC = ("certified", "attacked", "margin", "smallest lower bound", "seconds")


def write_report(results: Sequence[dict[str, Any]], output: Path, source: str) -> dict[str, Any]:
    """Writes the page of some results, whole or not at all.

    Args:
        results: of `reader.read_lines`, at least one.
        output: the HTML file; replaced if it is there.
        source: where the results are from, for the title.

    Returns:
        what `summarise` says of them.

    Raises:
        UserError: output cannot be written.
    """
    summary = summarise(results)
    data = render(results, summary, source).encode("utf-8")
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, output)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise UserError(f"output {output} cannot be written: {error.strerror}") from None
    return summary


def render(results: Sequence[dict[str, Any]], summary: dict[str, Any], source: str) -> str:
    """The page as text. The policy in its head forbids scripts and every request."""
    groups = groups_of(results)
    title = f"Certificates: {source}"
    body = [element("h1", title), _contradictions(summary), _summary_table(summary)]
    for sums, members in zip(summary["groups"], groups, strict=True):
        body.append(_section(sums, members))
    head = [
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element(
            "meta", http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'",
        ),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(STYLE + heat_map.STYLE)),
    ]
    page = element(
        "html", element("head", *head), element("body", element("main", *body)), lang="en"
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _contradictions(summary: dict[str, Any]) -> Markup:
    found = [text for group in summary["groups"] for text in group["contradictions"]]
    if not found:
        return Markup("")
    words = "These results contradict themselves; do not rely on any of this run:"
    items = element("ul", *(element("li", text) for text in found))
    return element("div", element("strong", words), items, class_="alert", role="alert")


def _summary_table(summary: dict[str, Any]) -> Markup:
    columns = [dict(summary_rows(group)) for group in summary["groups"]]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [
        element("tr", element("th", name, scope="row"), *(
            element("td", element("bdi", column.get(name, "-"))) for column in columns
        ))
        for name in names
        if any(column.get(name, "-") != "-" for column in columns)
    ]
    caption = element("caption", "Summary")
    return _scrolled(element("table", caption, element("tbody", *rows), class_="summary"))


def _section(sums: dict[str, Any], members: list[dict[str, Any]]) -> Markup:
    """Plots and table of one group."""
    named = [sums["network"], sums["method"], sums["task"], sums["question"]]
    unit = "radius" if sums["norm"] is None else f"L{sums['norm']} radius"
    parts = [element("h2", element("bdi", " · ".join(name for name in named if name)))]
    if asks_radius(members[0]):
        parts += _radius_plots(members, unit)
    else:
        parts += _margin_plot(members, sums)
    words = heat_map.heat_maps(members, unit)
    if words:
        parts += [element("h3", "Words"), words]
    parts += [element("h3", "Inputs"), _inputs_table(members, sums["task"] is not None)]
    return element("section", *parts)


def _radius_plots(members: list[dict[str, Any]], unit: str) -> list[Markup]:
    shown = [r for r in members if not is_wrong(r) and r["result"] != "error"]
    intervals = sorted(
        (charts.Interval(r["property"], certified_radius(r), attacked_radius(r)) for r in shown),
        key=lambda interval: (-(interval.certified or 0.0), -(interval.attacked or 0.0)),
    )
    curve = accuracy_curve(members)
    labelled = any(r.get("label") is not None for r in members)
    share = f"share of the {curve['inputs']} inputs{' with a label' if labelled else ''}"
    parts = [
        element("h3", f"Certified {'accuracy' if labelled else 'share'} against radius"),
        element(
            "p", f"Vertical: {share}. Solid and filled: certified at that radius",
            " and rightly predicted" if labelled else "",
            ". Dashed: what the attacks leave possible. The truth lies between.",
        ),
        charts.accuracy_steps(curve, unit, share.capitalize()),
    ]
    if not intervals:
        return parts
    note = _not_shown(len(members) - len(shown), "ended in an error or are misclassified")
    return [
        *parts,
        element("h3", "Radius of each input"),
        element(
            "p", _swatch("proved"), " certified, ", _swatch("open"), " not decided, ",
            _swatch("attack-mark"), f" smallest radius at which an attack succeeded.{note}",
        ),
        charts.interval_bars(intervals, unit),
    ]


def _not_shown(count: int, why: str) -> str:
    return f" Not shown: {count} of the inputs, which {why}." if count else ""


def _margin_plot(members: list[dict[str, Any]], sums: dict[str, Any]) -> list[Markup]:
    unit = "margin" if sums["task"] else "smallest lower bound"
    values = [(r["property"], _smallest_bound(r)) for r in members]
    known = sorted(((n, v) for n, v in values if v is not None), key=lambda pair: -pair[1])
    if not known:
        return []
    note = _not_shown(len(values) - len(known), "have no bound")
    return [
        element("h3", f"{unit.capitalize()} of each input"),
        element("p", _swatch("proved"), " above 0, ", _swatch("open"), f" not above 0.{note}"),
        charts.value_bars(known, unit),
    ]


def _inputs_table(members: list[dict[str, Any]], is_sentences: bool) -> Markup:
    if is_sentences:
        names = ["input", "sentence", "label", "predicted", "result"]
        names += ["certified", "attacked"] if asks_radius(members[0]) else ["margin"]
    else:
        names = ["property", "result", "smallest lower bound"]
    names.append("seconds")
    head = element("tr", *(
        element("th", name, scope="col", class_="number" if name in _NUMERIC else None)
        for name in names
    ))
    rows = [element("tr", *(_cell(name, member) for name in names)) for member in members]
    table = element("table", element("thead", head), element("tbody", *rows), class_="inputs")
    return _scrolled(table)


def _cell(name: str, result: dict[str, Any]) -> Markup:
    if name in ("input", "property"):
        return element("th", element("bdi", result["property"]), scope="row")
    if name == "sentence":
        sentence = result.get("text") or " ".join(result.get("tokens") or ())
        unknown = result.get("unknown_text")
        note = [element("br"), element("bdi", f"unknown: {', '.join(unknown)}")] if unknown else []
        return element("td", element("bdi", sentence), *note, class_="long")
    if name in ("label", "predicted"):
        return element("td", element("bdi", _named(result, name)))
    if name == "result":
        return element("td", *_outcome(result), class_="long")
    values = {
        "certified": at_least(certified_radius(result)),
        "attacked": at_most(attacked_radius(result)),
        "margin": at_least(margin(result)),
        "smallest lower bound": at_least(_smallest_bound(result)),
        "seconds": figure(result["seconds"]),
    }
    return element("td", values[name], class_="number")


def _outcome(result: dict[str, Any]) -> list[Markup]:
    """The result's word, and what explains it: an error, a note, by how much a counterexample is
    one, or the words that replaced others."""
    word = result["result"]
    kind = "good" if is_certified(result) else "bad" if word in ("sat", "error") else None
    shown = WORDS[word] if result.get("task") is not None else word
    parts = [element("span", shown, class_=kind)]
    if result.get("error"):
        parts += [Markup(": "), element("bdi", result["error"])]
    elif result.get("note"):
        parts += [Markup(": "), element("bdi", result["note"])]
    elif number(result.get("violation")) is not None:
        parts.append(Markup(f" by {figure(result['violation'])}"))
        if number(result.get("float64_violation")) is not None:
            parts.append(Markup(f" ({figure(result['float64_violation'])} in float64)"))
    elif result.get("question") == "synonyms" and result.get("counterexample"):
        found = result["counterexample"]
        is_words = isinstance(found, list) and all(isinstance(word, str) for word in found)
        said = " ".join(found) if is_words else json.dumps(found, ensure_ascii=False)
        parts += [Markup(" by: "), element("bdi", said)]
    return parts


def _named(result: dict[str, Any], name: str) -> str:
    value, said = result.get(name), result.get(f"{name}_name")
    if value is None:
        return "-"
    return f"{said} ({value})" if said else str(value)


def _smallest_bound(result: dict[str, Any]) -> float | None:
    """What the plot and the table show: the margin; of a property, the smallest lower bound."""
    if result.get("task") is not None:
        return margin(result)
    bounds = list(map(number, result.get("lower_bounds") or ()))
    return None if None in bounds else min(bounds, default=None)


def _scrolled(table: Markup) -> Markup:
    return element("div", table, class_="scroll")


def _swatch(kind: str) -> Markup:
    return element("span", "", class_=f"swatch {kind}", aria_hidden="true")


