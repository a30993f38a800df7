"""`lirpa-megatron` end to end, in this process (TP=1) and under torchrun."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from small_networks import (
    MNIST_FC,
    model,
    needs_mnist_fc,
    others_win,
    property_text,
    save,
    stack,
)

from lirpa_megatron import __version__
from lirpa_megatron.cli.commands import main

ROOT = Path(__file__).resolve().parents[1]
SIZES = [4, 8, 8, 3]
CENTER = [0.2, -0.4, 0.6, 0.1]
FIELDS = {
    "network", "property", "result", "method", "lower_bounds", "tensor_parallel", "seconds",
    "counterexample",
}


@pytest.fixture(autouse=True)
def unchanged_environment(monkeypatch):
    """The command line silences its libraries for the whole process; undone after each test."""
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """net.onnx, properties of growing radius around a point, and instances.csv."""
    folder = tmp_path_factory.mktemp("cli")
    proto = stack(SIZES)
    save(proto, folder / "net.onnx")
    center = np.array([CENTER], dtype="float32")
    label = int(ReferenceEvaluator(proto).run(None, {"x": center})[0].argmax())
    for name, eps in (("small", 0.01), ("middle", 0.2), ("large", 3.0)):
        box = [v - eps for v in CENTER], [v + eps for v in CENTER]
        text = property_text(*box, 3, others_win(label, 3))
        (folder / f"{name}.vnnlib").write_text(text)
    rows = [f"net.onnx,{name}.vnnlib,60\n" for name in ("small", "middle", "large")]
    (folder / "instances.csv").write_text("".join(rows))
    return folder


def verify(*arguments, output=None):
    """Exit status and results of `verify` in this process."""
    extra = ["--output", str(output)] if output else []
    status = main(["verify", *map(str, arguments), *extra])
    return status, read(output) if output else None


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def torchrun(size, *arguments, timeout=300):
    """The command under torchrun; stdout and stderr as text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    command += ["--standalone", "-m", "lirpa_megatron", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=timeout
    )


def largest_difference(first, second):
    """Relative to the largest bound of each instance."""
    pairs = [(np.array(a["lower_bounds"]), np.array(b["lower_bounds"])) for a, b in
             zip(first, second, strict=True)]
    return max((abs(a - b) / max(1.0, abs(a).max())).max() for a, b in pairs)


def test_small_ball_holds_and_large_one_has_a_counterexample(folder, tmp_path):
    status, results = verify("--instances", folder / "instances.csv", output=tmp_path / "r.jsonl")
    assert status == 0
    assert [r["result"] for r in results] == ["unsat", results[1]["result"], "sat"]
    for result in results:
        assert FIELDS <= set(result)
        assert result["network"] == "net" and result["tensor_parallel"] == 1
        assert result["method"] == "CROWN" and len(result["lower_bounds"]) == 2
    assert min(results[0]["lower_bounds"]) > 0 and results[0]["counterexample"] is None


def test_counterexample_is_in_the_box_and_wrong_by_onnx(folder, tmp_path):
    arguments = ("--onnx", folder / "net.onnx", "--vnnlib", folder / "large.vnnlib")
    _, (result,) = verify(*arguments, output=tmp_path / "r.jsonl")
    x = np.array(result["counterexample"])
    assert (abs(x - CENTER) <= 3.0 + 1e-12).all()
    evaluator = ReferenceEvaluator(stack(SIZES))
    before = evaluator.run(None, {"x": np.array([CENTER], dtype="float32")})[0].argmax()
    after = evaluator.run(None, {"x": x[None].astype("float32")})[0].argmax()
    assert before != after


def test_without_an_attack_the_answer_is_unknown(folder, tmp_path):
    arguments = ("--onnx", folder / "net.onnx", "--vnnlib", folder / "large.vnnlib")
    _, (result,) = verify(*arguments, "--attack-steps", 0, output=tmp_path / "r.jsonl")
    assert result["result"] == "unknown" and result["counterexample"] is None


def test_an_expired_limit_is_a_timeout(folder, tmp_path):
    arguments = ("--onnx", folder / "net.onnx", "--vnnlib", folder / "large.vnnlib")
    status, (result,) = verify(*arguments, "--timeout", 1e-9, output=tmp_path / "r.jsonl")
    assert status == 0 and result["result"] == "timeout"
    assert result["lower_bounds"] == [None, None]


def test_better_methods_give_better_bounds(folder, tmp_path):
    bounds = {}
    for method in ("ibp", "CROWN-IBP", "crown", "alpha-CROWN"):
        path = tmp_path / f"{method}.jsonl"
        arguments = ("--onnx", folder / "net.onnx", "--vnnlib", folder / "middle.vnnlib")
        _, (result,) = verify(*arguments, "--method", method, "--alpha-iterations", 10, output=path)
        bounds[result["method"]] = np.array(result["lower_bounds"])
    assert list(bounds) == ["IBP", "CROWN-IBP", "CROWN", "CROWN-Optimized"]
    assert (bounds["CROWN"] > bounds["IBP"]).all()
    assert (bounds["CROWN-Optimized"] >= bounds["CROWN"] - 1e-6).all()


def test_dtype_and_rows_at_once_change_rounding_only(folder, tmp_path):
    csv = folder / "instances.csv"
    _, single = verify("--instances", csv, output=tmp_path / "32.jsonl")
    _, double = verify("--instances", csv, "--dtype", "float64", output=tmp_path / "64.jsonl")
    _, chunks = verify("--instances", csv, "--max-spec-rows", 3, output=tmp_path / "3.jsonl")
    assert 0 < largest_difference(single, double) < 1e-5
    assert largest_difference(single, chunks) < 1e-5


def test_results_say_so_where_the_network_itself_was_not_run_beside_its_bounds(folder, tmp_path):
    csv = folder / "instances.csv"
    _, checked = verify("--instances", csv, output=tmp_path / "checked.jsonl")
    _, alone = verify("--instances", csv, "--no-live-check", output=tmp_path / "alone.jsonl")
    assert all("live_check" not in result for result in checked)
    assert all(result["live_check"] is False for result in alone)
    assert largest_difference(checked, alone) == 0


def test_nan_bounds_prove_nothing(tmp_path):
    proto = stack([2, 4, 2])
    for tensor in proto.graph.initializer:  # finite weights whose products overflow
        tensor.raw_data = (np.frombuffer(tensor.raw_data, "f").clip(-1, 1) * 3e38).tobytes()
    save(proto, tmp_path / "net.onnx")
    text = property_text([-1.0, -1.0], [1.0, 1.0], 2, others_win(0, 2))
    (tmp_path / "p.vnnlib").write_text(text)
    arguments = ("--onnx", tmp_path / "net.onnx", "--vnnlib", tmp_path / "p.vnnlib")
    status, (result,) = verify(*arguments, output=tmp_path / "r.jsonl")
    assert status == 0 and result["result"] == "unknown" and result["lower_bounds"] == [None]


def test_unsafe_inputs_of_either_box_are_found(folder, tmp_path):
    """Two boxes: a safe one and one where the outputs are not constrained."""
    text = property_text([-1.0] * 4, [1.0] * 4, 3, "(or (and (<= X_0 0.0) (<= Y_0 -1e6)) "
                         "(and (>= X_0 0.5) (>= Y_0 -1e6)))")
    (tmp_path / "p.vnnlib").write_text(text)
    arguments = ("--onnx", folder / "net.onnx", "--vnnlib", tmp_path / "p.vnnlib")
    _, (result,) = verify(*arguments, output=tmp_path / "r.jsonl")
    assert result["result"] == "sat" and result["counterexample"][0] >= 0.5
    assert result["lower_bounds"][0] > 0 > result["lower_bounds"][1]


def test_results_go_to_standard_output_without_output(folder, capsys):
    arguments = ("--onnx", folder / "net.onnx", "--vnnlib", folder / "small.vnnlib")
    status, _ = verify(*arguments)
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    assert status == 0 and json.loads(line)["result"] == "unsat"
    assert "unsat" in captured.err  # the closing table


def test_an_instance_that_fails_does_not_end_the_run(folder, tmp_path):
    text = property_text([0.0], [1.0], 3, others_win(0, 3))
    (folder / "short.vnnlib").write_text(text)
    csv = folder / "mixed.csv"
    csv.write_text("net.onnx,short.vnnlib\nnet.onnx,small.vnnlib,60\n")
    status, results = verify("--instances", csv, output=tmp_path / "r.jsonl")
    assert status == 1 and [r["result"] for r in results] == ["error", "unsat"]
    assert "declares 1 input variables, but network net has 4 inputs" in results[0]["error"]


def test_resume_skips_what_is_there_and_drops_half_a_line(folder, tmp_path):
    path, csv = tmp_path / "r.jsonl", folder / "instances.csv"
    verify("--instances", csv, output=path)
    lines = path.read_text().splitlines(keepends=True)
    marked = lines[0].replace('"tensor_parallel": 1', '"tensor_parallel": 7')
    path.write_text(marked + lines[1][:40])
    status, results = verify("--instances", csv, "--resume", output=path)
    assert status == 0 and [r["tensor_parallel"] for r in results] == [7, 1, 1]
    assert [r["property"] for r in results] == ["small", "middle", "large"]
    before = path.read_bytes()
    verify("--instances", csv, "--resume", output=path)  # nothing is left to do
    assert path.read_bytes() == before
    _, results = verify("--instances", csv, "--resume", "--method", "IBP", output=path)
    assert len(results) == 6


def test_without_resume_the_output_is_written_anew(folder, tmp_path):
    path = tmp_path / "r.jsonl"
    for _ in range(2):
        _, results = verify("--instances", folder / "instances.csv", output=path)
        assert len(results) == 3


def test_config_gives_options_and_the_command_line_wins(folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"onnx: {folder / 'net.onnx'}\nvnnlib: {folder / 'large.vnnlib'}\n"
        "method: IBP\nattack_steps: 0\nlr-alpha: 1e-1\nresume: false\n"
    )
    path = tmp_path / "r.jsonl"
    _, (result,) = verify("--config", config, output=path)
    assert result["method"] == "IBP" and result["result"] == "unknown"
    arguments = ("--config", config, "--method", "CROWN", "--instances", folder / "instances.csv")
    _, results = verify(*arguments, output=path)
    assert [r["method"] for r in results] == ["CROWN"] * 3


def test_load_with_instances_takes_the_rows_of_its_network(folder, tmp_path, capsys):
    assert main(["import-onnx", str(folder / "net.onnx"), str(tmp_path / "ckpt")]) == 0
    csv = folder / "two.csv"
    csv.write_text("other.onnx,small.vnnlib,60\nnet.onnx,large.vnnlib,60\n")
    arguments = ("--load", tmp_path / "ckpt", "--instances", csv)
    _, (result,) = verify(*arguments, output=tmp_path / "r.jsonl")
    assert (result["network"], result["property"]) == ("net", "large")


def test_paths_of_a_config_are_relative_to_it(folder, tmp_path, monkeypatch):
    (folder / "run.yaml").write_text(
        "onnx: net.onnx\nvnnlib: ./small.vnnlib\noutput: by_config.jsonl\n"
    )
    monkeypatch.chdir(tmp_path)
    assert verify("--config", os.path.relpath(folder / "run.yaml"))[0] == 0
    assert [r["result"] for r in read(folder / "by_config.jsonl")] == ["unsat"]
    (tmp_path / "large.vnnlib").write_bytes((folder / "large.vnnlib").read_bytes())
    arguments = ("--config", folder / "run.yaml", "--vnnlib", "large.vnnlib")  # of the command line
    _, (result,) = verify(*arguments, output=Path("r.jsonl"))
    assert result["property"] == "large"


def test_the_directory_of_an_iteration_is_that_iteration(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "ckpt"
    assert main(["import-onnx", str(folder / "net.onnx"), str(out)]) == 0
    (out / "release").rename(out / "iter_0000436")
    (out / "latest_checkpointed_iteration.txt").write_text("999")
    monkeypatch.chdir(out / "iter_0000436")
    for path in (out / "iter_0000436", Path("."), out / "iter_0000436/"):
        arguments = ("--load", path, "--vnnlib", folder / "small.vnnlib")
        _, (result,) = verify(*arguments, output=tmp_path / "r.jsonl")
        assert (result["network"], result["result"]) == ("net", "unsat")
        assert main(["inspect", str(path)]) == 0 and "net" in capsys.readouterr().out
    assert main(["inspect", str(out / "iter_0000436"), "--iteration", "7"]) == 2
    assert "iter_0000436 is not iteration 7: give" in capsys.readouterr().err
    assert main(["inspect", str(out / "iter_0000436"), "--iteration", "436"]) == 0
    assert main(["inspect", str(out / "iter_0000001")]) == 2
    assert "iter_0000001 is not a directory" in capsys.readouterr().err


# instances.csv.


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    """a/net.onnx, for which the property holds, and b/net.onnx, for which it does not."""
    two = tmp_path_factory.mktemp("two")
    for name, bound in (("a", 10.0), ("b", -10.0)):
        (two / name).mkdir()
        proto = stack(SIZES)
        proto.graph.initializer[-1].raw_data = np.array([0, 0, bound], "float32").tobytes()
        save(proto, two / name / "net.onnx")
    box = [v - 0.01 for v in CENTER], [v + 0.01 for v in CENTER]
    (two / "p.vnnlib").write_text(property_text(*box, 3, "(<= Y_2 0.0)"))
    (two / "i.csv").write_text("a/net.onnx,p.vnnlib,60\nb/net.onnx,p.vnnlib,60\n")
    return two


def test_rows_are_of_a_file_not_of_a_name(two, tmp_path, capsys):
    _, results = verify("--instances", two / "i.csv", output=tmp_path / "r.jsonl")
    assert [(r["network"], r["result"]) for r in results] == [("a/net", "unsat"), ("b/net", "sat")]
    assert [r["network_file"] for r in results] == ["a/net.onnx", "b/net.onnx"]
    for name, result in (("a", "unsat"), ("b", "sat")):
        path = two / "x" / ".." / name / "net.onnx"
        (two / "x").mkdir(exist_ok=True)
        arguments = ("--onnx", path, "--instances", two / "i.csv")
        _, (only,) = verify(*arguments, output=tmp_path / f"{name}.jsonl")
        assert (only["network"], only["result"]) == ("net", result)
    save(stack(SIZES), tmp_path / "net.onnx")
    assert verify("--onnx", tmp_path / "net.onnx", "--instances", two / "i.csv")[0] == 2
    assert "no rows for network" in (told := capsys.readouterr().err) and "a/net.onnx" in told
    assert main(["import-onnx", str(two / "a" / "net.onnx"), str(tmp_path / "ckpt")]) == 0
    capsys.readouterr()
    assert verify("--load", tmp_path / "ckpt", "--instances", two / "i.csv")[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "several files with that name: a/net.onnx, b/net.onnx" in line


def test_resume_tells_files_of_one_name_apart(two, tmp_path):
    """Also in one folder after the other: the name alone is the same then."""
    output = tmp_path / "r.jsonl"
    for name in "ab":
        (two / f"{name}.csv").write_text(f"{name}/net.onnx,p.vnnlib,60\n")
        _, results = verify("--instances", two / f"{name}.csv", "--resume", output=output)
    assert [r["result"] for r in results] == ["unsat", "sat"]
    before = output.read_bytes()
    verify("--instances", two / "a.csv", "--resume", output=output)
    assert output.read_bytes() == before


def test_rows_of_instances_are_read_as_they_are_met(folder, tmp_path):
    csv = tmp_path / "i.csv"
    net, small = folder / "net.onnx", folder / "small.vnnlib"
    link = tmp_path / "deep" / "er"
    link.mkdir(parents=True)
    (link / "net.onnx").write_bytes(net.read_bytes())
    csv.write_bytes((
        "\ufeffnetwork,property,timeout\r\n# a comment\r\n"
        f" {net} , {small} , inf \r\n./deep/er/net.onnx,{small}\r\n\r\n"
        f'"[(\'f\', \'{net}\')]",{small},60 # slow\r\n[(f,{net})],{small},\r\n'
        f"deep/../deep/er/net.onnx,{small},1e3"
    ).encode())
    status, results = verify("--instances", csv, output=tmp_path / "r.jsonl")
    assert status == 0 and [r["result"] for r in results] == ["unsat"] * 5
    csv.write_bytes(csv.read_bytes().replace(b"\r\n", b"\r"))
    assert len(verify("--instances", csv, output=tmp_path / "r.jsonl")[1]) == 5


WRONG_ROWS = {
    "property": ("net.onnx,nothing.vnnlib,60", "property file .*nothing.vnnlib does not exist"),
    "network": ("nothing.onnx,small.vnnlib,60", "network file .*nothing.onnx does not exist"),
    "folder": ("net.onnx,.,60", "property .* is not a regular file"),
    "seconds": ("net.onnx,small.vnnlib,soon", "'soon' is not a number of seconds"),
    "no time": ("net.onnx,small.vnnlib,0", "time limit 0 must be positive"),
    "NaN": ("net.onnx,small.vnnlib,nan", "time limit nan must be positive"),
    "one cell": ("net.onnx", "expected network,property,seconds, found 'net.onnx'"),
    "other separators": ("net.onnx;small.vnnlib;60", "expected network,property,seconds"),
    "no network": (",small.vnnlib,60", "expected network,property,seconds"),
    "four cells": ("net.onnx,small.vnnlib,60,1", "expected network,property,seconds"),
    "two networks": ("\"[('f', 'net.onnx'), ('g', 'net.onnx')]\",small.vnnlib,60",
                     "it asks about 2 networks"),
    "two without quotes": ("[(f,net.onnx),(g,net.onnx)],small.vnnlib,60", "about 2 networks"),
    "no networks": ("[],small.vnnlib,60", "neither a network nor a list"),
}


def test_a_row_that_is_wrong_is_an_error_and_the_others_go_on(folder, tmp_path, capsys):
    csv = folder / "wrong.csv"
    rows = ["net.onnx,small.vnnlib,60", *(row for row, _ in WRONG_ROWS.values())]
    csv.write_text("\n".join([*rows, "net.onnx,small.vnnlib,60"]))
    status, results = verify("--instances", csv, output=tmp_path / "r.jsonl")
    assert status == 1
    words = [r["result"] for r in results]
    assert words == ["unsat", *["error"] * len(WRONG_ROWS), "unsat"]
    for line, (result, (_, message)) in enumerate(
        zip(results[1:-1], WRONG_ROWS.values(), strict=True), start=2
    ):
        assert re.search(f"wrong.csv, line {line}: .*{message}", result["error"]), result["error"]
    capsys.readouterr()
    csv.write_text("\n".join(rows[1:3]))  # nothing can be done
    assert verify("--instances", csv)[0] == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "wrong.csv, line 1: " in line and "1 more row" in line
    # With a named network the rows of others do not matter.
    csv.write_text("nothing.onnx,nothing.vnnlib,60\nnet.onnx,small.vnnlib,60\n")
    arguments = ("--onnx", folder / "net.onnx", "--instances", csv)
    assert verify(*arguments, output=tmp_path / "r.jsonl")[0] == 0


# Counterexamples.


def linear(weight, bias, dtype="float32"):
    """A network of one layer, y = weight x + bias."""
    weight = np.array([[weight]], dtype)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    return model([node], {"w": weight, "b": np.array([bias], dtype)}, 1, 1, dtype)


def verified(tmp_path, proto, text, *arguments):
    save(proto, tmp_path / "net.onnx")
    (tmp_path / "p.vnnlib").write_text(text)
    arguments = ("--onnx", tmp_path / "net.onnx", "--vnnlib", tmp_path / "p.vnnlib", *arguments)
    _, (result,) = verify(*arguments, output=tmp_path / "r.jsonl")
    return result


def test_a_constant_that_float32_rounds_makes_no_counterexample(tmp_path):
    """y is at most 1, the property asks for 1 + 1e-9, which float32 rounds to 1."""
    text = property_text([0.0], [1.0], 1, "(>= Y_0 1.000000001)")
    result = verified(tmp_path, linear(1.0, 0.0), text)
    assert result["result"] in ("unknown", "unsat") and result["counterexample"] is None
    text = property_text([0.0], [1.0], 1, "(>= Y_0 1.0)")
    result = verified(tmp_path, linear(1.0, 0.0), text)
    assert result["result"] == "sat" and result["violation"] == 0.0
    text = property_text([0.0], [1.0], 1, "(> Y_0 1.0)")
    result = verified(tmp_path, linear(1.0, 0.0), text)
    assert result["result"] != "sat"  # a strict comparison is checked as one


def test_a_violation_within_rounding_is_said_not_sat(tmp_path):
    """0.1 x + 0.7 in float32 is above its float64 value at x = 1, by 1e-8."""
    exact = float(np.float32(0.1)) + float(np.float32(0.7))
    rounded = float(np.float32(0.1) + np.float32(0.7))
    assert exact < rounded < exact + 3e-8
    middle = (exact + rounded) / 2
    text = property_text([1.0], [1.0], 1, f"(>= Y_0 {middle!r})")
    result = verified(tmp_path, linear(0.1, 0.7), text)
    assert result["result"] == "unknown" and "not beyond rounding" in result["note"]
    text = property_text([1.0], [1.0], 1, f"(>= Y_0 {exact - 1e-6!r})")
    result = verified(tmp_path, linear(0.1, 0.7), text)
    assert result["result"] == "sat"
    assert result["float64_violation"] == pytest.approx(1e-6, rel=1e-3)
    assert result["violation"] == pytest.approx(1e-6 + rounded - exact, rel=1e-3)
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "r.jsonl"), "--output", str(page)]) == 0
    assert "1e-06 in float64" in page.read_text()


def test_counterexamples_lie_in_the_box_as_it_is_written(tmp_path):
    """0.1 is no float32: the network reads the nearest one, and the point is written as 0.1."""
    text = property_text([0.1], [0.1], 1, "(>= Y_0 0.0)")
    result = verified(tmp_path, linear(1.0, 0.0), text)
    assert result["result"] == "sat" and result["counterexample"] == [0.1]
    text = property_text([0.1], [0.3], 1, "(or (<= Y_0 0.10001) (>= Y_0 0.29999))")
    text = text.replace("(>= X_0", "(> X_0")  # which leaves 0.1 itself out
    result = verified(tmp_path, linear(1.0, 0.0), text)
    (x,) = result["counterexample"]
    assert result["result"] == "sat" and 0.1 < x <= 0.3 and np.float32(x) == x


def test_a_counterexample_is_one_of_the_network_as_it_is_stored(tmp_path):
    """float16: 0.1 x is 0.2998 at x = 3, and 0.29993 of the same weights in float32."""
    stored, exact = float(np.float16(0.1) * np.float16(3)), float(np.float16(0.1)) * 3
    assert stored < exact
    text = property_text([3.0], [3.0], 1, f"(>= Y_0 {(stored + exact) / 2!r})")
    result = verified(tmp_path, linear(0.1, 0.0, "float16"), text)
    assert result["result"] == "unknown" and result["stored_dtype"] == "float16"
    assert result["dtype"] == "float32"
    text = property_text([3.0], [3.0], 1, f"(>= Y_0 {stored - 1e-3!r})")
    result = verified(tmp_path, linear(0.1, 0.0, "float16"), text)
    assert result["result"] == "sat" and result["violation"] == pytest.approx(1e-3, rel=1e-9)


def test_what_holds_whatever_the_network_does_is_said(folder, tmp_path, capsys):
    for unsafe, why in (("(and (<= X_0 -9.0) (<= Y_0 1))", "no input"),
                        ("(and (<= Y_0 0.4) (>= Y_0 0.6))", "no outputs")):
        (tmp_path / "p.vnnlib").write_text(property_text([-1.0] * 4, [1.0] * 4, 3, unsafe))
        arguments = ("--onnx", folder / "net.onnx", "--vnnlib", tmp_path / "p.vnnlib")
        _, (result,) = verify(*arguments, output=tmp_path / "r.jsonl")
        assert result["result"] == "unsat" and result["note"].startswith(why)
        assert f"net p: unsat, {why}" in capsys.readouterr().out


def test_many_boxes_are_bounded_as_each_alone(folder, tmp_path):
    pieces = [(i / 300 - 0.5, (i + 1) / 300 - 0.5) for i in range(300)]
    each = [f"(and (>= X_0 {a!r}) (<= X_0 {b!r}) (<= Y_{i % 3} {-1 - i / 900!r}))"
            for i, (a, b) in enumerate(pieces)]
    (tmp_path / "p.vnnlib").write_text(
        property_text([-0.5] * 4, [0.5] * 4, 3, f"(or {' '.join(each)})"))
    arguments = ("--onnx", folder / "net.onnx", "--attack-steps", 0)
    _, (every,) = verify(*arguments, "--vnnlib", tmp_path / "p.vnnlib", output=tmp_path / "r.jsonl")
    for i in (0, 150, 299):
        (tmp_path / "one.vnnlib").write_text(property_text([-0.5] * 4, [0.5] * 4, 3, each[i]))
        _, (one,) = verify(*arguments, "--vnnlib", tmp_path / "one.vnnlib",
                           output=tmp_path / "one.jsonl")
        # Neurons that one box leaves unstable have rows in the whole batch: a little tighter.
        assert every["lower_bounds"][i] == pytest.approx(one["lower_bounds"][0], abs=1e-2)
        assert every["lower_bounds"][i] >= one["lower_bounds"][0] - 1e-5


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"], ["import-onnx", "-h"]])
def test_help_shows_an_example(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0 and "example" in capsys.readouterr().out


def test_version_is_shown(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.split() == ["lirpa-megatron", __version__]


def test_two_processes_import_and_verify_as_one_does(folder, tmp_path):
    written = torchrun(2, "import-onnx", folder / "net.onnx", tmp_path / "ckpt")
    assert written.returncode == 0, written.stderr
    names = {path.name for path in (tmp_path / "ckpt" / "release").iterdir()}
    assert "__1_0.distcp" in names  # the second rank's shards

    csv = folder / "instances.csv"
    common = ("--load", tmp_path / "ckpt", "--instances", csv)
    run = torchrun(2, "verify", *common, "--output", tmp_path / "2.jsonl")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("network") == 1 and "unsat" in run.stdout  # one table, by rank 0
    _, one = verify(*common, output=tmp_path / "1.jsonl")
    two = read(tmp_path / "2.jsonl")
    assert [r["tensor_parallel"] for r in two] == [2, 2, 2]
    assert [r["result"] for r in one] == [r["result"] for r in two]
    assert largest_difference(one, two) < 1e-5
    _, direct = verify("--instances", csv, output=tmp_path / "onnx.jsonl")
    assert largest_difference(one, direct) == 0.0


PROVED = {"256x2": [9, 1], "256x4": [11, 0], "256x6": [9, 0]}
"""Of 15 at eps 0.03 and 0.05, by CROWN; measured with auto_LiRPA 0.3 and 0.7.1 with their defaults,
one instance at a time (10 of 256x4 with CROWN for stable neurons too, or in one batch)."""


def proved(results):
    counts = {name: [0, 0] for name in PROVED}
    for result in results:
        at = 0 if result["property"].endswith("0.03") else 1
        counts[result["network"].removeprefix("mnist-net_")][at] += result["result"] == "unsat"
    return counts


@pytest.fixture(scope="module")
def mnist_fc_alone(tmp_path_factory):
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("mnist_fc") / "1.jsonl"
    arguments = ("--instances", MNIST_FC / "instances.csv", "--attack-steps", 0)
    status, results = verify(*arguments, output=output)
    assert status == 0 and len(results) == 90
    return results


@needs_mnist_fc
def test_published_instances_are_proved_as_published(mnist_fc_alone):
    assert proved(mnist_fc_alone) == PROVED


@needs_mnist_fc
@pytest.mark.parametrize("size", [pytest.param(size, marks=pytest.mark.slow) for size in (2, 4)])
def test_published_instances_have_the_same_bounds_at_any_size(mnist_fc_alone, size, tmp_path):
    arguments = ("--instances", MNIST_FC / "instances.csv", "--attack-steps", 0)
    run = torchrun(size, "verify", *arguments, "--output", tmp_path / "r.jsonl", timeout=900)
    assert run.returncode == 0, run.stderr
    results = read(tmp_path / "r.jsonl")
    assert proved(results) == PROVED
    assert largest_difference(mnist_fc_alone, results) < 1e-5
