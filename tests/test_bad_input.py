"""Bad input: one clear line on rank 0, exit status 2, nothing half-written, no rank waiting."""

import contextlib
import faulthandler
import io
import json
import os
import pickle
import re
import shutil
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import launch
from small_networks import model, others_win, property_text, save, stack

from lirpa_megatron.cli.commands import main
from lirpa_megatron.parallel import runtime

pytestmark = pytest.mark.usefixtures("unchanged_environment")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Good files, and one bad file of each kind."""
    folder = tmp_path_factory.mktemp("bad")
    save(stack([4, 8, 8, 3]), folder / "net.onnx")
    text = property_text([0.0] * 4, [0.1] * 4, 3, others_win(0, 3))
    files = {
        "good.vnnlib": text,
        "unbounded.vnnlib": text.replace("(assert (<= X_2 0.1))", ""),
        "count.vnnlib": property_text([0.0] * 5, [0.1] * 5, 3, others_win(0, 3)),
        "syntax.vnnlib": text.replace("(>= X_1 0.0)", "(>= X_1 0.0 ?)"),
        "empty.csv": "\n",
        "missing.csv": "net.onnx,nothing.vnnlib,60\n",
        "seconds.csv": "net.onnx,good.vnnlib,soon\n",
        "good.csv": "net.onnx,good.vnnlib,60\n",
        "unknown.yaml": "metod: CROWN\n",
        "broken.yaml": "method: [CROWN\n",
        "results.txt": "not a result\n",
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    (folder / "cut.onnx").write_bytes((folder / "net.onnx").read_bytes()[:300])
    weight = np.full((4, 3), np.nan, "float32")
    gemm = stack([4, 3]).graph.node[0]
    gemm.attribute.pop()
    nan = model([gemm], {"w0": weight, "b0": np.zeros(3, "float32")}, 4, 3)
    save(nan, folder / "nan.onnx")
    unsupported = stack([4, 3])
    unsupported.graph.node[0].op_type = "Det"
    del unsupported.graph.node[0].input[1:], unsupported.graph.node[0].attribute[:]
    save(unsupported, folder / "unsupported.onnx")

    assert main(["import-onnx", str(folder / "net.onnx"), str(folder / "ckpt")]) == 0
    for name in ("tracker", "metadata", "pickle", "nan"):
        shutil.copytree(folder / "ckpt", folder / f"bad_{name}")
    (folder / "bad_tracker" / "latest_checkpointed_iteration.txt").unlink()
    (folder / "bad_metadata" / "release" / ".metadata").write_bytes(b"\x80\x04garbage")
    # cos.system with an argument: what a pickle needs to run a command.
    hostile = b"cos\nsystem\n(S'touch " + str(folder / "it_ran").encode() + b"'\ntR."
    (folder / "bad_pickle" / "release" / ".metadata").write_bytes(hostile)
    _spoil_last_rows(folder / "bad_nan")
    return folder


def _spoil_last_rows(checkpoint):
    """NaN in the last row of the first layer's weight: in the last rank's shard only."""
    release = checkpoint / "release"
    metadata = pickle.loads((release / ".metadata").read_bytes())
    for index, info in metadata.storage_data.items():
        if index.fqn == "layers.fc1.weight":
            path = release / info.relative_path
            data = bytearray(path.read_bytes())
            piece = bytes(data[info.offset : info.offset + info.length])
            weight = torch.load(BytesIO(piece), weights_only=True)
            old = weight.numpy()[-1].tobytes()
            assert piece.count(old) == 1
            new = piece.replace(old, np.full(4, np.nan, "float32").tobytes())
            data[info.offset : info.offset + info.length] = new
            path.write_bytes(data)


V = ["verify", "--onnx", "net.onnx", "--vnnlib", "good.vnnlib"]
# name: (arguments, with file names relative to the folder; what the line says)
CASES = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["prove"], "invalid choice: 'prove'"),
    "nothing to verify": (["verify"], "nothing to verify"),
    "property without network": (["verify", "--vnnlib", "good.vnnlib"], "give --load DIR or"),
    "two networks": ([*V, "--load", "ckpt"], "--load and --onnx exclude each other"),
    "missing network": (["verify", "--onnx", "no.onnx", "--vnnlib", "good.vnnlib"],
                        "network file .*no.onnx does not exist"),
    "missing property": (["verify", "--onnx", "net.onnx", "--vnnlib", "no.vnnlib"],
                         "property file .*no.vnnlib does not exist"),
    "truncated network": (["verify", "--onnx", "cut.onnx", "--vnnlib", "good.vnnlib"],
                          "cut.onnx is (truncated|not a valid)"),
    "operator": (["verify", "--onnx", "unsupported.onnx", "--vnnlib", "good.vnnlib"],
                 "operator Det .*supported are A"),
    "NaN weights": (["verify", "--onnx", "nan.onnx", "--vnnlib", "good.vnnlib"],
                    "tensor 'w0' has NaN"),
    "unbounded input": (["verify", "--onnx", "net.onnx", "--vnnlib", "unbounded.vnnlib"],
                        "X_2 has no upper bound"),
    "variable count": (["verify", "--onnx", "net.onnx", "--vnnlib", "count.vnnlib"],
                       "declares 5 input variables, but network net has 4 inputs"),
    "syntax error": (["verify", "--onnx", "net.onnx", "--vnnlib", "syntax.vnnlib"],
                     r"line 10: expected a number or a variable, found .\?"),
    "checkpoint that is none": (["verify", "--load", "nowhere", "--vnnlib", "good.vnnlib"],
                                "nowhere is not a directory"),
    "no tracker": (["verify", "--load", "bad_tracker", "--vnnlib", "good.vnnlib"],
                   "it has no latest_checkpointed_iteration.txt"),
    "corrupt metadata": (["verify", "--load", "bad_metadata", "--vnnlib", "good.vnnlib"],
                         r"\.metadata is corrupt"),
    "hostile pickle": (["verify", "--load", "bad_pickle", "--vnnlib", "good.vnnlib"],
                       r"its pickle names os\.system"),
    "NaN in a checkpoint": (["verify", "--load", "bad_nan", "--vnnlib", "good.vnnlib"],
                            "layers.fc1.weight .* has NaN"),
    "no row for the network": (["verify", "--onnx", "nan.onnx", "--instances", "good.csv"],
                               "no rows for network nan; its networks are net"),
    "empty instances": (["verify", "--instances", "empty.csv"], "empty.csv is empty"),
    "instance without file": (["verify", "--instances", "missing.csv"],
                              "missing.csv, line 1: property file .*nothing.vnnlib does not exist"),
    "bad time limit": (["verify", "--instances", "seconds.csv"], "line 1: 'soon' is not a number"),
    "unknown method": ([*V, "--method", "magic"],
                       "unknown method 'magic'.* IBP, CROWN-IBP, CROWN, CROWN-Optimized"),
    "dynamic method": ([*V, "--method", "dynamic-forward"], "'dynamic-forward' is not available"),
    "negative limit": ([*V, "--timeout", "-1"], "--timeout: '-1' is not a number above 0"),
    "no rows at once": ([*V, "--max-spec-rows", "0"], "'0' is not a whole number of at least 1"),
    "unknown dtype": ([*V, "--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    "size that does not divide": ([*V, "--tensor-parallel-size", "3"],
                                  "size 3 does not divide the number of processes 1"),
    "output in no folder": ([*V, "--output", "no/r.jsonl"], "r.jsonl cannot be written: folder"),
    "output is a folder": ([*V, "--output", "ckpt"], "ckpt is a directory"),
    "resume without output": ([*V, "--resume"], "--resume needs --output"),
    "resume of another file": ([*V, "--resume", "--output", "results.txt"],
                               "line 1 of .*results.txt is not a result"),
    "missing config": ([*V, "--config", "no.yaml"], "config no.yaml cannot be read"),
    "unknown key": ([*V, "--config", "unknown.yaml"], "unknown option 'metod'; the options are"),
    "broken config": ([*V, "--config", "broken.yaml"], "broken.yaml, line 2 is not valid YAML"),
    "import of a missing file": (["import-onnx", "no.onnx", "new"], "no.onnx does not exist"),
    "import of a truncated file": (["import-onnx", "cut.onnx", "new"], "cut.onnx is"),
    "import over a checkpoint": (["import-onnx", "net.onnx", "ckpt"], "ckpt exists already"),
    "import over something else": (["import-onnx", "net.onnx", "results.txt", "--force"],
                                   "is not a checkpoint"),
    "import into no folder": (["import-onnx", "net.onnx", "no/new"], "folder no does not exist"),
}


def snapshot(folder):
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_with_one_clear_line(name, folder, monkeypatch, capsys):
    arguments, message = CASES[name]
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    status = main(arguments)
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("lirpa-megatron: error: ")
    assert re.search(message, line), line
    assert snapshot(folder) == before  # nothing written, nothing run


ON_RANKS = (
    "missing property", "truncated network", "operator", "variable count", "hostile pickle",
    "NaN in a checkpoint", "empty instances", "unknown method", "output is a folder",
    "import of a truncated file", "import over a checkpoint",
)


def _run_one_after_the_other(commands, path):
    """What a rank says to each command, in a file of its own.

    The process groups are made once for all.
    """
    faulthandler.dump_traceback_later(200, exit=True)
    runtime.initialize()
    said = []
    for arguments in commands:
        out, err, begin = io.StringIO(), io.StringIO(), time.monotonic()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(arguments)
        said.append([status, out.getvalue(), err.getvalue(), time.monotonic() - begin])
    Path(f"{path}{os.environ['RANK']}").write_text(json.dumps(said))


def test_bad_input_ends_all_ranks_and_only_rank_0_speaks(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    cases = [CASES[name] for name in ON_RANKS]
    before = snapshot(folder)
    commands = [arguments for arguments, _ in cases]
    run = launch(2, _run_one_after_the_other, commands, tmp_path / "said", timeout=280)
    assert run.returncode == 0, run.stderr
    first, second = (json.loads((tmp_path / f"said{rank}").read_text()) for rank in (0, 1))
    for name, (_, message), spoken, silent in zip(
        ON_RANKS, cases, first, second, strict=True
    ):
        assert spoken[0] == silent[0] == 2, (name, spoken, silent)
        assert silent[1:3] == ["", ""], (name, silent)
        (line,) = spoken[2].splitlines()
        assert spoken[1] == "" and re.search(message, line), (name, line)
        assert max(spoken[3], silent[3]) < 60, name
    assert snapshot(folder) == before
