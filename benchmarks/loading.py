"""Loading a language model's checkpoint: this package against Megatron's own loader, at TP=2.

    python benchmarks/loading.py FOLDER [--layers 22] [--hidden 1024] [--ranks 2] [--repeats 3]
        [--json FILE]

FOLDER gets a model of GPT-2's kind with random weights (22 layers of width 1024: 1.3 GB in
float32), written by `dist_checkpointing.save` at TP=2, and keeps it for the next run. Then
`load_language_model` and `dist_checkpointing.load` read it in turn, each time in processes of their
own, from files that are in the system's cache. The time of `dist_checkpointing.load` is that of its
call alone: Megatron's model is built before. That of `load_language_model` is all it does.

Memory is the most that the worst rank has allocated above what it has after the imports, as a share
of the bytes of its parameters; for Megatron's loader the model counts too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODES = ("ours", "dist_checkpointing")


def _write(folder: Path, ranks: int, layers: int, hidden: int) -> None:
    """FOLDER/checkpoint, unless it is there."""
    if (folder / "checkpoint").is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    script = ROOT / "examples" / "gpt2" / "random_gpt2.py"
    sizes = ("--layers", layers, "--hidden", hidden, "--heads", hidden // 64)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks)
    for command in (
        (script, folder / "hugging-face", *sizes),
        (*launcher, "-m", "lirpa_megatron", "import-hf", folder / "hugging-face",
         folder / "checkpoint"),
    ):
        subprocess.run([sys.executable, *map(str, command)], check=True, cwd=ROOT)


def _ours(checkpoint, measured):
    from lirpa_megatron.checkpoint.language_model import load_language_model
    from lirpa_megatron.parallel import runtime

    with measured:
        return load_language_model(checkpoint, runtime.tp_group())[1]


def _theirs(checkpoint, measured):
    """Megatron's model, filled by Megatron's loader."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    from lirpa_megatron.checkpoint.language_model import read_model_description
    from lirpa_megatron.checkpoint.layout import data_directory
    from lirpa_megatron.checkpoint.model_builder import build
    from lirpa_megatron.parallel import runtime

    description = read_model_description(checkpoint)
    model = build(description, runtime.tp_group(), torch.float32).to_empty(device="cpu")
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = {"model": model.sharded_state_dict(metadata={"dp_cp_group": group})}
    with measured:
        loaded = dist_checkpointing.load(state, str(data_directory(checkpoint)))
    model.load_state_dict(loaded["model"], strict=False)
    return model


class _Measured:
    """Seconds of a block, which all ranks enter at the same time."""

    seconds = 0.0

    def __enter__(self) -> None:
        import torch.distributed as dist

        dist.barrier()
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._start


def _one_mode(task: dict) -> dict:
    """Runs in a process of its own (one per rank)."""
    import torch
    from memory import PeakMemory

    import lirpa_megatron.checkpoint.language_model  # noqa: F401  (imports are not measured)
    from lirpa_megatron.parallel import runtime

    torch.set_num_threads(1)
    runtime.initialize()
    memory, measured = PeakMemory(), _Measured()
    load = _ours if task["mode"] == "ours" else _theirs
    model = load(Path(task["checkpoint"]), measured)
    peak = memory.stop()
    shards = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    total = sum(p.double().sum().item() for p in model.parameters())
    runtime.shutdown()
    return {"seconds": measured.seconds, "peak": peak, "shards": shards, "sum": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    from transformer_models import launch

    _write(arguments.folder, arguments.ranks, arguments.layers, arguments.hidden)
    checkpoint = arguments.folder / "checkpoint"
    size = sum(path.stat().st_size for path in checkpoint.rglob("*.distcp")) / 1e9
    print(f"{size:.2f} GB, TP={arguments.ranks}\n\n| | s | each run | MiB | / shards |")
    print("|---" * 5 + "|")
    found: dict[str, list] = {mode: [] for mode in MODES}
    for _ in range(arguments.repeats):
        for mode in MODES:
            task = {"mode": mode, "checkpoint": str(checkpoint.resolve())}
            found[mode].append(launch(__file__, task, arguments.ranks, 3600, None))
    for mode, runs in found.items():
        seconds = [max(rank["seconds"] for rank in run) for run in runs]
        peak, share = (max(f(rank) for run in runs for rank in run) for f in (
            lambda rank: rank["peak"], lambda rank: rank["peak"] / rank["shards"]
        ))
        print(f"| {mode} | {min(seconds):.2f} | {', '.join(f'{s:.2f}' for s in seconds)} | "
              f"{peak:.0f} | {share:.2f} |", flush=True)
    sums = {round(rank["sum"], 3) for runs in found.values() for rank in runs[0]}
    print(f"\nsums of the ranks' parameters: {sorted(sums)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    if "--worker" in sys.argv:
        print(json.dumps(_one_mode(json.loads(sys.argv[-1]))), flush=True)
    else:
        main()
