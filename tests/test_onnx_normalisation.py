"""Arithmetic in front of a network, in the type and order of the file: no verdict of another one.

(x - m) / d in float32 at x of 10^9 is a step function: a bound of the real-valued function is not
one of the network's.
"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx_cases import graph, ints, node, numbers
from ranks import pool
from small_networks import property_text, save, stack

from lirpa_megatron.networks.network import Network
from lirpa_megatron.networks.normalisation import normalisation, outward, through
from lirpa_megatron.networks.onnx_import import read_onnx
from lirpa_megatron.parallel import runtime
from lirpa_megatron.parallel.model_ranks import ModelRanks
from lirpa_megatron.verify.properties.instance import Deadline, verify_instance
from lirpa_megatron.verify.properties.loading import load
from lirpa_megatron.verify.properties.options import VerifyOptions
from lirpa_megatron.verify.properties.vnnlib import read_vnnlib

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
W1, B1, W2 = numbers(16, 1), numbers(16), numbers(1, 16)

pytestmark = pytest.mark.usefixtures("session")


def behind(nodes, constants, width=1, **options):
    """A small ReLU network behind nodes that make "z" of "x"."""
    return graph(
        [
            *nodes, node("Gemm", ["z", "w1", "b1"], ["h"], transB=1), node("Relu", ["h"], ["r"]),
            node("Gemm", ["r", "w2"], ["y"], transB=1),
        ],
        {"w1": np.repeat(W1, width, 1), "b1": B1, "w2": W2, **constants}, [0, width], **options,
    )


def normalised(mean, deviation, width=1):
    nodes = [node("Sub", ["x", "m"], ["c"]), node("Div", ["c", "d"], ["z"])]
    return behind(nodes, {"m": np.float32(mean), "d": np.float32(deviation)}, width)


def floats_between(lower, upper):
    """All float32 numbers of a small interval."""
    values, x = [], np.float32(lower)
    while x <= np.float32(upper):
        values.append(x)
        x = np.nextafter(x, np.float32(np.inf))
    return np.array(values, dtype=np.float32)


def outputs(proto, points):
    evaluator = ReferenceEvaluator(proto)
    return np.concatenate([evaluator.run(None, {"x": p})[0] for p in points[:, None]])


def verdict(path, text_or_path, folder, **options):
    if isinstance(text_or_path, str):
        (folder / "p.vnnlib").write_text(text_or_path)
        text_or_path = folder / "p.vnnlib"
    options = VerifyOptions(**options)
    loaded = load(path, False, options.dtype, options.bound_opts())
    prop = read_vnnlib(text_or_path, loaded.description.n_in, loaded.description.n_out, "it")
    return verify_instance(loaded, prop, options, Deadline(None)), loaded


@pytest.mark.parametrize("dtype", [None, "float64"])
@pytest.mark.parametrize("method", ["CROWN", "IBP"])
@pytest.mark.parametrize(
    "mean, deviation, lower, upper",
    [(1.7e9, 86400, 1700052608.0, 1700053376.0), (5329875, 7, 5329878.5, 5329881.5),
     (1.7e9, -86400, 1700052608.0, 1700053376.0), (15, 10, 24.6, 24.601)],
)
def test_no_point_of_the_box_violates_what_is_called_unsat(
    mean, deviation, lower, upper, method, dtype, tmp_path
):
    proto = normalised(mean, deviation)
    path = save(proto, tmp_path / "net.onnx")
    y = outputs(proto, floats_between(lower, upper)[:50, None]).reshape(-1)
    spread = max(float(y.max() - y.min()), 1e-6)
    # Thresholds around what the network does: below all its values, and above the least.
    for threshold in (y.min() - spread, y.min() + spread / 100, y.min() + spread / 3):
        text = property_text([lower], [upper], 1, f"(<= Y_0 {float(threshold)!r})")
        found, _ = verdict(path, text, tmp_path, dtype=dtype, method=method)
        if (y <= threshold).any():
            assert found.result != "unsat", threshold
        if found.result == "sat":
            x = np.float32(found.counterexample.point)[None]
            assert outputs(proto, x)[0, 0] <= threshold


def test_bounds_of_a_normalised_network_are_as_tight_as_of_the_one_behind(tmp_path):
    proto = normalised(1.7e9, 86400)
    path = save(proto, tmp_path / "net.onnx")
    lower, upper = 1700052608.0, 1700053376.0
    y = outputs(proto, floats_between(lower, upper)[:, None])
    found, _ = verdict(path, property_text([lower], [upper], 1, "(<= Y_0 -1000.0)"), tmp_path)
    # From the least output down to the bound: a fraction of what the outputs span.
    assert found.result == "unsat"
    assert 0 <= y.min() + 1000 - found.lower_bounds[0] < 0.1 * (y.max() - y.min()) + 1e-5


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases (../shared/cases) are not here")
@pytest.mark.parametrize("dtype", [None, "float64"])
@pytest.mark.parametrize("name", ["unix_time", "utm_small"])
def test_the_cases_that_were_called_unsat_are_sat(name, dtype, tmp_path):
    found, loaded = verdict(
        CASES / f"{name}.onnx", CASES / f"{name}_false_unsat.vnnlib", tmp_path, dtype=dtype
    )
    assert found.result in ("sat", "unknown")
    assert (loaded.stored_dtype, loaded.dtype) == ("float32", dtype or "float32")


FRONTS = {
    "normalised, in float32": normalised(3e4, 7, 3),
    "a factor for each, one negative": behind(
        [node("Mul", ["x", "s"], ["a"]), node("Add", ["a", "o"], ["z"])],
        {"s": np.float32([0.001, -0.3, 2.0]), "o": np.float32([1e3, -1e4, 7.0])}, 3,
    ),
    "parts normalised each in its way": behind(
        [
            node("Split", ["x", "n"], ["a", "b"], axis=1), node("Sub", ["a", "m"], ["c"]),
            node("Mul", ["b", "s"], ["d"]), node("Concat", ["d", "c"], ["z"], axis=1),
        ],
        {"n": ints(1, 2), "m": np.float32(3e4), "s": np.float32([1e-4, -1e-4])}, 3,
    ),
    "rounded to float16": behind(
        [
            node("Cast", ["x"], ["a"], to=TensorProto.FLOAT16),
            node("Sub", ["a", "m"], ["c"]), node("Cast", ["c"], ["z"], to=TensorProto.FLOAT),
        ],
        {"m": np.float16(3e4)}, 3,
    ),
    "BatchNormalization": behind(
        [node("BatchNormalization", ["x", "s", "b", "m", "v"], ["z"])],
        {"s": numbers(3), "b": numbers(3), "m": np.float32([3e4] * 3), "v": abs(numbers(3)) + 1}, 3,
    ),
    "normalised, and read as it is": graph(
        [
            node("Sub", ["x", "m"], ["c"]), node("Mul", ["x", "s"], ["d"]),
            node("Add", ["c", "d"], ["e"]), node("Relu", ["e"], ["r"]),
            node("Add", ["r", "x"], ["y"]),
        ],
        {"m": np.float32([3e4, 2e4, 1.0]), "s": np.float32(1e-4)}, [0, 3],
    ),
    "nothing else": graph(
        [node("Sub", ["x", "m"], ["c"]), node("Div", ["c", "d"], ["y"])],
        {"m": np.float32(3e4), "d": np.float32(7)}, [0, 3],
    ),
}


@pytest.mark.parametrize("name", FRONTS)
def test_bounds_hold_for_the_network_as_it_is_stored(name, tmp_path):
    proto = FRONTS[name]
    loaded = load(save(proto, tmp_path / "net.onnx"), False, None, {})
    assert loaded.normalisation is not None
    rng = np.random.default_rng(0)
    for width in (0.0, 0.01, 30.0):
        lower = np.array([3e4, 3.01e4, 2.99e4]) - width / 2
        points = (lower + rng.random((200, 3)) * width).astype("float32")
        points[:8] = np.array(list(itertools.product([0, 1], repeat=3))) * width + lower
        ends = lower.tolist(), (lower + width).tolist()
        prop = property_text(*ends, loaded.description.n_out, "(<= Y_0 0.0)")
        (tmp_path / "p.vnnlib").write_text(prop)
        (region,) = read_vnnlib(tmp_path / "p.vnnlib", 3, loaded.description.n_out, "it").regions
        from lirpa_megatron import BoundedTensor, PerturbationLpNorm

        low, high = loaded.box(region)
        box = PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high)
        for method in ("IBP", "CROWN"):
            bounds = loaded.bounded.compute_bounds(
                x=(BoundedTensor((low + high) / 2, box),), method=method
            )
            lb, ub = (b.detach().numpy() for b in bounds)
            y = outputs(proto, points)
            # Rounding of float32 behind the normalisation, as everywhere in the bounds.
            slack = 2e-5 * (1 + np.abs(y).max())
            assert (lb - slack <= y).all() and (y <= ub + slack).all(), (width, method)


def test_the_border_is_the_exact_range_of_a_normalisation(tmp_path):
    result = read_onnx(save(normalised(5329875, -7), tmp_path / "net.onnx"))
    network = Network.from_weights(result.description, result.weights)
    part = normalisation(result.description)
    assert part.layers == ("shift1", "divide1") and part.border == ("divide1",)
    lower, upper = np.array([5329878.3]), np.array([5329881.6])
    low, high = through(network, part, lower, upper)
    # The box is rounded outward: float32 has 5329878, 5329878.5 ... 5329882 here.
    x = floats_between(np.float32(5329878), np.float32(5329882))
    z = (x - np.float32(5329875)) / np.float32(-7)
    assert low.item() == z.min() and high.item() == z.max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_boxes_are_rounded_outward_by_one_step_at_most(dtype):
    dtype = getattr(torch, dtype)
    values = torch.tensor([0.1, -0.1, 1e-9, -1e-9, 0.0, 1.0, -3.3e4, 6e-8], dtype=torch.float64)
    low, high = outward(values, values, dtype)
    assert (low.double() <= values).all() and (values <= high.double()).all()
    nearest = values.to(dtype).double()
    assert ((low.double() == nearest) | (high.double() == nearest)).all()
    inside = (low.double() < values) & (values < high.double())
    assert ((low == high) | inside).all() and (low[4:6] == high[4:6]).all()


def test_a_half_precision_network_is_run_as_it_is_stored(tmp_path):
    proto = stack([4, 8, 3], dtype="float16")
    loaded = load(save(proto, tmp_path / "net.onnx"), False, None, {})
    assert (loaded.stored_dtype, loaded.dtype) == ("float16", "float32")
    x = torch.randn(5, 4)
    stored, wide = loaded.stored_forward(x), loaded.forward(x)
    assert stored.dtype == torch.float16 and wide.dtype == torch.float32
    expected = outputs(proto, x.numpy().astype("float16"))
    # Sums of 8 products, rounded at other places: a few units in the last place of float16.
    np.testing.assert_allclose(stored.numpy(), expected, atol=4e-3)
    assert (stored.float() - wide).abs().max() > 1e-5, "otherwise this tests nothing"


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
def test_comparing_outputs_of_a_softmax_is_comparing_what_enters_it(op, tmp_path):
    proto = stack([4, 8, 3])
    scores = load(save(proto, tmp_path / "scores.onnx"), False, None, {})
    proto.graph.node[-1].output[0] = "s"
    proto.graph.node.append(node(op, ["s"], ["y"], axis=1))
    loaded = load(save(proto, tmp_path / "net.onnx"), False, None, {})
    text = property_text([0.0] * 4, [0.1] * 4, 3, "(<= Y_0 Y_1)")
    (tmp_path / "p.vnnlib").write_text(text)
    prop = read_vnnlib(tmp_path / "p.vnnlib", 4, 3, "it")
    options = VerifyOptions(attack_steps=0)
    bounds = [
        verify_instance(each, prop, options, Deadline(None)).lower_bounds
        for each in (scores, loaded)
    ]
    assert bounds[0] == bounds[1]


def _bounds_of(proto_bytes, folder):
    from lirpa_megatron.verify.properties.loading import load

    group = runtime.tp_group()
    path = Path(folder) / f"net{group.rank()}.onnx"
    path.write_bytes(proto_bytes)
    ranks = ModelRanks(group)
    loaded = load(path, False, "float64", {}, ranks)
    prop = read_vnnlib(Path(folder) / "p.vnnlib", 4, 3, "it")
    options = VerifyOptions(attack_steps=0, dtype="float64")
    found = verify_instance(loaded, prop, options, Deadline(None, ranks), ranks)
    kinds = {type(m).__name__ for m in loaded.network.modules()}
    kinds = sorted(kinds & {"ColumnLinear", "RowLinear"})
    return found.lower_bounds, kinds, loaded.sharded_share


def test_bounds_of_a_normalised_network_are_the_same_on_two_ranks(tmp_path):
    proto = stack([4, 8, 8, 3])
    proto.graph.node[0].input[0] = "n"
    constants = {"m": np.float32(0.3), "d": np.float32([2, -3, 4, 5])}
    front = graph([node("Sub", ["x", "m"], ["c"]), node("Div", ["c", "d"], ["n"])], constants, [4])
    nodes = [*front.graph.node, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.extend(front.graph.initializer)
    text = property_text([0.0] * 4, [0.4] * 4, 3, "(or (and (<= Y_0 Y_1)) (and (<= Y_2 0.2)))")
    (tmp_path / "p.vnnlib").write_text(text)
    one = pool(1).run(_bounds_of, proto.SerializeToString(), str(tmp_path))[0]
    two = pool(2).run(_bounds_of, proto.SerializeToString(), str(tmp_path))
    assert two[0] == two[1] and two[0][1] == ["ColumnLinear", "RowLinear"]
    # Of 4 x 8 + 8 x 8 + 8 x 3 weights the first two layers'.
    assert (one[2], two[0][2]) == (None, 0.8)
    np.testing.assert_allclose(one[0], two[0][0], rtol=1e-12, atol=1e-12)


def test_a_checkpoint_of_a_normalised_network_has_the_file_s_bounds(tmp_path, capsys):
    from lirpa_megatron.checkpoint.writer import save_network

    path = save(FRONTS["parts normalised each in its way"], tmp_path / "net.onnx")
    result = read_onnx(path)
    network = Network.from_weights(result.description, result.weights)
    save_network(result.description, network, tmp_path / "checkpoint")
    ends = [3e4, 3.01e4, 2.99e4], [3.001e4, 3.011e4, 2.991e4]
    (tmp_path / "p.vnnlib").write_text(property_text(*ends, 1, "(<= Y_0 0.0)"))
    prop = read_vnnlib(tmp_path / "p.vnnlib", 3, 1, "it")
    options = VerifyOptions(attack_steps=0)
    found = []
    for source, is_checkpoint in ((path, False), (tmp_path / "checkpoint", True)):
        loaded = load(source, is_checkpoint, None, options.bound_opts())
        found.append(verify_instance(loaded, prop, options, Deadline(None)))
        assert loaded.normalisation is not None
    assert found[0].lower_bounds == found[1].lower_bounds


def test_half_precision_survives_a_checkpoint(tmp_path):
    from lirpa_megatron.checkpoint.writer import save_network

    result = read_onnx(save(stack([4, 8, 3], dtype="float16"), tmp_path / "net.onnx"))
    network = Network.from_weights(result.description, result.weights)
    save_network(result.description, network, tmp_path / "checkpoint")
    loaded = load(tmp_path / "checkpoint", True, None, {})
    assert (loaded.stored_dtype, loaded.dtype) == ("float16", "float32")
    x = torch.randn(5, 4)
    # The last layer's bias is added to a rounded product: two units in the last place.
    torch.testing.assert_close(loaded.stored_forward(x), network(x), atol=2e-3, rtol=2e-3)
