"""ONNX networks, without onnx2torch (it needs torchvision) and without running the file's code.

Reads the graph node by node (`onnx_operators`). What is computed is what the file says: constants
are evaluated in the file's types by onnx's own reference evaluator, and arithmetic on activations
stays in the file's order, each operator a layer. Only what leaves no trace in the numbers is
simplified: reshapes and other movements of elements, and a bias added to a linear layer.

The function imported is that of one sample. A batch that the file leaves open is taken as one; in a
file with a fixed batch of several each sample must be treated by itself, which is checked. An input
without a batch is one sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import TensorProto

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.description import INPUT, MAX_WIDTH, NetworkDescription
from lirpa_megatron.networks.files import find_file, read_file, stem
from lirpa_megatron.networks.onnx_builder import Activation, Builder, as_tensor
from lirpa_megatron.networks.onnx_constants import array_of, constant_of, evaluate
from lirpa_megatron.networks.onnx_functions import reads_of, written_out
from lirpa_megatron.networks.onnx_operators import HANDLERS, Node
from lirpa_megatron.networks.onnx_operators.attention import check_masks
from lirpa_megatron.networks.onnx_operators.node import place

# Before this operator set, element-wise operators broadcast by other rules.
MIN_OPSET = 7
# Nodes of a graph, those that the output does not need included.
MAX_NODES = 20_000
# Sizes to try for a dimension that the file leaves open.
_MAX_TRIED = 64
# Types from the coarsest to the finest.
_COARSE_FIRST = ("bfloat16", "float16", "float32", "float64")
_TYPES = {
    TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64",
    TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16",
}
SUPPORTED_OPS = ", ".join(sorted([*HANDLERS, "Constant", "If"]))


@dataclass(frozen=True)
class ImportedNetwork:
    """An ONNX file's content."""

    description: NetworkDescription
    # full weights by parameter name of `Network`, in the types of the file
    weights: dict[str, torch.Tensor]


def read_onnx(path: str | Path, output: str | None = None) -> ImportedNetwork:
    """Reads NET.onnx or NET.onnx.gz.

    Args:
        path: the file.
        output: which of several outputs; None: the only one.

    Raises:
        UserError: missing, truncated or invalid file; an operator, shape or weight that is not
            supported (with the node's name).
    """
    model = _load(path)
    try:
        return _import(model, stem(path), output)
    except UserError as error:
        raise UserError(f"network {path}: {error}") from None


def _load(path: str | Path) -> onnx.ModelProto:
    data = read_file(path, "network")
    try:
        model = onnx.load_model_from_string(data)
        if len(model.graph.node) > MAX_NODES:
            raise UserError(
                f"network {path} has {len(model.graph.node):,} nodes; "
                f"at most {MAX_NODES:,} are supported"
            )
        for value in model.graph.output:  # not read here, and often left out
            value.type.tensor_type.shape.SetInParent()
        onnx.load_external_data_for_model(model, str(find_file(path, "network").parent))
        onnx.checker.check_model(model)
    except DecodeError:
        raise UserError(f"network {path} is truncated or not an ONNX file") from None
    except (onnx.checker.ValidationError, OSError, ValueError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or ["unknown reason"])[0]
        raise UserError(f"network {path} is not a valid ONNX file: {reason}") from None
    opset = _opset(model)
    if opset < MIN_OPSET:
        raise UserError(f"network {path} uses operator set {opset}; {MIN_OPSET} or newer is needed")
    return model


def _opset(model: onnx.ModelProto) -> int:
    return max((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), default=0)


def _import(model: onnx.ModelProto, name: str, output: str | None) -> ImportedNetwork:
    model = written_out(model, MAX_NODES)
    graph = model.graph
    if graph.sparse_initializer:
        raise UserError("sparse initializers are not supported")
    chosen = _output(graph, output)
    nodes = _needed(graph, chosen)
    read = {n for node in nodes for n in reads_of(node)} | {chosen}
    constants = {t.name: t for t in graph.initializer if t.name in read}
    inputs = [v for v in graph.input if v.name in read and v.name not in constants]
    if len(inputs) != 1:
        raise UserError(
            f"output {chosen!r} depends on {len(inputs)} inputs"
            + (f" ({', '.join(v.name for v in inputs)})" if inputs else "")
            + "; exactly one is supported"
        )
    reader = _Reader(nodes, constants, inputs[0], chosen, name, _opset(model))
    errors = []
    found: list[tuple[tuple[int, ...], ImportedNetwork]] = []
    for shape, batch in _readings(inputs[0], graph, nodes):
        try:
            found.append((shape, reader.run(shape, batch)))
        except UserError as error:
            errors.append(error)
            continue
        if not _is_open(inputs[0]):
            break
    if not found and not errors:
        raise UserError(
            f"input {inputs[0].name!r} leaves a size open that nothing in the file fixes: export "
            "the network with fixed sizes"
        )
    if not found:
        raise errors[-1 if len(errors) == 2 and not _is_open(inputs[0]) else 0]
    if len(found) > 1:
        sizes = " and ".join(str(list(shape)) for shape, _ in found[:2])
        raise UserError(
            f"input {inputs[0].name!r} leaves a size open, and both {sizes} fit: "
            "export the network with fixed sizes"
        )
    return found[0][1]


def _output(graph: onnx.GraphProto, wanted: str | None) -> str:
    names = [value.name for value in graph.output]
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"there is no output {wanted!r}; its outputs are {', '.join(names)}")
        return wanted
    if len(names) != 1:
        raise UserError(
            f"it has {len(names)} outputs ({', '.join(names)}): say which one is meant "
            "(--onnx-output NAME)"
        )
    return names[0]


def _needed(graph: onnx.GraphProto, output: str) -> list[onnx.NodeProto]:
    """The nodes that an output depends on, in order."""
    needed, nodes = {output}, []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(reads_of(node))
            nodes.append(node)
    return nodes[::-1]


# ------------------------------------------------------------------- what the input's shape means


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    """Sizes of an input; 0 where the file leaves one open."""
    tensor = value.type.tensor_type
    if tensor.elem_type not in _TYPES:
        kind = TensorProto.DataType.Name(tensor.elem_type).lower()
        raise UserError(f"input {value.name!r} is of type {kind}; floating point is expected")
    if not tensor.HasField("shape") or not tensor.shape.dim:
        raise UserError(f"input {value.name!r} has no shape")
    dims = [max(d.dim_value, 0) for d in tensor.shape.dim]
    if math.prod(n or 1 for n in dims) > MAX_WIDTH:
        raise UserError(f"input {value.name!r} of shape {dims} is too large")
    return dims


def _is_open(value: onnx.ValueInfoProto) -> bool:
    """Whether a size other than the batch's is left open."""
    dims = _dims(value)
    return 0 in (dims if len(dims) == 1 else dims[1:])


def _readings(
    value: onnx.ValueInfoProto, graph: onnx.GraphProto, nodes: list[onnx.NodeProto]
) -> Iterator[tuple[tuple[int, ...], int]]:
    """Shapes that the input may have, and how many samples that is: the likeliest first."""
    dims = _dims(value)
    if len(dims) > 1 and dims[0] == 0:
        dims[0] = 1
    if 0 not in dims:
        if len(dims) > 1 and dims[0] > 1:
            yield tuple(dims), dims[0]  # a batch of several, else one sample
        yield tuple(dims), 1
        return
    if dims.count(0) > 1:
        raise UserError(
            f"input {value.name!r} has shape {dims} (0: left open); besides the batch one size at "
            "most may be open: export the network with fixed sizes"
        )
    sizes = {n for tensor in graph.initializer for n in tensor.dims}
    sizes |= {
        n for node in nodes if node.op_type == "Constant"
        for a in node.attribute for n in a.t.dims
    }
    others = math.prod(n for n in dims if n)
    sizes |= {n // others for n in sizes if n % others == 0}
    tried = sorted(n for n in sizes if 1 < n <= MAX_WIDTH)[:_MAX_TRIED]
    batch = dims[0] if len(dims) > 1 and dims[0] > 1 else 1
    for size in tried:
        yield tuple(size if n == 0 else n for n in dims), batch


# ------------------------------------------------------------------- one pass over the graph


@dataclass
class _Reader:
    """Reads the nodes that an output needs, for one reading of the input's shape."""

    nodes: list[onnx.NodeProto]
    initializers: dict[str, onnx.TensorProto]
    input: onnx.ValueInfoProto
    output: str
    name: str
    opset: int

    def run(self, shape: tuple[int, ...], batch: int) -> ImportedNetwork:
        builder = Builder(math.prod(shape) // batch, batch)
        dtype = _TYPES[self.input.type.tensor_type.elem_type]
        values: dict[str, object] = {n: array_of(t) for n, t in self.initializers.items()}
        values[self.input.name] = Activation(INPUT, shape, dtype, exclusive=False)
        reads: dict[str, int] = {self.output: 1}
        for name in [name for node in self.nodes for name in reads_of(node)]:
            reads[name] = reads.get(name, 0) + 1
        self._read(self.nodes, builder, values, reads)
        result = values[self.output]
        if isinstance(result, np.ndarray):
            raise UserError(f"output {self.output!r} does not depend on the input")
        if not isinstance(result, Activation):
            raise UserError(f"output {self.output!r} is a comparison, not a number")
        where = f"output {self.output!r}"
        plain = builder.plain(result, where)
        if plain.layer == INPUT:
            raise UserError("the output is the input: there is no layer to bound")
        return self._finish(builder, shape, dtype, plain)

    def _read(self, nodes, builder, values, reads) -> None:
        for node in nodes:
            made = self._convert(node, builder, values, reads)
            for name, value in zip(node.output, made, strict=False):
                if name and value is not None:
                    values[name] = value

    def _branch(self, node, builder, values, reads) -> list:
        """An If: the branch that a condition chooses which does not depend on the input."""
        where, condition = place(node), values[node.input[0]]
        if not isinstance(condition, np.ndarray) or condition.size != 1:
            raise UserError(f"{where} chooses by what depends on the input: not supported")
        chosen = "then_branch" if condition.reshape(-1)[0] else "else_branch"
        graph = next(a.g for a in node.attribute if a.name == chosen)
        inner = values | {t.name: array_of(t) for t in graph.initializer}
        self._read(graph.node, builder, inner, reads)
        return [inner[value.name] for value in graph.output]

    def _convert(self, node, builder, values, reads) -> list:
        where = place(node)
        handler = HANDLERS.get(node.op_type)
        if node.domain not in ("", "ai.onnx"):
            raise UserError(f"operator {node.domain}.{node.op_type} of {where} is not supported")
        for name in node.input:
            if name and name not in values:
                raise UserError(f"{where} reads {name!r}, which nothing has made")
        operands = [values[name] if name else None for name in node.input]
        if node.op_type == "Constant":
            return [constant_of(node, where)]
        if node.op_type == "If":
            return self._branch(node, builder, values, reads)
        if all(x is None or isinstance(x, np.ndarray) for x in operands):
            return evaluate(node, operands, self.opset, where, builder.spend)
        if handler is None:
            raise UserError(
                f"operator {node.op_type} of {where} is not supported (supported are "
                f"{SUPPORTED_OPS}): export the network without it"
            )
        try:
            made = handler(Node(node, self.opset, builder, values, reads))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # Operands and attributes that a valid node cannot have: onnx.checker looks at few.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{where} has operands or attributes that do not fit: {reason[:200]}"
            ) from None
        return made if isinstance(made, list) else [made]

    def _finish(self, builder, shape, dtype, result) -> ImportedNetwork:
        layers = builder.needed(result.layer)
        check_masks(layers)
        weights = {
            f"layers.{layer.name}.{name}": as_tensor(array)
            for layer in layers for name, array in builder.arrays[layer.name].items()
        }
        types = {layer.dtype for layer in layers} | {dtype}
        description = NetworkDescription(
            self.name, next(t for t in _COARSE_FIRST if t in types),
            _of_sample(shape, builder.batch), _of_sample(result.shape, builder.batch),
            tuple(layers), dtype,
        )
        description.check()
        return ImportedNetwork(description, weights)


def _of_sample(shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """A shape without its batch dimension, which one sample may lack."""
    return shape[1:] if len(shape) > 1 and (batch > 1 or shape[0] == 1) else shape

