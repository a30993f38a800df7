"""The forward methods against depth: certified radii, times, and which error stands in the way.

    python benchmarks/depth.py random [--layers 3 6 12] [--sequence 8 16] [--modes forward ...]
    python benchmarks/depth.py sst [--layers 3 6 12] [--sentences 10] [--positions 0]
    python benchmarks/depth.py study [--layers 6] [--sequence 8] [--eps 0.007]

'random': the GPT models of `transformers.py` (hidden 128, FFN 512, 4 heads, as torch initialises
them), the embedding in the middle of the sequence in an L-inf ball. The radius is the largest for
which no margin of the next token falls by more than its standard deviation over random inputs; with
--eps one bound each, and how far the worst margin falls in units of that.

'sst': classifiers of SST (hidden 128, FFN 128, 4 heads, pre-LN with the full LayerNorm), trained
the first time (three epochs, a warm-up of 100 batches). One word's embedding in an L-inf ball, the
largest radius with the class certified, for every word (or --positions of them, evenly spaced) of
the first test sentences of 6 to 10 words that the model classifies rightly. The attack: projected
gradient steps from three starts, radii by bisection.

'study': the fall at one radius, and what it would be if an operator's relaxation had no error. That
is no bound of anything.

Radii: factors of 2 from the last radius found, then bisection of the logarithm. Float32, one
thread, processor seconds. Every mode runs in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from pathlib import Path

SST_SIZES = {"hidden": 128, "ffn": 128}
PARTS = {"norms": ("BoundNorm",), "scores": ("BoundScores",), "GELU": ("BoundGeluTanh",),
         "attention": ("BoundSoftmaxValues",)}


def timed(seconds, bound, *given):
    """What `bound` returns; its processor time goes into `seconds`."""
    start = time.process_time()
    found = bound(*given)
    seconds.append(time.process_time() - start)
    return found


def radius(holds, start: float, steps: int) -> float:
    """The largest radius found that `holds`; 0 below 1e-9."""
    low, high, eps = None, None, start
    while low is None or high is None:
        if holds(eps):
            low, eps = eps, 2 * eps
        else:
            high, eps = eps, eps / 2
        if eps < 1e-9:
            return 0.0
    for _ in range(steps):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def word_ball(x, position: int, eps: float):
    """One position of x [1, S, h] in an L-inf ball."""
    from lirpa_megatron import BoundedTensor, PerturbationLpNorm

    lower, upper = x.clone(), x.clone()
    lower[:, position] -= eps
    upper[:, position] += eps
    return BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), x_L=lower, x_U=upper))


# ------------------------------------------------------------------------------- random models


def _random_model(task: dict):
    """A function of eps: by how many standard deviations the worst margin may fall."""
    import torch
    import transformers

    plain = transformers._plain(task)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(1, task["sequence"], transformers.HIDDEN, generator=generator)
    with torch.no_grad():
        many = plain(torch.randn(500, task["sequence"], transformers.HIDDEN, generator=generator))
        against = list(transformers.AGAINST)
        spread = (many[:, [transformers.TARGET]] - many[:, against]).std(0)
    bounded, others = transformers._ours(plain, x, task)
    with torch.no_grad():
        clean = bounded(x, *others)

    def fall(eps: float) -> float:
        ball = word_ball(x, task["sequence"] // 2, eps)
        with torch.no_grad():
            lower, _ = bounded.compute_bounds(
                x=(ball, *others), method=task["mode"], bound_upper=False
            )
        return ((clean - lower) / spread).max().item()

    return fall


def _random(task: dict) -> dict:
    fall, seconds = _random_model(task), []
    if task["eps"]:
        return {"fall": timed(seconds, fall, task["eps"]), "seconds": seconds[0]}
    found = radius(lambda eps: timed(seconds, fall, eps) < 1, task["start"], task["steps"])
    return {"radius": found, "seconds": sum(seconds) / len(seconds), "bounds": len(seconds)}


def _study(task: dict) -> dict:
    """Falls without the errors of each part, by patches in this process alone."""
    from dataclasses import replace

    import torch

    from lirpa_megatron.forward import propagation, rules

    fall, rule_of = _random_model(task), propagation.rule_of
    left_out: list[str] = []

    def without(node):
        rule = rule_of(node)
        if type(node).__name__ not in left_out:
            return rule

        @rules.reading_shares
        def exact(run, node, inputs):
            made = rule(run, node, inputs)
            box, ball = torch.zeros_like(made.form.box), torch.zeros_like(made.form.ball)
            form = replace(made.form, box=box, ball=ball, heads=None, scores=None)
            return replace(made, form=form, fresh=[], columns=None, balls=None, rest=None)

        return exact

    propagation.rule_of = without
    found = {"nothing": fall(task["eps"])}
    for part, names in PARTS.items():
        left_out[:] = names
        found[part] = fall(task["eps"])
    return found


# ------------------------------------------------------------------------------- classifiers


def _model_path(layers: int) -> Path:
    return Path(f"build/sst_{layers}x{SST_SIZES['hidden']}.pt")


def _attacked(body, x, position: int, label: int, start: float) -> float:
    """The smallest radius at which an attack was found."""
    import torch

    def margin(y):
        out = body(y)
        return out[:, label] - out[:, 1 - label]

    def survives(eps: float) -> bool:
        for seed in range(3):
            delta = torch.zeros_like(x)
            if seed:
                drawn = torch.Generator().manual_seed(seed)
                delta[:, position] = eps * torch.randn(x.shape[-1], generator=drawn).sign()
            for step in range(12):
                delta.requires_grad_()
                value = margin(x + delta)
                if value.item() <= 0:
                    return False
                (grad,) = torch.autograd.grad(value, delta)
                size = eps * (1.0 if step < 3 else 0.3)
                with torch.no_grad():
                    moved = delta[:, position] - size * grad[:, position].sign()
                    delta = torch.zeros_like(x)
                    delta[:, position] = moved.clamp(-eps, eps)
        return True

    return 2 ** (1 / 8) * radius(survives, start, 3)  # the radius that held is an eighth below


def _sst(task: dict) -> dict:
    import torch
    from sst import bounded_by
    from sst_classifier import load, read, words_of

    body, encode, embed = load(_model_path(task["layers"]), ())
    found: list[dict] = []
    start = task["start"]
    for record in read("test"):
        words, label = words_of(record), record["label"]
        if len(found) == task["sentences"]:
            break
        if not 6 <= len(words) <= 10:
            continue
        x = embed(encode(words))
        if body(x).argmax().item() != label:
            continue
        places = range(1, len(words) + 1)
        if task["positions"]:
            n = task["positions"]
            places = [1 + round(i * (len(words) - 1) / max(1, n - 1)) for i in range(n)]
        sign = 1.0 if label == 0 else -1.0
        C, radii, attacks, seconds = torch.tensor([[[sign, -sign]]]), [], [], []
        bounded = None if task["mode"] == "attack" else bounded_by("ours", body, x)

        def holds(eps, place, x=x, bounded=bounded, C=C):
            with torch.no_grad():
                lower, _ = bounded.compute_bounds(
                    x=(word_ball(x, place, eps),), C=C, method=task["mode"], bound_upper=False
                )
            return lower.item() > 0

        for place in places:
            if bounded is None:
                attacks.append(_attacked(body, x, place, label, 0.5))
                continue
            own = functools.partial(holds, place=place)
            radii.append(radius(functools.partial(timed, seconds, own), start, task["steps"]))
            start = max(radii[-1], 1e-6)
        found.append({"words": len(words), "radii": radii or attacks, "seconds": sum(seconds),
                      "bounds": len(seconds)})
    radii = [r for each in found for r in each["radii"]]
    return {
        "sentences": len(found), "radii": len(radii), "mean": sum(radii) / len(radii),
        "least": min(radii), "seconds a sentence": sum(f["seconds"] for f in found) / len(found),
        "bounds a sentence": sum(f["bounds"] for f in found) / len(found),
    }


def _train(layers: int) -> None:
    from sst_classifier import train

    if not _model_path(layers).exists():
        begin = time.process_time()
        train(_model_path(layers), 3, {"layers": layers, **SST_SIZES}, 100)
        print(f"{layers} layers: trained in {time.process_time() - begin:.0f} s", file=sys.stderr)


# --------------------------------------------------------------------------------------- tables


def _worker(task: dict) -> dict:
    import torch

    torch.set_num_threads(1)
    from lirpa_megatron.parallel import runtime

    runtime.initialize()
    made = {"random": _random, "study": _study, "sst": _sst}[task["what"]](task)
    runtime.shutdown()
    return {"result": made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("random", "sst", "study"))
    parser.add_argument("--layers", nargs="+", type=int, default=[3, 6, 12])
    parser.add_argument("--sequence", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--modes", nargs="+", default=["forward", "forward+backward"],
                        help="methods; of 'sst' also attack")
    parser.add_argument("--eps", type=float, default=0.0, help="one bound instead of a radius")
    parser.add_argument("--start", type=float, default=0.01, help="the first radius tried")
    parser.add_argument("--steps", type=int, default=2, help="of bisection")
    parser.add_argument("--sentences", type=int, default=10)
    parser.add_argument("--positions", type=int, default=0, help="words of a sentence; 0: all")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one mode")
    arguments = parser.parse_args()
    from workers import launch

    sequences = [0] if arguments.what == "sst" else arguments.sequence
    for layers in arguments.layers:
        if arguments.what == "sst":
            _train(layers)
        for sequence in sequences:
            for mode in arguments.modes if arguments.what != "study" else ["forward"]:
                task = {**vars(arguments), "layers": layers, "sequence": sequence, "mode": mode}
                ranks = launch(__file__, task, 1, arguments.limit, None)
                found = ranks and ranks[0]["result"]
                name = f"{layers} layers" + (f", {sequence} tokens" if sequence else "")
                texts = [f"{key} {value:.4g}" for key, value in (found or {}).items()]
                print(f"{name}, {mode}: {', '.join(texts) or 'too slow'}", flush=True)


if __name__ == "__main__":
    from workers import start

    start(main, _worker)
