"""ONNX files that were made to cost time and memory are refused before they do."""

import resource
import time

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx_cases import graph, ints, node

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.onnx_import import read_onnx


def chained(op, count, *rest, **attributes):
    """x -> op -> op -> ... -> y."""
    names = ["x", *(f"a{i}" for i in range(count - 1)), "y"]
    return [node(op, [a, *rest], [b], **attributes)
            for a, b in zip(names, names[1:], strict=False)]


HOSTILE = {
    "a constant of 2^40 numbers": graph(
        [node("ConstantOfShape", ["s"], ["c"]), node("Mul", ["x", "c"], ["y"])],
        {"s": ints(2**20, 2**20)}, [1, 4],
    ),
    "Reshape to 2^40": graph([node("Reshape", ["x", "s"], ["y"])], {"s": ints(2**40)}, [1, 4]),
    "Expand to 2^42": graph(
        [node("Expand", ["x", "s"], ["y"])], {"s": ints(2**20, 2**20, 4)}, [1, 4]
    ),
    "Tile to 2^52": graph([node("Tile", ["x", "s"], ["y"])], {"s": ints(1, 2**50)}, [1, 4]),
    "Range of 2^62": graph(
        [node("Range", ["a", "b", "c"], ["r"]), node("Mul", ["x", "r"], ["y"])],
        {"a": np.int64(0), "b": np.int64(2**62), "c": np.int64(1)}, [1, 4],
    ),
    "a sum of 2^40 numbers": graph(
        [node("Add", ["a", "b"], ["r"]), node("Mul", ["x", "r"], ["y"])],
        {"a": np.ones((2**20, 1), "f"), "b": np.ones((1, 2**20), "f")}, [1, 4],
    ),
    "a product of 2^40 numbers": graph(
        [node("MatMul", ["a", "b"], ["r"]), node("Mul", ["x", "r"], ["y"])],
        {"a": np.ones((2**20, 1), "f"), "b": np.ones((1, 2**20), "f")}, [1, 4],
    ),
    "an input of 2^40 numbers": graph([node("Relu", ["x"], ["y"])], {}, [1, 2**40]),
    "a node that reads itself": graph([node("Add", ["x", "y"], ["y"])], {}, [1, 4]),
    "nodes in a circle": graph(
        [node("Add", ["x", "b"], ["a"]), node("Relu", ["a"], ["b"]), node("Relu", ["b"], ["y"])],
        {}, [1, 4],
    ),
    "a step of zero": graph(
        [node("Slice", ["x", "a", "b", "c", "d"], ["y"])],
        {"a": ints(0), "b": ints(3), "c": ints(1), "d": ints(0)}, [1, 4],
    ),
    "100,000 nodes": graph(chained("Relu", 100_000), {}, [1, 4]),
    "a tensor that doubles 40 times": graph(
        [node("Unsqueeze", ["x", "one"], ["u"]),
         *(node("Concat", [a, a], [b], axis=1) for a, b in
           zip(["u", *(f"c{i}" for i in range(39))], [*(f"c{i}" for i in range(39)), "y"],
               strict=True))],
        {"one": ints(1)}, [1, 64],
    ),
    "a size that is a lie": None,
    "a file outside of the folder": None,
}


def doubling(levels):
    """Functions that call the one below twice."""
    proto = graph([node(f"F{levels}", ["x"], ["y"], domain="own")], {}, [1, 4])
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    for i in range(1, levels + 1):
        call = {"op_type": f"F{i - 1}", "domain": "own"} if i > 1 else {"op_type": "Relu"}
        nodes = [node(inputs=[a], outputs=[b], **call) for a, b in ("ab", "bc")]
        proto.functions.append(helper.make_function("own", f"F{i}", ["a"], ["c"], nodes, sets))
    proto.opset_import.append(helper.make_opsetid("own", 1))
    return proto


HOSTILE["functions that double 40 times"] = doubling(40)


def lying():
    proto = graph([node("Gemm", ["x", "w"], ["y"])], {}, [1, 4])
    proto.graph.initializer.append(
        TensorProto(name="w", data_type=1, dims=[2**40, 4], raw_data=b"\0" * 64)
    )
    return proto


def outside():
    proto = graph([node("Gemm", ["x", "w"], ["y"])], {}, [1, 4])
    tensor = TensorProto(name="w", data_type=1, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../secret")
    proto.graph.initializer.append(tensor)
    return proto


HOSTILE["a size that is a lie"], HOSTILE["a file outside of the folder"] = lying(), outside()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_little_time_and_memory(name, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(HOSTILE[name].SerializeToString())
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        read_onnx(path)
    # Generous: each takes less than two seconds and 300 MB by itself.
    assert time.monotonic() - begin < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
