"""Certified training with Megatron's loop: a classifier of digits is fine-tuned on its bounds.

    python examples/certified_training.py
    torchrun --nproc-per-node 2 examples/certified_training.py                           TP=2
    torchrun --nproc-per-node 2 examples/certified_training.py --tensor-parallel-size 1  DP=2

A network (64-256-256-10, ReLU) learns the 8x8 scans of handwriting that scikit-learn bundles as
usual, and then on bounds over every box of radius eps around an image, while eps grows to 0.1 and
the bounds go from CROWN-IBP to IBP. Printed are natural accuracy, accuracy under a gradient attack,
and certified accuracy before and after; a plot has certified accuracy against the radius. All sizes
train the same network up to rounding. A run that is started again goes on after the last epoch that
was saved.
"""

import argparse
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from sklearn.datasets import load_digits
from torch import nn

from lirpa_megatron import (
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    classification_margins,
    parallelize,
)
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel import runtime
from lirpa_megatron.training import CertifiedLoss, Ramp

WIDTHS, CLASSES, HELD_OUT = (64, 256, 256, 10), 10, 360
EPS, RADII = 0.1, (0.01, 0.02, 0.05, 0.1, 0.15)
PHASES = ("natural", "certified")
BATCH, RATE = 128, {"natural": 1e-2, "certified": 2e-3}


def images():
    """(train x, train y, held-out x, held-out y), x [images, 64] in [0, 1]."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x, y = torch.tensor(digits.data[order] / 16).float(), torch.tensor(digits.target[order])
    return x[:-HELD_OUT], y[:-HELD_OUT], x[-HELD_OUT:], y[-HELD_OUT:]


def network():
    """Column- and row-parallel layers, the same function at every tensor-parallel size."""
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in zip(WIDTHS, WIDTHS[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return parallelize(nn.Sequential(*layers[:-1]))


def box(x, eps):
    """Images whose pixels move by up to eps within [0, 1]."""
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    return BoundedTensor(x, PerturbationLpNorm(norm=math.inf, x_L=low, x_U=high))


def train(phase, epochs, model, loss_of, data, folder):
    """Trains with Megatron's DistributedDataParallel, epoch by epoch; saves each."""
    size = runtime.tp_size()
    config = TransformerConfig(  # Megatron's reductions ask it for the parallel sizes
        num_layers=1, hidden_size=WIDTHS[1], num_attention_heads=size,
        tensor_model_parallel_size=size,
    )
    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(overlap_grad_reduce=False), model
    )
    ddp.zero_grad_buffer()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE[phase])
    x, y = data
    steps = len(x) // BATCH
    radius = Ramp(start=0, length=steps * epochs * 2 // 3, first=0.0, last=EPS)
    crown_share = Ramp(start=0, length=steps * epochs * 2 // 3, first=1.0, last=0.0, mid=0)
    replicas = parallel_state.get_data_parallel_world_size()
    replica = parallel_state.get_data_parallel_rank()
    state = folder / f"{phase}-{runtime.tp_rank()}of{size}.pt"
    first = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"] + 1
    firsts = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(firsts, first)
    if len(set(firsts)) > 1:
        raise UserError(f"{folder} was saved after different epochs by the processes: --restart")
    for epoch in range(first, epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        total = 0.0
        for step, batch in enumerate(order.split(BATCH)[:steps]):
            iteration = epoch * steps + step
            own = batch.chunk(replicas)[replica]
            loss = F.cross_entropy(ddp(x[own]), y[own])
            if phase == "certified":
                worst = loss_of((box(x[own], radius(iteration)),), y[own], iteration=iteration,
                                crown_share=crown_share(iteration))
                loss = 0.5 * loss + 0.5 * worst.loss.mean()
            ddp.zero_grad_buffer()
            loss.backward()
            finalize_model_grads([ddp])
            for parameter in model.parameters():
                parameter.grad = parameter.main_grad
            optimizer.step()
            total += float(loss.detach()) / steps
        if runtime.is_rank0():
            print(f"\r{phase} epoch {epoch + 1}/{epochs} loss {total:.3f} ", end="",
                  file=sys.stderr, flush=True)
        if replica == 0:
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "epoch": epoch}
            torch.save(saved, state.with_suffix(".tmp"))
        torch.distributed.barrier()  # all or, but for a moment, none of the processes have saved
        if replica == 0:
            state.with_suffix(".tmp").replace(state)
    if runtime.is_rank0():
        print(file=sys.stderr)
    for parameter in model.parameters():
        parameter.grad = None


def attacked(model, x, y, eps, steps=20):
    """Points of the boxes that raise the loss."""
    generator = torch.Generator().manual_seed(0)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    point = low + (high - low) * torch.rand(x.shape, generator=generator)
    for _ in range(steps):
        point.requires_grad_(True)
        (slope,) = torch.autograd.grad(F.cross_entropy(model(point), y), point)
        point = (point.detach() + 2.5 * eps / steps * slope.sign()).clamp(low, high)
    return point


def evaluate(model, x, y):
    """(natural, attacked and certified accuracy at EPS, certified accuracy at each of RADII)."""
    bounded, C = BoundedModule(model, x), classification_margins(y, CLASSES)
    bounded.eval()
    right = model(x).argmax(1) == y

    def certified(eps):
        lower, _ = bounded.compute_bounds((box(x, eps),), C=C, method="CROWN", bound_upper=False)
        return float((right & (lower.amin(1) > 0)).double().mean())

    robust = right & (model(attacked(model, x, y, EPS)).argmax(1) == y)
    with torch.no_grad():
        curve = [certified(eps) for eps in RADII]
    return [float(right.double().mean()), float(robust.double().mean()), certified(EPS)], curve


def plot(path, curves):
    """Certified accuracy against the radius, where matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5))
    for name, curve in curves.items():
        axes.plot(RADII, curve, marker="o", label=name)
    axes.set(xlabel="L-inf radius", ylabel="certified accuracy", ylim=(-0.02, 1.02),
             title="Digits, CROWN, held-out images")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return f"plot: {path}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensor-parallel-size", type=int, help="default: all processes")
    parser.add_argument("--epochs", type=int, nargs=2, default=(10, 60), metavar="N",
                        help="natural and certified epochs (default 10 60)")
    parser.add_argument("--folder", type=Path, default=Path("build/certified_training"))
    parser.add_argument("--restart", action="store_true", help="forget what was saved")
    chosen = parser.parse_args()
    with runtime.session(chosen.tensor_parallel_size):
        if runtime.is_rank0():
            if chosen.restart:
                shutil.rmtree(chosen.folder, ignore_errors=True)
            chosen.folder.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        x, y, held_x, held_y = images()
        model = network()
        # Before Megatron's DistributedDataParallel: it wraps the same parameters.
        loss_of = CertifiedLoss(model, (x[:1],), num_classes=CLASSES, method="CROWN-IBP")
        found = {}
        for phase, epochs in zip(PHASES, chosen.epochs, strict=True):
            train(phase, epochs, model, loss_of, (x, y), chosen.folder)
            found[phase] = evaluate(model, held_x, held_y)
        if runtime.is_rank0():
            others = [eps for eps in RADII if eps != EPS]
            print(f"| training | natural | attacked at {EPS} | certified at {EPS} | "
                  + " | ".join(f"at {eps}" for eps in others) + " |\n" + "|---" * 8 + "|")
            for phase, (at_eps, curve) in found.items():
                beside = [v for eps, v in zip(RADII, curve, strict=True) if eps != EPS]
                print(f"| {phase} | " + " | ".join(f"{v:.1%}" for v in at_eps + beside) + " |")
            curves = {phase: curve for phase, (_, curve) in found.items()}
            print(plot(chosen.folder / "certified_accuracy.png", curves))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
