"""Functions and branches of ONNX graphs: what takes their place before, or while, nodes are read.

A file may define functions of its own: onnx's inliner writes them out. An `If` whose condition does
not depend on the input (exporters ask for sizes) is its branch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
import onnx.inliner

from lirpa_megatron.errors import UserError


def written_out(model: onnx.ModelProto, most: int) -> onnx.ModelProto:
    """The model without functions of its own.

    Args:
        model: a checked model.
        most: nodes that it may have.

    Raises:
        UserError: it would have more, or functions call themselves.
    """
    functions = {(f.domain, f.name): f for f in model.functions}
    counts: dict[tuple[str, str], int] = {}

    def size(nodes: Iterable[onnx.NodeProto], calls: frozenset) -> int:
        total = 0
        for node in nodes:
            key = node.domain, node.op_type
            if key in calls:
                raise UserError(f"function {node.op_type} calls itself")
            if key in functions:
                if key not in counts:
                    counts[key] = size(functions[key].node, calls | {key})
                total += counts[key]
            total += 1 + sum(size(graph.node, calls) for graph in branches(node))
            if total > most:
                raise UserError(f"it has more than {most:,} nodes, its functions written out")
        return total

    size(model.graph.node, frozenset())
    try:
        return onnx.inliner.inline_local_functions(model) if functions else model
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["unknown reason"])[0]
        raise UserError(f"its functions cannot be written out: {reason[:200]}") from None


def branches(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node has as attributes."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g


def reads_of(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, those that its graphs read included."""
    yield from (name for name in node.input if name)
    for graph in branches(node):
        for inner in graph.node:
            yield from reads_of(inner)
        yield from (value.name for value in graph.output)
