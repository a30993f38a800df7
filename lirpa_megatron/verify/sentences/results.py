"""Results of a run over sentences: one JSON object a line, and what `--resume` makes of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lirpa_megatron.errors import UserError
from lirpa_megatron.report.reader import checked
from lirpa_megatron.verify.sentences.data import Item
from lirpa_megatron.verify.sentences.encoded import Encoded
from lirpa_megatron.verify.sentences.sentence import Finding, Verdict
from lirpa_megatron.verify.sentences.task import Task
from lirpa_megatron.verify.sentences.tokenizer import Substitutes

_KEY = (
    "network", "iteration", "property", "task", "method", "question", "norm", "eps", "words",
    "shape", "tolerance", "prompt", "label_tokens", "dtype", "text", "label",
    "live_check", "rounding", "order", "splits", "layer", "vectors",
)


def result_of(
    item: Item, encoded: Encoded | None, substitutes: Substitutes, verdict: Verdict | None,
    task: Task, asked: dict[str, Any], ranks: tuple[int, int], seconds: float,
    memory: float | None, error: str | None = None,
) -> dict[str, Any]:
    """The line for one sentence, as plain data; see docs/command-line.md for the fields.

    `asked` is what the results of one run have in common, among it `SentenceOptions.key`.
    """
    found = verdict.finding if verdict is not None else None
    positions = None
    if verdict is not None and asked["words"] == "each":
        positions = [
            {"position": p, "result": each.result, "margin": each.margin,
             "certified_radius": each.certified_radius, "attacked_radius": each.attacked_radius,
             "counterexample": each.sentence, **_pieces(each)}
            for p, each in sorted(verdict.positions.items())
        ]
    tried = {}
    if asked["question"] == "synonyms":
        tried["substitutes"] = [{"position": p, "words": w} for p, w in substitutes.words.items()]
        tried["dropped_candidates"] = substitutes.dropped
    margin = None if found is None else found.margin
    found = found or Finding("unknown")
    return {
        "network": asked["network"],
        "property": item.name,
        "result": "error" if verdict is None else verdict.result,
        **asked,
        "text": item.text,
        "tokens": None if encoded is None else encoded.tokens,
        "unknown_tokens": None if encoded is None else len(encoded.missing),
        "unknown_text": None if encoded is None else encoded.missing,
        "fixed": None if encoded is None else _fixed(encoded, substitutes, asked),
        "label": item.label,
        "predicted": None if verdict is None else verdict.predicted,
        # An error may be that the label is no class.
        "label_name": None if None in (verdict, item.label) else task.class_name(item.label),
        "predicted_name": None if verdict is None else task.class_name(verdict.predicted),
        "clean_margin": None if verdict is None else verdict.clean_margin,
        "margin": margin,
        "lower_bounds": [] if margin is None else [margin],
        "certified_radius": found.certified_radius,
        "attacked_radius": found.attacked_radius,
        "positions": positions,
        **tried,
        "counterexample": found.sentence,
        **_pieces(found),
        "tensor_parallel": ranks[0],
        **({} if ranks[1] == 1 else {"pipeline_parallel": ranks[1]}),
        "seconds": round(seconds, 4),
        "peak_memory_mib": memory,
        **({} if error is None else {"error": error}),
    }


def _pieces(found: Finding) -> dict[str, Any]:
    """What splits have found, if there were any."""
    if found.pieces is None:
        return {}
    return {"proved_share": found.proved_share, "pieces": found.pieces}


def _fixed(encoded: Encoded, substitutes: Substitutes, asked: dict[str, Any]) -> list[int]:
    """The positions that no perturbation moves."""
    moves = set(encoded.positions)
    if asked["question"] == "synonyms" and (asked["eps"] is None or asked["words"] == "each"):
        moves = set(substitutes.ids)
    return [position for position in range(len(encoded.ids)) if position not in moves]


def to_line(result: dict[str, Any]) -> str:
    return json.dumps(result, allow_nan=False, ensure_ascii=False) + "\n"


def key_of(result: dict[str, Any]) -> tuple:
    """What `--resume` recognises a sentence and a question by."""
    return tuple(map(result.get, _KEY))


def read_results(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Results of an earlier run, and the size in bytes of the part of the file to keep.

    A killed run may leave half a line at the end, which is dropped.

    Raises:
        UserError: a line, other than half a last one, is not a result of a run over sentences.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"results {path} cannot be read: {error.strerror}") from None
    kept = data[: data.rfind(b"\n") + 1]
    results = []
    for number, line in enumerate(kept.splitlines(), start=1):
        try:
            result = checked(line.decode("utf-8"))
            if result.get("question") is None:
                raise ValueError("not of a sentence")
            hash(key_of(result))
        except (ValueError, TypeError):
            raise UserError(
                f"line {number} of {path} is not a result of verify --data: remove it or choose "
                "another --output"
            ) from None
        results.append(result)
    return results, len(kept)


def unfinished(
    items: Sequence[Item], done: Sequence[dict[str, Any]], like: dict[str, Any]
) -> list[Item]:
    """The items without a result for this question.

    Args:
        items: of the data.
        done: earlier results.
        like: what this run's results have in common, as a result has it.
    """
    finished = {key_of(result) for result in done}
    return [item for item in items if key_of(_asked(item, like)) not in finished]


def of_items(
    items: Sequence[Item], done: Sequence[dict[str, Any]], like: dict[str, Any]
) -> list[dict[str, Any]]:
    """The earlier results for this question; arguments as for `unfinished`."""
    keys = {key_of(_asked(item, like)) for item in items}
    return [result for result in done if key_of(result) in keys]


def _asked(item: Item, like: dict[str, Any]) -> dict[str, Any]:
    return {**like, "property": item.name, "text": item.text, "label": item.label}
