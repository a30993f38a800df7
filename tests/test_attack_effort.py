"""The attack of `verify` works harder where few inputs move and bounds leave a property open."""

import numpy as np
import pytest
from commands import read
from onnx import numpy_helper
from small_networks import property_text, save, stack

from lirpa_megatron.cli.commands import main
from lirpa_megatron.verify.properties.options import VerifyOptions

pytestmark = pytest.mark.usefixtures("unchanged_environment")

WIDTH, PLACE = 0.012, (0.3, 0.7)
"""Of the only part of the unit square where the network is not 0: 3e-4 of its area."""


def write_needle(folder):
    """relu(WIDTH - |x - a| - |z - b|) - 0.001: without slope nearly everywhere."""
    a, b = PLACE
    layers = [
        ([[1, 0], [-1, 0], [0, 1], [0, -1]], [-a, a, -b, b]),
        ([[-1, -1, -1, -1]], [WIDTH]),
        ([[1]], [-0.001]),
    ]
    proto = stack([2, 4, 1, 1])
    for i, values in enumerate(layers):
        for name, value in zip("wb", values, strict=True):
            (tensor,) = (t for t in proto.graph.initializer if t.name == f"{name}{i}")
            tensor.CopyFrom(numpy_helper.from_array(np.array(value, np.float32), tensor.name))
    save(proto, folder / "needle.onnx")
    text = property_text([0, 0], [1, 1], 1, "(>= Y_0 0.0)")
    (folder / "needle.vnnlib").write_text(text)


def test_what_the_usual_attack_misses_is_found_with_more_points(tmp_path, session):
    write_needle(tmp_path)
    output = tmp_path / "r.jsonl"
    given = ["verify", "--onnx", str(tmp_path / "needle.onnx"), "--vnnlib",
             str(tmp_path / "needle.vnnlib"), "--output", str(output)]
    assert main([*given, "--attack-restarts", "21"]) == 0
    assert [r["result"] for r in read(output)] == ["unknown"]
    assert main(given) == 0
    (harder,) = read(output)
    assert harder["result"] == "sat"
    assert np.abs(np.array(harder["counterexample"]) - PLACE).sum() <= WIDTH


@pytest.mark.parametrize("moving, targets, weights, options, attacks", [
    (5, 1, 13_000, {}, [(40, 20), (300, 300)]),
    (784, 1, 13_000, {}, [(40, 20)]),
    (5, 1000, 13_000, {}, [(40, 20)]),
    (5, 8, 13_000, {}, [(40, 20), (300, 300)]),
    (2, 1, 1_400_000, {}, [(40, 20)]),
    (5, 1, 13_000, {"attack_steps": 100}, [(100, 20)]),
    (5, 1, 13_000, {"attack_steps": 0}, []),
])
def test_a_harder_attack_follows_where_it_is_cheap(moving, targets, weights, options, attacks):
    found = VerifyOptions(**options).attacks(moving, targets, weights)
    assert [(attack.steps, attack.restarts) for attack in found] == attacks
