"""How wide bounds of elementwise functions are beside plain auto_LiRPA 0.7.1's.

    python benchmarks/functions.py --auto-lirpa FOLDER [--only tanh] [--seeds 2]

Default options on both sides (alpha-CROWN: 20 iterations), float64. Each cell is our width over
auto_LiRPA's, of the same function of the same intervals: the mean, and the largest in brackets.

- alone: y = f(x) on intervals of width 1e-6 to 1e3 at several centers (alpha: 0.1, 1 and 10, one
  width after another, as its loss is a sum);
- network: Linear(f(Linear x)), 8-16-8, random weights, the function's intervals on average 0.1, 1,
  10 or 100 wide.

'-': auto_LiRPA cannot bound it. Where a point violates its bounds they are not compared: '(n left
out)' says of how many. Ratios that rounding decides (widths below 1e-9 of the values) are left out
too. A point that violates ours ends the run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import sys

METHODS = ("IBP", "CROWN", "CROWN-Optimized")
WIDTHS = (1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3)
ALPHA_WIDTHS = (0.1, 1.0, 10.0)
NETWORK_WIDTHS = (0.1, 1.0, 10.0, 100.0)
CENTERS = (-3.0, -1.0, -0.3, 0.0, 0.5, 1.0, 2.0, 5.0)
POSITIVE = (0.2, 0.6, 1.0, 2.0, 5.0, 30.0, 600.0)
INPUTS, HIDDEN = 8, 16


def _functions():
    """Name -> (function, whether of positive numbers alone)."""
    import torch
    import torch.nn.functional as F

    anywhere = {
        "tanh": torch.tanh, "sigmoid": torch.sigmoid, "log-sigmoid": F.logsigmoid,
        "softsign": F.softsign, "atan": torch.atan, "erf": torch.erf, "exp": torch.exp,
        "softplus": F.softplus, "mish": F.mish, "SiLU": F.silu,
        "tanh GELU": lambda x: F.gelu(x, approximate="tanh"), "x ** 2": lambda x: x**2,
        "x * x": lambda x: x * x, "x ** 3": lambda x: x**3, "x ** 4": lambda x: x**4,
        "sin": torch.sin, "cos": torch.cos, "abs": torch.abs,
        "LeakyReLU": lambda x: F.leaky_relu(x, 0.1), "ReLU": F.relu,
        "maximum": lambda x: torch.maximum(x, 0.7 - x),
        "minimum": lambda x: torch.minimum(x, 0.3 - 0.5 * x),
        "softmax": lambda x: torch.softmax(x, -1), "ReLU6": F.relu6, "ELU": F.elu,
    }
    positive = {
        "log": torch.log, "log1p": torch.log1p, "sqrt": torch.sqrt,
        "reciprocal": torch.reciprocal, "x ** 1.5": lambda x: x**1.5,
    }
    return {**{name: (f, False) for name, f in anywhere.items()},
            **{name: (f, True) for name, f in positive.items()}}


def _bounds(model, lower, upper, method: str, own: bool):
    """(lower, upper), or None where auto_LiRPA cannot."""
    from transformer_models import bound_plainly

    from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm

    x = (lower + upper) / 2
    ball = BoundedTensor(x, PerturbationLpNorm(norm=math.inf, x_L=lower, x_U=upper))
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            bounded = BoundedModule(model, x) if own else bound_plainly(model, x)
            found = bounded.compute_bounds(x=(ball,), method=method)
        except (AssertionError, NotImplementedError, TypeError, RuntimeError):
            if own:
                raise
            return None
    return tuple(bound.detach() for bound in found)


def _outside(model, lower, upper, bounds):
    """Which outputs have a point outside of their bounds: a grid, random points, corners."""
    import torch

    share = torch.linspace(0, 1, 2001).view(-1, *[1] * lower.ndim)
    drawn = torch.rand(2000, *lower.shape)
    shares = torch.cat([share.expand(-1, *lower.shape), drawn, drawn.round()])
    y = model((lower + (upper - lower) * shares).flatten(0, 1)).unflatten(0, shares.shape[:2])
    low, high = bounds
    slack = 1e-9 * (high - low).nan_to_num(0) + 1e-12 * (1 + y.abs().amax(0))
    return ((y < low - slack) | (y > high + slack)).any(0) | ~(high >= low)


def _compare(model, lower, upper, method: str, name: str):
    """Ratios of widths, and of how many outputs auto_LiRPA's bounds are violated; None: '-'."""
    plain = _bounds(model, lower, upper, method, own=False)
    if plain is None:
        return None
    ours = _bounds(model, lower, upper, method, own=True)
    if _outside(model, lower, upper, ours).any():
        raise SystemExit(f"{name}, {method}: a point violates this package's bounds")
    wrong = _outside(model, lower, upper, plain)
    width = plain[1] - plain[0]
    fine = ~wrong & width.isfinite() & (width > 1e-9 * plain[0].abs()) & (width > 1e-9)
    return ((ours[1] - ours[0]) / width)[fine].tolist(), int(wrong.sum())


def _alone(name: str, f, positive: bool, method: str):
    import torch

    widths = ALPHA_WIDTHS if method == "CROWN-Optimized" else WIDTHS
    groups = [[w] for w in widths] if method == "CROWN-Optimized" else [widths]
    parts = []
    for group in groups:
        centers = POSITIVE if positive else CENTERS
        pairs = [(c - w / 2, c + w / 2) for w in group for c in centers]
        if positive:
            pairs = [pair for pair in pairs if pair[0] > 0]
        ends = torch.tensor(pairs).t().unsqueeze(1)
        parts.append(_compare(_module(f), ends[0], ends[1], method, name))
    return _together(parts)


def _network(name: str, f, positive: bool, method: str, seeds: int):
    import torch
    from torch import nn

    parts = []
    for seed in range(seeds if method != "CROWN-Optimized" else 1):
        for width in NETWORK_WIDTHS:
            generator = torch.Generator().manual_seed(seed)
            first, last = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, INPUTS)
            for parameter in [*first.parameters(), *last.parameters()]:
                parameter.data = torch.randn(parameter.shape, generator=generator)
            x = torch.randn(1, INPUTS, generator=generator)
            radius = first.weight.abs().sum(1)
            eps = width / 2 / radius.mean()
            if positive:  # intervals begin between 0.2 and 0.5
                start = 0.2 + 0.3 * torch.rand(HIDDEN, generator=generator)
                first.bias.data += start - (first(x) - eps * radius)[0]
            network = nn.Sequential(first, _module(f), last).requires_grad_(False)
            parts.append(_compare(network, x - eps, x + eps, method, name))
    return _together(parts)


def _module(f):
    from torch import nn

    class Function(nn.Module):
        def forward(self, x):
            return f(x)

    return Function()


def _together(parts) -> str:
    if None in parts:
        return "-"
    ratios = [ratio for found, _ in parts for ratio in found]
    wrong = sum(count for _, count in parts)
    note = f" ({wrong} left out)" if wrong else ""
    if not ratios:
        return "unsound" if wrong else "-"
    return f"{sum(ratios) / len(ratios):.3f} ({max(ratios):.4f}){note}"


def _worker(task: dict) -> dict:
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    from lirpa_megatron.parallel import runtime

    found = {}
    with runtime.session():
        for name, (f, positive) in _functions().items():
            if task["only"] and name not in task["only"]:
                continue
            cells = [_alone(name, f, positive, method) for method in METHODS]
            cells += [_network(name, f, positive, m, task["seeds"]) for m in METHODS[1:]]
            found[name] = cells
            print(name, cells, file=sys.stderr, flush=True)
    return {"result": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of functions")
    parser.add_argument("--seeds", type=int, default=2, help="of networks (alpha: 1)")
    parser.add_argument("--limit", type=float, default=1800, help="seconds")
    parser.add_argument("--auto-lirpa", default=os.environ.get("AUTO_LIRPA"),
                        help="a folder with auto_LiRPA; by default the one that is installed")
    arguments = parser.parse_args()
    from workers import host_version, result

    os.environ["PYTHONBREAKPOINT"] = "0"  # auto_LiRPA's alpha loop stops in the debugger at NaN
    task = {"only": arguments.only, "seeds": arguments.seeds}
    found = result(__file__, task, arguments.limit, arguments.auto_lirpa)
    print(f"widths / those of auto_LiRPA {host_version(arguments.auto_lirpa)}\n")
    print("| function | alone, IBP | CROWN | alpha | network, CROWN | alpha |\n" + "|---" * 6 + "|")
    for name, cells in found.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    from workers import start

    start(main, _worker)
