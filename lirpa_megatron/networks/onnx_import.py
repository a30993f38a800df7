"""ONNX networks, without onnx2torch (it needs torchvision) and without running the file's code.

Reads the graph node by node. Reshapes disappear (activations are flat, see `network.py`).
Element-wise arithmetic with constants, as in input normalisation, is folded into the neighbouring
linear layer in float64:

    W (s * x + o) + b     =  (W s) x + (W o + b)        constants before a linear layer
    s * (W x + b) + o     =  (s W) x + (s b + o)        constants after one

so a network consists of linear layers, activations, sums and differences. Folding changes the
function by rounding only. float16 and bfloat16 weights become float32, exactly; float64 stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.network import DTYPES, INPUT, LayerDescription, NetworkDescription
from lirpa_megatron.networks.onnx_shapes import (
    broadcast,
    flattened,
    matmul_width,
    reshaped,
    sample_shape,
    scaled,
)
from lirpa_megatron.verify.files import find_file, read_file, stem

# Widest activation for which arithmetic with constants that has no linear neighbour becomes a
# (diagonal) linear layer of its own.
MAX_DIAGONAL = 4096
# Before this operator set, element-wise operators broadcast by other rules.
MIN_OPSET = 7
_ACTIVATIONS = {"Relu": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid"}
SUPPORTED_OPS = (
    "Add, Constant, Div, Dropout, Flatten, Gemm, Identity, MatMul, Mul, Relu, Reshape, Sigmoid, "
    "Sub, Tanh"
)


@dataclass(frozen=True)
class ImportedNetwork:
    """An ONNX file's content."""

    description: NetworkDescription
    # full weights by parameter name of `Network`, in the description's dtype
    weights: dict[str, torch.Tensor]


@dataclass
class _Linear:
    """Weights of one linear layer while the graph is being read."""

    # [n_out, n_in]
    weight: np.ndarray
    # [n_out] or None
    bias: np.ndarray | None


@dataclass(frozen=True)
class _Activation:
    """An ONNX tensor that depends on the input: `scale * layer output + offset`."""

    # the layer's name
    layer: str
    # shape of one sample in ONNX's eyes
    shape: tuple[int, ...]
    # [n] or None, float64: still to be folded into a linear layer
    scale: np.ndarray | None = None
    offset: np.ndarray | None = None
    # whether nothing but this tensor reads the layer's output
    exclusive: bool = True

    @property
    def width(self) -> int:
        return int(np.prod(self.shape))

    @property
    def is_plain(self) -> bool:
        return self.scale is None and self.offset is None


def read_onnx(path: str | Path) -> ImportedNetwork:
    """Reads NET.onnx or NET.onnx.gz.

    Raises:
        UserError: missing, truncated or invalid file; an operator, shape or weight that is not
            supported (with the node's name).
    """
    model = _load(path)
    try:
        return _Importer(model.graph, stem(path)).run()
    except UserError as error:
        raise UserError(f"network {path}: {error}") from None


def _load(path: str | Path) -> onnx.ModelProto:
    data = read_file(path, "network")
    try:
        model = onnx.load_model_from_string(data)
        onnx.load_external_data_for_model(model, str(find_file(path, "network").parent))
        onnx.checker.check_model(model)
    except DecodeError:
        raise UserError(f"network {path} is truncated or not an ONNX file") from None
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["unknown reason"])[0]
        raise UserError(f"network {path} is not a valid ONNX file: {reason}") from None
    opset = max((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), default=0)
    if opset < MIN_OPSET:
        raise UserError(f"network {path} uses operator set {opset}; {MIN_OPSET} or newer is needed")
    return model


@dataclass
class _Importer:
    """One pass over a graph; `run` returns the result."""

    graph: onnx.GraphProto
    name: str
    values: dict[str, np.ndarray | _Activation] = field(default_factory=dict)
    linears: dict[str, _Linear] = field(default_factory=dict)
    layers: dict[str, LayerDescription] = field(default_factory=dict)
    # how often each ONNX tensor is read
    reads: dict[str, int] = field(default_factory=dict)

    def run(self) -> ImportedNetwork:
        for tensor in self.graph.initializer:
            self.values[tensor.name] = _array(tensor)
        if self.graph.sparse_initializer:
            raise UserError("sparse initializers are not supported")
        inputs = [value for value in self.graph.input if value.name not in self.values]
        if len(inputs) != 1 or len(self.graph.output) != 1:
            raise UserError(
                f"{len(inputs)} inputs and {len(self.graph.output)} outputs; "
                "exactly one of each is supported"
            )
        input_shape = sample_shape(inputs[0])
        self.values[inputs[0].name] = _Activation(INPUT, input_shape, exclusive=False)
        output = self.graph.output[0].name
        for name in [name for node in self.graph.node for name in node.input] + [output]:
            self.reads[name] = self.reads.get(name, 0) + 1
        for node in self.graph.node:
            self._convert(node)
        result = self._result(output)
        return self._finish(input_shape, result)

    def _result(self, output: str) -> _Activation:
        result = self.values.get(output)
        if not isinstance(result, _Activation):
            raise UserError(f"output {output!r} does not depend on the input")
        if not result.is_plain:
            result = self._diagonal(result, f"output {output!r}")
        if result.layer == INPUT:
            raise UserError("the output is the input: there is no layer to bound")
        return result

    def _convert(self, node: onnx.NodeProto) -> None:
        where = f"node {node.name or node.output[0]!r} ({node.op_type})"
        handler = getattr(self, f"_op_{node.op_type.lower()}", None)
        if node.domain not in ("", "ai.onnx") or handler is None:
            domain = f"{node.domain}." if node.domain else ""
            raise UserError(
                f"operator {domain}{node.op_type} of node {node.name or node.output[0]!r} is not "
                f"supported (supported are {SUPPORTED_OPS})"
            )
        for name in node.input:
            if name and name not in self.values:
                raise UserError(f"{where} reads {name!r}, which nothing has made")
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        self.values[node.output[0]] = handler(node, attributes, where)

    # One method for each operator: (node, attributes, where) -> the tensor it makes.

    def _op_constant(self, node, attributes, where):
        if "value" in attributes:
            return _array(attributes["value"], where)
        for name, dtype in (("value_float", np.float32), ("value_int", np.int64)):
            for value in (attributes.get(name), attributes.get(name + "s")):
                if value is not None:
                    return np.asarray(value, dtype)
        raise UserError(f"{where} has no numeric value")

    def _op_identity(self, node, attributes, where):
        return self._read(node, 0)

    def _op_dropout(self, node, attributes, where):
        if len(node.input) > 2 and node.input[2] and np.any(self._constant(node, 2, where)):
            raise UserError(f"{where} is in training mode; export the network for inference")
        return self._activation(node, 0, where)

    def _op_flatten(self, node, attributes, where):
        x = self._activation(node, 0, where)
        return replace(x, shape=flattened(x.shape, attributes.get("axis", 1), where))

    def _op_reshape(self, node, attributes, where):
        x = self._activation(node, 0, where)
        target = [int(n) for n in self._constant(node, 1, where)]
        allowzero = attributes.get("allowzero", 0)
        return replace(x, shape=reshaped(x.shape, target, allowzero, where))

    def _op_relu(self, node, attributes, where):
        x = self._materialised(self._activation(node, 0, where), where)
        return self._new_layer(_ACTIVATIONS[node.op_type], [x], x.shape)

    _op_tanh = _op_relu
    _op_sigmoid = _op_relu

    def _op_gemm(self, node, attributes, where):
        x = self._activation(node, 0, where)
        if attributes.get("transA", 0) or len(x.shape) != 1:
            raise UserError(f"{where}: only transA=0 on a batch of vectors is supported")
        weight = self._matrix(node, 1, where)
        if not attributes.get("transB", 0):
            weight = weight.T
        weight = scaled(attributes.get("alpha", 1.0), weight)
        bias = None
        if len(node.input) > 2 and node.input[2]:
            bias = scaled(attributes.get("beta", 1.0), self._constant(node, 2, where))
            bias = broadcast(bias, (weight.shape[0],), where)
        return self._linear(x, weight, bias, matmul_width(x.shape, weight.shape, where))

    def _op_matmul(self, node, attributes, where):
        x = self._activation(node, 0, where)
        weight = self._matrix(node, 1, where).T
        return self._linear(x, weight, None, matmul_width(x.shape, weight.shape, where))

    def _op_add(self, node, attributes, where):
        return self._sum_or_difference(node, where, sign=1.0)

    def _op_sub(self, node, attributes, where):
        return self._sum_or_difference(node, where, sign=-1.0)

    def _sum_or_difference(self, node, where, sign):
        left, right = self._read(node, 0), self._read(node, 1)
        if isinstance(left, _Activation) and isinstance(right, _Activation):
            if left.shape != right.shape:
                raise UserError(
                    f"{where} joins activations of shapes {left.shape} and {right.shape}; only "
                    "equal shapes are supported"
                )
            terms = [self._materialised(left, where), self._materialised(right, where)]
            return self._new_layer("add" if sign > 0 else "sub", terms, left.shape)
        if isinstance(right, np.ndarray):
            return self._affine(self._activation(node, 0, where), None, sign * right, where)
        scale = None if sign > 0 else np.float64(-1.0)
        return self._affine(right, scale, self._constant(node, 0, where), where)

    def _op_mul(self, node, attributes, where):
        index = 1 if isinstance(self._read(node, 0), _Activation) else 0
        x = self._activation(node, 1 - index, where)
        return self._affine(x, self._constant(node, index, where), None, where)

    def _op_div(self, node, attributes, where):
        x, divisor = self._activation(node, 0, where), self._constant(node, 1, where)
        if np.any(divisor == 0):
            raise UserError(f"{where} divides by zero")
        return self._affine(x, 1.0 / divisor.astype(np.float64), None, where)

    # Reading operands.

    def _read(self, node, index) -> np.ndarray | _Activation:
        value = self.values[node.input[index]]
        if isinstance(value, _Activation) and self.reads[node.input[index]] > 1:
            return replace(value, exclusive=False)
        return value

    def _activation(self, node, index, where) -> _Activation:
        value = self._read(node, index)
        if not isinstance(value, _Activation):
            raise UserError(f"{where}: operand {index} is a constant, expected an activation")
        return value

    def _constant(self, node, index, where) -> np.ndarray:
        value = self._read(node, index)
        if not isinstance(value, np.ndarray):
            raise UserError(f"{where}: operand {index} is an activation, expected a constant")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise UserError(f"tensor {node.input[index]!r} has NaN or infinite values")
        return value

    def _matrix(self, node, index, where) -> np.ndarray:
        value = self._constant(node, index, where)
        if value.ndim != 2:
            raise UserError(f"{where}: operand {index} has shape {value.shape}, expected a matrix")
        return value

    # Making layers.

    def _new_layer(self, op, inputs, shape, n_out=None, bias=False) -> _Activation:
        prefix = "fc" if op == "linear" else op
        number = 1 + sum(layer.op == op for layer in self.layers.values())
        width = inputs[0].width
        name = f"{prefix}{number}"
        self.layers[name] = LayerDescription(
            name, op, tuple(x.layer for x in inputs), width, n_out or width, bias
        )
        return _Activation(name, tuple(shape))

    def _linear(self, x: _Activation, weight, bias, n_out) -> _Activation:
        """A linear layer on x, with x's pending scale and offset folded in."""
        if x.offset is not None:
            shift = weight.astype(np.float64) @ x.offset
            bias = shift if bias is None else bias + shift
        if x.scale is not None:
            weight = weight * x.scale
        plain = replace(x, scale=None, offset=None)
        y = self._new_layer("linear", [plain], (*x.shape[:-1], n_out), n_out)
        self.linears[y.layer] = _Linear(weight, bias)
        return y

    def _affine(self, x: _Activation, scale, offset, where) -> _Activation:
        """scale * x + offset, into the linear layer that made x or kept pending."""
        scale = None if scale is None else broadcast(scale, x.shape, where)
        offset = None if offset is None else broadcast(offset, x.shape, where)
        linear = self.linears.get(x.layer)
        if linear is not None and x.exclusive and x.is_plain:
            if scale is not None:
                linear.weight = linear.weight * scale[:, None]
                linear.bias = None if linear.bias is None else linear.bias * scale
            if offset is not None:
                linear.bias = offset if linear.bias is None else linear.bias + offset
            return x
        if scale is not None:
            x = replace(x, scale=scale if x.scale is None else x.scale * scale)
            x = replace(x, offset=None if x.offset is None else x.offset * scale)
        if offset is not None:
            x = replace(x, offset=offset if x.offset is None else x.offset + offset)
        return x

    def _materialised(self, x: _Activation, where) -> _Activation:
        return x if x.is_plain else self._diagonal(x, where)

    def _diagonal(self, x: _Activation, where) -> _Activation:
        """A linear layer for arithmetic with constants that no neighbour can take."""
        if x.width > MAX_DIAGONAL:
            raise UserError(
                f"{where}: arithmetic with constants on {x.width} features can only be folded "
                f"into a linear layer next to it; alone it is supported up to {MAX_DIAGONAL}"
            )
        return replace(self._linear(x, np.eye(x.width), None, x.width), shape=x.shape)

    # The result.

    def _finish(self, input_shape, result: _Activation) -> ImportedNetwork:
        layers = self._needed(result.layer)
        arrays: dict[str, np.ndarray] = {}
        described = []
        for layer in layers:
            if layer.op == "linear":
                linear = self.linears[layer.name]
                arrays[f"layers.{layer.name}.weight"] = linear.weight
                if linear.bias is not None:
                    arrays[f"layers.{layer.name}.bias"] = linear.bias
                layer = replace(layer, bias=linear.bias is not None)
            described.append(layer)
        dtype = self._weight_dtype()
        weights = {}
        for name, array in arrays.items():
            weights[name] = torch.from_numpy(np.array(array, order="C")).to(DTYPES[dtype])
            if not torch.isfinite(weights[name]).all():
                raise UserError(f"{name} has NaN or infinite values after folding constants")
        description = NetworkDescription(
            self.name, dtype, input_shape, result.shape, tuple(described)
        )
        description.check()
        return ImportedNetwork(description, weights)

    def _weight_dtype(self) -> str:
        constants = [value for value in self.values.values() if isinstance(value, np.ndarray)]
        return "float64" if any(value.dtype == np.float64 for value in constants) else "float32"

    def _needed(self, last: str) -> list[LayerDescription]:
        """The layers that the output depends on, in order; `last` comes last."""
        needed = {last}
        for layer in reversed(self.layers.values()):
            if layer.name in needed:
                needed.update(layer.inputs)
        chosen = [layer for layer in self.layers.values() if layer.name in needed]
        return [layer for layer in chosen if layer.name != last] + [self.layers[last]]


def _array(tensor: onnx.TensorProto, where: str | None = None) -> np.ndarray:
    """An initializer or constant as numpy; half precisions become float32."""
    name = tensor.name or where
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError) as error:
        raise UserError(f"tensor {name!r} is damaged: {error}") from None
    if tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
        return array.astype(np.float32)
    return array
