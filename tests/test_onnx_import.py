"""Imported networks compute what ONNX's own reference evaluator computes."""

import gzip

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from small_networks import MNIST_FC, model, needs_mnist_fc, save, stack

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.network import Network, NetworkDescription
from lirpa_megatron.networks.onnx_import import read_onnx

node = helper.make_node
RNG = np.random.default_rng(1)


def array(*shape, dtype="float32"):
    return RNG.normal(size=shape).astype(dtype)


def imported_and_reference(proto, path, samples=4):
    """Outputs of the imported network and of the reference, sample by sample (batch is 1)."""
    save(proto, path)
    result = read_onnx(path)
    network = Network.from_weights(result.description, result.weights)
    value = proto.graph.input[0]
    shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
    dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    x = [RNG.normal(size=shape).astype(dtype) for _ in range(samples)]
    evaluator = ReferenceEvaluator(proto)
    reference = np.concatenate([evaluator.run(None, {value.name: v})[0] for v in x])
    batch = torch.tensor(np.concatenate(x)).flatten(1).to(next(network.parameters()).dtype)
    return result, network(batch).detach().numpy(), reference.reshape(samples, -1)


W, B = array(6, 4), array(6)
CASES = {
    "Gemm with alpha, beta and untransposed weight": model(
        [node("Gemm", ["x", "w", "b"], ["y"], alpha=0.5, beta=-2.0)],
        {"w": W.T, "b": B}, 4, 6,
    ),
    "Gemm with a scalar bias": model(
        [node("Gemm", ["x", "w", "b"], ["y"], transB=1)], {"w": W, "b": np.float32(0.3)}, 4, 6
    ),
    "MatMul and Add become one layer": model(
        [node("MatMul", ["x", "w"], ["m"]), node("Add", ["b", "m"], ["y"])],
        {"w": W.T, "b": B}, 4, 6,
    ),
    "input normalisation of an image": model(
        [
            node("Sub", ["x", "mean"], ["c"]),
            node("Div", ["c", "std"], ["n"]),
            node("Flatten", ["n"], ["f"]),
            node("Gemm", ["f", "w", "b"], ["y"], transB=1),
        ],
        {"mean": array(1, 2, 1, 1), "std": abs(array(2, 1, 1)) + 0.5, "w": array(6, 8), "b": B},
        8, 6, shape=[2, 2, 2],
    ),
    "constant minus activation, and a factor": model(
        [
            node("Sub", ["one", "x"], ["s"]),
            node("Mul", ["s", "scale"], ["m"]),
            node("Gemm", ["m", "w"], ["y"], transB=1),
        ],
        {"one": np.float32(1.0), "scale": array(4), "w": W}, 4, 6,
    ),
    "residual sum and difference": model(
        [
            node("Gemm", ["x", "w", "b"], ["g"], transB=1),
            node("Relu", ["g"], ["r"]),
            node("Gemm", ["r", "v"], ["h"]),
            node("Add", ["h", "g"], ["s"]),
            node("Tanh", ["s"], ["t"]),
            node("Sub", ["t", "r"], ["y"]),
        ],
        {"w": W, "b": B, "v": array(6, 6)}, 4, 6,
    ),
    "a layer read twice is not folded into": model(
        [
            node("Gemm", ["x", "w", "b"], ["g"], transB=1),
            node("Add", ["g", "c"], ["s"]),
            node("Sigmoid", ["s"], ["t"]),
            node("Add", ["t", "g"], ["y"]),
        ],
        {"w": W, "b": B, "c": array(6)}, 4, 6,
    ),
    "arithmetic after an activation, at the output": model(
        [
            node("Gemm", ["x", "w", "b"], ["g"], transB=1),
            node("Relu", ["g"], ["r"]),
            node("Mul", ["r", "c"], ["m"]),
            node("Add", ["m", "d"], ["y"]),
        ],
        {"w": W, "b": B, "c": array(6), "d": array(6)}, 4, 6,
    ),
    "Identity, Dropout, Reshape and Constant": model(
        [
            node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array([1, -1]))),
            node("Identity", ["x"], ["i"]),
            node("Dropout", ["i"], ["d", "mask"]),
            node("Reshape", ["d", "shape"], ["f"]),
            node("MatMul", ["f", "w"], ["m"]),
            node("Reshape", ["m", "keep"], ["y"]),
        ],
        {"w": array(4, 6), "keep": np.array([0, 6])}, 4, 6, shape=[2, 2],
    ),
    "a dead branch is dropped": model(
        [
            node("Gemm", ["x", "w", "b"], ["dead"], transB=1),
            node("Gemm", ["x", "w"], ["y"], transB=1),
        ],
        {"w": W, "b": B}, 4, 6,
    ),
    "Tanh stack": stack([4, 8, 8, 3], activation="Tanh"),
    "Sigmoid stack in float64": stack([4, 8, 3], activation="Sigmoid", dtype="float64"),
}


@pytest.mark.parametrize("name", CASES)
def test_network_computes_what_onnx_says(name, tmp_path):
    _, ours, reference = imported_and_reference(CASES[name], tmp_path / "net.onnx")
    # Sums in another order; values are of order 1.
    tolerance = 1e-14 if reference.dtype == np.float64 else 3e-6
    np.testing.assert_allclose(ours, reference, rtol=tolerance, atol=tolerance)


def test_arithmetic_with_constants_stays_in_the_order_of_the_file(tmp_path):
    save(CASES["input normalisation of an image"], tmp_path / "net.onnx")
    description = read_onnx(tmp_path / "net.onnx").description
    assert [layer.op for layer in description.layers] == ["shift", "divide", "linear"]
    assert description.input_shape == (2, 2, 2)


def test_half_precision_weights_stay_as_they_are_stored(tmp_path):
    proto = stack([4, 8, 3], dtype="float16")
    result = read_onnx(save(proto, tmp_path / "net.onnx"))
    stored = numpy_helper.to_array(proto.graph.initializer[0])
    assert (result.description.dtype, result.description.bounds_dtype) == ("float16", "float32")
    np.testing.assert_array_equal(result.weights["layers.fc1.weight"].numpy(), stored)


def test_float64_weights_stay_float64(tmp_path):
    result = read_onnx(save(stack([4, 3], dtype="float64"), tmp_path / "net.onnx"))
    assert result.weights["layers.fc1.weight"].dtype == torch.float64


def test_description_survives_plain_data_and_builds_on_meta(tmp_path):
    result = read_onnx(save(CASES["residual sum and difference"], tmp_path / "net.onnx"))
    plain = result.description.to_plain()
    assert NetworkDescription.from_plain(plain) == result.description
    with torch.device("meta"):
        network = Network(result.description)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes == result.description.weight_shapes()
    torch.fx.symbolic_trace(network)


@needs_mnist_fc
@pytest.mark.parametrize("depth", [2, 4, 6])
def test_published_networks_compute_what_onnx_says(depth, tmp_path):
    packed = MNIST_FC / "onnx" / f"mnist-net_256x{depth}.onnx.gz"
    proto = onnx.load_model_from_string(gzip.decompress(packed.read_bytes()))
    _, ours, reference = imported_and_reference(proto, tmp_path / "net.onnx")
    np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)
    assert read_onnx(packed).description.name == f"mnist-net_256x{depth}"


REFUSED = {
    "an unknown operator": (
        model([node("LRN", ["x"], ["y"], name="last", size=3)], {}, 4, 4),
        r"operator LRN of node 'last' \(LRN\) is not supported .* Abs, Add",
    ),
    "NaN in a weight": (
        model([node("Gemm", ["x", "w"], ["y"])], {"w": np.full((4, 6), np.nan, "f")}, 4, 6),
        "tensor 'w' has NaN",
    ),
    "infinite bias": (
        model(
            [node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
            {"w": W, "b": np.full(6, np.inf, "float32")}, 4, 6,
        ),
        "tensor 'b' has NaN or infinite",
    ),
    "division by zero": (
        model(
            [node("Div", ["x", "c"], ["d"]), node("Gemm", ["d", "w"], ["y"], transB=1)],
            {"w": W, "c": np.zeros(4, "f")}, 4, 6,
        ),
        "divides by zero",
    ),
    "widths that do not fit": (
        model([node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": array(6, 5)}, 4, 6),
        "4 features, the weight expects 5",
    ),
    "an old operator set": (
        model([node("Gemm", ["x", "w", "b"], ["y"], transB=1, broadcast=1)],
              {"w": W, "b": B}, 4, 6, opset=6),
        "operator set 6",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name, tmp_path):
    proto, message = REFUSED[name]
    path = save(proto, tmp_path / "net.onnx")
    with pytest.raises(UserError, match=message) as caught:
        read_onnx(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("packed", [False, True])
def test_truncated_files_are_refused(part, packed, tmp_path):
    data = stack([4, 8, 3]).SerializeToString()
    data = gzip.compress(data) if packed else data
    path = tmp_path / ("net.onnx.gz" if packed else "net.onnx")
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(UserError) as caught:
        read_onnx(path)
    assert "\n" not in str(caught.value)


def test_a_compressed_file_is_found_without_its_suffix(tmp_path):
    data = gzip.compress(stack([4, 8, 3]).SerializeToString())
    (tmp_path / "net.onnx.gz").write_bytes(data)
    assert read_onnx(tmp_path / "net.onnx").description.name == "net"
