"""Nodes of constants alone, evaluated; and nodes that move elements, evaluated on positions.

onnx's own reference evaluator computes them, one node at a time, in the types of the file. Files
come from strangers: only operators whose result's size is known beforehand are evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from lirpa_megatron.errors import UserError

# Largest constant that a node may make.
MAX_CONSTANT = 2**25
# Multiplications of a product of constants.
_MAX_PRODUCTS = 2**32

# Operator sets from which the evaluator has an operator that did the same before: of older sets it
# has none, or (BatchNormalization) one that mixes the statistics with its input's, as in training.
_FIRST_EVALUATED = {"BatchNormalization": 14, "DequantizeLinear": 19}
_OF_ROWS = ("Hardmax", "LogSoftmax", "Softmax")

_ELEMENTWISE = (
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BatchNormalization BitShift BitwiseAnd "
    "BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Cos Cosh DequantizeLinear "
    "Div Dropout Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual GroupNormalization "
    "HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN LeakyRelu Less "
    "LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow QuantizeLinear Reciprocal "
    "Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan "
    "Tanh ThresholdedRelu Where Xor"
).split()
_OF_FIRST = (
    "ArgMax ArgMin Compress CumSum DepthToSpace Det EyeLike Flatten Hardmax LayerNormalization "
    "LogSoftmax LpNormalization RMSNormalization ReduceL1 ReduceL2 ReduceLogSum "
    "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare "
    "Reshape ReverseSequence ScatterElements ScatterND Scatter Shape Size Slice Softmax "
    "SpaceToDepth Split Squeeze Transpose Trilu Unique Unsqueeze"
).split()
MOVES = (
    "DepthToSpace Expand Flatten Gather GatherElements GatherND Reshape Slice SpaceToDepth "
    "Split Squeeze Tile Transpose Unsqueeze"
).split()
"""Operators whose first input's elements are moved, whatever they are."""


def array_of(tensor: onnx.TensorProto, where: str = "") -> np.ndarray:
    """An initializer or constant as numpy, in its own type.

    Raises:
        UserError: its data do not fit its shape, or are in another file.
    """
    name = tensor.name or where
    try:
        return numpy_helper.to_array(tensor)
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or ["unknown reason"])[0]
        raise UserError(f"tensor {name!r} is damaged: {reason}") from None


def constant_of(node: onnx.NodeProto, where: str) -> np.ndarray:
    """What a Constant node holds."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if "value" in attributes:
        return array_of(attributes["value"], where)
    for name, dtype in (("value_float", np.float32), ("value_int", np.int64)):
        for value in (attributes.get(name), attributes.get(name + "s")):
            if value is not None:
                return np.asarray(value, dtype)
    raise UserError(f"{where} has no numeric value")


def evaluate(
    node: onnx.NodeProto, inputs: Sequence[np.ndarray | None], opset: int, where: str,
    spend: Callable[[int, str], None],
) -> list[np.ndarray]:
    """The outputs of a node on these inputs.

    Args:
        node: of the standard domain.
        inputs: one for each input of the node; None where it leaves one out.
        opset: of the file.
        where: the node, for errors.
        spend: called with the elements that will be made.

    Raises:
        UserError: an operator that is not evaluated; a result that is too large or impossible.
    """
    try:
        size = _size(node, inputs)
    except (ArithmeticError, ValueError, IndexError, TypeError, AttributeError):
        raise UserError(f"{where} has operands that do not fit each other") from None
    if size is None:
        raise UserError(
            f"{where} is made of constants alone by an operator that is not evaluated: compute it "
            "before the export"
        )
    if size > MAX_CONSTANT:
        raise UserError(f"{where} makes a constant of {size:,} elements, which is too large")
    spend(size, where)
    if node.op_type in _OF_ROWS and opset < 13:
        return _of_rows(node, inputs, where)
    opset = max(opset, _FIRST_EVALUATED.get(node.op_type, 0))
    named = {
        name: array for name, array in zip(node.input, inputs, strict=True) if array is not None
    }
    try:
        graph = helper.make_graph(
            [node], "node",
            [_declared(name, array) for name, array in named.items()],
            [helper.make_tensor_value_info(name, 0, None) for name in node.output if name],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(proto).run(None, named)
    except Exception as error:  # whatever the evaluator says of a file from a stranger
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where} cannot be evaluated: {reason[:200]}") from None
    by_name = dict(zip([name for name in node.output if name], results, strict=True))
    return [np.asarray(by_name[name]) if name else None for name in node.output]


def _of_rows(
    node: onnx.NodeProto, inputs: Sequence[np.ndarray | None], where: str
) -> list[np.ndarray]:
    """Softmax and the like before operator set 13: all dimensions from the axis on, 1 by default,
    are one. The evaluator takes them for those of set 13."""
    (x,) = inputs
    axis = attributes_of(node).get("axis", 1)
    if not -x.ndim <= axis <= x.ndim:
        raise UserError(f"{where} has an axis of {axis} for {x.ndim} dimensions")
    rows = math.prod(x.shape[: axis if axis >= 0 else axis + x.ndim])
    newer = helper.make_node(node.op_type, node.input, node.output, axis=1)
    y = x.reshape(rows, x.size // max(1, rows))
    return [r.reshape(x.shape) for r in evaluate(newer, [y], 13, where, lambda *_: None)]


def _declared(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
    )


def _size(node: onnx.NodeProto, inputs: Sequence[np.ndarray | None]) -> int | None:
    """Elements of the result, or more; None for operators that are not evaluated."""
    op = node.op_type
    attributes = {a.name: a for a in node.attribute}
    shapes = [array.shape for array in inputs if array is not None]

    def integers(index: int, attribute: str) -> list[int]:
        if attribute in attributes:
            return list(attributes[attribute].ints)
        return [int(n) for n in inputs[index].reshape(-1)]

    if op in _ELEMENTWISE:
        return math.prod(np.broadcast_shapes(*shapes))
    if op == "LpNormalization" and "p" in attributes and attributes["p"].i != 2:
        return None  # the evaluator sums x where the standard sums |x|
    if op in _OF_FIRST:
        return max(1, math.prod(shapes[0]))
    if op == "Concat":
        return sum(math.prod(shape) for shape in shapes)
    if op == "Gather":
        axis = attributes["axis"].i if "axis" in attributes else 0
        return math.prod(shapes[1]) * math.prod(shapes[0]) // max(1, shapes[0][axis])
    if op == "GatherElements":
        return math.prod(shapes[1])
    if op == "GatherND":
        lead = attributes["batch_dims"].i if "batch_dims" in attributes else 0
        return math.prod(shapes[1][:-1]) * math.prod(shapes[0][lead + shapes[1][-1] :])
    if op == "Pad":
        ends = integers(1, "pads")
        axes = integers(3, "") if len(inputs) > 3 and inputs[3] is not None else range(
            len(shapes[0]))
        sizes = list(shapes[0])
        for axis, begin, end in zip(axes, ends, ends[len(ends) // 2 :], strict=False):
            sizes[axis] += max(begin, 0) + max(end, 0)
        return math.prod(sizes)
    if op == "NonZero":
        return len(shapes[0]) * math.prod(shapes[0])
    if op == "TopK":
        return 2 * math.prod(shapes[0])
    if op == "OneHot":
        return math.prod(shapes[0]) * max(0, int(inputs[1].reshape(-1)[0]))
    if op == "Einsum":
        return _einsum_size(attributes["equation"].s.decode(), shapes)
    if op == "Expand":
        return math.prod(np.broadcast_shapes(shapes[0], tuple(integers(1, "shape"))))
    if op == "Tile":
        return math.prod(shapes[0]) * math.prod(max(n, 0) for n in integers(1, "repeats"))
    if op == "ConstantOfShape":
        return math.prod(max(n, 0) for n in integers(0, ""))
    if op == "Range":
        start, limit, delta = (float(x.reshape(-1)[0]) for x in inputs)
        return max(0, math.ceil((limit - start) / delta)) if delta else None
    if op in ("MatMul", "Gemm"):
        transposed = "transA" in attributes and attributes["transA"].i
        deep = shapes[0][0] if transposed else shapes[0][-1]
        products = math.prod(shapes[0]) * math.prod(shapes[1]) // deep
        return products // deep if products <= _MAX_PRODUCTS else MAX_CONSTANT + 1
    return None


def _einsum_size(equation: str, shapes: Sequence[tuple[int, ...]]) -> int | None:
    """The products that it takes, which are at least as many as elements of the result."""
    terms = equation.replace(" ", "").split("->")[0].split(",")
    if "." in equation or len(terms) != len(shapes):
        return None
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        sizes.update(zip(term, shape, strict=True))
    return math.prod(sizes.values())


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Name -> value."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
