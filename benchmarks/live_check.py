"""What the comparison with the live model costs: its seconds beside those of CROWN.

    python benchmarks/live_check.py [--models mnist-256x6 deep] [--batch 1 8] [--layers 1 3 6]
        [--sequence 8 16] [--repeats 3]

The models are those of `run.py` (feed-forward networks of random weights) and `transformers.py`
(GPTModel of megatron-core, hidden 128), float32, one process, one thread. Each row is a second and
later call of `compute_bounds`, the best of the repeats, with the seconds that `LiveCheck` took of
it: one forward pass of the live model, and the rest: the comparison, a look at what its modules
say, and putting back what the pass has left on them.
"""

from __future__ import annotations

import argparse
import time


def _networks(names, batches):
    """Name -> (bounded module, inputs)."""
    import torch
    from run import WIDTHS, _fill, _network

    from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm

    for name, batch in ((name, batch) for name in names for batch in batches):
        widths = WIDTHS[name]
        x = torch.rand(batch, widths[0], generator=torch.Generator().manual_seed(9))
        ball = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=0.01))
        yield f"{name}, batch {batch}", BoundedModule(_fill(_network(widths), widths), x), (ball,)


def _transformers(layers, sequences):
    import torch
    from transformers import _ours, _plain

    from lirpa_megatron import BoundedTensor, PerturbationLpNorm

    for depth in layers:
        for sequence in sequences:
            task = {"layers": depth, "sequence": sequence}
            x = torch.randn(1, sequence, 128, generator=torch.Generator().manual_seed(9))
            bounded, others = _ours(_plain(task), x, task)
            ball = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=1e-3))
            yield f"GPT, {depth} layers, {sequence} tokens", bounded, (ball, *others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["mnist-256x6", "deep"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--layers", nargs="*", type=int, default=[1, 3, 6])
    parser.add_argument("--sequence", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    import torch

    from lirpa_megatron.parallel import runtime

    torch.set_num_threads(1)
    runtime.initialize()
    print("| model | CROWN, s | forward pass, ms | rest, ms | all, share | difference |")
    print("|---" * 6 + "|")
    models = [
        _networks(arguments.models, arguments.batch),
        _transformers(arguments.layers, arguments.sequence),
    ]
    for name, bounded, inputs in (model for group in models for model in group):
        taken = []
        for _ in range(arguments.repeats + 1):
            start = time.perf_counter()
            with torch.no_grad():
                bounded.compute_bounds(x=inputs, method="CROWN")
            live = bounded.live
            taken.append((time.perf_counter() - start, live.seconds, live.forward_seconds))
        seconds, live, forward = map(min, zip(*taken[1:], strict=True))
        print(f"| {name} | {seconds:.3f} | {1e3 * forward:.2f} | {1e3 * (live - forward):.2f} | "
              f"{100 * live / seconds:.2f}% | {bounded.live.difference:.1e} |", flush=True)
    runtime.shutdown()


if __name__ == "__main__":
    main()
