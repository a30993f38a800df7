"""Time, memory and bytes of CROWN: plain auto_LiRPA against this package at TP=1, 2, 4.

    python benchmarks/run.py [--models mnist-256x6 wide deep] [--batch 1 8] [--rounds 3]
        [--profile] [--json FILE] [--eps R] [--method CROWN-Optimized] [--opts JSON]

Every mode runs in processes of its own, one thread each, the modes interleaved over the rounds. The
figures are medians over rounds of ratios within a round: machines drift, ratios hold. Memory is the
most that the worst rank has allocated, above what it is after the imports and the bounds of a tiny
network (weights included; see `memory`). Bytes are those this rank's collectives sent, against the
layouts' formula (of CROWN).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

WIDTHS = {
    "mnist-256x6": (784, 256, 256, 256, 256, 256, 256, 10),
    "wide": (1024, 4096, 1024, 4096, 10),
    "deep": (1024, *(4096, 1024) * 3, 4096, 10),
}
MODES = {"plain": 1, "tp1": 1, "tp2": 2, "tp4": 4}
"""Mode -> processes. 'plain' is auto_LiRPA with its defaults."""
LONG = 5
"""Seconds after which a timed run is not repeated."""


def _network(widths):
    """The plain network on the meta device."""
    import torch
    from torch import nn

    layers = []
    with torch.device("meta"):
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
            layers += [nn.ReLU()] * (i > 0) + [nn.Linear(a, b)]
    return nn.Sequential(*layers)


def _fill(net, widths):
    """Random weights, the same for every mode, drawn layer by layer so that no rank has all."""
    import torch
    from torch import nn

    from lirpa_megatron.parallel import runtime

    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        generator = torch.Generator().manual_seed(i)
        layer = net[2 * i]
        full = {"weight": torch.randn(b, a, generator=generator) / a**0.5,
                "bias": torch.randn(b, generator=generator) * 0.1}
        for name, value in full.items():
            old = getattr(layer, name)
            if getattr(old, "tensor_model_parallel", False):
                parts = value.chunk(runtime.tp_size(), old.partition_dim)
                value = parts[runtime.tp_rank()].clone()
            new = nn.Parameter(value, requires_grad=False)
            new.__dict__.update(old.__dict__)
            setattr(layer, name, new)
    return net


def _one_mode(task: dict) -> dict:
    """Runs in a process of its own (one per rank)."""
    model, mode, batch = task["model"], task["mode"], task["batch"]
    import kinds
    import torch
    from memory import PeakMemory

    torch.set_num_threads(1)
    from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm, parallelize
    from lirpa_megatron.compat import auto_lirpa
    from lirpa_megatron.parallel import runtime

    class Plain(auto_lirpa.HostBoundedModule):
        _named_members = auto_lirpa.named_members

    def build(widths):
        """(bounded module, function that bounds)."""
        x = torch.rand(batch, widths[0], generator=torch.Generator().manual_seed(9))
        net = _network(widths)
        if mode == "plain":
            with auto_lirpa.conversion():
                bounded = Plain(_fill(net, widths), x, bound_opts={"conv_mode": "matrix"})
        else:
            bounded = BoundedModule(_fill(parallelize(net), widths), x, task["opts"])

        def bound():
            ball = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=task["eps"]))
            with torch.set_grad_enabled(task["method"] == "CROWN-Optimized"):
                return bounded.compute_bounds(x=(ball,), method=task["method"])

        return bounded, bound

    runtime.initialize()
    build((8,) * 5)[1]()  # imports what is imported late, compiles the host's kernels
    memory = PeakMemory()
    bounded, bound = build(WIDTHS[model])
    traffic = None if mode == "plain" else bounded.context.collectives.traffic
    seconds: list[float] = []
    for run in range(task["repeats"] + 1):
        if traffic is not None:
            traffic.clear()
        start = time.perf_counter()
        lower, upper = bound()
        seconds.append(time.perf_counter() - start)
        if run > 0 and seconds[-1] > LONG:
            break
    result = {
        "seconds": statistics.median(seconds[1:]),
        "mib": memory.stop(),
        "bytes": None if traffic is None else traffic.total_bytes,
        "lower": lower.sum().item(),
        "upper": upper.sum().item(),
    }
    if task["profile"]:
        with kinds.by_kind() as result["kinds"]:
            bound()
    runtime.shutdown()
    return result


def predicted_bytes(
    widths: tuple[int, ...], p: int, batch: int, moves: str = "auto", itemsize: int = 4
) -> int:
    """Bytes that one rank sends in a CROWN run, from the formulas of `crown.placement`.

    For an MLP whose Linear layers are Column, Row, Column, Row, ... (the last one replicated when
    their number is odd). S rows, lower and upper together; a pass in which A moves also reduces its
    bias. Weights are gathered for each chunk of rows that fits 16 MiB, shared by the ranks.

    Of all rows: where neurons are known to be stable less is sent, by as much as there are of them;
    that ranks agree on how many takes a few bytes for each layer.
    """
    def sent(rows: int, features: int) -> float:
        """Gathering or reduce-scattering A [rows, 2, B, features] over the rows."""
        return (p - 1) / p * 2 * batch * rows * features * itemsize

    layers = len(widths) - 1
    columns = range(0, layers - layers % 2, 2)  # layer i is Column, layer i + 1 Row
    total = 0.0
    for k in range(1, layers - 1):  # the start node after layer k, read by an activation
        sharded = k in columns
        neurons = widths[k + 1]
        rows = neurons if sharded else -(-neurons // p) * p
        at_once = max(1, 2**24 // p // (2 * batch * max(widths[: k + 2]) * itemsize))
        chunks = -(-rows // p // at_once)
        partial = False
        for i in columns:  # regions that the pass goes through with all rows
            if i >= k:
                continue
            # In through its Row (a start node at the Row knows all identity rows), and out.
            as_A = sent(rows, widths[i]) + (sent(rows, widths[i + 2]) if i + 1 != k else 0)
            # The weights of both, the bias of the first, the bounds that the activation reads.
            shard = widths[i + 1] // p * (widths[i] + 1 + 2 * batch + widths[i + 2])
            as_weights = (p - 1) * chunks * shard * itemsize
            weights = moves == "weights" or (moves == "auto" and as_weights < as_A)
            total += as_weights if weights else as_A
            partial |= not weights
        total += sent(rows, 1) if partial else 0  # the bias
        total += 0 if sharded else sent(rows, 1)  # every rank's results
    specification = widths[-1]  # the final pass is whole: all-reduces, twice a reduce-scatter
    total += 2 * sum(sent(specification, widths[i]) for i in columns) + 2 * sent(specification, 1)
    total += sum(sent(1, widths[i + 2]) for i in columns)  # the output at the clean input
    return round(total)


def _launch(task: dict) -> dict:
    """The figures of one mode: the worst rank's."""
    ranks = MODES[task["mode"]]
    from workers import launch

    results = launch(__file__, task, ranks, None, None)
    worst = {key: max(r[key] for r in results) for key in ("seconds", "mib")}
    return {**results[0], **worst}


def _table(model: str, rounds: list[dict[str, dict]], batch: int) -> str:
    def ratio(mode: str, key: str, base: str) -> float:
        if base not in rounds[0]:
            return float("nan")
        return statistics.median(r[mode][key] / r[base][key] for r in rounds)

    lines = [
        f"{model} ({'-'.join(map(str, WIDTHS[model]))}), batch {batch}, {len(rounds)} rounds",
        f"{'mode':<12}{'s':>8}{'/plain':>8}{'/tp1':>7}{'MiB':>9}{'/plain':>8}{'/tp1':>7}"
        f"{'bytes sent':>13}{'predicted':>12}{'lower bounds':>15}",
    ]
    for mode in rounds[0]:
        median = {k: statistics.median(r[mode][k] for r in rounds) for k in ("seconds", "mib")}
        sent, expected = rounds[0][mode]["bytes"], ""
        if sent is not None:
            expected = str(predicted_bytes(WIDTHS[model], MODES[mode], batch))
        lines.append(
            f"{mode:<12}{median['seconds']:>8.3f}{ratio(mode, 'seconds', 'plain'):>8.2f}"
            f"{ratio(mode, 'seconds', 'tp1'):>7.2f}{median['mib']:>9.1f}"
            f"{ratio(mode, 'mib', 'plain'):>8.2f}{ratio(mode, 'mib', 'tp1'):>7.2f}"
            f"{'' if sent is None else sent:>13}{expected:>12}{rounds[0][mode]['lower']:>15.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="runs per process after a warm-up")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--profile", action="store_true", help="what kind of work takes the time")
    parser.add_argument("--eps", type=float, default=0.02, help="L-inf radius (default 0.02)")
    parser.add_argument("--method", choices=("CROWN", "CROWN-Optimized"), default="CROWN")
    parser.add_argument("--opts", type=json.loads, default={}, help="bound_opts of ours, as JSON")
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    import kinds

    figures = {}
    for model, batch in itertools.product(arguments.models, arguments.batch):
        rounds = []
        for number in range(arguments.rounds):
            print(f"{model}, batch {batch}: round {number + 1} of {arguments.rounds}",
                  file=sys.stderr)
            rounds.append({
                mode: _launch({**vars(arguments), "json": None, "model": model, "mode": mode,
                               "batch": batch})
                for mode in arguments.modes
            })
        figures[f"{model}, batch {batch}"] = rounds
        print(_table(model, rounds, batch), end="\n\n", flush=True)
        if arguments.profile:
            shares = {mode: result["kinds"] for mode, result in rounds[-1].items()}
            print(kinds.table(shares), end="\n\n", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    from workers import start

    start(main, _one_mode)
