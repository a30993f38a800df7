"""Small checkpoints, vocabularies and sentences for tests of `verify --data`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import torch
import transformers

from lirpa_megatron.cli.commands import main

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2)
# Both classes of the random BERT are within reach: the bias of its binary head.
BIAS = [-0.14, 0.0]
WORDS = ["[UNK]", *(f"w{i}" for i in range(1, transformers.VOCABULARY))]


def save_checkpoint(kind, out, change=None, dtype=torch.float64, layers=1, **arguments):
    """A rank file of a model of small layers (needs a session); its folder."""
    arguments = {"num_layers": layers, **arguments}
    model = {"gpt": transformers.gpt, "bert": transformers.bert}[kind](
        **{**SMALL, "num_layers": layers}
    )
    state = {name: p.detach().to(dtype) for name, p in model.named_parameters()}
    if kind == "bert":
        state["binary_head.bias"] = torch.tensor(BIAS, dtype=dtype)
    values = checkpoints.arguments(**{**SMALL, "kv_channels": 4, **arguments})
    checkpoints.save_legacy(
        state, out, values, change=None if change is None else lambda c, r, s: change(c)
    )
    (out / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    return out


def write_lines(path, *lines):
    """A data file of dictionaries and of lines as they are."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(results):
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "peak_memory_mib")} for r in results
    ]


def start(size, *arguments):
    """The command as `size` processes of torchrun, in a process group of their own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return subprocess.Popen(
        [sys.executable, *(launch if size > 1 else []), "-m", "lirpa_megatron", "verify",
         *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )


def finish(process, seconds):
    """(exit status, standard output, standard error); one that does not end is a failure."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def wait_for_lines(path, count, process, seconds=120):
    """Until a file of results has so many lines."""
    end = time.monotonic() + seconds
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no {count} lines in {path} after {seconds} s"
        time.sleep(0.05)


QUICK = ("--attack-steps", 2, "--attack-restarts", 1, "--tolerance", 0.3)
CERTIFY = ("--question", "certify", "--eps", 1e-4, "--attack-steps", 0)


def write_job(folder):
    """bert and gpt with their vocabularies; six sentences."""
    save_checkpoint("bert", folder / "bert")
    save_checkpoint("gpt", folder / "gpt")
    write_lines(
        folder / "data.jsonl", {"id": "first", "sentence": "w3 W7 unheard"}, {"text": "w4 w5"},
        {"ids": [7, 3, 20, 11]}, {"sentence": "w9"}, {"sentence": "w1 w2 w3 w4 w5 w6 w7 w8"},
        {"id": 6, "sentence": "w11 w12"},
    )
    return folder


def verify(folder, *arguments, output=None, model="bert", data="data.jsonl"):
    """Exit status, and results if there is an output."""
    extra = ["--output", output] if output else []
    status = main([
        "verify", "--load", str(folder / model), "--data", str(folder / data),
        *map(str, [*arguments, *extra]),
    ])
    return status, read(output) if output else None
