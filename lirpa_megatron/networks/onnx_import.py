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
class Port:
    """An input or output of the file."""

    name: str
    # elements of one sample
    size: int
    # a key of STORED_DTYPES
    dtype: str


@dataclass(frozen=True)
class ImportedNetwork:
    """An ONNX file's content."""

    description: NetworkDescription
    # full weights by parameter name of `Network`, in the types of the file
    weights: dict[str, torch.Tensor]
    # in the order in which they stand in the network's input and output
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()


def read_onnx(
    path: str | Path, output: str | None = None, whole: bool = False
) -> ImportedNetwork:
    """Reads NET.onnx or NET.onnx.gz.

    Args:
        path: the file.
        output: which of several outputs; None: the only one.
        whole: with all inputs of the file, also those that the output does not depend on, and
            unless `output` says which, with all outputs.

    Raises:
        UserError: missing, truncated or invalid file; an operator, shape or weight that is not
            supported (with the node's name).
    """
    model = _load(path)
    try:
        return _import(model, stem(path), output, whole)
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


def _import(
    model: onnx.ModelProto, name: str, output: str | None, whole: bool
) -> ImportedNetwork:
    model = written_out(model, MAX_NODES)
    graph = model.graph
    if graph.sparse_initializer:
        raise UserError("sparse initializers are not supported")
    chosen = _outputs(graph, output, whole)
    nodes = _needed(graph, chosen)
    read = {n for node in nodes for n in reads_of(node)} | set(chosen)
    initializers = {t.name for t in graph.initializer}
    constants = {t.name: t for t in graph.initializer if t.name in read}
    inputs = [v for v in graph.input if v.name not in initializers and (whole or v.name in read)]
    if not inputs:
        raise UserError(f"output {chosen[0]!r} depends on no input")
    reader = _Reader(nodes, constants, inputs, chosen, name, _opset(model))
    if len(inputs) > 1:
        return reader.run([_fixed_shape(value) for value in inputs], 1)
    errors = []
    found: list[tuple[tuple[int, ...], ImportedNetwork]] = []
    for shape, batch in _readings(inputs[0], graph, nodes):
        try:
            found.append((shape, reader.run([shape], batch)))
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


def _outputs(graph: onnx.GraphProto, wanted: str | None, whole: bool) -> list[str]:
    names = [value.name for value in graph.output]
    if wanted is not None:
        if wanted not in names:
            raise UserError(f"there is no output {wanted!r}; its outputs are {', '.join(names)}")
        return [wanted]
    if len(names) != 1 and not whole:
        raise UserError(
            f"it has {len(names)} outputs ({', '.join(names)}): say which one is meant "
            "(--onnx-output NAME)"
        )
    return names


def _needed(graph: onnx.GraphProto, outputs: list[str]) -> list[onnx.NodeProto]:
    """The nodes that outputs depend on, in order."""
    needed, nodes = set(outputs), []
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


def _fixed_shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Shape of one of several inputs: of one sample, and otherwise fixed."""
    dims = _dims(value)
    if len(dims) > 1 and dims[0] == 0:
        dims[0] = 1
    if 0 in dims:
        raise UserError(
            f"input {value.name!r} has shape {dims} (0: left open); of several inputs all sizes "
            "but the batch's must be fixed: export the network so"
        )
    return tuple(dims)


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
    """Reads the nodes that outputs need, for one reading of the inputs' shapes."""

    nodes: list[onnx.NodeProto]
    initializers: dict[str, onnx.TensorProto]
    inputs: list[onnx.ValueInfoProto]
    outputs: list[str]
    name: str
    opset: int

    def run(self, shapes: list[tuple[int, ...]], batch: int) -> ImportedNetwork:
        types = [_TYPES[value.type.tensor_type.elem_type] for value in self.inputs]
        if len(set(types)) > 1:
            raise UserError(f"its inputs are of different types ({', '.join(types)})")
        widths = [math.prod(shape) // batch for shape in shapes]
        if sum(widths) > MAX_WIDTH:
            raise UserError(f"its inputs have too many elements together ({sum(widths):,})")
        builder = Builder(sum(widths), batch)
        values: dict[str, object] = {n: array_of(t) for n, t in self.initializers.items()}
        begin = 0
        for value, shape, width in zip(self.inputs, shapes, widths, strict=True):
            index = np.arange(begin, begin + width) if len(shapes) > 1 else None
            values[value.name] = Activation(INPUT, shape, types[0], index, exclusive=False)
            begin += width
        reads: dict[str, int] = dict.fromkeys(self.outputs, 1)
        for name in [name for node in self.nodes for name in reads_of(node)]:
            reads[name] = reads.get(name, 0) + 1
        self._read(self.nodes, builder, values, reads)
        results = [self._result(name, builder, values) for name in self.outputs]
        whole = results[0]
        if len(results) > 1:
            n_out = sum(map(builder.width, results))
            shape = (batch, n_out) if batch > 1 else (n_out,)
            whole = builder.layer("join", results, shape, "the join of its outputs", n_out=n_out)
        if whole.layer == INPUT:
            raise UserError("the output is the input: there is no layer to bound")
        ports = [
            tuple(Port(*port) for port in zip(names, sizes, dtypes, strict=True))
            for names, sizes, dtypes in (
                ([v.name for v in self.inputs], widths, types),
                (self.outputs, map(builder.width, results), [r.dtype for r in results]),
            )
        ]
        shape = shapes[0] if len(shapes) == 1 else (sum(widths),)
        return self._finish(builder, shape, types[0], whole, *ports)

    def _result(self, name, builder, values) -> Activation:
        result = values[name]
        if isinstance(result, np.ndarray):
            raise UserError(f"output {name!r} does not depend on the input")
        if not isinstance(result, Activation):
            raise UserError(f"output {name!r} is a comparison, not a number")
        return builder.plain(result, f"output {name!r}")

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

    def _finish(self, builder, shape, dtype, result, inputs, outputs) -> ImportedNetwork:
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
        return ImportedNetwork(description, weights, inputs, outputs)


def _of_sample(shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """A shape without its batch dimension, which one sample may lack."""
    return shape[1:] if len(shape) > 1 and (batch > 1 or shape[0] == 1) else shape

