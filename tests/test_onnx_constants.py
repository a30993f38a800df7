"""Nodes of constants alone are what the standard says for the operator set of the file.

The references are written here, because onnx's own evaluator departs from the standard in them.
"""

import numpy as np
import pytest
import torch
from onnx_cases import graph, node, numbers
from small_networks import save

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.network import Network
from lirpa_megatron.networks.onnx_import import read_onnx

VALUES = numbers(3, 4)
CHANNELS = {"scale": numbers(4), "shift": numbers(4), "mean": numbers(4),
            "var": np.abs(numbers(4))}


def constant(op, tmp_path, opset, constants=None, **attributes):
    """The imported network's constant: its output at 0, y = x + op(VALUES)."""
    proto = graph(
        [node(op, ["values", *(constants or {})], ["c"], **attributes),
         node("Add", ["x", "c"], ["y"])],
        {"values": VALUES, **(constants or {})}, VALUES.shape, opset,
    )
    read = read_onnx(save(proto, tmp_path / "net.onnx"))
    network = Network.from_weights(read.description, read.weights)
    return network(torch.zeros(1, VALUES.size)).detach().numpy().reshape(VALUES.shape)


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


@pytest.mark.parametrize("axis", [0, 1, None, -1])
@pytest.mark.parametrize("opset", [7, 12, 13])
@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
def test_softmax_of_older_sets_takes_all_dimensions_from_the_axis_on(op, opset, axis, tmp_path):
    attributes = {} if axis is None else {"axis": axis}
    over = {0: (0, 1) if opset < 13 else 0}.get(axis, 1)
    expected = softmax(VALUES, over)
    if op == "LogSoftmax":
        expected = np.log(expected)
    if op == "Hardmax":
        expected = (expected == expected.max(over, keepdims=True)).astype(float)
    found = constant(op, tmp_path, opset, **attributes)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("opset", [7, 9, 13, 14, 21])
def test_batch_normalization_takes_the_statistics_of_the_file(opset, tmp_path):
    scale, shift, mean, var = CHANNELS.values()
    expected = scale * (VALUES - mean) / np.sqrt(var + 0.5) + shift
    found = constant("BatchNormalization", tmp_path, opset, CHANNELS, epsilon=0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_sums_of_absolute_values_are_not_taken_from_the_evaluator(tmp_path):
    with pytest.raises(UserError, match="operator that is not evaluated"):
        constant("LpNormalization", tmp_path, 17, p=1, axis=1)
    found = constant("LpNormalization", tmp_path, 17, p=2, axis=1)
    expected = VALUES / np.sqrt(np.square(VALUES).sum(1, keepdims=True))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
