"""Each operator of ONNX: the imported network computes it, and bounds of it hold."""

import json
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_attention_cases import CASES as OF_TRANSFORMERS
from onnx_cases import CASES as BASIC
from onnx_cases import W, graph, node, numbers
from small_networks import save

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.network import Network, NetworkDescription
from lirpa_megatron.networks.onnx_import import read_onnx

METHODS = ("IBP", "CROWN")
CASES = BASIC | OF_TRANSFORMERS


def imported(proto, tmp_path, **options):
    result = read_onnx(save(proto, tmp_path / "net.onnx"), **options)
    return result.description, Network.from_weights(result.description, result.weights)


def shape_of(proto, open_size=1):
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    return [d.dim_value or open_size for d in dims]


def reference(proto, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, of functions' branches that are not taken
        return np.asarray(ReferenceEvaluator(proto).run(None, {"x": x})[0])


@pytest.mark.parametrize("name", CASES)
def test_the_operator_is_what_onnx_says(name, tmp_path):
    proto = CASES[name]
    description, network = imported(proto, tmp_path)
    x = np.random.default_rng(1).normal(size=shape_of(proto)).astype("float32")
    expected = reference(proto, x)
    ours = network(torch.tensor(x).reshape(-1, description.n_in)).detach().numpy()
    # Both round in float32, sums in another order; values are of order 1.
    np.testing.assert_allclose(ours.reshape(-1), expected.reshape(-1), rtol=5e-6, atol=5e-6)
    plain = json.loads(json.dumps(description.to_plain()))
    assert NetworkDescription.from_plain(plain) == description


@pytest.mark.parametrize("name", CASES)
def test_bounds_of_the_operator_hold(name, tmp_path):
    description, network = imported(CASES[name], tmp_path)
    network = Network.from_weights(
        description, dict(network.state_dict()), torch.float64
    ).requires_grad_(False)
    torch.manual_seed(0)
    x = torch.randn(2, description.n_in, dtype=torch.float64)
    bounded = BoundedModule(network, x)
    for eps in (0.01, 0.6):
        away = eps * (2 * torch.rand(2, 300, description.n_in, dtype=torch.float64) - 1)
        away[:, :100] = away[:, :100].sign() * eps
        points = x[:, None] + away
        y = network(points.flatten(0, 1)).view(2, 300, -1)
        for method in METHODS:
            ball = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=eps))
            lower, upper = bounded.compute_bounds(x=(ball,), method=method)
            lower, upper = (b.detach().reshape(2, 1, -1) for b in (lower, upper))
            # Rounding of float64 at values of order 1, of which squares and sums are taken.
            assert (lower <= y + 1e-12).all() and (y <= upper + 1e-12).all(), (method, eps)
            assert torch.isfinite(upper - lower).all(), (method, eps)


def test_before_set_13_softmax_is_of_all_dimensions_from_its_axis_on(tmp_path):
    _, network = imported(
        graph([node("Softmax", ["x"], ["y"], axis=1)], {}, [1, 3, 5], opset=11), tmp_path
    )
    x = torch.randn(2, 15)
    torch.testing.assert_close(network(x), torch.softmax(x, dim=1))


def test_what_moves_nothing_leaves_no_layer(tmp_path):
    proto = graph(
        [
            node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]), node("Flatten", ["t"], ["f"]),
            node("Gemm", ["f", "w"], ["y"], transB=1),
        ],
        {"w": numbers(5, 16)}, [1, 1, 4, 4],
    )
    description, _ = imported(proto, tmp_path)
    assert [layer.op for layer in description.layers] == ["linear"]


@pytest.mark.parametrize("shape", [["N", "F"], ["F"]])
def test_a_size_that_is_left_open_is_what_a_later_node_needs(shape, tmp_path):
    description, network = imported(
        graph([node("MatMul", ["x", "w"], ["m"]), node("Relu", ["m"], ["y"])], {"w": W.T},
              [0] * len(shape)), tmp_path,
    )
    assert description.input_shape == (4,) and network(torch.zeros(3, 4)).shape == (3, 6)


def test_two_sizes_that_fit_an_open_one_are_refused(tmp_path):
    proto = graph([node("Softmax", ["x"], ["y"])], {"c": np.zeros(3, "f"), "d": np.zeros(4, "f")},
                  [0, 0])
    with pytest.raises(UserError, match=r"leaves a size open, and both \[1, 3\] and \[1, 4\] fit"):
        imported(proto, tmp_path)


def test_one_of_several_outputs_is_asked_for_by_name(tmp_path):
    proto = graph(
        [node("Relu", ["x"], ["r"]), node("Gemm", ["r", "w"], ["s"], transB=1)], {"w": W}, [1, 4],
        outputs=("s", "r"),
    )
    with pytest.raises(UserError, match=r"2 outputs \(s, r\): say which"):
        imported(proto, tmp_path)
    description, _ = imported(proto, tmp_path, output="r")
    assert description.n_out == 4
    with pytest.raises(UserError, match="there is no output 'q'; its outputs are s, r"):
        imported(proto, tmp_path, output="q")


def test_nodes_and_tensors_that_the_output_does_not_need_are_not_read(tmp_path):
    proto = graph(
        [node("LRN", ["x"], ["q"], size=3), node("Relu", ["x"], ["y"])],
        {"bad": np.array([np.nan], "float32")}, [1, 4],
    )
    assert [layer.op for layer in imported(proto, tmp_path)[0].layers] == ["relu"]


def test_samples_of_a_batch_are_each_bounded_alone(tmp_path):
    description, _ = imported(CASES["a batch of 32"], tmp_path)
    assert (description.input_shape, description.output_shape) == ((4,), (6,))


def test_version_1_of_descriptions_is_still_read():
    plain = {
        "format": "lirpa_megatron.network", "version": 1, "name": "net", "dtype": "float32",
        "input_shape": [4], "output_shape": [3],
        "layers": [
            {"name": "fc1", "op": "linear", "inputs": ["input"], "n_in": 4, "n_out": 3,
             "bias": True},
            {"name": "relu1", "op": "relu", "inputs": ["fc1"], "n_in": 3, "n_out": 3,
             "bias": False},
        ],
    }
    description = NetworkDescription.from_plain(plain)
    assert description.weight_shapes() == {"layers.fc1.weight": (3, 4), "layers.fc1.bias": (3,)}
    assert Network(description)(torch.zeros(2, 4)).shape == (2, 3)


REFUSED = {
    "a choice that jumps": (
        graph([node("Greater", ["x", "z"], ["c"]), node("Where", ["c", "x", "k"], ["y"])],
              {"z": np.float32(0), "k": np.float32(0.1)}, [1, 5]),
        r"node 'y' \(Where\) .* may jump",
    ),
    "ArgMax": (graph([node("ArgMax", ["x"], ["y"])], {}, [1, 5]), "compare the scores"),
    "a convolution": (
        graph([node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])], {"w": numbers(2, 1, 3, 3)},
              [1, 1, 4, 4]),
        r"node 'y' \(Conv\) is a convolution, .* verify convolutional networks with auto_LiRPA",
    ),
    "a mask without attention": (
        graph([node("Add", ["x", "m"], ["a"]), node("Softmax", ["a"], ["y"])],
              {"m": np.array([0, -np.inf], "f")}, [1, 2]),
        r"node 'a' \(Add\) .* number that is far below 0.* use a finite one such as -10000",
    ),
    "infinity": (
        graph([node("Add", ["x", "m"], ["y"])], {"m": np.array([0, np.inf], "f")}, [1, 2]),
        "NaN or infinite values",
    ),
    "an exponent that is no whole number": (
        graph([node("Pow", ["x", "e"], ["y"])], {"e": np.float32(1.5)}, [1, 5]), "exponent 1.5"
    ),
    "a jump": (
        graph([node("ThresholdedRelu", ["x"], ["y"], alpha=1.0)], {}, [1, 5]), "jumps at 1"
    ),
    **{
        f"{op} that falls": (graph([node(op, ["x"], ["y"], alpha=-0.5)], {}, [1, 5]),
                             rf"{op}.* has alpha -0.5, which must be positive")
        for op in ("Elu", "Celu", "Selu")
    },
    "a cast to integers": (
        graph([node("Cast", ["x"], ["y"], to=TensorProto.INT64)], {}, [1, 5]), "only between floats"
    ),
    "integer input": (
        graph([node("Relu", ["x"], ["y"])], {}, [1, 5], kind=TensorProto.INT64), "of type int64"
    ),
    "types that differ": (
        graph([node("Add", ["x", "c"], ["y"])], {"c": numbers(5).astype("float16")}, [1, 5]),
        "operands of different types",
    ),
    "training mode": (
        graph([node("BatchNormalization", ["x", "s", "s", "s", "s"], ["y", "m", "v"],
                    training_mode=1)], {"s": np.ones(4, "f")}, [1, 4]),
        "training mode",
    ),
    "Dropout in training mode": (
        graph([node("Dropout", ["x", "r", "t"], ["y"])],
              {"r": np.float32(0.5), "t": np.array(True)}, [1, 4]),
        "training mode",
    ),
    "an operator of another domain": (
        helper.make_model(
            helper.make_graph(
                [node("Gelu", ["x"], ["y"], domain="com.microsoft")], "g",
                [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
                [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
            ),
            opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
            ir_version=8,
        ),
        r"operator com.microsoft.Gelu of node 'y'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_by_name(name, tmp_path):
    proto, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        imported(proto, tmp_path)


def test_weights_in_a_file_of_their_own_are_read(tmp_path):
    proto = graph([node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": W}, [1, 4])
    onnx.save(proto, str(tmp_path / "net.onnx"), save_as_external_data=True, location="net.data",
              size_threshold=0)
    result = read_onnx(tmp_path / "net.onnx")
    np.testing.assert_array_equal(result.weights["layers.fc1.weight"].numpy(), W)


class Mixed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = torch.nn.Linear(12, 8), torch.nn.BatchNorm1d(8)
        self.last = torch.nn.Linear(8, 3)
        self.register_buffer("mean", torch.randn(3, 2, 2))

    def forward(self, x):
        x = ((x - self.mean) / 0.3).permute(0, 2, 3, 1).reshape(x.shape[0], -1)
        gate, up = torch.nn.functional.gelu(self.norm(self.first(x))).chunk(2, 1)
        h = torch.cat([torch.nn.functional.silu(gate) * up, up.abs()], 1)
        return torch.log_softmax(self.last(h), 1)


class Tokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)
        self.last = torch.nn.Linear(4, 2)

    def forward(self, x):
        h = self.norm(torch.nn.functional.leaky_relu(self.first(x)) + x)
        return self.last(h.mean(1))


class Choices(torch.nn.Module):
    def forward(self, x):
        y = torch.where(x > 0, x, 0.1 * x).clamp(-1, 2) + torch.maximum(x, -x)
        return y + x[:, [2, 1, 0, 3]].pow(2).sum(1, keepdim=True).sqrt()


EXPORTED = {
    "normalised, gated": (Mixed, [2, 3, 2, 2]),
    "tokens": (Tokens, [2, 3, 4]),
    "choices": (Choices, [2, 4]),
    "softmax": (lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Softmax(1)), [32, 4]),
    "activations": (
        lambda: torch.nn.Sequential(*(
            part for name in "ELU Hardswish SELU ReLU6 PReLU Mish Softplus Softsign Tanh".split()
            for part in (torch.nn.Linear(5, 5), getattr(torch.nn, name)())
        )),
        [2, 5],
    ),
}


@pytest.mark.parametrize("batch", ["fixed", "open"])
@pytest.mark.parametrize("name", EXPORTED)
def test_what_torch_exports_is_what_is_imported(name, batch, tmp_path):
    make, shape = EXPORTED[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    path = str(tmp_path / "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of its age
        torch.onnx.export(
            model, (x,), path, dynamo=False, input_names=["x"],
            dynamic_axes={"x": {0: "batch"}} if batch == "open" else None,
        )
    result = read_onnx(path)
    network = Network.from_weights(result.description, result.weights)
    assert result.description.input_shape == tuple(shape[1:])
    ours = network(x.flatten(1))
    # Two orders of the same arithmetic in float32, at values of order 1.
    torch.testing.assert_close(ours, model(x).flatten(1), rtol=1e-5, atol=1e-5)
