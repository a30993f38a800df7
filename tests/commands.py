"""The command line on small ONNX networks, in this process (TP=1) and under torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from forks import launch
from onnx.reference import ReferenceEvaluator
from small_networks import others_win, property_text, save, stack

from lirpa_megatron.cli.commands import main

ROOT = Path(__file__).resolve().parents[1]
SIZES = [4, 8, 8, 3]
CENTER = [0.2, -0.4, 0.6, 0.1]


def write_instances(folder):
    """net.onnx, properties of growing radius around a point, and instances.csv."""
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


def on_ranks(size, *arguments):
    """The same in processes forked from one that has the libraries: seconds less of a processor."""
    return launch(size, main, [*map(str, arguments)])


def largest_difference(first, second):
    """Relative to the largest bound of each instance."""
    pairs = [(np.array(a["lower_bounds"]), np.array(b["lower_bounds"])) for a, b in
             zip(first, second, strict=True)]
    return max((abs(a - b) / max(1.0, abs(a).max())).max() for a, b in pairs)
