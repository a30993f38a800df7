"""Small ONNX graphs, one for each operator and each way to write it, for tests."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

node = helper.make_node
_RNG = np.random.default_rng(0)


def numbers(*shape):
    return _RNG.normal(size=shape).astype("float32")


def ints(*values):
    return np.array(values, dtype=np.int64)


def graph(nodes, constants, shape, opset=17, outputs=("y",), kind=TensorProto.FLOAT):
    """A model with input "x" of this shape (0 or a name: left open) and these outputs."""
    made = helper.make_graph(
        nodes, "test",
        [helper.make_tensor_value_info("x", kind, [n or None for n in shape])],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def unary(op, opset=17, **attributes):
    return graph([node(op, ["x"], ["y"], **attributes)], {}, [1, 6], opset)


def of_positive(nodes, constants=None):
    """Nodes that read "p" = x^2 + 1/2."""
    begin = [node("Mul", ["x", "x"], ["s"]), node("Add", ["s", "half"], ["p"])]
    return graph([*begin, *nodes], {"half": np.float32(0.5), **(constants or {})}, [1, 6])


def power(exponent):
    return of_positive([node("Pow", ["p", "e"], ["y"])], {"e": np.float32(exponent)})


def reduced(op, keepdims):
    if op == "ReduceSum":
        return graph([node(op, ["x", "a"], ["y"], keepdims=keepdims)], {"a": ints(2)}, [1, 3, 5])
    return graph([node(op, ["x"], ["y"], axes=[2], keepdims=keepdims)], {}, [1, 3, 5])


def choice(sign, *rest, high, low, c=0.0):
    """Where(x sign c, high, low)."""
    begin = [node(sign, ["x", "c"], ["b"])]
    end = [node("Where", ["b", high, low], ["y"])]
    constants = {"c": np.float32(c), "k": np.float32(0.1), "one": np.float32(1)}
    return graph([*begin, *rest, *end], constants, [1, 6])


W, B = numbers(6, 4), numbers(6)
BN = {"s": numbers(3), "b": numbers(3), "m": numbers(3), "v": abs(numbers(3)) + 0.1}

ELEMENTWISE = {
    op: unary(op)
    for op in (
        "Abs Celu Cos Elu Erf Exp HardSigmoid HardSwish LeakyRelu Neg Relu Selu Sigmoid Sign Sin "
        "Softplus Softsign Tanh"
    ).split()
} | {
    "Mish": unary("Mish", opset=18),
    "Gelu": unary("Gelu", opset=20),
    "Gelu, tanh": unary("Gelu", opset=20, approximate="tanh"),
    "Elu, alpha": unary("Elu", alpha=0.7),
    "LeakyRelu, alpha": unary("LeakyRelu", alpha=0.3),
    "PRelu": graph([node("PRelu", ["x", "s"], ["y"])], {"s": numbers(6)}, [1, 6]),
    "PRelu of channels": graph([node("PRelu", ["x", "s"], ["y"])], {"s": numbers(3, 1)}, [1, 3, 2]),
    "Clip": graph(
        [node("Clip", ["x", "a", "b"], ["y"])], {"a": np.float32(-0.5), "b": np.float32(0.6)},
        [1, 6],
    ),
    "Clip as ReLU6": unary("Clip", opset=10, min=0.0, max=6.0),
    "Clip from below": graph([node("Clip", ["x", "a"], ["y"])], {"a": np.float32(-0.5)}, [1, 6]),
    "Clip from above": graph([node("Clip", ["x", "", "b"], ["y"])], {"b": np.float32(0.5)}, [1, 6]),
    "ThresholdedRelu at 0": unary("ThresholdedRelu", alpha=0.0),
    "SiLU in two nodes": graph(
        [node("Sigmoid", ["x"], ["s"]), node("Mul", ["s", "x"], ["y"])], {}, [1, 6]
    ),
    "Mish in three nodes": graph(
        [
            node("Softplus", ["x"], ["p"]), node("Tanh", ["p"], ["t"]),
            node("Mul", ["x", "t"], ["y"]),
        ],
        {}, [1, 6],
    ),
    "Log": of_positive([node("Log", ["p"], ["y"])]),
    "Sqrt": of_positive([node("Sqrt", ["p"], ["y"])]),
    "Reciprocal": of_positive([node("Reciprocal", ["p"], ["y"])]),
    "Pow, integer exponent": graph([node("Pow", ["x", "e"], ["y"])], {"e": ints(2)}, [1, 6]),
    **{f"Pow {e}": power(e) for e in (1, 2, 3, 0.5, -1, -2, -0.5)},
    "Where as relu": choice("Greater", high="x", low="c"),
    "Where as leaky relu": choice(
        "GreaterOrEqual", node("Mul", ["x", "k"], ["n"]), high="x", low="n"
    ),
    "Where as abs": choice("Less", node("Neg", ["x"], ["n"]), high="n", low="x"),
    "Where as max": choice("Greater", high="x", low="c", c=0.2),
    "Where as min": choice("LessOrEqual", high="x", low="c", c=0.2),
    "Where as elu": choice(
        "Greater", node("Exp", ["x"], ["e"]), node("Sub", ["e", "one"], ["n"]), high="x", low="n"
    ),
}

ARITHMETIC = {
    "constant minus activation": graph([node("Sub", ["c", "x"], ["y"])], {"c": numbers(6)}, [1, 6]),
    "a constant that widens": graph(
        [node("Add", ["x", "c"], ["y"])], {"c": numbers(3, 1)}, [1, 1, 4]
    ),
    "an activation that is widened": graph(
        [node("ReduceSum", ["x", "a"], ["m"]), node("Sub", ["x", "m"], ["y"])], {"a": ints(1)},
        [1, 5],
    ),
    "Sum of three": graph(
        [node("Tanh", ["x"], ["n"]), node("Sum", ["c", "x", "n"], ["y"])], {"c": numbers(5)}, [1, 5]
    ),
    "Mul of two": graph([node("Tanh", ["x"], ["n"]), node("Mul", ["x", "n"], ["y"])], {}, [1, 5]),
    "Mul with itself": graph([node("Mul", ["x", "x"], ["y"])], {}, [1, 5]),
    "Max of two and a number": graph(
        [node("Neg", ["x"], ["n"]), node("Max", ["x", "n", "c"], ["y"])], {"c": np.float32(0.3)},
        [1, 5],
    ),
    "Min of two and a number": graph(
        [node("Neg", ["x"], ["n"]), node("Min", ["c", "x", "n"], ["y"])], {"c": np.float32(-0.3)},
        [1, 5],
    ),
    "Div by an activation": of_positive([node("Div", ["x", "p"], ["y"])]),
    "a constant over an activation": of_positive(
        [node("Div", ["c", "p"], ["y"])], {"c": numbers(6)}
    ),
    "normalisation": graph(
        [node("Sub", ["x", "m"], ["c"]), node("Div", ["c", "s"], ["y"])],
        {"m": numbers(4), "s": numbers(4)}, [1, 4],
    ),
    "BatchNormalization": graph(
        [node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"])], BN, [1, 3, 2]
    ),
    "BatchNormalization of a layer": graph(
        [
            node("Gemm", ["x", "w"], ["h"], transB=1),
            node("BatchNormalization", ["h", "s", "b", "m", "v"], ["y"]),
        ],
        {"w": numbers(3, 4), **BN}, [1, 4],
    ),
    "Cast to float64 and back": graph(
        [
            node("Cast", ["x"], ["d"], to=TensorProto.DOUBLE), node("Mul", ["d", "c"], ["e"]),
            node("Cast", ["e"], ["y"], to=TensorProto.FLOAT),
        ],
        {"c": numbers(4).astype("float64")}, [1, 4],
    ),
}

LINEAR = {
    "Gemm, alpha and beta": graph(
        [node("Gemm", ["x", "w", "b"], ["y"], transB=1, alpha=0.3, beta=-0.7)], {"w": W, "b": B},
        [1, 4],
    ),
    "Gemm, weight first": graph(
        [node("Gemm", ["w", "x", "b"], ["y"])], {"w": W, "b": numbers(6, 1)}, [4, 1]
    ),
    "Gemm, transA": graph(
        [node("Gemm", ["x", "w"], ["y"], transA=1)], {"w": numbers(4, 3)}, [4, 1]
    ),
    "Gemm, bias from an activation": graph(
        [node("Gemm", ["x", "w"], ["h"]), node("Gemm", ["h", "v", "h"], ["y"], beta=0.5)],
        {"w": numbers(4, 6), "v": numbers(6, 6)}, [1, 4],
    ),
    "MatMul, weight first": graph(
        [node("MatMul", ["w", "x"], ["m"]), node("Add", ["m", "b"], ["y"])],
        {"w": W, "b": numbers(6, 1)}, [4, 1],
    ),
    "MatMul, weight first, a vector": graph(
        [node("MatMul", ["w", "x"], ["m"]), node("Add", ["m", "b"], ["y"])], {"w": W, "b": B}, [4]
    ),
    "MatMul, no batch": graph(
        [node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["y"])], {"w": W.T, "b": B}, [4]
    ),
    "MatMul, one number": graph(
        [node("MatMul", ["x", "w"], ["m"]), node("Relu", ["m"], ["y"])], {"w": numbers(1, 3)}, [1]
    ),
    "MatMul with a vector": graph([node("MatMul", ["x", "w"], ["y"])], {"w": numbers(4)}, [1, 4]),
    "MatMul of tokens": graph(
        [node("MatMul", ["x", "w"], ["m"]), node("Add", ["b", "m"], ["y"])], {"w": W.T, "b": B},
        [1, 3, 4],
    ),
    "a batch of 32": graph(
        [node("Gemm", ["x", "w"], ["m"], transB=1), node("Relu", ["m"], ["y"])], {"w": W}, [32, 4]
    ),
    "a batch of 32, reshaped": graph(
        [node("Reshape", ["x", "s"], ["f"]), node("Gemm", ["f", "w"], ["y"], transB=1)],
        {"w": W, "s": ints(32, 4)}, [32, 2, 2],
    ),
    "five rows that are one sample": graph(
        [node("Transpose", ["x"], ["t"], perm=[1, 0]), node("Gemm", ["t", "w"], ["y"], transB=1)],
        {"w": numbers(3, 5)}, [5, 4],
    ),
    "a weight that nodes make": graph(
        [
            node("Cast", ["h"], ["c"], to=TensorProto.FLOAT), node("Transpose", ["c"], ["w"]),
            node("MatMul", ["x", "w"], ["y"]),
        ],
        {"h": W.astype("float16")}, [1, 4],
    ),
    "a constant of a shape": graph(
        [
            node("ConstantOfShape", ["s"], ["o"],
                 value=numpy_helper.from_array(np.array([2.0], "float32"))),
            node("Mul", ["x", "o"], ["y"]),
        ],
        {"s": ints(1, 4)}, [1, 4],
    ),
}

MOVES = {
    "Flatten at axis 0": graph(
        [node("Flatten", ["x"], ["f"], axis=0), node("Gemm", ["f", "w"], ["y"], transB=1)],
        {"w": W}, [1, 2, 2],
    ),
    "Reshape that drops the batch": graph(
        [node("Reshape", ["x", "s"], ["f"]), node("MatMul", ["w", "f"], ["y"])],
        {"w": W, "s": ints(4)}, [1, 2, 2],
    ),
    "Reshape to a shape that nodes make": graph(
        [
            node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["b"]),
            node("Unsqueeze", ["b", "zeros"], ["u"]), node("Concat", ["u", "m"], ["t"], axis=0),
            node("Reshape", ["x", "t"], ["f"]), node("MatMul", ["f", "w"], ["y"]),
        ],
        {"zero": np.int64(0), "zeros": ints(0), "m": ints(-1), "w": W.T}, [0, 2, 2],
    ),
    "Transpose": graph(
        [
            node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]), node("Flatten", ["t"], ["f"]),
            node("Gemm", ["f", "w"], ["y"], transB=1),
        ],
        {"w": numbers(5, 12)}, [1, 3, 2, 2],
    ),
    "Slice backwards": graph(
        [node("Slice", ["x", "a", "b", "d", "s"], ["y"])],
        {"a": ints(-1), "b": ints(-10), "d": ints(1), "s": ints(-2)}, [1, 6],
    ),
    "Slice of set 9": graph(
        [node("Slice", ["x"], ["y"], starts=[1], ends=[3], axes=[1])], {}, [1, 6], 9
    ),
    "Split": graph(
        [node("Split", ["x", "s"], ["a", "b"], axis=1), node("Sub", ["a", "b"], ["y"])],
        {"s": ints(3, 3)}, [1, 6],
    ),
    "Split of set 11": graph(
        [node("Split", ["x"], ["a", "b"], axis=1, split=[2, 4]), node("Relu", ["b"], ["y"])], {},
        [1, 6], 11,
    ),
    "Split of set 18": graph(
        [node("Split", ["x"], ["a", "b"], axis=1, num_outputs=2), node("Sub", ["a", "b"], ["y"])],
        {}, [1, 6], 18,
    ),
    "Gather": graph([node("Gather", ["x", "i"], ["y"], axis=1)], {"i": ints(2, 2, 0, -1)}, [1, 6]),
    "Gather of one": graph([node("Gather", ["x", "i"], ["y"], axis=1)], {"i": np.int64(2)}, [1, 6]),
    "Concat": graph(
        [node("Relu", ["x"], ["r"]), node("Concat", ["r", "x"], ["y"], axis=-1)], {}, [1, 2, 3]
    ),
    "Concat with a constant": graph(
        [node("Relu", ["x"], ["r"]), node("Concat", ["c", "x", "r"], ["y"], axis=1)],
        {"c": numbers(1, 2, 3)}, [1, 2, 3],
    ),
    "Concat in a batch of 5": graph(
        [node("Relu", ["x"], ["r"]), node("Concat", ["r", "c", "x"], ["y"], axis=1)],
        {"c": np.ones((5, 2), "float32")}, [5, 3],
    ),
    "Squeeze, Unsqueeze": graph(
        [
            node("Unsqueeze", ["x", "a"], ["u"]), node("Relu", ["u"], ["r"]),
            node("Squeeze", ["r", "a"], ["y"]),
        ],
        {"a": ints(2)}, [1, 6],
    ),
    "Squeeze, Unsqueeze of set 11": graph(
        [
            node("Unsqueeze", ["x"], ["u"], axes=[2]), node("Relu", ["u"], ["r"]),
            node("Squeeze", ["r"], ["y"], axes=[2]),
        ],
        {}, [1, 6], 11,
    ),
    "Expand": graph([node("Expand", ["x", "s"], ["y"])], {"s": ints(1, 3, 4)}, [1, 1, 4]),
    "Tile": graph([node("Tile", ["x", "s"], ["y"])], {"s": ints(1, 2)}, [1, 4]),
}

REDUCTIONS = {
    f"{op}, keepdims={k}": reduced(op, k)
    for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin") for k in (0, 1)
} | {
    "ReduceMean of set 18": graph(
        [node("ReduceMean", ["x", "a"], ["y"])], {"a": ints(1, 2)}, [1, 3, 5], 18
    ),
    "ReduceSum of all": graph([node("ReduceSum", ["x"], ["y"], keepdims=0)], {}, [1, 3, 5]),
    "ReduceSum of all, by axes without elements": graph(
        [node("ReduceSum", ["x", "a"], ["y"], keepdims=0)], {"a": ints()}, [1, 3, 5]
    ),
    "ReduceSum of none": graph(
        [
            node("ReduceSum", ["x", "a"], ["s"], noop_with_empty_axes=1),
            node("Relu", ["s"], ["y"]),
        ],
        {"a": ints()}, [1, 3, 5],
    ),
    "GlobalAveragePool": graph(
        [node("GlobalAveragePool", ["x"], ["y"])], {}, [1, 3, 2, 2]
    ),
    "Softmax": graph([node("Softmax", ["x"], ["y"], axis=1)], {}, [1, 3, 5]),
    "LogSoftmax": graph([node("LogSoftmax", ["x"], ["y"])], {}, [1, 5]),
    "LayerNormalization": graph(
        [node("LayerNormalization", ["x", "s", "b"], ["y"])], {"s": numbers(5), "b": numbers(5)},
        [1, 3, 5],
    ),
}

CASES = ELEMENTWISE | ARITHMETIC | LINEAR | MOVES | REDUCTIONS
