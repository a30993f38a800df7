"""Certified training with Megatron's loop: fine-tunes a model on its bounds.

    python examples/certified_training.py --model digits
    python examples/certified_training.py --model sentences
    torchrun --nproc-per-node 2 examples/certified_training.py ...                           TP=2
    torchrun --nproc-per-node 2 examples/certified_training.py --tensor-parallel-size 1 ...  DP=2

'digits' is a network of MNIST's size (784-256-256-10, ReLU) for the scans of handwriting that
scikit-learn bundles; it is first trained as usual. 'sentences' is the trained BERT of examples/sst.
Both are then trained on bounds over boxes of radius eps around the inputs, while eps grows. The
script prints natural accuracy, accuracy under a gradient attack and certified accuracy before and
after, and plots certified accuracy against the radius. All tensor-parallel sizes train the same
model up to rounding. A run that is restarted continues after the last saved epoch. For sentences, a
Megatron checkpoint and the certified results are saved too (`certified_models`).
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from certified_models import MODELS
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel import runtime
from lirpa_megatron.training import Ramp

PHASES = ("natural", "certified")


def resumed(state, model, optimizer, folder):
    """The epoch to begin with: after the last that all processes have saved."""
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
    return first


def train(phase, epochs, task, folder):
    """Trains with Megatron's DistributedDataParallel, epoch by epoch; saves each."""
    model = task.model
    ddp = DistributedDataParallel(
        task.config, DistributedDataParallelConfig(overlap_grad_reduce=False), model
    )
    ddp.zero_grad_buffer()
    optimizer = torch.optim.Adam(task.groups(phase))
    steps = task.count // task.batch
    ramp = steps * epochs * 2 // 3
    radius = Ramp(start=0, length=ramp, first=0.0, last=task.eps)
    crown_share = Ramp(start=0, length=ramp, first=1.0, last=0.0, mid=0)
    replicas = parallel_state.get_data_parallel_world_size()
    replica = parallel_state.get_data_parallel_rank()
    state = folder / f"{phase}-{runtime.tp_rank()}of{runtime.tp_size()}.pt"
    first = resumed(state, model, optimizer, folder)
    for epoch in range(first, epochs):
        order = torch.randperm(task.count, generator=torch.Generator().manual_seed(epoch))
        total = 0.0
        for step, batch in enumerate(order.split(task.batch)[:steps]):
            iteration = epoch * steps + step
            own = batch.chunk(replicas)[replica]
            loss = task.loss(own)
            if phase == "certified":
                worst = task.loss_of(
                    task.inputs(own, radius(iteration)), task.labels(own), iteration=iteration,
                    crown_share=crown_share(iteration),
                )
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


def evaluate(task):
    """(natural, attacked, radius -> certified accuracy) of the held-out inputs."""
    task.model.eval()
    right = task.right(None)
    robust = right & task.right(task.eps)
    curve = {eps: share(right & task.certified(eps)) for eps in task.radii}
    task.model.train()
    return share(right), share(robust), curve


def share(hits):
    return float(hits.double().mean())


def table(task, found):
    """Lines of a Markdown table."""
    others = [eps for eps in task.radii if eps != task.eps]
    yield (f"| training | natural | attacked at {task.eps} | certified at {task.eps} | "
           + " | ".join(f"at {eps}" for eps in others) + " |")
    yield "|---" * (4 + len(others)) + "|"
    for phase, (natural, robust, curve) in found.items():
        values = [natural, robust, curve[task.eps], *(curve[eps] for eps in others)]
        yield f"| {phase} | " + " | ".join(f"{v:.1%}" for v in values) + " |"


def plot(path, task, found):
    """Certified accuracy against the radius, where matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5))
    for phase, (natural, _, curve) in found.items():
        points = {0.0: natural, **curve}
        axes.plot(list(points), list(points.values()), marker="o", label=phase)
    axes.axvline(task.eps, color="0.7", linestyle=":", label="trained for")
    axes.set(xlabel="L-inf radius", ylabel="certified accuracy", ylim=(-0.02, 1.02),
             title=f"{task.title}, CROWN")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return f"plot: {path}"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="digits")
    parser.add_argument("--tensor-parallel-size", type=int, help="default: all processes")
    parser.add_argument("--epochs", type=int, nargs=2, metavar="N",
                        help="natural and certified epochs (default: digits 10 60, sentences 0 60)")
    parser.add_argument("--folder", type=Path,
                        help="what is saved (default build/certified_training/MODEL)")
    parser.add_argument("--restart", action="store_true", help="forget what was saved")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/sst"),
                        help="sentences: folder of train.jsonl and dev.jsonl (default %(default)s)")
    parser.add_argument("--limit", type=int,
                        help="held-out inputs to evaluate (default: digits 360, sentences 30)")
    chosen = parser.parse_args()
    chosen.folder = chosen.folder or Path("build/certified_training") / chosen.model
    return chosen


def main(chosen):
    if runtime.is_rank0():
        if chosen.restart:
            shutil.rmtree(chosen.folder, ignore_errors=True)
        chosen.folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    # Makes its CertifiedLoss before Megatron's DistributedDataParallel wraps the parameters.
    task = MODELS[chosen.model](chosen.data, chosen.limit)
    found = {}
    for phase, epochs in zip(PHASES, chosen.epochs or task.epochs, strict=True):
        if epochs:
            train(phase, epochs, task, chosen.folder)
        found[phase] = evaluate(task)
    saved = task.save(chosen.folder)
    if runtime.is_rank0():
        lines = list(table(task, found))
        (chosen.folder / "accuracy.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))
        print(plot(chosen.folder / "certified_accuracy.png", task, found))
        print(saved, end="")


if __name__ == "__main__":
    chosen = arguments()
    with runtime.session(chosen.tensor_parallel_size):
        try:
            main(chosen)
        except UserError as error:
            if runtime.is_rank0():
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
