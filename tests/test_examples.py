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


def _printed(name, launcher=()):
    """The lines that an example prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / f"{name}.py")],
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
