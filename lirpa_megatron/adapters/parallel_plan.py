"""Which Linear layers of a plain module become Column and which Row, from its graph.

A *stream* is a set of values that have their features in the same places: the output of a Linear
and everything that elementwise operators make of it, and of other streams they combine it with (a
residual addition makes one stream of two). Attention whose queries, keys and values are features of
all heads side by side (`head_dim_at`) makes one stream of them and its output, sharded by heads. A
stream can be sharded when only Linear layers write to it (they become Column) and only Linear
layers read from it (they become Row). A Linear between two streams cannot be Column and Row at
once, so streams that are sharded are never neighbours; among those choices, the one that shards the
most weights is taken.
"""

from __future__ import annotations

import builtins
import functools
import math
import operator
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lirpa_megatron.operators.elementwise.functions import FUNCTIONS


def _names() -> set[str]:
    """Names of torch's functions in the table of elementwise functions."""
    return {name.split("::")[1] for entry in FUNCTIONS.values() for name in entry.aten}


@functools.cache
def _modules() -> dict[str, type]:
    """torch.nn's classes by their names without capitals: those of the functions in F."""
    return {name.lower(): cls for name, cls in vars(nn).items() if isinstance(cls, type)}


_OTHER_MODULES = (nn.ReLU, nn.GELU, nn.Softsign, nn.Identity, nn.Dropout)
_OTHER_NAMES = {
    "relu", "gelu", "softsign", "dropout", "add", "sub", "mul", "neg", "div", "truediv", "pow",
    "maximum", "minimum", "clip", "logsigmoid",
}
"""Beside those of the table: what the host, `exported` and this package's operators make of it."""
_MOST_STATES = 4096  # of the search in `_choose`; chains and residual stacks need a handful


@dataclass(frozen=True)
class Decision:
    """What becomes of one Linear layer."""

    kind: str
    """'column', 'row' or 'replicated'."""
    reason: str
    """Why, for a reader."""


@dataclass
class _Stream:
    """Values with their features in the same places."""

    writers: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    obstacle: str = ""
    width: int = 0
    head_dim: int = 1
    """Features that stay together."""


def plan_layers(module: nn.Module, size: int) -> dict[str, Decision]:
    """Chooses Column, Row or replicated for each Linear of the module.

    Args:
        module: built of Linear layers, elementwise activations, residual sums, Flatten, ...; its
            weights are not looked at (they may be on the meta device).
        size: tensor-parallel size.

    Returns:
        Linear's name -> decision.
    """
    linears = {n: m for n, m in module.named_modules() if type(m) is nn.Linear}
    try:
        graph = fx.symbolic_trace(module).graph
    except Exception as error:  # any code may stand in a forward
        reason = f"torch.fx cannot trace the module: {str(error).splitlines()[0]}"
        return {name: Decision("replicated", reason) for name in linears}
    unusable = _unusable(linears, graph)
    streams, input_of, output_of = _streams(graph, linears, unusable)
    sharded = _choose(streams, linears, size)
    decisions = {}
    for name in linears:
        decisions[name] = _decide(name, unusable, streams, sharded, input_of, output_of, size)
    return decisions


def _unusable(linears: dict[str, nn.Linear], graph: fx.Graph) -> dict[str, str]:
    """Layers that stay as they are whatever their neighbours: name -> reason."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    reasons = {}
    owners: dict[int, str] = {}
    for name, layer in linears.items():
        if calls[name] != 1:
            reasons[name] = f"it is called {calls[name]} times"
        for parameter in layer.parameters():
            other = owners.setdefault(id(parameter), name)
            if other != name:
                reasons[name] = f"it shares a parameter with {other}"
                reasons[other] = f"it shares a parameter with {name}"
    for node in graph.nodes:
        if node.op == "get_attr":
            owner = str(node.target).rpartition(".")[0]
            if owner in linears:
                reasons[owner] = "its weight is also used directly"
    return reasons


def _streams(
    graph: fx.Graph, linears: dict[str, nn.Linear], unusable: dict[str, str]
) -> tuple[list[_Stream], dict[str, int], dict[str, int]]:
    modules = dict(graph.owning_module.named_modules())
    parent: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    values = [node for node in graph.nodes if node.op != "output"]
    for node in values:
        parent[node] = node
        for x in _of_one_stream(node, modules):
            parent[root(x)] = root(node)

    number: dict[fx.Node, int] = {}
    streams: list[_Stream] = []
    for node in values:
        if root(node) not in number:
            number[root(node)] = len(streams)
            streams.append(_Stream())
        number[node] = number[root(node)]

    input_of: dict[str, int] = {}
    output_of: dict[str, int] = {}
    for node in graph.nodes:
        linear = node.op == "call_module" and node.target in linears
        if linear:
            layer, name = linears[node.target], str(node.target)
            source, target = streams[number[node.args[0]]], streams[number[node]]
            input_of[name], output_of[name] = number[node.args[0]], number[node]
            source.readers.append(name)
            target.writers.append(name)
            source.width, target.width = layer.in_features, layer.out_features
            if name in unusable:
                source.obstacle = source.obstacle or f"{name} reads it, and {unusable[name]}"
                target.obstacle = target.obstacle or f"{name} writes it, and {unusable[name]}"
        elif node.op == "output":
            for x in node.all_input_nodes:
                streams[number[x]].obstacle = "it is the output"
        elif _is_of_heads(node):
            stream = streams[number[node]]
            stream.head_dim = math.lcm(stream.head_dim, node.args[node.target.head_dim_at])
        elif not _is_elementwise(node, modules):
            what = "the input" if node.op == "placeholder" else f"{node.op} {node.target}"
            streams[number[node]].obstacle = streams[number[node]].obstacle or f"{what} writes it"
            for x in node.all_input_nodes:
                streams[number[x]].obstacle = streams[number[x]].obstacle or f"{what} reads it"
    return streams, input_of, output_of


def _of_one_stream(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The inputs that have their features in the same places as the result."""
    if _is_of_heads(node):
        return [x for x in node.args[:2] if isinstance(x, fx.Node)]
    return node.all_input_nodes if _is_elementwise(node, modules) else []


def _is_of_heads(node: fx.Node) -> bool:
    """Whether each head of the result depends on that head of the first two inputs alone."""
    return node.op == "call_function" and hasattr(node.target, "head_dim_at")


def _is_elementwise(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether each feature of the result depends on that feature of the inputs alone."""
    if node.op == "call_module":
        return _is_elementwise_module(modules[str(node.target)])
    if node.op == "call_function":
        if getattr(node.target, "elementwise", False):
            return True
        name = getattr(node.target, "__name__", "").rstrip("_")
        if name not in _names() | _OTHER_NAMES:
            return False
        homes = (torch, F, operator, torch._C._nn, builtins)
        return any(getattr(home, name, None) is node.target for home in homes)
    name = str(node.target).strip("_")
    return node.op == "call_method" and name in _names() | _OTHER_NAMES


def _is_elementwise_module(module: nn.Module) -> bool:
    if isinstance(module, nn.PReLU):
        return module.num_parameters == 1  # several slopes would have to be sharded alike
    known = _modules()
    classes = (known.get(name.replace("_", "")) for name in _names())
    return isinstance(module, (*_OTHER_MODULES, *(cls for cls in classes if cls is not None)))


def _choose(streams: list[_Stream], linears: dict[str, Any], size: int) -> set[int]:
    """Streams to shard: no two joined by a Linear, with the most weights in all."""

    def weights(stream: _Stream) -> int:
        names = {*stream.writers, *stream.readers}
        return sum(linears[n].in_features * linears[n].out_features for n in names)

    possible = [
        i for i, s in enumerate(streams)
        if not s.obstacle and s.writers and s.readers and s.width % (size * s.head_dim) == 0
        and not set(s.writers) & set(s.readers)
    ]
    layers = {i: {*streams[i].writers, *streams[i].readers} for i in possible}
    # Stream by stream: for each set of streams that the choices so far exclude, the best choice.
    best: dict[frozenset[int], tuple[int, frozenset[int]]] = {frozenset(): (0, frozenset())}
    for i in possible:
        neighbours = {j for j in possible if j > i and layers[i] & layers[j]}
        options = []
        for excluded, (weight, taken) in best.items():
            options.append((excluded - {i}, weight, taken))
            if i not in excluded:
                options.append((excluded - {i} | neighbours, weight + weights(streams[i]),
                                taken | {i}))
        best = {}
        for excluded, weight, taken in sorted(options, key=lambda o: o[1])[-_MOST_STATES:]:
            best[excluded] = (weight, taken)
    return set(max(best.values(), key=lambda choice: choice[0])[1])


def _decide(
    name: str, unusable: dict[str, str], streams: list[_Stream], sharded: set[int],
    input_of: dict[str, int], output_of: dict[str, int], size: int,
) -> Decision:
    if name in unusable:
        return Decision("replicated", unusable[name])
    if output_of[name] in sharded:
        readers = ", ".join(streams[output_of[name]].readers)
        return Decision("column", f"its output goes to {readers} only, through elementwise steps")
    if input_of[name] in sharded:
        writers = ", ".join(streams[input_of[name]].writers)
        return Decision("row", f"its input comes from {writers} only, through elementwise steps")
    reasons = []
    for side, index in (("input", input_of[name]), ("output", output_of[name])):
        stream = streams[index]
        if stream.obstacle:
            reasons.append(f"its {side} stays whole: {stream.obstacle}")
        elif stream.width % size == 0 and stream.width % (size * stream.head_dim):
            reasons.append(
                f"its {side} has {stream.width // stream.head_dim} heads, which tensor-parallel "
                f"size {size} does not divide"
            )
        elif stream.width % size:
            reasons.append(
                f"its {side} width {stream.width} is not divisible by tensor-parallel size {size}"
            )
        else:
            reasons.append(f"its {side} lies next to a stream that is sharded")
    return Decision("replicated", "; ".join(reasons))
