"""The examples of transformers: each certifies something, and says the same on two processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def _numbers(line):
    return [float(number) for number in re.findall(r"-?\d+\.\d{6}", line)]


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "bert"])
def test_an_example_certifies_margins_and_radii(name):
    lines = _printed(name)
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


@pytest.mark.slow
def test_certified_training_learns_the_same_at_every_size_and_resumes(tmp_path):
    pytest.importorskip("sklearn")
    tables = []
    for name, launcher, options in (
        ("one", (), ()), ("tp", LAUNCH, ()), ("dp", LAUNCH, ("--tensor-parallel-size", 1)),
        ("one", (), ()),  # finished: it trains nothing and finds the same
    ):
        folder = tmp_path / name
        lines = _printed(
            "certified_training", launcher, ("--epochs", 5, 20, "--folder", folder, *options)
        )
        rows = [line.strip("| ").split(" | ") for line in lines if "%" in line]
        assert [row[0] for row in rows] == ["natural", "certified"]
        tables.append([[float(cell.rstrip("%")) for cell in row[1:]] for row in rows])
        assert (folder / "certified_accuracy.png").exists() or "no plot" in lines[-1]
    natural, certified = tables[0]
    assert natural[0] > 95 and certified[0] > 95
    assert natural[2] < 20 and certified[2] > natural[2] + 30  # certified at EPS
    for table in tables[1:3]:
        for row, expected in zip(table, tables[0], strict=True):
            # Points of 360 images: rounding grows over the steps, a few images change sides.
            assert max(abs(a - b) for a, b in zip(row, expected, strict=True)) <= 2
    assert tables[3] == tables[0]
