"""The examples of transformers: each certifies something, and says the same on two processes."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from forks import launch

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = "-m torch.distributed.run --standalone --nproc-per-node 2".split()


def _printed(name, launcher=(), options=()):
    """The lines that an example prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / f"{name}.py"), *map(str, options)],
        capture_output=True, text=True, env=environment, timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def _printed_without_imports(name):
    """The same from a process that has the libraries already, which saves seconds."""
    process = launch(1, runpy.run_path, str(ROOT / "examples" / f"{name}.py"), None, "__main__")
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def _numbers(line):
    return [float(number) for number in re.findall(r"-?\d+\.\d{6}", line)]


@pytest.mark.parametrize("name, printed", [
    pytest.param("llama", _printed, marks=pytest.mark.slow), ("bert", _printed_without_imports),
])
def test_an_example_certifies_margins_and_radii(name, printed):
    lines = printed(name)
    assert len(lines) == 2
    for line in lines:
        assert _numbers(line) and min(_numbers(line)) > 0, line


@pytest.mark.slow
def test_the_gpt_example_prints_the_same_on_one_process_and_on_two():
    one, two = _printed("gpt"), _printed("gpt", LAUNCH)
    assert len(one) == len(two) == 2
    for line, other in zip(one, two, strict=True):
        clean, near, radius = _numbers(line)
        assert clean >= near > 0 and radius > 0
        assert _numbers(other) == pytest.approx([clean, near, radius], abs=2e-6)
        assert line.split(":")[0] == other.split(":")[0]  # the same sequence and next word


def _certified_training(model, folder, launcher=(), options=()):
    """The table's rows, as numbers, and the last lines."""
    given = ("--model", model, "--folder", folder, *options)
    lines = _printed("certified_training", launcher, given)
    rows = [line.strip("| ").split(" | ") for line in lines if "%" in line]
    assert [row[0] for row in rows] == ["natural", "certified"]
    assert (folder / "certified_accuracy.png").exists() or any("no plot" in x for x in lines)
    return [[float(cell.rstrip("%")) for cell in row[1:]] for row in rows]


@pytest.mark.slow
def test_certified_training_learns_the_same_at_every_size_and_resumes(tmp_path):
    pytest.importorskip("sklearn")
    epochs = ("--epochs", 5, 20)
    tables = [
        _certified_training("digits", tmp_path / name, launcher, (*epochs, *options))
        for name, launcher, options in (
            ("one", (), ()), ("tp", LAUNCH, ()), ("dp", LAUNCH, ("--tensor-parallel-size", 1)),
            ("one", (), ()),  # finished: it trains nothing and finds the same
        )
    ]
    natural, certified = tables[0]
    assert natural[0] > 93 and certified[0] > 90
    assert natural[2] < 10 and certified[2] > natural[2] + 20  # certified at EPS
    for table in tables[1:3]:
        for row, expected in zip(table, tables[0], strict=True):
            # Points of 360 images: rounding grows over the steps, a few images change sides.
            assert max(abs(a - b) for a, b in zip(row, expected, strict=True)) <= 2
    assert tables[3] == tables[0]


@pytest.mark.slow
@pytest.mark.skipif(
    not (ROOT.parent / "shared" / "data" / "sst").is_dir(), reason="../shared/data/sst is absent"
)
def test_what_training_certified_of_sentences_the_job_certifies_of_the_checkpoint(tmp_path):
    data = ROOT.parent / "shared" / "data" / "sst"
    folder = tmp_path / "sentences"
    options = ("--data", data, "--limit", 4, "--epochs", 0, 2)
    _certified_training("sentences", folder, LAUNCH, options)
    lines = [json.loads(line) for line in (folder / "certified.jsonl").read_text().splitlines()]
    command = [
        sys.executable, "-m", "lirpa_megatron", "verify", "--load", folder / "checkpoint", "--data",
        folder / "certified.jsonl", "--question", "certify", "--eps", lines[0]["eps"],
        "--output", tmp_path / "results.jsonl",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*map(str, command)], check=True, capture_output=True, env=environment)
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {result["property"]: result for result in found}
    assert len(found) == len(lines) == 4
    bounded = [line for line in lines if found[line["id"]]["result"] != "misclassified"]
    assert bounded
    for line in bounded:  # two ranks reported them, in float32; here one rank
        lower = found[line["id"]]["lower_bounds"]
        assert lower == pytest.approx([line["margin"]], rel=1e-4, abs=1e-4)
