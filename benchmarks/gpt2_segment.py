"""A segment of one embedding's norm at GPT-2 small's shape, proved whole by pieces.

    python benchmarks/gpt2_segment.py [--prompts 3 4 8] [--orders 8] [--modes tp1 tp2]
        [--splits 200] [--layers 12] [--tokens 16] [--limit 1200] [--json FILE]

The model, the margins and the direction D, as long as the embedding of the word, are those of
`gpt2_shape.py`, a prompt is the seed of its 16 tokens (3 there). The segment x + t D goes from
t = -1 to 0, so it ends at the prompt itself. It is cut until every piece is proved. 'least' is the
least margin of the model's own at 65 points of it. Seconds are the processor's of the busiest
rank, without what the first call prepares (singular values); memory is beside the model's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from gpt2_shape import RANKS, VOCABULARY, Sets, model_of


def _one(task: dict) -> dict:
    """Runs in a process of its own (one per rank)."""
    import torch
    from memory import PeakMemory

    from lirpa_megatron import (
        BoundedModule,
        BoundedTensor,
        at_position,
        bound_by_splits,
        next_token_margins,
        smallest_margin,
    )
    from lirpa_megatron.parallel import runtime
    from lirpa_megatron.problem.perturbations import PerturbationSegments

    torch.set_num_threads(1)
    with runtime.session(), torch.no_grad():
        model = model_of(task["layers"], task["tokens"])
        drawn = torch.Generator().manual_seed(task["prompt"])
        ids = torch.randint(0, VOCABULARY, (1, task["tokens"]), generator=drawn)
        sets = Sets("segment", model, ids)
        memory = PeakMemory()
        logits = BoundedModule(at_position(model, -1), (sets.x,))
        target = logits.forward(sets.x).argmax(-1)
        points = sets.x.repeat(65, 1, 1)
        points[:, sets.place] += torch.linspace(-1, 0, 65).unsqueeze(1) * sets.ends[0]
        own = logits.forward(points)
        own, others = own[:, int(target)], own.index_fill(1, target, -torch.inf).amax(1)
        D = torch.zeros_like(sets.x).unsqueeze(1)
        D[0, 0, sets.place] = sets.ends[0] / 2
        x = sets.x - D[:, 0]
        options = {"order": task["order"], "adjoint_rows": 1, "refined_rows": 0}
        bounded = BoundedModule(next_token_margins(model), (x, target), options)
        point = BoundedTensor(x, PerturbationSegments(x, 1e-4 * D))
        begin = time.process_time()
        bounded.compute_bounds((point, target), method="forward", bound_upper=False)
        first, begin = time.process_time() - begin, time.process_time()
        found = bound_by_splits(
            bounded, (BoundedTensor(x, PerturbationSegments(x, D)), target),
            splits=task["splits"], method="forward", bound_upper=False,
            margin=lambda rows, of: smallest_margin(rows, target[of]),
        )
        seconds, peak = time.process_time() - begin, memory.stop()
    return {"pieces": int(found.pieces), "proved": float(found.proved), "seconds": seconds,
            "first": first, "mib": peak, "margin": float(found.margin),
            "least": float((own - others).amin()), "refuted": bool(found.counterexamples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", nargs="+", type=int, default=[3, 4, 8])
    parser.add_argument("--orders", nargs="+", type=int, default=[8])
    parser.add_argument("--modes", nargs="+", choices=RANKS, default=["tp1"])
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--limit", type=float, default=1200, help="seconds for one row")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from workers import launch

    print("| prompt | order | mode | least | pieces | proved | s | first | MiB |\n"
          "|---|---|---|---|---|---|---|---|---|")
    figures = []
    for prompt in options.prompts:
        for order in options.orders:
            for mode in options.modes:
                task = {"prompt": prompt, "order": order, "splits": options.splits,
                        "layers": options.layers, "tokens": options.tokens}
                ranks = launch(__file__, task, RANKS[mode], options.limit, None)
                if ranks is None:
                    print(f"| {prompt} | {order} | {mode} | more than {options.limit:g} s |")
                    continue
                x = max(ranks, key=lambda x: x["seconds"])
                proved = "refuted" if x["refuted"] else f"{x['proved']:.1%}"
                print(f"| {prompt} | {order} | {mode} | {x['least']:.3f} | {x['pieces']} | "
                      f"{proved} | {x['seconds']:.0f} | {x['first']:.1f} | {x['mib']:.0f} |",
                      flush=True)
                figures.append({**task, "mode": mode, "ranks": ranks})
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    from workers import start

    start(main, _one)
