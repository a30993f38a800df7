"""Small ONNX graphs of what transformers are made of, for tests."""

import numpy as np
from onnx import helper
from onnx_cases import graph, ints, node, numbers

MASK = np.array([[0, 1, 1], [0, 0, 1], [0, 0, 0]], bool)
W = {f"w{i}": numbers(4, 4) for i in range(3)}


def heads(nodes, constants=None, opset=17, begin=()):
    """q, k, v [1, 2, 3, 2] of x [1, 3, 4]; nodes make "a" [1, 2, 3, 2] of them."""
    made = list(begin)
    for i, name in enumerate("qkv"):
        perm = [0, 2, 3, 1] if name == "k" and not begin else [0, 2, 1, 3]
        made += [
            node("MatMul", ["x", f"w{i}"], [f"m{i}"]), node("Reshape", [f"m{i}", "s"], [f"r{i}"]),
            node("Transpose", [f"r{i}"], [name], perm=perm),
        ]
    end = [node("Transpose", ["a"], ["t"], perm=[0, 2, 1, 3]), node("Flatten", ["t"], ["y"])]
    constants = {**W, "s": ints(1, 3, 2, 2), **(constants or {})}
    return graph([*made, *nodes, *end], constants, [1, 3, 4], opset)


def masked(nodes, constants):
    """Scores "s1" become "p" by nodes."""
    return heads(
        [node("MatMul", ["q", "k"], ["s1"]), *nodes, node("MatMul", ["p", "v"], ["a"])], constants
    )


def operator(inputs=(), constants=None, **attributes):
    nodes = [node("Attention", ["q", "k", "v", *inputs], ["a"], **attributes)]
    return heads(nodes, constants, 23, [node("Identity", ["x"], ["unused"])])


def gelu(kind, half):
    """GELU in parts, with the half at one of three places."""
    c = {"c": np.float32(np.sqrt(2)), "one": np.float32(1), "h": np.float32(0.5),
         "a": np.float32(np.sqrt(2 / np.pi)), "b": np.float32(0.044715), "e": np.float32(3)}
    if kind == "erf":
        gate = [node("Div", ["x", "c"], ["d"]), node("Erf", ["d"], ["g"])]
    else:
        cube = [node("Pow", ["x", "e"], ["p"])] if half != "gate" else [
            node("Mul", ["x", "x"], ["x2"]), node("Mul", ["x", "x2"], ["p"])
        ]
        gate = [
            *cube, node("Mul", ["b", "p"], ["bp"]), node("Add", ["x", "bp"], ["u"]),
            node("Mul", ["a", "u"], ["au"]), node("Tanh", ["au"], ["g"]),
        ]
    gate.append(node("Add", ["g", "one"], ["g1"]))
    if half == "gate":
        end = [node("Mul", ["h", "g1"], ["g2"]), node("Mul", ["x", "g2"], ["y"])]
    elif half == "x":
        end = [node("Mul", ["x", "h"], ["x1"]), node("Mul", ["x1", "g1"], ["y"])]
    else:
        end = [node("Mul", ["x", "g1"], ["g2"]), node("Mul", ["g2", "h"], ["y"])]
    return graph([*gate, *end], c, [1, 6])


def norm(centred):
    """A norm in parts, with weight and, for LayerNorm, bias."""
    begin = [
        node("ReduceMean", ["x"], ["m"], axes=[-1]), node("Sub", ["x", "m"], ["z"]),
    ] if centred else [node("Identity", ["x"], ["z"])]
    end = [
        node("Div", ["z", "d"], ["n"]), node("Mul", ["n", "g"], ["k"]),
        node("Add", ["k", "b"], ["y"]),
    ] if centred else [
        node("Reciprocal", ["d"], ["i"]), node("Mul", ["z", "i"], ["n"]),
        node("Mul", ["g", "n"], ["y"]),
    ]
    return graph(
        [
            *begin, node("Pow", ["z", "two"], ["q"]), node("ReduceMean", ["q"], ["v"], axes=[-1]),
            node("Add", ["v", "eps"], ["w"]), node("Sqrt", ["w"], ["d"]), *end,
        ],
        {"two": np.float32(2), "eps": np.float32(1e-5), "g": numbers(5), "b": numbers(5)},
        [1, 3, 5],
    )


def branch():
    """Whether x has 4 columns decides, and it has."""
    graphs = [
        helper.make_graph([node("Relu", ["h"], [name])], name, [],
                          [helper.make_tensor_value_info(name, 1, None)])
        for name in ("yes", "no")
    ]
    graphs[1].node[0].op_type = "Floor"
    return graph(
        [
            node("MatMul", ["x", "w"], ["h"]), node("Shape", ["x"], ["s"]),
            node("Gather", ["s", "i"], ["n"]), node("Equal", ["n", "four"], ["c"]),
            node("If", ["c"], ["y"], then_branch=graphs[0], else_branch=graphs[1]),
        ],
        {"w": numbers(4, 3), "i": np.int64(1), "four": np.int64(4)}, [1, 4],
    )


def function():
    proto = graph(
        [node("Gate", ["x", "w"], ["y"], domain="own")], {"w": numbers(4, 3)}, [1, 4]
    )
    nodes = [
        node("MatMul", ["a", "b"], ["h"]), node("Sigmoid", ["h"], ["s"]),
        node("Mul", ["h", "s"], ["c"]),
    ]
    sets = [helper.make_opsetid("", 17)]
    proto.functions.append(helper.make_function("own", "Gate", ["a", "b"], ["c"], nodes, sets))
    proto.opset_import.append(helper.make_opsetid("own", 1))
    return proto


PARTS = {
    f"GELU of {kind} in parts, half of {half}": gelu(kind, half)
    for kind in ("erf", "tanh") for half in ("gate", "x", "product")
} | {"LayerNorm in parts": norm(True), "RMSNorm in parts": norm(False)}

ATTENTION = {
    "attention": masked([node("Softmax", ["s1"], ["p"], axis=-1)], {}),
    "attention, scaled": masked(
        [node("Div", ["s1", "d"], ["s2"]), node("Softmax", ["s2"], ["p"])],
        {"d": np.float32(1.4)},
    ),
    "attention, masked by -inf": masked(
        [node("Add", ["s1", "b"], ["s2"]), node("Softmax", ["s2"], ["p"])],
        {"b": np.where(MASK, -np.inf, 0).astype("float32")},
    ),
    "attention, masked by the least number and a bias": masked(
        [node("Add", ["s1", "b"], ["s2"]), node("Softmax", ["s2"], ["p"])],
        {"b": np.where(MASK, np.finfo("float32").min, 0.3).astype("float32")},
    ),
    "attention, masked by -10000": masked(
        [node("Add", ["s1", "b"], ["s2"]), node("Softmax", ["s2"], ["p"])],
        {"b": np.where(MASK, -1e4, 0).astype("float32")},
    ),
    "attention, a mask that masks nothing": masked(
        [node("Add", ["s1", "b"], ["s2"]), node("Softmax", ["s2"], ["p"])],
        {"b": np.zeros((1, 1, 3, 3), "float32")},
    ),
    "attention, masked by a choice": masked(
        [node("Where", ["b", "low", "s1"], ["s2"]), node("Softmax", ["s2"], ["p"])],
        {"b": MASK, "low": np.float32(-np.inf)},
    ),
    "attention, masked differently in each head": masked(
        [node("Where", ["b", "s1", "low"], ["s2"]), node("Softmax", ["s2"], ["p"])],
        {"b": ~np.stack([MASK, np.zeros_like(MASK)]), "low": np.float32(-np.inf)},
    ),
    "attention, guarded against NaN": masked(
        [
            node("Add", ["s1", "b"], ["s2"]), node("Softmax", ["s2"], ["p0"]),
            node("IsNaN", ["p0"], ["n"]), node("Where", ["n", "zero", "p0"], ["p"]),
        ],
        {"b": np.where(MASK, -np.inf, 0).astype("float32"), "zero": np.float32(0)},
    ),
    "queries, keys and values of one layer": graph(
        [
            node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["c"]),
            node("Reshape", ["c", "s"], ["r"]),
            node("Transpose", ["r"], ["t"], perm=[2, 0, 3, 1, 4]),
            *(node("Gather", ["t", f"i{i}"], [n], axis=0) for i, n in enumerate("qkv")),
            node("Mul", ["q", "d"], ["q1"]), node("Transpose", ["k"], ["k1"], perm=[0, 1, 3, 2]),
            node("MatMul", ["q1", "k1"], ["s1"]), node("Softmax", ["s1"], ["p"]),
            node("MatMul", ["p", "v"], ["y"]),
        ],
        {
            "w": numbers(4, 12), "b": numbers(12), "s": ints(1, 3, 3, 2, 2), "d": np.float32(0.7),
            **{f"i{i}": np.int64(i) for i in range(3)},
        },
        [1, 3, 4],
    ),
    "weights that are an output, too": graph(
        [
            node("MatMul", ["x", "w"], ["k"]), node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
            node("MatMul", ["x", "kt"], ["s"]), node("Softmax", ["s"], ["p"]),
            node("MatMul", ["p", "x"], ["v"]), node("Concat", ["v", "p"], ["y"], axis=2),
        ],
        {"w": numbers(4, 4)}, [1, 3, 4],
    ),
    "two activations multiplied as matrices": graph(
        [node("Tanh", ["x"], ["t"]), node("MatMul", ["x", "t"], ["y"])], {}, [1, 3, 3]
    ),
    "Attention": operator(),
    "Attention, causal": operator(is_causal=1),
    "Attention, scale and a mask": operator(["b"], {"b": ~MASK}, scale=0.3),
    "Attention, a mask of numbers": operator(["b"], {"b": numbers(3, 3)}),
    "Attention, heads side by side and shared": graph(
        [
            node("MatMul", ["x", "w0"], ["q"]), node("MatMul", ["x", "w1"], ["k"]),
            node("MatMul", ["x", "w2"], ["v"]),
            node("Attention", ["q", "k", "v"], ["y"], q_num_heads=2, kv_num_heads=1),
        ],
        {"w0": numbers(4, 4), "w1": numbers(4, 2), "w2": numbers(4, 2)}, [1, 3, 4], 23,
    ),
    "Einsum of two activations": graph(
        [
            node("Einsum", ["x", "x"], ["s"], equation="bid,bjd->bij"),
            node("Softmax", ["s"], ["p"]),
            node("Einsum", ["p", "x"], ["y"], equation="bij,bjd->bid"),
        ],
        {}, [1, 3, 4],
    ),
}

OTHERS = {
    "patches": graph(
        [node("Conv", ["x", "w", "b"], ["y"], strides=[2, 3], kernel_shape=[2, 3])],
        {"w": numbers(3, 2, 2, 3), "b": numbers(3)}, [1, 2, 5, 6],
    ),
    "Conv of single pixels in a batch": graph(
        [node("Conv", ["x", "w"], ["y"])], {"w": numbers(3, 2, 1, 1)}, [4, 2, 2, 2]
    ),
    "RMSNormalization": graph(
        [node("RMSNormalization", ["x", "s"], ["y"])], {"s": numbers(5)}, [1, 3, 5], 23
    ),
    "a class token and positions": graph(
        [
            node("Concat", ["c", "x"], ["t"], axis=1), node("Add", ["t", "e"], ["h"]),
            node("LayerNormalization", ["h", "s"], ["n"]),
            node("Gather", ["n", "i"], ["g"], axis=1),
            node("MatMul", ["g", "w"], ["y"]),
        ],
        {"c": numbers(1, 1, 4), "e": numbers(1, 4, 4), "s": numbers(4), "i": np.int64(0),
         "w": numbers(4, 2)}, [1, 3, 4],
    ),
    "a bias of vectors that a reshape made": graph(
        [
            node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["h"]),
            node("Reshape", ["h", "s"], ["r"]), node("LayerNormalization", ["r", "g"], ["n"]),
            node("Reshape", ["n", "t"], ["f"]), node("Add", ["f", "c"], ["y"]),
        ],
        {"w": numbers(4), "b": numbers(6), "s": ints(1, 2, 3), "g": numbers(3), "t": ints(1, 6),
         "c": numbers(6)}, [1, 6, 4],
    ),
    "Einsum with a matrix": graph(
        [node("Einsum", ["w", "x"], ["y"], equation="nd,bdt->bnt")], {"w": numbers(3, 4)}, [1, 4, 2]
    ),
    "Pad": graph(
        [node("Pad", ["x", "p", "v"], ["y"])], {"p": ints(0, 1, 0, 2), "v": np.float32(0.3)}, [1, 4]
    ),
    "Pad by reflection, of set 10": graph(
        [node("Pad", ["x"], ["y"], pads=[0, 2, 0, 1], mode="reflect")], {}, [1, 4], 10
    ),
    "GatherND": graph(
        [node("GatherND", ["x", "i"], ["y"])], {"i": np.array([[[0, 2, 1], [0, 0, 0]]])}, [1, 3, 2]
    ),
    "a choice that is constant": graph(
        [node("Tanh", ["x"], ["t"]), node("Where", ["b", "x", "t"], ["z"]),
         node("Where", ["c", "z", "k"], ["y"])],
        {"b": np.array([True, False, True]), "c": np.array([True, True, False]),
         "k": np.float32(0.2)}, [1, 3],
    ),
    "Max and Min with vectors": graph(
        [node("Max", ["x", "a"], ["m"]), node("Min", ["m", "b"], ["y"])],
        {"a": numbers(4), "b": numbers(4)}, [1, 4],
    ),
    **{
        op: graph([node(op, ["x"], ["y"], axes=[2], keepdims=0)], {}, [1, 2, 3])
        for op in ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp")
    },
    "InstanceNormalization": graph(
        [node("InstanceNormalization", ["x", "s", "b"], ["y"])],
        {"s": numbers(2), "b": numbers(2)}, [1, 2, 3],
    ),
    "GroupNormalization": graph(
        [node("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2)],
        {"s": numbers(4), "b": numbers(4)}, [1, 4, 3], 21,
    ),
    "CumSum": graph(
        [node("CumSum", ["x", "a"], ["y"], reverse=1, exclusive=1)], {"a": np.int64(1)}, [1, 3, 2]
    ),
    "Mean": graph(
        [node("Tanh", ["x"], ["t"]), node("Mean", ["x", "t", "c"], ["y"])], {"c": numbers(4)},
        [1, 4],
    ),
    "a branch by a size": branch(),
    "a function of the file": function(),
    "Swish": graph([node("Swish", ["x"], ["y"], alpha=0.7)], {}, [1, 4], 24),
    "Atan": graph([node("Atan", ["x"], ["y"])], {}, [1, 4]),
    "constants by any operator": graph(
        [
            node("Softmax", ["a"], ["s"]), node("Einsum", ["s", "b"], ["e"], equation="ij,jk->ik"),
            node("Pad", ["e", "p"], ["w"]), node("DequantizeLinear", ["q", "scale"], ["d"]),
            node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "d"], ["y"]),
        ],
        {"a": numbers(3, 2), "b": numbers(2, 3), "p": ints(0, 0, 1, 0),
         "q": np.array([3, -4, 5], "int8"), "scale": np.float32(0.1)}, [1, 4], 19,
    ),
}

CASES = PARTS | ATTENTION | OTHERS
