"""What the results of a run add up to. Plain data in and out, so that a job can write it as JSON.

A result is a dictionary as `verify` writes it, one for each input. Words used here:

right         the input has a label, the prediction is that label, and its result is not
              "misclassified".
wrong         its result is "misclassified", or it has a label and a prediction that differ.
certified     the result is "unsat" and, for a sentence, the margin is a finite number above 0. When
              a radius was asked for: the certified radius is a finite number above 0.
certified at radius r
              the certified radius is a finite number of at least r > 0.

A sentence whose words were perturbed one at a time is as strong as its weakest word: its margin and
radius are the smallest of its own and theirs, and a word without one certifies nothing. An error, a
missing number, NaN and infinity never certify.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context
from typing import Any

# The words of a result -> what they say to a reader.
WORDS = {
    "unsat": "certified",
    "sat": "attacked",
    "unknown": "unknown",
    "timeout": "out of time",
    "error": "error",
    "misclassified": "misclassified",
}
_SETTING = (
    "network", "iteration", "stored_dtype", "dtype", "method", "task", "question", "norm", "words",
    "shape", "tolerance", "prompt", "label_tokens", "order", "splits", "layer", "vectors",
)

Result = dict[str, Any]


def number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def margin(result: Result) -> float | None:
    """Smallest lower bound of the margins; None if it is missing, or missing for a word."""
    return _weakest(result, "margin")


def certified_radius(result: Result) -> float | None:
    """Radius proved; None if there is none, or none for a word."""
    if result["result"] in ("error", "misclassified"):
        return None
    return _weakest(result, "certified_radius")


def attacked_radius(result: Result) -> float | None:
    """Smallest radius at which an attack succeeded; None if none did."""
    radii = [result, *(result.get("positions") or ())]
    return min(_numbers(each.get("attacked_radius") for each in radii), default=None)


def is_right(result: Result) -> bool:
    label = result.get("label")
    return label is not None and result.get("predicted") == label and not is_wrong(result)


def is_wrong(result: Result) -> bool:
    label, predicted = result.get("label"), result.get("predicted")
    differ = label is not None and predicted is not None and label != predicted
    return differ or result["result"] == "misclassified"


def is_certified(result: Result) -> bool:
    """Certified in the region that was asked for; see the top of this file."""
    if asks_radius(result):
        return (certified_radius(result) or 0.0) > 0
    if result["result"] != "unsat":
        return False
    return result.get("task") is None or (margin(result) or 0.0) > 0


def asks_radius(result: Result) -> bool:
    question = result.get("question")
    return question == "radius" or (question == "direction" and result.get("eps") is None)


def groups_of(results: Sequence[Result]) -> list[list[Result]]:
    """Results of one network and one question (`_SETTING`) together, in order of appearance.

    They are also told apart by eps if an input occurs with several, so that it counts once.
    """
    groups: list[list[Result]] = []
    for members in _split(results, _SETTING):
        names = {member["property"] for member in members}
        groups += [members] if len(names) == len(members) else _split(members, ("eps",))
    return groups


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """Sums of a run, one group for each setting: one network and one question, see `groups_of`.

    Of each group:
        inputs, counts: how many, and how many of each result word.
        certified, attacked: inputs certified, and inputs on which an attack succeeded.
        labelled: inputs with a label. The accuracies below are shares of these, None without any.
        clean_accuracy: share of all inputs with a label that are right.
        certified_accuracy: share of all inputs with a label that are right and certified; a lower
            bound of the accuracy under any perturbation in the region asked for. When a radius was
            asked for, that at any radius above 0; `accuracy_curve` has it at each radius.
        accuracy_limit: share of them that are not wrong and not attacked; an upper bound of it.
            None when a radius was asked for: `accuracy_curve` has it at each radius.
        certified_share: share of all inputs, with a label or not, that are certified and not wrong.
        radius_inputs, mean_radius, median_radius, min_radius: of the certified radii of the inputs
            that a radius was asked for and that are not wrong; an input without one counts as 0.
        seconds, seconds_per_input (mean), peak_memory_mib (largest; None if not measured).
        unknown_tokens, unknown_inputs: tokens that the vocabulary does not have, and inputs with
            such; None where there are no tokens.
        repeated: lines that repeat an input of this setting; each line is counted.
        contradictions: results that contradict themselves, in words. There must be none: a
            certified radius above an attacked one is a bug in a bound or in an attack.
    """
    return {"inputs": len(results), "groups": [_summary(group) for group in groups_of(results)]}


def accuracy_curve(results: Sequence[Result]) -> dict[str, Any]:
    """Certified accuracy against the radius, and its upper bound from the attacks.

    Shares are of all inputs with a label; without any label, of all inputs (then a certified
    prediction counts whether it is true or not).

    Returns:
        inputs: how many the shares are of.
        certified: (radius, share) ascending: at radii above the one before and up to this radius,
            this share is right and certified. Above the last radius it is 0.
        limit: (radius, share) likewise: below this radius, this share is not wrong and no attack
            succeeded. From the last radius on it is `limit_end`.
    """
    population = [r for r in results if _is_labelled(r)]
    has_label = bool(population)
    population = population or list(results)
    kept = [r for r in population if is_right(r) or not (has_label or is_wrong(r))]
    certified = sorted(c for c in map(certified_radius, kept) if c is not None and c > 0)
    standing = [r for r in population if not is_wrong(r)]
    attacked = sorted(_numbers(map(attacked_radius, standing)))
    total, left = len(population), len(standing) - len(attacked)
    return {
        "inputs": total,
        "certified": _steps(certified, 0, total),
        "limit": _steps(attacked, left, total),
        "limit_end": left / total,
    }


def summary_rows(group: dict[str, Any]) -> list[tuple[str, str]]:
    """What is shown of a group: (measure, value), in reading order; "-" for what does not apply."""
    counts, total = group["counts"], group["inputs"]
    at = " at a radius above 0" if group["asks_radius"] else ""
    rows = [
        ("network", group["network"]),
        ("iteration", group["iteration"] or "-"),
        ("weights", _precision(group)),
        ("method", group["method"]),
        ("task", group["task"] or "VNN-LIB property"),
        ("question", group["question"] or "-"),
        ("words perturbed", {"all": "together", "each": "one at a time"}.get(group["words"], "-")),
        ("norm", "-" if group["norm"] is None else f"L{group['norm']}"),
        ("eps", ", ".join(figure(eps) for eps in group["eps"]) or "-"),
        ("tensor-parallel size", ", ".join(map(str, group["tensor_parallel"])) or "-"),
        ("inputs", str(total)),
        ("unknown tokens", _unknown(group)),
        ("certified" + at, str(group["certified"])),
        ("attacked", str(group["attacked"])),
        *((WORDS[word], str(counts[word])) for word in ("unknown", "timeout", "error")),
    ]
    if group["task"] is not None:
        rows += [
            ("misclassified", str(counts["misclassified"])),
            ("clean accuracy", _share(group, "clean_accuracy")),
            ("certified accuracy" + at, _share(group, "certified_accuracy")),
            ("accuracy under attack, at most", _share(group, "accuracy_limit")),
        ]
    for name in ("mean", "median", "min"):
        rows.append((f"{name} certified radius", at_least(group[f"{name}_radius"])))
    rows += [
        ("seconds per input", figure(group["seconds_per_input"])),
        ("seconds", figure(group["seconds"])),
        ("peak memory (MiB)", figure(group["peak_memory_mib"])),
    ]
    for name in ("repeated", "contradictions"):
        if group[name]:
            rows.append((name, str(group[name] if name == "repeated" else len(group[name]))))
    return rows


def summary_table(summary: dict[str, Any]) -> str:
    """`summarise`'s result as text, one column for each group."""
    columns = [dict(summary_rows(group)) for group in summary["groups"]]
    names = list(dict.fromkeys(name for column in columns for name in column))
    used = [name for name in names if any(c.get(name, "-") != "-" for c in columns)]
    lines = [[name, *(column.get(name, "-") for column in columns)] for name in used]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def figure(value: float | None, rounding: str = ROUND_HALF_EVEN) -> str:
    """A number as it is shown: four significant digits, "-" for None."""
    if value is None:
        return "-"
    return f"{float(Context(prec=4, rounding=rounding).create_decimal(repr(value))):.4g}"


def at_least(value: float | None) -> str:
    """What was proved, rounded down: no more is shown than was proved."""
    return figure(value, ROUND_FLOOR)


def at_most(value: float | None) -> str:
    """Where an attack succeeded, rounded up."""
    return figure(value, ROUND_CEILING)


def _summary(group: list[Result]) -> dict[str, Any]:
    labelled = [r for r in group if _is_labelled(r)]
    asked = [r for r in group if asks_radius(r) and not is_wrong(r)]
    radii = [certified_radius(r) or 0.0 for r in asked]
    seconds = [r["seconds"] for r in group]
    unknown = [r["unknown_tokens"] for r in group if r.get("unknown_tokens") is not None]

    def share(holds: Callable[[Result], bool]) -> float | None:
        return sum(map(holds, labelled)) / len(labelled) if labelled else None

    return {
        **{name: group[0].get(name) for name in _SETTING},
        "asks_radius": asks_radius(group[0]),
        "eps": sorted(set(_numbers(r.get("eps") for r in group))),
        "tensor_parallel": sorted({r.get("tensor_parallel") for r in group} - {None}),
        "inputs": len(group),
        "counts": {word: sum(r["result"] == word for r in group) for word in WORDS},
        "certified": sum(map(is_certified, group)),
        "attacked": sum(map(_is_attacked, group)),
        "labelled": len(labelled),
        "clean_accuracy": share(is_right),
        "certified_accuracy": share(lambda r: is_right(r) and is_certified(r)),
        "accuracy_limit": None if asks_radius(group[0]) else share(
            lambda r: not is_wrong(r) and not _is_attacked(r)
        ),
        "certified_share": sum(is_certified(r) and not is_wrong(r) for r in group) / len(group),
        "radius_inputs": len(radii),
        "mean_radius": statistics.fmean(radii) if radii else None,
        "median_radius": statistics.median(radii) if radii else None,
        "min_radius": min(radii, default=None),
        "seconds": sum(seconds),
        "seconds_per_input": statistics.fmean(seconds),
        "peak_memory_mib": max(_numbers(r.get("peak_memory_mib") for r in group), default=None),
        "unknown_tokens": sum(unknown) if unknown else None,
        "unknown_inputs": sum(map(bool, unknown)) if unknown else None,
        "repeated": len(group) - len({r["property"] for r in group}),
        "contradictions": [text for r in group for text in _contradictions(r)],
    }


def _is_labelled(result: Result) -> bool:
    return result.get("label") is not None or result["result"] == "misclassified"


def _is_attacked(result: Result) -> bool:
    found = asks_radius(result) and attacked_radius(result) is not None
    return found or result["result"] == "sat"


def _contradictions(result: Result) -> list[str]:
    found, name = [], result["property"]
    for part in (result, *(result.get("positions") or ())):
        where = name if part is result else f"{name}, word {part['position']}"
        proved, broken = number(part.get("certified_radius")), attacked_radius(part)
        if proved is not None and broken is not None and proved > broken:
            found.append(f"{where}: certified at radius {proved!r}, but attacked at {broken!r}")
    if result.get("task") is None:
        return found
    if result["result"] == "unsat" and not (asks_radius(result) or is_certified(result)):
        found.append(f"{name}: result unsat, but no margin above 0")
    if result["result"] == "unsat" and is_wrong(result):
        found.append(f"{name}: result unsat, but the prediction is not the label")
    if result["result"] == "sat" and not asks_radius(result) and (margin(result) or 0.0) > 0:
        found.append(f"{name}: result sat, but the margin is above 0")
    return found


def _weakest(result: Result, name: str) -> float | None:
    own, words = result.get(name), result.get("positions") or ()
    values = [number(word.get(name)) for word in words]
    if own is not None or not words:
        values.append(number(own))
    return None if None in values else min(values)


def _numbers(values: Iterable[Any]) -> list[float]:
    return [value for value in map(number, values) if value is not None]


def _split(results: Sequence[Result], names: Sequence[str]) -> list[list[Result]]:
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(str(result.get(name)) for name in names), []).append(result)
    return list(groups.values())


def _steps(ends: list[float], beyond: int, total: int) -> list[tuple[float, float]]:
    """(end, share up to it) for ascending ends of one input each, and some that never end."""
    first = {end: index for index, end in reversed(list(enumerate(ends)))}
    return [(end, (len(ends) - first[end] + beyond) / total) for end in sorted(first)]


def _precision(group: dict[str, Any]) -> str:
    stored, used = group["stored_dtype"], group["dtype"]
    if used is None:
        return "-"
    return used if stored in (None, used) else f"stored as {stored}, verified as {used}"


def _unknown(group: dict[str, Any]) -> str:
    tokens, inputs = group["unknown_tokens"], group["unknown_inputs"]
    return str(tokens or "-") if not tokens else f"{tokens} in {inputs} of {group['inputs']} inputs"


def _share(group: dict[str, Any], name: str) -> str:
    share, total = group[name], group["labelled"]
    return "-" if share is None else f"{share:.1%} ({round(share * total)} of {total})"
