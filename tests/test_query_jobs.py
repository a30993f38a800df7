"""Verdicts on queries of VNN-LIB 2.0: one network, inputs beside outputs, two networks."""

import functools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import SIZES, verify, write_instances
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from queries import box, is_violated, needs_parser, network, one, query
from ranks import pool
from small_networks import property_text, save, stack

from lirpa_megatron.cli.commands import main
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel import runtime
from lirpa_megatron.parallel.model_ranks import ModelRanks
from lirpa_megatron.verify.properties.instance_list import Instance
from lirpa_megatron.verify.properties.job import Runner
from lirpa_megatron.verify.properties.job_plan import plan_job
from lirpa_megatron.verify.properties.options import VerifyOptions
from lirpa_megatron.verify.properties.vnnlib import read_vnnlib

pytestmark = [needs_parser, pytest.mark.usefixtures("unchanged_environment")]


def nearby(proto, size, seed=1):
    """A network of the same graph whose weights differ a little."""
    made, generator = onnx.ModelProto(), np.random.default_rng(seed)
    made.CopyFrom(proto)
    for tensor in made.graph.initializer:
        value = numpy_helper.to_array(tensor)
        value = (value + size * generator.normal(size=value.shape)).astype(value.dtype)
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return made


def equal_inputs(n):
    return "".join(f"(assert (== X[{i}] A[{i}]))\n" for i in range(n))


def apart(n_out, eps):
    """Unsafe: an output of g is further than eps from that of f."""
    rows = [f"(> B[{j}] (+ Y[{j}] {eps})) (< B[{j}] (- Y[{j}] {eps}))" for j in range(n_out)]
    return f"(assert (or {' '.join(rows)}))\n"


def pair_of(n_in, n_out, how="isomorphic-to"):
    return network("f", {"X": [n_in]}, {"Y": [n_out]}) + network(
        "g", {"A": [n_in]}, {"B": [n_out]}, f"  ({how} f)\n"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """f.onnx and g.onnx, which differ by less than 0.1 on the box, and queries about them."""
    folder = write_instances(tmp_path_factory.mktemp("queries"))
    f = stack(SIZES, seed=3)
    save(f, folder / "f.onnx")
    save(nearby(f, 1e-3), folder / "g.onnx")
    around = box("X", [0.0, -0.6, 0.4, 0.0], [0.2, -0.4, 0.6, 0.2])
    texts = {
        "near": query(pair_of(4, 3), around + equal_inputs(4) + apart(3, "0.1")),
        "far": query(pair_of(4, 3), around + equal_inputs(4) + apart(3, "0.0001")),
        "same": query(pair_of(4, 3, "equal-to"), around + equal_inputs(4) + apart(3, "0.08")),
        # f does not fall by more than 5 where its first input rises by at most 1
        "rising": query(pair_of(4, 3, "equal-to"), around + "".join(
            f"(assert (== X[{i}] A[{i}]))\n" for i in (1, 2, 3)
        ) + "(assert (and (<= X[0] A[0]) (<= A[0] (+ X[0] 1.0))))\n(assert (< B[0] (- Y[0] 5.0)))"),
        "mixed": one("(>= Y[0] (+ (* 2.0 X[0]) (* -1.0 X[3]) 9.0))", [-1.0] * 4, [1.0] * 4, 3),
        "mixed_sat": one("(>= Y[0] (+ X[0] X[1] -1.0))", [-1.0] * 4, [1.0] * 4, 3),
    }
    for name, text in texts.items():
        (folder / f"{name}.vnnlib").write_text(text)
    pair = "\"[('f', 'f.onnx'), ('g', '{}')]\""
    rows = [
        f"{pair.format('g.onnx')},near.vnnlib,60", f"{pair.format('g.onnx')},far.vnnlib,60",
        f"{pair.format('f.onnx')},same.vnnlib,60", "\"[('f', 'f.onnx')]\",same.vnnlib,60",
        "f.onnx,rising.vnnlib,60", "f.onnx,mixed.vnnlib,60", "f.onnx,mixed_sat.vnnlib,60",
    ]
    (folder / "pairs.csv").write_text("\n".join(rows))
    return folder


WANTED = ["unsat", "sat", "unsat", "unsat", "unsat", "unsat", "sat"]


def outputs(path, x):
    return ReferenceEvaluator(str(path)).run(None, {"x": np.array([x], "float32")})[0][0]


def test_queries_of_pairs_and_of_inputs_beside_outputs_are_decided(folder, tmp_path):
    status, results = verify("--instances", folder / "pairs.csv", output=tmp_path / "r.jsonl")
    assert status == 0 and [r["result"] for r in results] == WANTED
    assert [r["network"] for r in results] == ["f+g", "f+g", *["f"] * 5]
    point = results[1]["counterexample"]
    assert len(point) == 8 and point[:4] == point[4:]
    difference = np.abs(outputs(folder / "f.onnx", point[:4])
                        - outputs(folder / "g.onnx", point[4:])).max()
    assert 0.0001 < difference < 0.1
    point = results[-1]["counterexample"]
    assert outputs(folder / "f.onnx", point)[0] >= point[0] + point[1] - 1.0


def of_all(folder, **options):
    """Results of a run over all queries, on this rank."""
    options = VerifyOptions(dtype="float64", **options)
    plan = plan_job({"instances": Path(folder) / "pairs.csv"}, options)
    return Runner(options, ModelRanks.of_megatron()).run(plan.instances, lambda result: None)


@functools.cache
def _one_rank(folder):
    with runtime.session():
        return of_all(folder)


@pytest.mark.parametrize("options", [
    pytest.param({}, id="bounds"),
    pytest.param({"complete": True, "method": "IBP", "attack_steps": 0}, id="branch-and-bound",
                 marks=pytest.mark.slow),
])
def test_two_ranks_say_what_one_says(folder, options):
    with runtime.session():
        one = of_all(folder, **options)
    for found in pool(2).run(of_all, str(folder), **options):
        assert [r.result for r in found] == WANTED
        for a, b in zip(one, found, strict=True):
            assert a.domains == b.domains
            # sums in another order
            assert np.allclose(a.lower_bounds, b.lower_bounds, rtol=1e-10, atol=1e-10)


def test_bounds_of_pairs_and_mixed_rows_hold_on_samples(folder):
    generator = np.random.default_rng(0)
    points = generator.uniform(-1, 1, size=(400, 4)).astype("float32")
    points[:16] = np.sign(points[:16])
    near = points / 10 + np.array([0.1, -0.5, 0.5, 0.1], "float32")
    f, g = (ReferenceEvaluator(str(folder / n)) for n in ("f.onnx", "g.onnx"))
    y = np.concatenate([f.run(None, {"x": x[None]})[0] for x in points])
    both = np.concatenate([
        np.concatenate([net.run(None, {"x": x[None]})[0] for net in (f, g)], 1) for x in near
    ])
    by_name = {r.property: r for r in _one_rank(folder)}
    cases = {
        "near": (near, both), "far": (near, both), "mixed": (points, y), "mixed_sat": (points, y),
    }
    for name, (x, values) in cases.items():
        prop = read_vnnlib(folder / f"{name}.vnnlib")
        values = np.concatenate([values, x[:, list(prop.wiring.handed_on)]], 1)
        for row, bound in zip(prop.rows, by_name[name].lower_bounds, strict=True):
            found = sum(float(c) * values[:, j] for j, c in row.coefficients.items())
            assert (found - float(row.bound)).min() >= bound - 1e-5, name  # float32's outputs


def test_the_difference_of_two_networks_is_bounded_on_shared_symbols(folder, tmp_path):
    apart_text = (folder / "near.vnnlib").read_text()
    for i in range(4):
        (own,) = [line for line in apart_text.splitlines() if f"(>= X[{i}]" in line]
        apart_text = apart_text.replace(f"(assert (== X[{i}] A[{i}]))", own.replace("X", "A"))
    (folder / "unshared.vnnlib").write_text(apart_text)
    csv = folder / "unshared.csv"
    csv.write_text("[(f,f.onnx),(g,g.onnx)],unshared.vnnlib,60\n")
    _, (result,) = verify("--instances", csv, output=tmp_path / "r.jsonl")
    near = _one_rank(folder)[0]
    assert result["result"] == "sat"
    assert min(near.lower_bounds) > 0 > max(result["lower_bounds"])


@pytest.mark.parametrize("unsafe", [
    "(or (and (<= Y_0 Y_1) (>= Y_2 0.25)) (<= (+ Y_0 (* 2.0 Y_1)) -4.5))",
    "(and (or (<= X_0 0.0) (>= X_1 0.5)) (>= Y_2 0.5) (<= Y_1 Y_2))",
])
@pytest.mark.parametrize("radius", [0.05, 1.0])
def test_both_versions_of_a_property_get_one_result(folder, tmp_path, unsafe, radius):
    lower, upper = [-radius] * 4, [radius] * 4
    old = property_text(lower, upper, 3, unsafe)
    new = unsafe
    for name in ("X_0", "X_1", "Y_0", "Y_1", "Y_2"):
        new = new.replace(name, f"{name[0]}[{name[-1]}]")
    results = []
    for version, text in (("1", old), ("2", one(new, lower, upper, 3, "float32"))):
        (tmp_path / f"v{version}.vnnlib").write_text(text)
        _, (result,) = verify(
            "--onnx", folder / "f.onnx", "--vnnlib", tmp_path / f"v{version}.vnnlib",
            "--complete", output=tmp_path / f"{version}.jsonl")
        results.append({k: v for k, v in result.items() if k in
                        ("result", "lower_bounds", "counterexample", "bound", "domains")})
    assert results[0] == results[1]


def test_a_network_with_several_inputs_and_outputs_is_matched_in_order(tmp_path):
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=shape).astype("float32") for shape in ((3, 4), (2, 4), (4, 2))]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["image"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "w0"], ["a"]),
            helper.make_node("MatMul", ["more", "w1"], ["b"]),
            helper.make_node("Add", ["a", "b"], ["c"]), helper.make_node("Relu", ["c"], ["d"]),
            helper.make_node("MatMul", ["d", "w2"], ["score"]),
        ],
        "two",
        [info(name, TensorProto.FLOAT, shape) for name, shape in
         (("image", [1, 1, 3]), ("more", [1, 2]), ("unused", [1, 1]))],
        [info("score", TensorProto.FLOAT, [1, 2]), info("d", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8),
              str(path))
    declared = network("f", {"I": [1, 1, 3], "M": [1, 2], "U": [1, 1]}, {"S": [1, 2], "D": [1, 4]})
    names = [*(f"I[0,0,{i}]" for i in range(3)), "M[0,0]", "M[0,1]", "U[0,0]"]
    bounds = "".join(f"(assert (and (>= {n} -0.5) (<= {n} 0.5)))\n" for n in names)
    evaluator = ReferenceEvaluator(str(path))
    found = {}
    for side, sign in (("low", ">="), ("high", "<=")):
        text = query(declared, bounds + f"(assert (and ({sign} D[0,2] 1.0) ({sign} S[0,1] 0.25)))")
        (tmp_path / f"{side}.vnnlib").write_text(text)
        status, (result,) = verify("--onnx", path, "--vnnlib", tmp_path / f"{side}.vnnlib",
                                   output=tmp_path / f"{side}.jsonl")
        assert status == 0
        found[side] = result["lower_bounds"]
    for x in generator.uniform(-0.5, 0.5, size=(200, 6)).astype("float32"):
        score, d = evaluator.run(None, {
            "image": x[:3].reshape(1, 1, 3), "more": x[None, 3:5], "unused": x[None, 5:]})
        values = d[0, 2] - 1.0, score[0, 1] - 0.25
        for value, low, high in zip(values, found["low"], found["high"], strict=True):
            assert low - 1e-5 <= -value and high - 1e-5 <= value  # float32's rounding
    text = (tmp_path / "low.vnnlib").read_text()
    for old, new, message in (
        ("M real [1,2]", "M real [1,3]", r"inputs I \(3\), M \(3\), U \(1\), but .* more \(2\)"),
        ("  (declare-output S real [1,2])\n", "", r"outputs D \(4\), but .* score \(2\), d \(4\)"),
        ("I real", "I float64", "declares I as float64, but that input of network net is float32"),
    ):
        assert old in text
        (tmp_path / "wrong.vnnlib").write_text(
            text.replace(old, new).replace("S[0,1]", "D[0,1]")
            + "(assert (== M[0,2] 0.0))" * ("M" in old)
        )
        runner = Runner(VerifyOptions())
        instance = Instance("net", path, False, "wrong", tmp_path / "wrong.vnnlib")
        with pytest.raises(UserError, match=message):
            runner.prepare(instance)


def test_branch_and_bound_decides_queries_and_check_proves_their_records(folder, tmp_path, capsys):
    record, csv = tmp_path / "proof.json", tmp_path / "r.jsonl"
    wide = (folder / "rising.vnnlib").read_text().replace("X[0] 1.0", "X[0] 0.2").replace(
        "Y[0] 5.0", "Y[0] 0.05")
    (tmp_path / "wide.vnnlib").write_text(wide)
    mixed = one("(>= Y[0] (+ (* 2.0 X[0]) (* -1.0 X[3]) 3.4))", [-1.0] * 4, [1.0] * 4, 3)
    (tmp_path / "mixed.vnnlib").write_text(mixed)
    for name, networks in (
        ("mixed", ["--onnx", folder / "f.onnx"]), ("wide", ["--network", f"f={folder}/f.onnx"]),
    ):
        arguments = ["--vnnlib", tmp_path / f"{name}.vnnlib", "--method", "IBP", "--complete",
                     "--attack-steps", 0, "--record", record]
        status, (result,) = verify(*networks, *arguments, output=csv)
        assert (status, result["result"]) == (0, "unsat"), result
        assert result["domains"] > 3
        csv.unlink()
        assert main(["check", str(record)]) == 0
        assert "holds" in capsys.readouterr().out
        content = json.loads(record.read_text())
        content["trees"][0]["leaves"].pop()
        record.write_text(json.dumps(content))
        assert main(["check", str(record)]) == 2
        capsys.readouterr()


def standard(*arguments, capsys):
    """Exit status, lines of standard output, last line of standard error of the standard's form."""
    status = main(["verify", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err.strip().splitlines()[-1:]


def test_the_form_of_the_standard_prints_a_word_and_values(folder, capsys):
    files = ["--network", f"f={folder / 'f.onnx'}", "--network", f"g={folder / 'g.onnx'}"]
    status, lines, _ = standard(folder / "near.vnnlib", *files, "--timeout", 60, capsys=capsys)
    assert (status, lines) == (0, ["unsat"])
    status, lines, _ = standard(folder / "far.vnnlib", *files, capsys=capsys)
    assert status == 0 and lines[0] == "sat"
    heads = [line for line in lines if " " in line]
    assert heads == ["X real [4]", "Y real [3]", "A real [4]", "B real [3]"]
    values = [float(line) for line in lines[1:] if " " not in line]
    assert len(values) == 14 and not any("e" in line for line in lines[1:] if "real" not in line)
    prop = read_vnnlib(folder / "far.vnnlib")
    x, y = values[:4] + values[7:11], values[4:7] + values[11:]
    assert is_violated(prop, x, y) and np.allclose(outputs(folder / "g.onnx", x[4:]), y[3:])
    status, lines, _ = standard(folder / "near.vnnlib", *files, "--timeout", 1e-9, capsys=capsys)
    assert (status, lines) == (0, ["timed-out"])
    status, lines, _ = standard(folder / "large.vnnlib", "--onnx", folder / "net.onnx",
                                capsys=capsys)
    assert status == 0 and lines[0] == "sat" and lines[1] == "X real [4]"


WRONG = {
    "no file": ([], "needs the network"),
    "one of two": (["f=f.onnx"], "has a network g, and no file is given for it"),
    "unknown name": (["f=f.onnx", "h=g.onnx"], "has no network 'h'; its networks are f, g"),
    "unnecessary": (["f=f.onnx", "g=g.onnx", "h=g.onnx"], "has no network 'h'"),
    "twice": (["f=f.onnx", "f=g.onnx"], "--network f=FILE is given twice"),
    "no name": (["f.onnx"], "'f.onnx' is not NAME=FILE"),
    "missing file": (["f=f.onnx", "g=no.onnx"], "no.onnx does not exist"),
}


@pytest.mark.parametrize("case", WRONG)
def test_networks_that_a_query_does_not_have_are_refused(case, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    named, message = WRONG[case]
    arguments = [word for pair in named for word in ("--network", pair)]
    status, lines, error = standard("near.vnnlib", *arguments, capsys=capsys)
    assert (status, lines) == (2, []) and message in error[0]


def test_files_of_other_networks_or_types_are_refused(folder, tmp_path, capsys):
    save(stack([5, 4, 3]), tmp_path / "five.onnx")
    save(stack(SIZES, dtype="float64"), tmp_path / "double.onnx")
    f, near = f"f={folder / 'f.onnx'}", folder / "near.vnnlib"
    for path, message in (("five", "A (4), but network five has x (5)"),
                          ("double", "read different number types (float32 and float64)")):
        status, _, error = standard(near, "--network", f, "--network",
                                    f"g={tmp_path / path}.onnx", capsys=capsys)
        assert status == 2 and message in error[0]
    status, _, error = standard(near, "--onnx", folder / "f.onnx", capsys=capsys)
    assert status == 2 and "say which file is which" in error[0]
    status, _, error = standard(folder / "same.vnnlib", "--network", f, "--network",
                                f"g={folder / 'g.onnx'}", capsys=capsys)
    assert status == 2 and "equal to f, but their files are" in error[0]
    status, _, error = standard(near, "--vnnlib", near, "--network", f, capsys=capsys)
    assert status == 2 and "QUERY and --vnnlib exclude each other" in error[0]


def test_checkpoints_answer_as_files_do(folder, tmp_path, capsys):
    for name in "fg":
        assert main(["import-onnx", str(folder / f"{name}.onnx"), str(tmp_path / name)]) == 0
    capsys.readouterr()
    files = [f"f={tmp_path / 'f'}", f"g={tmp_path / 'g'}"]
    for query_name, wanted in (("near", "unsat"), ("far", "sat")):
        status, lines, _ = standard(
            folder / f"{query_name}.vnnlib", "--network", files[0], "--network", files[1],
            capsys=capsys)
        assert (status, lines[0]) == (0, wanted)
    status, lines, _ = standard(folder / "mixed.vnnlib", "--load", tmp_path / "f", capsys=capsys)
    assert (status, lines) == (0, ["unsat"])
