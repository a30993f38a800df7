"""Certified radii of a sentiment classifier: plain auto_LiRPA against this package, part by part.

    python benchmarks/sst.py [--sentences 3] [--modes plain ours ...] [--model FILE]
    python benchmarks/sst.py --depth [--layers 1 2 3 6] [--hidden 64 128] [--sequence 8 16]
        [--limit 900] [--device cpu] [--auto-lirpa FOLDER] [--json FILE]

The classifier is a pre-LN transformer with the full LayerNorm (2 layers, hidden 64, FFN 256, 4
heads, tanh GELU, the first token classified), trained on SST the first time.
For sentences of the dev set of six words that it classifies rightly: the largest eps by which all
embeddings may move in L-inf with the class certified, by bisection with CROWN. 'ours' is the model
as megatron-core's TransformerBlock; 'boxes' that with form_limit=0; 'only X' and 'but X' make
one part (norm, attention, GELU), or all but one, of this package's operators and leave the rest to
auto_LiRPA's (0.7.1, as for 'plain'). Seconds are processor time per bound, one thread.

With --depth: radii of models as torch initialises them, their clean margin set to one standard
deviation of it over random inputs, which makes them comparable.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from sst_classifier import DATA, HEADS, load, read, train, words_of

PARTS = {"norm": "norm", "attention": "attention", "GELU": "gelu"}
MODES = ["plain", "ours", "boxes", *(f"{how} {part}" for how in ("only", "but") for part in PARTS)]


# ------------------------------------------------------------------------------- certification


def bounded_by(mode: str, plain, x):
    """The bounded module of a mode; `plain` has the mode's parts."""
    from transformer_models import Classifier, bound_plainly

    from lirpa_megatron import BoundedModule

    if mode == "plain":
        return bound_plainly(plain, x)
    model = Classifier(plain).to(x.device) if mode in ("ours", "boxes") else plain
    options = {"form_limit": 0} if mode == "boxes" else {}
    return BoundedModule(model.eval(), x, bound_opts=options)


def radius(bounded, x, label: int, most: float, steps: int, method: str = "CROWN") -> dict:
    """The certified radius by bisection on [0, most], and seconds per bound."""
    import torch

    from lirpa_megatron import BoundedTensor, PerturbationLpNorm

    C = torch.tensor([[[1.0, -1.0] if label == 0 else [-1.0, 1.0]]], device=x.device)
    low, high, seconds = 0.0, most, []
    for _ in range(steps):
        eps = (low + high) / 2
        ball = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=eps))
        # On a GPU the processor waits without working.
        clock = time.perf_counter if x.is_cuda else time.process_time
        start = clock()
        try:
            with torch.set_grad_enabled(method != "CROWN"):
                lower, _ = bounded.compute_bounds(
                    x=(ball,), C=C, method=method, bound_upper=False
                )
            certified = lower.item() > 0
            seconds.append(clock() - start)
        except AssertionError:  # of plain auto_LiRPA: a variance that may be negative
            certified = False
        low, high = (eps, high) if certified else (low, eps)
    average = sum(seconds) / len(seconds) if seconds else None
    return {"radius": low, "seconds": average, "bounds": len(seconds)}


def _sst_mode(task: dict) -> list[dict]:
    mode = task["mode"]
    parts: tuple[str, ...] = ()
    if mode not in ("plain", "ours", "boxes"):
        how, part = mode.split()
        others = tuple(p for p in PARTS.values() if p != PARTS[part])
        parts = (PARTS[part],) if how == "only" else others
    body, encode, embed = load(Path(task["model"]), parts)
    found: list[dict] = []
    for record in read("dev"):
        words = words_of(record)
        if len(words) != 6 or len(found) == task["sentences"]:
            continue
        x = embed(encode(words))
        if body(x).argmax().item() != record["label"]:
            continue
        bounded = bounded_by(mode, body, x)
        result = radius(bounded, x, record["label"], task["most"], task["steps"])
        found.append({"sentence": " ".join(words), **result})
    return found


def _depth_mode(task: dict) -> dict:
    import torch
    from transformer_models import Plain

    torch.manual_seed(0)
    hidden, method = task["hidden"], task["mode"]
    plain = Plain(task["layers"], hidden, 4 * hidden, HEADS, 2).eval().requires_grad_(False)
    inputs = torch.randn(1000, task["sequence"], hidden)
    outputs = plain(inputs)
    margins = outputs[:, 0] - outputs[:, 1]
    plain.head.bias[0] += margins.std() - margins[0]
    x = inputs[:1].to(task["device"])
    bounded = bounded_by("ours", plain, x)
    if method == "CROWN-Optimized":
        bounded.set_bound_opts({"optimize_bound_args": {"iteration": task["iterations"]}})
    return radius(bounded, x, 0, task["most"], task["steps"], method)


def _worker(task: dict) -> dict:
    import torch

    torch.set_num_threads(1)
    from lirpa_megatron.parallel import runtime

    with runtime.session():
        result = _depth_mode(task) if task["depth"] else _sst_mode(task)
    return {"result": result}


# --------------------------------------------------------------------------------------- tables


def _sst_table(arguments: argparse.Namespace, version: str, run) -> dict:
    print(f"auto_LiRPA {version}; certified L-inf radius of all embeddings, by bisection in "
          f"{arguments.steps} steps\n")
    heads = [f"{i + 1}" for i in range(arguments.sentences)]
    print(f"| mode | {' | '.join(heads)} | mean | /plain | s per bound |")
    print("|---" * (len(heads) + 4) + "|", flush=True)
    figures: dict = {}
    for mode in arguments.modes:
        if version == "0.3" and mode not in ("ours", "boxes"):
            continue
        task = {"mode": mode, "sentences": arguments.sentences, "model": str(arguments.model)}
        found = figures[mode] = run(task)
        if not found:
            empty = " | ".join(["-"] * (len(heads) + 2))
            print(f"| {mode} | {empty} | > {arguments.limit:g} in all |")
            continue
        radii = [r["radius"] for r in found]
        times = [r["seconds"] for r in found if r["seconds"] is not None]
        mean, base = sum(radii) / len(radii), figures.get("plain")
        base = sum(r["radius"] for r in base) / len(base) if base else 0.0
        cells = [f"{r:.5f}" for r in (*radii, mean)]
        cells += [f"{mean / base:.2f}" if base else "-"]
        cells += [f"{sum(times) / len(times):.2f}" if times else "-"]
        print(f"| {mode} | {' | '.join(cells)} |", flush=True)
    for i, result in enumerate(next((f for f in figures.values() if f), [])):
        print(f"\n{i + 1}: {result['sentence']}", end="")
    print()
    return figures


def _depth_table(arguments: argparse.Namespace, version: str, run) -> dict:
    print(f"auto_LiRPA {version}; certified L-inf radius of all hidden states of models at their "
          f"initialisation (s per bound), CROWN-Optimized with {arguments.iterations} iterations\n")
    print("| hidden | tokens | method | " + " | ".join(f"{n} layers" for n in arguments.layers)
          + " |\n" + "|---" * (3 + len(arguments.layers)) + "|", flush=True)
    figures = {}
    for hidden in arguments.hidden:
        for sequence in arguments.sequence:
            for method in arguments.methods:
                cells = []
                for layers in arguments.layers:
                    task = {"mode": method, "hidden": hidden, "sequence": sequence,
                            "layers": layers, "iterations": arguments.iterations}
                    slower = cells and cells[-1] == "-"  # than a smaller one that took too long
                    found = None if slower else run(task)
                    figures[f"{hidden} {sequence} {method} {layers}"] = found
                    text = f"{found['radius']:.5f} ({found['seconds']:.1f})" if found else "-"
                    cells.append(text)
                print(f"| {hidden} | {sequence} | {method} | {' | '.join(cells)} |", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--model", type=Path, default=Path("build/sst.pt"),
                        help="where the trained classifier is kept")
    parser.add_argument("--depth", action="store_true", help="radius against depth instead")
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 2, 3, 6])
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--sequence", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--methods", nargs="+", default=["CROWN", "CROWN-Optimized"])
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--most", type=float, help="where bisection starts")
    parser.add_argument("--steps", type=int, default=8, help="of bisection")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one mode")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"),
                        help="of --depth; on a GPU seconds are wall time")
    parser.add_argument("--auto-lirpa", default=os.environ.get("AUTO_LIRPA"),
                        help="a folder with auto_LiRPA; by default the one that is installed")
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    if not arguments.depth and not DATA.is_dir():
        print("the SST data are not there: ../shared/data/sst", file=sys.stderr)
        raise SystemExit(2)
    from workers import host_version, launch

    version = host_version(arguments.auto_lirpa)
    common = {"depth": arguments.depth, "steps": arguments.steps, "device": arguments.device,
              "most": arguments.most or (0.08 if arguments.depth else 0.03)}

    def run(task):
        ranks = launch(__file__, {**task, **common}, 1, arguments.limit, arguments.auto_lirpa)
        return None if ranks is None else ranks[0]["result"]

    if not arguments.depth and not arguments.model.exists():
        train(arguments.model)
    table = _depth_table if arguments.depth else _sst_table
    figures = table(arguments, version, run)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    from workers import start

    start(main, _worker)
