"""A sentence whose words are coloured by how far each may move before the proof ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lirpa_megatron.report.markup import Markup, element, join
from lirpa_megatron.report.summary import at_least, at_most, figure, number

# ColorBrewer's YlOrBr, which the colour-blind can tell apart too, from fragile to robust, each
# with the colour of text that can be read on it.
_LEVELS = (
    ("#993404", "#fff"), ("#d95f0e", "#000"), ("#fe9929", "#000"), ("#fed98e", "#000"),
    ("#ffffd4", "#000"),
)
_LAST = len(_LEVELS) - 1
STYLE = "\n".join(
    f".level{level} {{ background: {back}; color: {front}; }}"
    for level, (back, front) in enumerate(_LEVELS)
)


def heat_maps(results: Sequence[dict[str, Any]], unit: str) -> Markup:
    """The sentences that have `positions`, on one common scale; empty if none has.

    Where no radius was asked for, a word is either certified at eps or not.
    """
    shown = [result for result in results if result.get("positions")]
    radii = [
        radius
        for result in shown
        for word in result["positions"]
        if (radius := number(word.get("certified_radius"))) is not None
    ]
    if not shown:
        return Markup("")
    most = max(radii) if radii else None
    return join((_legend(most, unit), *(_sentence(result, most) for result in shown)))


def _sentence(result: dict[str, Any], most: float | None) -> Markup:
    words = {word["position"]: word for word in result["positions"]}
    spans = [_word(token, words.get(at), most) for at, token in enumerate(result["tokens"])]
    name = element("bdi", result["property"])
    return element("p", element("span", name, class_="name"), " ", *spans, class_="sentence")


def _word(token: str, word: dict[str, Any] | None, most: float | None) -> Markup:
    shown = element("bdi", token or "\u2423")
    if word is None:
        return element("span", shown, class_="word", title=f"{token}: not perturbed")
    certified = number(word.get("certified_radius"))
    attacked = number(word.get("attacked_radius"))
    title = f"{token}: certified {at_least(certified)}, attacked {at_most(attacked)}"
    if number(word.get("margin")) is not None:
        title += f", margin {at_least(word['margin'])}"
    if word.get("result"):
        title += f", {word['result']}"
    if most is None:
        level = _LAST if word.get("result") == "unsat" else None
        shown_number = at_least(number(word.get("margin")))
    else:
        level, shown_number = _level(certified, most), at_least(certified)
    kind = "none" if level is None else f"level{level}"
    return element("span", shown, " ", element("small", shown_number), class_=f"word {kind}",
                   title=title)


def _level(radius: float | None, most: float) -> int | None:
    if radius is None or radius <= 0:
        return None
    return min(int(radius / most * len(_LEVELS)), _LAST)


def _legend(most: float | None, unit: str) -> Markup:
    steps = len(_LEVELS)
    if most is None:
        title, levels = "A word may move by eps: ", [(_LAST, "certified, with the margin")]
    else:
        title = f"Certified {unit} of a word: "
        levels = [(level, f"from {figure(most * level / steps)}") for level in range(steps)]
    boxes = [element("span", said, class_=f"word level{level}") for level, said in levels]
    none = element("span", "not certified", class_="word none")
    plain = element("span", "not perturbed", class_="word")
    return element("p", title, *boxes, none, plain, class_="legend")
