"""Rows of instances.csv: whose they are, and what one that is wrong costs."""

import re

import numpy as np
import pytest
from commands import CENTER, SIZES, verify, write_instances
from small_networks import property_text, save, stack

from lirpa_megatron.cli.commands import main
from lirpa_megatron.verify.properties.instance_list import read_rows

pytestmark = pytest.mark.usefixtures("unchanged_environment")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_instances(tmp_path_factory.mktemp("cli"))


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


def test_resume_computes_bounds_of_another_degree_anew(folder, tmp_path):
    csv, output = tmp_path / "i.csv", tmp_path / "r.jsonl"
    csv.write_text(f"{folder / 'net.onnx'},{folder / 'small.vnnlib'},60\n")
    for order, count in ((1, 1), (2, 2), (2, 2), (1, 2)):
        _, results = verify("--instances", csv, "--resume", "--method", "forward", "--order",
                            order, output=output)
        assert len(results) == count
    assert [r.get("order") for r in results] == [None, 2]


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
    "one name twice": ("\"[('f', 'net.onnx'), ('f', 'net.onnx')]\",small.vnnlib,60",
                       "each network needs a name of its own"),
    "no names": ("\"['net.onnx', 'net.onnx']\",small.vnnlib,60", "needs a name of its own"),
    "no networks": ("[],small.vnnlib,60", "neither a network nor a list"),
}


@pytest.mark.parametrize("row", ["one name twice", "no names", "no networks"])
def test_a_list_of_networks_that_is_refused_is_called_by_its_line(row, tmp_path):
    (tmp_path / "i.csv").write_text(f"# comment\n{WRONG_ROWS[row][0]}\n")
    (read,) = read_rows(tmp_path / "i.csv")
    assert (read.network, read.property) == ("networks-line-2", "small.vnnlib")


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
