"""What outward rounding costs, and how much it adds to bounds.

    python benchmarks/rounding.py [--repeat 3] [--only relu]

For networks of random weights in float64, on one rank and one thread: seconds of processor time of
ordinary and of outward bounds (the least of some runs, taken in turns), and the largest part of its
width that a bound grew by.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time

import torch
from torch import nn

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    widths: tuple[int, ...]
    act: type[nn.Module]
    method: str
    eps: float = 0.01
    batch: int = 8

    def model(self) -> nn.Module:
        layers: list[nn.Module] = []
        for n, m in itertools.pairwise(self.widths):
            layers += [nn.Linear(n, m), self.act()]
        return nn.Sequential(*layers[:-1]).double().eval()


WIDE = (784, *[256] * 6, 10)
CASES = [
    Case(f"{name} {method}", widths, act, method, batch=batch)
    for name, widths, act, batch in (
        ("relu 256x6", WIDE, nn.ReLU, 8),
        ("relu 1024x3", (256, *[1024] * 3, 10), nn.ReLU, 2),
        ("gelu 256x4", WIDE[:5] + (10,), nn.GELU, 8),
    )
    for method in ("IBP", "CROWN-IBP", "CROWN")
] + [Case("relu 256x6 CROWN-Optimized", WIDE, nn.ReLU, "CROWN-Optimized", batch=1)]


def measure(case: Case, repeat: int) -> tuple[float, float, float]:
    """(seconds of ordinary bounds, of outward ones, largest part of a width that is added)."""
    torch.manual_seed(0)
    model, x = case.model(), torch.rand(case.batch, case.widths[0], dtype=torch.float64)
    best, found = {}, {}
    for _, rounding in itertools.product(range(repeat), ("nearest", "outward")):
        options = {"rounding": rounding, "optimize_bound_args": {"iteration": 5}}
        module = BoundedModule(model, x, options)
        where = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=case.eps))
        start = time.process_time()
        with torch.set_grad_enabled(case.method == "CROWN-Optimized"):
            bounds = module.compute_bounds(x=(where,), method=case.method)
        spent = time.process_time() - start
        best[rounding] = min(best.get(rounding, spent), spent)
        found[rounding] = [b.detach() for b in bounds]
    (lower, upper), (low, high) = found["nearest"], found["outward"]
    added = torch.stack([lower - low, high - upper]) / (upper - lower)
    return best["nearest"], best["outward"], float(added.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3)
    torch.set_num_threads(1)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    arguments = parser.parse_args()
    print("| network, method | nearest (s) | outward (s) | ratio | added / width |")
    print("|---|---|---|---|---|")
    for case in CASES:
        if arguments.only in case.name:
            nearest, outward, added = measure(case, arguments.repeat)
            print(f"| {case.name} | {nearest:.3f} | {outward:.3f} | {outward / nearest:.2f} | "
                  f"{added:.0e} |", flush=True)


if __name__ == "__main__":
    main()
