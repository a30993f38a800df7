"""Whole segments proved in pieces, on the classifier of examples/sst.

    python benchmarks/splits.py [--radii 1 2 4 8] [--modes CROWN:1 forward:1 forward:3 forward:8]
        [--splits 200] [--limit 1200] [--json FILE]

The set is x + r t D, |t| <= 1, with a random direction D as long as the embedding of the last word
but one. Each radius of each mode runs in a process of its own, one thread, float32, and stops at a
point that the model itself classifies otherwise. Seconds are the processor's, without loading.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "sst"


def _sst():
    """(module to be bounded, embeddings, specification, place of the word)."""
    import torch

    from lirpa_megatron import bert_head, embed
    from lirpa_megatron.checkpoint.language_model import load_language_model
    from lirpa_megatron.parallel import runtime

    _, model = load_language_model(EXAMPLE / "checkpoint", runtime.tp_group())
    words = {w: i for i, w in enumerate((EXAMPLE / "vocab.txt").read_text().split("\n"))}
    given = json.loads((EXAMPLE / "sentences.jsonl").read_text().splitlines()[0])
    text = ["[CLS]", *given["sentence"].lower().split()]
    ids = torch.tensor([[words.get(word, 1) for word in text]])
    x = embed(model, ids, tokentype_ids=torch.zeros_like(ids)).detach()
    C = torch.zeros(1, 1, 2)
    C[0, 0, given["label"]], C[0, 0, 1 - given["label"]] = 1, -1
    return bert_head(model, "binary"), x, C, ids.shape[1] - 2


def _one(task: dict) -> dict:
    """Runs in a process of its own."""
    import torch
    from memory import PeakMemory

    from lirpa_megatron import BoundedModule, bound_by_splits, directions
    from lirpa_megatron.parallel import runtime

    torch.set_num_threads(1)
    with runtime.session(), torch.no_grad():
        view, x, C, place = _sst()
        D = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(2))
        D = D / D.norm() * x[0, place].norm()
        given = directions(x, D[None], task["radius"], positions=[place])
        bounded = BoundedModule(view, (x,), bound_opts={"order": task["order"]})
        memory, begin = PeakMemory(), time.process_time()
        found = bound_by_splits(
            bounded, given, C, splits=task["splits"], method=task["method"], bound_upper=False,
        )
        seconds, peak = time.process_time() - begin, memory.stop()
    return {"pieces": int(found.pieces), "proved": float(found.proved), "mib": peak,
            "seconds": seconds, "refuted": bool(found.counterexamples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--radii", nargs="+", type=float, default=[1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--modes", nargs="+",
                        default=["CROWN:1", "forward:1", "forward:3", "forward:8"])
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--limit", type=float, default=1200, help="seconds for one row")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from workers import launch

    print("| radius | method | order | pieces | proved | s | MiB |\n|---|---|---|---|---|---|---|")
    figures = []
    for radius in options.radii:
        for mode in options.modes:
            method, order = mode.split(":")
            task = {"radius": radius, "method": method, "order": int(order),
                    "splits": options.splits}
            ranks = launch(__file__, task, 1, options.limit, None)
            if ranks is None:
                print(f"| {radius:g} | {method} | {order} | more than {options.limit:g} s |")
                continue
            x = ranks[0]
            proved = "refuted" if x["refuted"] else f"{x['proved']:.1%}"
            print(f"| {radius:g} | {method} | {order} | {x['pieces']} | {proved} | "
                  f"{x['seconds']:.1f} | {x['mib']:.0f} |", flush=True)
            figures.append({**task, **x})
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    from workers import start

    start(main, _one)
