"""What branch and bound decides of networks whose activations are no ReLUs, in a limit of time.

    python benchmarks/nonlinear.py [--kinds tanh sigmoid gelu] [--widths 784 100 100 10]
        [--count 6] [--seconds 60] [--json FILE]
    python benchmarks/nonlinear.py --kinds transformer --widths 64 16 10

A classifier of clusters in [0, 1]^784, trained for some steps, and boxes around samples. Each task
is one row, the logit of the right class minus another one's, at a radius at which CROWN-Optimized
with 20 iterations leaves the row open and signed gradient steps find no counterexample: a share of
the way from the largest radius that the first proves to the smallest at which the second finds one.
Each runs in a process of its own, one thread, float32; seconds are the processor's.

Of a transformer `widths` are inputs, which are four tokens, hidden size, and classes: one block of
two heads with LayerNorms and GELU, as torch exports it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

SEED, SHARES = 0, (0.02, 0.05, 0.1)
KINDS = {"tanh": "Tanh", "sigmoid": "Sigmoid", "gelu": "GELU", "silu": "SiLU", "transformer": ""}
TOKENS, HEADS = 4, 2


def _trained(kind, widths):
    """(network, samples, labels)."""
    import torch
    from torch import nn

    torch.manual_seed(SEED)
    if kind == "transformer":
        net = _transformer(*widths)
    else:
        layers = []
        for n, m in itertools.pairwise(widths):
            layers += [nn.Linear(n, m), getattr(nn, KINDS[kind])()]
        net = nn.Sequential(*layers[:-1])
    centers = torch.rand(widths[-1], widths[0])

    def drawn(count):
        labels = torch.randint(widths[-1], (count,))
        noise = 0.6 * torch.randn(count, widths[0])
        return (centers[labels] + noise).clamp(0, 1), labels

    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(300):
        x, labels = drawn(128)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), labels).backward()
        optimizer.step()
    net = net.requires_grad_(False).eval()
    return (_exported(net, widths[0]) if kind == "transformer" else net, *drawn(200))


def _transformer(inputs, h, classes):
    from torch import nn

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(inputs // TOKENS, h)
            self.block = nn.TransformerEncoderLayer(
                h, HEADS, 2 * h, dropout=0.0, activation="gelu", batch_first=True,
                norm_first=True,
            )
            self.head = nn.Linear(h, classes)

        def forward(self, x):
            x = self.embed(x.view(len(x), TOKENS, inputs // TOKENS))
            return self.head(self.block(x).mean(1))

    return Patches()


def _exported(net, inputs):
    """The network that is read from the file which torch exports."""
    import tempfile
    import warnings

    import torch

    from lirpa_megatron import parallelize
    from lirpa_megatron.networks.network import Network
    from lirpa_megatron.networks.onnx_import import read_onnx

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of its age
        path = f"{folder}/net.onnx"
        torch.backends.mha.set_fastpath_enabled(False)  # one operator, which no file has
        torch.onnx.export(net, (torch.zeros(1, inputs),), path, dynamo=False,
                          input_names=["x"], opset_version=17)
        found = read_onnx(path)
    made = Network.from_weights(found.description, found.weights, torch.float32)
    return parallelize(made.requires_grad_(False).eval())


def _attacked(net, x, c, eps) -> float:
    """A small value of c . y in the box."""
    import torch

    low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
    at, best = x.clone(), float("inf")
    for step in range(60):
        at.requires_grad_(True)
        y = net(at) @ c
        best = min(best, float(y))
        (slope,) = torch.autograd.grad(y.sum(), at)
        at = (at.detach() - 0.5 * 0.93**step * (high - low) * slope.sign()).clamp(low, high)
    return best


def _one(task: dict) -> dict:
    """Runs in a process of its own."""
    import torch

    from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm
    from lirpa_megatron.complete import SearchOptions, branch_and_bound

    torch.set_num_threads(1)
    net, samples, labels = _trained(task["kind"], task["widths"])
    right = (net(samples).argmax(1) == labels).nonzero().flatten()
    x = samples[right[task["index"]], None]
    order = net(x)[0].argsort(descending=True)
    c = torch.zeros(task["widths"][-1])
    c[order[0]], c[order[1]] = 1, -1
    graph = BoundedModule(net, x, bound_opts={"optimize_bound_args": {"iteration": 20}})

    def box(eps):
        ends = PerturbationLpNorm(norm=float("inf"), x_L=(x - eps).clamp(0, 1),
                                  x_U=(x + eps).clamp(0, 1))
        return BoundedTensor(x, ends)

    def bound(eps):
        found, _ = graph.compute_bounds(
            x=(box(eps),), C=c[None, None], method="CROWN-Optimized", bound_upper=False
        )
        return float(found)

    def largest(holds):
        low, high = 0.0, 0.5
        for _ in range(9):
            middle = (low + high) / 2
            low, high = (middle, high) if holds(middle) else (low, middle)
        return low

    proved = largest(lambda eps: bound(eps) > 0)
    safe = largest(lambda eps: _attacked(net, x, c, eps) > 0)
    eps = proved + task["share"] * (safe - proved)
    begin = time.process_time()
    before = bound(eps)
    alone = time.process_time() - begin
    limit = begin + alone + task["seconds"]
    options = SearchOptions(branching="nonlinear")
    # the limit is one of the processor's time, the search's own of the clock
    found = branch_and_bound(
        net, box(eps), c[None, None], options=options, timeout=20 * task["seconds"],
        progress=lambda *_: _end(limit),
    )
    return {"eps": eps, "proved_eps": proved, "safe_eps": safe, "crown_optimized": before,
            "status": found.status, "bound": found.bound, "domains": found.domains,
            "seconds": time.process_time() - begin - alone}


class _Over(Exception):
    pass


def _end(limit: float) -> None:
    if time.process_time() > limit:
        raise _Over


def _worker(task: dict) -> dict:
    try:
        return _one(task)
    except _Over:
        return {"status": "timeout"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["tanh", "sigmoid", "gelu"])
    parser.add_argument("--widths", nargs="+", type=int, default=[784, 100, 100, 10])
    parser.add_argument("--count", type=int, default=6, help="samples at each share")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--seconds", type=float, default=60, help="of the processor, for each")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from workers import launch

    print("| activation | share of the way | decided | of | seconds, each of the decided | domains "
          "|\n|---|---|---|---|---|---|")
    figures = []
    for kind, share in itertools.product(options.kinds, options.shares):
        found = []
        for index in range(options.count):
            task = {"kind": kind, "widths": options.widths, "index": index, "share": share,
                    "seconds": options.seconds}
            (one,) = launch(__file__, task, 1, None, None)
            found.append(one)
            figures.append({**task, "limit": options.seconds, **one})
        done = [one for one in found if one["status"] in ("proved", "refuted")]
        spent = [one["seconds"] for one in done] or [0.0]
        domains = [one["domains"] for one in done] or [0]
        print(f"| {kind} | {share:g} | {len(done)} | {len(found)} | {min(spent):.1f} to "
              f"{max(spent):.1f} | {min(domains)} to {max(domains)} |", flush=True)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    from workers import start

    start(main, _worker)
