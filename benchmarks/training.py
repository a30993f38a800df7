"""Time and memory of a training step with bounds against the same step without them, at TP=1 and 2.

    python benchmarks/training.py [--models mlp bert] [--steps 5] [--limit 300] [--json FILE]

'mlp' is 784-1024-1024-1024-10 (ReLU, batch 64), 'bert' the classifier of examples/sst (2 layers,
hidden 64, FFN 128, 8 tokens, batch 32), random weights; CROWN, which keeps all rows of all passes
for the gradient, gets a batch of 1. A step is the loss, its gradients with Megatron's
DistributedDataParallel and finalize_model_grads, and torch's Adam. With bounds the loss is half the
cross-entropy and half that of the bounds (radius 0.01).

Every mode runs in processes of its own, one thread each; medians of the steps after two. Memory is
the most that the worst rank has allocated, above what it is after the imports (weights included).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

BOUNDS = ("without", "IBP", "CROWN-IBP", "CROWN")
EPS = 0.01


def _mlp(task):
    """(model, Megatron's config, inputs of a radius, labels, clean logits, classes)."""
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig
    from torch import nn

    from lirpa_megatron import BoundedTensor, PerturbationLpNorm, parallelize
    from lirpa_megatron.parallel import runtime

    widths = (784, 1024, 1024, 1024, 10)
    layers = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    model = parallelize(nn.Sequential(*layers[:-1]))
    config = TransformerConfig(
        num_layers=1, hidden_size=1024, num_attention_heads=runtime.tp_size(),
        tensor_model_parallel_size=runtime.tp_size(),
    )
    x, y = torch.rand(task["batch"], 784), torch.randint(0, 10, (task["batch"],))

    def inputs():
        return (BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=EPS)),)

    return model, config, inputs, y, lambda: model(x), 10


def _bert(task):
    import sst_data
    import torch
    import train as sst_train

    from lirpa_megatron import bert_head, perturb_tokens

    args = sst_train.megatron_arguments(sst_train.parse_arguments(["--save", "none"]), 1000)
    args.hidden_dropout = args.attention_dropout = 0.0
    model = sst_train.build(args)
    view = bert_head(model, "binary")
    ids = torch.randint(len(sst_data.SPECIAL), 1000, (task["batch"], 8))
    y = torch.randint(0, 2, (task["batch"],))
    mask = torch.ones_like(ids)

    def inputs():
        return perturb_tokens(view, ids, eps=EPS, attention_mask=mask,
                              tokentype_ids=torch.zeros_like(ids))

    def logits():
        return sst_train.classify(model, sst_train.embed(model, ids), mask)

    return view, model.config, inputs, y, logits, 2


MODELS = {"mlp": _mlp, "bert": _bert}


def _one_mode(task: dict) -> dict:
    """Runs in a process of its own (one per rank)."""
    import torch
    import torch.nn.functional as F
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from memory import PeakMemory

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "sst"))
    from lirpa_megatron.parallel import runtime
    from lirpa_megatron.training import CertifiedLoss

    runtime.initialize()
    import train  # noqa: F401

    memory = PeakMemory()
    torch.manual_seed(0)
    model, config, inputs, labels, logits, classes = MODELS[task["model"]](task)
    loss_of = None
    if task["bounds"] != "without":
        loss_of = CertifiedLoss(model, inputs(), num_classes=classes, method=task["bounds"])
    module = getattr(model, "model", model)
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), module)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)
    seconds = []
    for step in range(task["steps"] + 2):
        start = time.perf_counter()
        ddp.zero_grad_buffer()
        loss = F.cross_entropy(logits(), labels)
        if loss_of is not None:
            loss = loss / 2 + loss_of(inputs(), labels, iteration=step).loss.mean() / 2
        loss.backward()
        finalize_model_grads([ddp])
        for parameter in module.parameters():
            parameter.grad = parameter.main_grad
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    result = {"seconds": statistics.median(seconds[2:]), "mib": memory.stop(),
              "loss": float(loss.detach())}
    runtime.shutdown()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--bounds", nargs="+", choices=BOUNDS, default=list(BOUNDS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 2], help="tensor-parallel")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300, help="seconds for one mode")
    parser.add_argument("--json", type=Path, help="write every figure there")
    arguments = parser.parse_args()
    from workers import launch

    figures = {}
    for model in arguments.models:
        batch = {"mlp": 64, "bert": 32}[model]
        print(f"\n{model}, batch {batch}\n\n| bounds | TP | s per step | / without | / TP=1 "
              "| MiB | / without | / TP=1 |")
        print("|---" * 8 + "|", flush=True)
        found: dict = {}
        for bounds in arguments.bounds:
            for size in arguments.sizes:
                few = 1 if bounds == "CROWN" else batch
                task = {"model": model, "bounds": bounds, "steps": arguments.steps, "batch": few}
                ranks = launch(__file__, task, size, arguments.limit, None)
                name = bounds if few == batch else f"{bounds}, batch {few}"
                if ranks is None:
                    print(f"| {name} | {size} | > {arguments.limit:g} in all |" + " - |" * 5)
                    continue
                found[bounds, size] = {k: max(r[k] for r in ranks) for k in ("seconds", "mib")}
                own, cells = found[bounds, size], []
                for key, form in (("seconds", ".4f"), ("mib", ".0f")):
                    cells.append(f"{own[key]:{form}}")
                    for base in (("without", size), (bounds, 1)):
                        known = base in found and few == batch or base[0] == bounds
                        cells.append(f"{own[key] / found[base][key]:.2f}" if known else "-")
                print(f"| {name} | {size} | {' | '.join(cells)} |", flush=True)
        figures[model] = {f"{b}, TP={s}": v for (b, s), v in found.items()}
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    from workers import start

    start(main, _one_mode)
