"""Domains of branch and bound per second: a batch of them against a loop that calls auto_LiRPA.

    python benchmarks/domains.py [--widths 784 256 256 256 256 10] [--count 256] [--batch 128]
        [--splits 8] [--steps 0 16] [--auto-lirpa DIR] [--json FILE]

A network of random weights, a box, and domains of some random splits. Bounds of inner neurons are
alpha-CROWN's of the box, cut at the splits, in both modes; what is timed is the bound of one output
in each domain, with or without steps of alpha ('batch': and beta, which auto_LiRPA 0.3 lacks). Each
mode runs in a process of its own, one thread, float32; seconds are the processor's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

SEED, EPS = 0, 0.02


def _network(widths):
    """(network, clean input [1, inputs], row [1, 1, outputs])."""
    import torch
    from torch import nn

    torch.manual_seed(SEED)
    layers = []
    for n, m in itertools.pairwise(widths):
        layers += [nn.Linear(n, m), nn.ReLU()]
    C = torch.zeros(1, 1, widths[-1])
    C[..., 0], C[..., 1] = 1, -1
    return nn.Sequential(*layers[:-1]).requires_grad_(False), torch.rand(1, widths[0]), C


def _drawn(unstable, count, splits):
    """For each domain different unstable neurons and signs: [(neuron, sign), ...]."""
    import random

    rng = random.Random(SEED)
    return [[(n, rng.choice((1, -1))) for n in rng.sample(unstable, splits)] for _ in range(count)]


def _batch(task: dict) -> list[float]:
    import torch

    from lirpa_megatron import BoundedModule
    from lirpa_megatron.complete import SearchOptions
    from lirpa_megatron.complete.bounding import Bounder
    from lirpa_megatron.complete.domain_pass import passes
    from lirpa_megatron.complete.problem import Domain, Problem
    from lirpa_megatron.complete.roots import bound_roots

    net, x, C = _network(task["widths"])
    never = torch.full((1, 1), float("inf"), dtype=torch.float64)
    problem = Problem(x - EPS, x + EPS, (0,), C, never)
    graph = BoundedModule(net, x)
    roots = bound_roots(graph, problem)
    places = ((roots.lower < 0) & (roots.upper > 0))[0].nonzero().flatten()
    drawn = _drawn(roots.number_of[places].tolist(), task["count"], task["splits"])
    with passes(graph, roots.active_columns):
        bounder = Bounder(graph, problem, roots, SearchOptions())
        whole = bounder.whole([0])
        alpha, beta = whole.alpha[:, 0], torch.zeros(1, task["splits"])
        domains = [
            Domain(0, tuple((*split, 0.0) for split in splits), 0.0, alpha, beta, ())
            for splits in drawn
        ]
        begin = time.process_time()
        for at in range(0, len(domains), task["batch"]):
            bounder.ascend(bounder.batch(domains[at : at + task["batch"]]), task["steps"])
        return [time.process_time() - begin, len(places)]


def _loop(task: dict) -> list[float]:
    from lirpa_megatron import BoundedTensor, PerturbationLpNorm
    from lirpa_megatron.compat import auto_lirpa

    class Plain(auto_lirpa.HostBoundedModule):
        _named_members = auto_lirpa.named_members

    net, x, C = _network(task["widths"])
    # alpha of all neurons: those of the box's unstable ones do not fit domains with fewer
    options = {"sparse_features_alpha": False,
               "optimize_bound_args": {"iteration": task["steps"], "early_stop_patience": 10**6}}
    with auto_lirpa.conversion():
        bounded = Plain(net, x, bound_opts=options, device="cpu")
    where = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=EPS))
    bounded.compute_bounds(x=(where,), C=C, method="CROWN", bound_upper=False)
    relus = [n for n in bounded._modules.values() if type(n).__name__ == "BoundRelu"]
    known = [(n.inputs[0].name, n.inputs[0].lower.detach().clone(),
              n.inputs[0].upper.detach().clone()) for n in relus]
    unstable = [(i, j) for i, (_, low, high) in enumerate(known)
                for j in ((low < 0) & (high > 0))[0].nonzero().flatten().tolist()]
    name = ("interm_bounds" if "interm_bounds" in bounded.compute_bounds.__code__.co_varnames
            else "intermediate_layer_bounds")
    drawn = _drawn(unstable, task["count"], task["splits"])
    begin = time.process_time()
    for splits in drawn:
        ends = {n: [low.clone(), high.clone()] for n, low, high in known}
        for (i, j), sign in splits:
            ends[known[i][0]][0 if sign > 0 else 1][0, j] = 0
        bounded.compute_bounds(
            x=(where,), C=C, bound_upper=False, **{name: ends},
            method="CROWN-Optimized" if task["steps"] else "CROWN",
        )
    return [time.process_time() - begin, len(unstable)]


def _one(task: dict) -> dict:
    """Runs in a process of its own."""
    import torch

    torch.set_num_threads(1)
    seconds, unstable = (_batch if task["mode"] == "batch" else _loop)(task)
    return {"seconds": seconds, "unstable": unstable}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", nargs="+", type=int, default=[784, 256, 256, 256, 256, 10])
    parser.add_argument("--count", type=int, default=256, help="domains")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--splits", type=int, default=8, help="of each domain")
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 16])
    parser.add_argument("--limit", type=float, default=900, help="seconds for one row")
    parser.add_argument("--auto-lirpa", help="folder of another auto_LiRPA")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from workers import launch

    print("| steps | mode | domains a second | to the loop |\n|---|---|---|---|")
    figures = []
    for steps in options.steps:
        rates: dict[str, float] = {}
        for mode in ("loop", "batch"):
            task = {"mode": mode, "steps": steps, "widths": options.widths,
                    "count": options.count, "splits": options.splits, "batch": options.batch}
            ranks = launch(__file__, task, 1, options.limit, options.auto_lirpa)
            if ranks is None:
                print(f"| {steps} | {mode} | not done in {options.limit:g} s |", flush=True)
                continue
            rates[mode] = options.count / ranks[0]["seconds"]
            ratio = f"{rates[mode] / rates['loop']:.1f}" if "loop" in rates else ""
            print(f"| {steps} | {mode} | {rates[mode]:.1f} | {ratio} |", flush=True)
            figures.append({**task, **ranks[0]})
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    from workers import start

    start(main, _one)
