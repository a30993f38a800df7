"""How wide CROWN's bounds are beside plain auto_LiRPA 0.7.1's, operator by operator.

    python benchmarks/operators.py --auto-lirpa FOLDER [--eps 0.003 0.03 0.1] [--seeds 3]
        [--only GELU]

Each network is one kind of operator between linear maps, or a whole layer, on 4 tokens of 32
numbers (2 heads), with torch's initialisation; all of x moves by eps in L-inf. Printed is the mean
width of the outputs' bounds by this package's operators over that by auto_LiRPA's own graph of the
same function, the mean over the seeds. '-': auto_LiRPA cannot bound it (0.3 cannot build most of
them); 'unsound': a point violates its bounds.
"""

from __future__ import annotations

import argparse
import os

TOKENS, HIDDEN, FFN, HEADS = 4, 32, 64, 2


def _networks():
    """Name -> class of a network; `own` says whose operators it has."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    from transformer_models import Layer

    from lirpa_megatron.adapters import traced_ops

    activations = {
        "tanh GELU": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        "erf GELU": ("gelu", F.gelu),
        "quick GELU": ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x)),
        "SiLU": ("silu", lambda x: x * torch.sigmoid(x)),
        "squared ReLU": ("squared_relu", lambda x: F.relu(x) ** 2),
        "squared ReLU as a product": ("squared_relu", lambda x: F.relu(x) * F.relu(x)),
        "tanh": ("tanh", torch.tanh),
    }

    class Between(nn.Module):
        """Linear(operator(Linear x, ...))."""

        def __init__(self, own, inputs=1, wide=HIDDEN):
            super().__init__()
            self.own = own
            self.first = nn.ModuleList(nn.Linear(HIDDEN, wide) for _ in range(inputs))
            self.last = nn.Linear(wide, HIDDEN)

        def forward(self, x):
            return self.last(self.operator(*(layer(x) for layer in self.first)))

    def activation(kind, plain):
        class Activation(Between):
            def operator(self, x):
                return traced_ops.activation(x, kind) if self.own else plain(x)

        return Activation

    def gate(kind, plain):
        class Gate(Between):
            def __init__(self, own):
                super().__init__(own, 2, FFN)

            def operator(self, a, b):
                if self.own:
                    return traced_ops.product(traced_ops.activation(a, kind), b)
                return plain(a) * b

        return Gate

    class Norm(Between):
        rms = False

        def operator(self, x):
            one, none = torch.ones(HIDDEN), torch.zeros(HIDDEN)
            if self.own:
                return traced_ops.norm(x, one, none, 1e-5, self.rms)
            z = x if self.rms else x - x.mean(-1, keepdim=True)
            return z / ((z * z).mean(-1, keepdim=True) + 1e-5).sqrt()

    class RmsNorm(Norm):
        rms = True

    class Scores(Between):
        def __init__(self, own):
            super().__init__(own, 2)
            self.last = nn.Linear(TOKENS, TOKENS)

        def operator(self, q, k):
            size = HIDDEN // HEADS
            if self.own:
                return traced_ops.scores(q, k, size, size**-0.5)
            q, k = (z.view(1, TOKENS, HEADS, size).transpose(1, 2) for z in (q, k))
            return q @ k.transpose(-1, -2) * size**-0.5

    class Attention(Between):
        def __init__(self, own):
            super().__init__(own, 3)
            parts = ("norm", "attention", "gelu") if own else ()
            self.layer = [Layer(HIDDEN, FFN, HEADS, parts)]  # not a part: it has no weights here

        def operator(self, q, k, v):
            return self.layer[0].attend(q, k, v, None)

    class Whole(nn.Module):
        def __init__(self, own):
            super().__init__()
            parts = ("norm", "attention", "gelu") if own else ()
            self.layer = Layer(HIDDEN, FFN, HEADS, parts)

        def forward(self, x):
            return self.layer(x)

    found = {name: activation(*entry) for name, entry in activations.items()}
    found |= {f"{name} gate": gate(*activations[name]) for name in ("SiLU", "tanh GELU", "tanh")}
    found["ReLU gate"] = gate("relu", F.relu)
    return {
        **found, "LayerNorm": Norm, "RMSNorm": RmsNorm, "scores": Scores, "attention": Attention,
        "layer (pre-LN)": Whole,
    }


def _width(make, own: bool, eps: float, seed: int) -> float | str:
    """The mean width of the bounds, or why there is none that counts."""
    import torch
    from transformer_models import bound_plainly

    from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm

    torch.manual_seed(seed)
    network = make(own).eval().requires_grad_(False)
    x = torch.randn(1, TOKENS, HIDDEN)
    ball = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=eps))
    try:
        bounded = BoundedModule(network, x) if own else bound_plainly(network, x)
        lower, upper = bounded.compute_bounds(x=(ball,), method="CROWN")
    except (AssertionError, NotImplementedError, RuntimeError):
        if own:
            raise
        return "-"
    width = (upper - lower).mean()
    if not width.isfinite():
        return "-"
    return "unsound" if _is_violated(network, x, eps, lower, upper) else width.item()


def _is_violated(network, x, eps: float, lower, upper) -> bool:
    """Whether a corner that a gradient leads to lies outside of the bounds, beyond rounding."""
    import torch

    margin = 1e-4 * (upper - lower)
    directions = torch.eye(lower[0].numel()).view(-1, *lower.shape[1:])
    for direction in (directions, -directions):
        point = x.expand(len(direction), *x.shape[1:])
        for _ in range(5):
            with torch.enable_grad():
                at = point.detach().requires_grad_(True)
                wanted = torch.cat([network(one[None]) for one in at]) * direction
                (slope,) = torch.autograd.grad(wanted.sum(), at)
            point = x + eps * slope.sign()
            y = torch.cat([network(one[None]) for one in point])
            if ((y < lower - margin) | (y > upper + margin)).any():
                return True
    return False


def _ratio(make, eps: float, seeds: int) -> float | str:
    """Ours over plain's, the mean over the seeds."""
    ratios = []
    for seed in range(seeds):
        ours, plain = (_width(make, own, eps, seed) for own in (True, False))
        if isinstance(ours, str):
            raise SystemExit(f"{make.__name__}, eps {eps}, seed {seed}: this package's are {ours}")
        if isinstance(plain, str):
            return plain
        ratios.append(ours / plain)
    return sum(ratios) / len(ratios)


def _worker(task: dict) -> dict:
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    from lirpa_megatron.parallel import runtime

    found = {}
    with runtime.session():
        for name, make in _networks().items():
            if task["only"] not in name:
                continue
            found[name] = [_ratio(make, eps, task["seeds"]) for eps in task["eps"]]
    return {"result": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--eps", type=float, nargs="+", default=[0.003, 0.03, 0.1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="networks whose name has this in it")
    parser.add_argument("--limit", type=float, default=600, help="seconds")
    parser.add_argument("--auto-lirpa", default=os.environ.get("AUTO_LIRPA"),
                        help="a folder with auto_LiRPA; by default the one that is installed")
    arguments = parser.parse_args()
    from workers import host_version, result

    task = {"eps": arguments.eps, "seeds": arguments.seeds, "only": arguments.only}
    found = result(__file__, task, arguments.limit, arguments.auto_lirpa)
    print(f"widths of CROWN's bounds / those of auto_LiRPA {host_version(arguments.auto_lirpa)}\n")
    print("| network | " + " | ".join(f"eps {eps:g}" for eps in arguments.eps) + " |")
    print("|---" * (1 + len(arguments.eps)) + "|")
    for name, ratios in found.items():
        cells = [r if isinstance(r, str) else f"{r:.3f}" for r in ratios]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    from workers import start

    start(main, _worker)
