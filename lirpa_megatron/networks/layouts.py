"""In which shape each layer of a network reads its inputs and makes its output.

A description knows widths alone. Layers that treat vectors alike (linear layers on tokens, norms,
attention) work on [B, T, h], and what stands between them keeps that shape: the methods that
follow vectors (`forward`), and shards of features, need to see them. Layouts are shapes without
the batch; (n,) is flat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Layout = tuple[int, ...]
# (layer, layouts of what it reads) -> (layouts in which it reads it, layout of what it makes)
Rule = Callable[[Any, Sequence[Layout]], tuple[list[Layout], Layout]]


def layouts_of(
    layers: Sequence[Any], known: Mapping[str, Layout]
) -> tuple[dict[str, Layout], dict[str, list[Layout]]]:
    """The layout of each value, and those in which each layer reads its inputs.

    Args:
        layers: descriptions, in an order in which they can run.
        known: the layouts of what they read besides.
    """
    made, reads = dict(known), {}
    for layer in layers:
        rule = _RULES.get(layer.op, _alike)
        reads[layer.name], made[layer.name] = rule(layer, [made[name] for name in layer.inputs])
    return made, reads


def _alike(layer: Any, given: Sequence[Layout]) -> tuple[list[Layout], Layout]:
    """What is done to each element: as the first input that is not flat."""
    layout = next((own for own in given if len(own) > 1), (layer.n_out,))
    return [layout] * len(given), layout


def _flat(layer: Any, given: Sequence[Layout]) -> tuple[list[Layout], Layout]:
    return [(math.prod(own),) for own in given], (layer.n_out,)


def _tokens(layer: Any, given: Sequence[Layout]) -> tuple[list[Layout], Layout]:
    count = layer.attributes["tokens"]
    return [(count, layer.n_in // count)], (count, layer.n_out // count)


def _on_vectors(layer: Any, given: Sequence[Layout]) -> tuple[list[Layout], Layout]:
    size = layer.attributes["size"]
    layout = given[0] if given[0][-1] == size else (layer.n_in // size, size)
    return [layout], layout


def _select(layer: Any, given: Sequence[Layout]) -> tuple[list[Layout], Layout]:
    """Whole vectors stay vectors; one of them is flat."""
    (layout,), index = given, layer.attributes["index"]
    if len(layout) != 2 or len(index) % layout[1]:
        return _flat(layer, given)
    size = layout[1]
    whole = all(
        first % size == 0 and index[at : at + size] == list(range(first, first + size))
        for at, first in ((at, index[at]) for at in range(0, len(index), size))
    )
    if not whole:
        return _flat(layer, given)
    count = len(index) // size
    return [layout], (size,) if count == 1 else (count, size)


def _sum(layer: Any, given: Sequence[Layout]) -> tuple[list[Layout], Layout]:
    (layout,) = given
    sums_vectors = len(layout) == 2 and layer.n_out == layout[1]
    if sums_vectors and layer.attributes["index"] == list(range(layout[1])) * layout[0]:
        return [layout], (layer.n_out,)
    return _flat(layer, given)


def _join(layer: Any, given: Sequence[Layout]) -> tuple[list[Layout], Layout]:
    sizes = [own[1] for own in given if len(own) == 2]
    widths = [math.prod(own) for own in given]
    if not sizes or any(width % sizes[0] for width in widths):
        return _flat(layer, given)
    return [(width // sizes[0], sizes[0]) for width in widths], (layer.n_out // sizes[0], sizes[0])


def _scores(layer: Any, given: Sequence[Layout]) -> tuple[list[Layout], Layout]:
    heads, queries, keys = (layer.attributes[name] for name in ("heads", "queries", "keys"))
    widths = [math.prod(own) for own in given]
    return (
        [(queries, widths[0] // queries), (keys, widths[1] // keys)], (heads, queries, keys)
    )


def _attend(layer: Any, given: Sequence[Layout]) -> tuple[list[Layout], Layout]:
    heads, queries, keys = (layer.attributes[name] for name in ("heads", "queries", "keys"))
    width = math.prod(given[1]) // keys
    return [(heads, queries, keys), (keys, width)], (queries, width)


_RULES: dict[str, Rule] = {
    "linear": _flat, "tokens": _tokens, "select": _select, "sum": _sum, "join": _join,
    "prelu": _flat, "softmax": _on_vectors, "logsoftmax": _on_vectors,
    "layernorm": _on_vectors, "norm": _on_vectors, "scores": _scores, "attend": _attend,
}
"""Of the operators that are not done to each element alone."""
