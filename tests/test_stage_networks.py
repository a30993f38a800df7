"""Imported networks over pipeline stages: where they can be cut, and one process's verdicts."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import commands
import pytest
from onnx import helper
from ranks import pool
from small_networks import model, property_text, save, stack

from lirpa_megatron.errors import UserError
from lirpa_megatron.networks.onnx_import import read_onnx
from lirpa_megatron.networks.stages import parts_of, stage_of
from lirpa_megatron.parallel.model_ranks import ALONE, ModelRanks
from lirpa_megatron.verify.properties.instance_list import Instance
from lirpa_megatron.verify.properties.job import Runner
from lirpa_megatron.verify.properties.loading import load
from lirpa_megatron.verify.properties.options import VerifyOptions

SIZES = (4, 8, 12, 8, 6, 3)
UNSAFE = {
    "holds": "(and (>= Y_0 (+ 40.0 Y_1)))",
    "is violated": "(and (<= Y_0 (+ 40.0 Y_1)))",
    "is open": "(and (<= Y_0 Y_1))",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("networks")
    save(stack(SIZES), found / "net.onnx")
    save(normalised(), found / "normalised.onnx")
    save(stack(SIZES, dtype="float16"), found / "half.onnx")
    for name, unsafe in UNSAFE.items():
        text = property_text([-0.1] * 4, [0.1] * 4, 3, unsafe)
        (found / f"{name}.vnnlib").write_text(text)
    return found


def normalised():
    """(x - 0.25) / 0.5 in front, softmax behind."""
    proto = stack(SIZES, seed=3)
    graph = proto.graph
    graph.node[0].input[0] = "scaled"
    graph.node[-1].output[0] = "scores"
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["shifted"]),
        helper.make_node("Div", ["shifted", "deviation"], ["scaled"]),
        *graph.node, helper.make_node("Softmax", ["scores"], ["y"], axis=1),
    ]
    from onnx import numpy_helper

    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    like = constants["w0"].dtype.type
    constants |= {"mean": [like(0.25)] * 4, "deviation": [like(0.5)] * 4}
    return model(nodes, constants, SIZES[0], SIZES[-1])


def residual():
    """Three linear layers, the second around a residual connection, and one that reads x again."""
    weights = {f"w{i}": stack((4, 4), seed=i).graph for i in range(4)}
    from onnx import numpy_helper

    constants = {
        name: numpy_helper.to_array(graph.initializer[0]) for name, graph in weights.items()
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w1"], ["c"]),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "w2"], ["e"]),
        helper.make_node("Add", ["b", "e"], ["f"]),
        helper.make_node("MatMul", ["f", "w3"], ["y"]),
    ]
    return model(nodes, constants, 4, 4)


def of_all(folder, network, options):
    """What a run over all properties says: result, bounds, counterexample of each."""
    ranks = ModelRanks.of_megatron()
    runner = Runner(VerifyOptions(attack_steps=8, attack_restarts=4, **options), ranks)
    path = Path(folder) / network
    instances = [
        Instance(network, path, False, name, Path(folder) / f"{name}.vnnlib", None)
        for name in UNSAFE
    ]
    found = runner.run(instances, lambda result: None)
    return [(r.result, r.lower_bounds, r.counterexample, r.error) for r in found]


@cache
def of_one(folder, network, options):
    from lirpa_megatron.parallel import runtime

    with runtime.session():
        return of_all(folder, network, dict(options))


def compare(folder, network, tp, pp, **options):
    alone = tuple((k, v) for k, v in options.items() if k != "pipeline_layers")
    expected = of_one(folder, network, alone)
    for found in pool(tp * pp, tp, pp).run(of_all, str(folder), network, options):
        for got, want in zip(found, expected, strict=True):
            assert got[0] == want[0] != "error", got
            tolerance = 1e-10 if options["dtype"] == "float64" else 1e-5
            assert got[1] == pytest.approx(want[1], rel=tolerance, abs=tolerance)
            assert (got[2] is None) == (want[2] is None)
    return [result for result, *_ in expected]


@pytest.mark.parametrize(("tp", "pp", "extra"), [
    (1, 2, {}),
    (1, 3, {"pipeline_layers": (1, 3, 1)}),
    (2, 2, {"method": "CROWN-Optimized", "alpha_iterations": 3}),
])
def test_verdicts_are_those_of_one_process(folder, tp, pp, extra):
    results = compare(folder, "net.onnx", tp, pp, dtype="float64", **extra)
    assert results[0] == "unsat" and "sat" in results


def test_a_box_goes_through_the_normalisation_on_the_first_stage(folder):
    """And two outputs of a softmax are compared before it, on the last stage."""
    results = compare(folder, "normalised.onnx", 1, 2, dtype="float64")
    assert results[0] == "unsat"


def test_the_network_as_stored_runs_over_stages_too(folder):
    """A counterexample is one of the network in half precision."""
    assert "sat" in compare(folder, "half.onnx", 1, 2, dtype="float32", method="auto")


def test_a_network_is_cut_where_one_value_crosses(folder, tmp_path):
    parts = parts_of(read_onnx(folder / "net.onnx").description)
    assert [[layer.op for layer in part] for part in parts] == [["linear", "relu"]] * 4 + [
        ["linear"]
    ]
    path = save(residual(), tmp_path / "residual.onnx")
    whole = read_onnx(path).description
    assert [sum(layer.op == "linear" for layer in part) for part in parts_of(whole)] == [1, 2, 1]


def test_stages_of_a_network_make_the_whole(folder):
    import torch

    from lirpa_megatron.networks.network import Network

    for name in ("net.onnx", "normalised.onnx", "half.onnx"):
        imported = read_onnx(folder / name)
        x = torch.rand(5, 4)
        want = Network.from_weights(imported.description, imported.weights)(x)
        for counts in ((5,), (2, 3), (1, 1, 3), (1, 1, 1, 1, 1)):
            value = x
            for stage in range(len(counts)):
                own = stage_of(imported.description, counts, stage)
                own.check()
                value = Network.from_weights(own, imported.weights)(value)
            assert torch.equal(value, want)


def of_too_many(folder):
    try:
        load(Path(folder) / "two.onnx", False, None, {}, ModelRanks.of_megatron())
    except UserError as error:
        return str(error)


def test_more_stages_than_parts_are_refused_in_one_line(folder):
    save(stack((4, 8, 3)), folder / "two.onnx")
    for message in pool(3, 1, 3).run(of_too_many, str(folder)):
        assert "size 3 is more than the 2 parts that network two can be cut into" in message


def test_an_error_on_one_stage_is_the_instances_error_on_all(folder):
    text = (folder / "holds.vnnlib").read_text().replace("0.1", "1e39")
    (folder / "overflows.vnnlib").write_text(text)
    for found in pool(2, 1, 2).run(of_overflow, str(folder)):
        assert found[0][0] == "error" and "overflows" in found[0][1]
        assert found[1][0] == "unsat"  # the next one is verified


def of_overflow(folder):
    runner = Runner(VerifyOptions(dtype="float32"), ModelRanks.of_megatron())
    path, folder = Path(folder) / "normalised.onnx", Path(folder)
    instances = [
        Instance("it", path, False, name, folder / f"{name}.vnnlib", None)
        for name in ("overflows", "holds")
    ]
    return [(r.result, r.error) for r in runner.run(instances, lambda result: None)]


def test_the_command_line_verifies_a_checkpoint_over_stages(folder, tmp_path):
    from lirpa_megatron.cli.commands import main

    checkpoint, output = tmp_path / "checkpoint", tmp_path / "r.jsonl"
    assert main(["import-onnx", str(folder / "net.onnx"), str(checkpoint)]) == 0
    found = commands.on_ranks(
        2, "verify", "--load", checkpoint, "--vnnlib", folder / "holds.vnnlib",
        "--pipeline-parallel-size", 2, "--output", output,
    )
    assert found.returncode == 0, found.stderr
    assert '"result": "unsat"' in output.read_text()
    assert '"pipeline_parallel": 2' in output.read_text()


def test_layers_of_stages_need_stages(folder, session):
    with pytest.raises(UserError, match="has 2 numbers, the pipeline 1 stages"):
        load(folder / "net.onnx", False, None, {}, pipeline_layers=[2, 3])


def test_one_process_is_one_stage():
    assert (ALONE.size, ALONE.stages) == (1, 1)
    assert ALONE.broadcast_object("x") == "x"
