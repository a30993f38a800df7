"""Small ONNX networks and VNN-LIB properties for tests, and where the published ones are."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lirpa_megatron.verify.properties.vnnlib import parse_vnnlib

MNIST_FC = Path(__file__).resolve().parents[2] / "shared" / "data" / "vnncomp2022_mnist_fc"
needs_mnist_fc = pytest.mark.skipif(
    not MNIST_FC.is_dir(), reason="the published VNN-COMP networks (../shared/data) are not here"
)
_TYPES = {
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
}


def model(nodes, constants, n_in, n_out, dtype="float32", shape=None, opset=13):
    """A model with input "x" [1, *shape or n_in], output "y" [1, n_out] and named constants."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", _TYPES[dtype], [1, *(shape or [n_in])])],
        [helper.make_tensor_value_info("y", _TYPES[dtype], [1, n_out])],
        [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def stack(sizes, seed=0, dtype="float32", activation="Relu"):
    """Gemm layers of these widths with an activation between them."""
    generator = np.random.default_rng(seed)
    nodes, constants, value = [], {}, "x"
    for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        last = i == len(sizes) - 2
        constants[f"w{i}"] = (generator.normal(size=(n_out, n_in)) / n_in**0.5).astype(dtype)
        constants[f"b{i}"] = (generator.normal(size=n_out) / 4).astype(dtype)
        out = "y" if last else f"g{i}"
        nodes.append(helper.make_node("Gemm", [value, f"w{i}", f"b{i}"], [out], transB=1))
        if not last:
            nodes.append(helper.make_node(activation, [out], [f"a{i}"]))
            value = f"a{i}"
    return model(nodes, constants, sizes[0], sizes[-1], dtype)


def save(proto, path):
    onnx.save(proto, str(path))
    return path


def property_text(lower, upper, n_out, unsafe):
    """A property over a box whose outputs must not satisfy the formula `unsafe`."""
    lines = [f"(declare-const X_{i} Real)" for i in range(len(lower))]
    lines += [f"(declare-const Y_{j} Real)" for j in range(n_out)]
    for i, (low, high) in enumerate(zip(lower, upper, strict=True)):
        lines += [f"(assert (>= X_{i} {low!r}))", f"(assert (<= X_{i} {high!r}))"]
    return "\n".join([*lines, f"(assert {unsafe})", ""])


def others_win(label, n_out):
    """Unsafe: another output is at least as large as the label's."""
    rows = [f"(and (>= Y_{j} Y_{label}))" for j in range(n_out) if j != label]
    return f"(or {' '.join(rows)})"


def parse(unsafe, lower=(0.0, -1.0), upper=(1.0, 1.0), n_out=2):
    """The property over a box whose outputs must not satisfy `unsafe`, as it is read."""
    return parse_vnnlib(property_text(lower, upper, n_out, unsafe), "test")
