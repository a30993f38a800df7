"""Certified radii and times of the forward methods beside CROWN, on the classifier of examples/sst.

    python benchmarks/forward.py [--dimensions 1,2,4,7] [--sentences 1]

The set is x + r (t_1 D_1 + ... + t_d D_d), |t_i| <= 1, with random directions D of length 1 in the
embedding of the last word but one. Prints a row for each method: the largest radius r that it
certifies (bisection) and the processor seconds of one bound. One thread, float64.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from pathlib import Path

import torch

from lirpa_megatron import BoundedModule, BoundedTensor, bert_head
from lirpa_megatron.adapters.embeddings import embed
from lirpa_megatron.checkpoint.language_model import load_language_model
from lirpa_megatron.parallel import runtime
from lirpa_megatron.problem.perturbations import PerturbationSegments

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "sst"
METHODS = (("CROWN", 1), ("forward", 1), ("forward+backward", 1), ("forward", 2), ("forward", 3),
           ("forward", 8))
MOST = {2: 16, 3: 8, 8: 1}
"""Dimensions up to which a degree is offered."""


def radius(proves, steps=12):
    """The largest radius proved, by bisection of its logarithm."""
    low, high, found = math.log(1e-5), math.log(8.0), 0.0
    for _ in range(steps):
        middle = (low + high) / 2
        if proves(math.exp(middle)):
            low, found = middle, math.exp(middle)
        else:
            high = middle
    return found


def sentences(model, count):
    """(embeddings, label) of the first sentences."""
    words = {w: i for i, w in enumerate((EXAMPLE / "vocab.txt").read_text().split("\n"))}
    for line in (EXAMPLE / "sentences.jsonl").read_text().splitlines()[:count]:
        given = json.loads(line)
        text = given["sentence"].lower().split()
        ids = torch.tensor([[words["[CLS]"], *(words.get(word, 1) for word in text)]])
        yield embed(model, ids, tokentype_ids=torch.zeros_like(ids)).detach(), given["label"]


def proved(bounded, x, mask, C, D, method, seconds, r):
    """Whether the margin is positive on x + r (t_1 D_1 + ...); the time goes into `seconds`."""
    inputs = (BoundedTensor(x, PerturbationSegments(x, r * D)), mask)
    begin = time.process_time()
    with torch.no_grad():
        lower, _ = bounded.compute_bounds(inputs, C=C, method=method, bound_upper=False)
    seconds.append(time.process_time() - begin)
    return bool((lower > 0).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dimensions", default="1,2,4,7")
    parser.add_argument("--sentences", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with runtime.session():
        _, model = load_language_model(EXAMPLE / "checkpoint", runtime.tp_group(), torch.float64)
        view = bert_head(model.eval().requires_grad_(False), "binary")
        print("| dimensions | method | order | radius | s a bound |\n|---|---|---|---|---|")
        for n, (x, label) in enumerate(sentences(model, options.sentences)):
            length = x.shape[1]
            C = torch.zeros(1, 1, 2)
            C[0, 0, label], C[0, 0, 1 - label] = 1, -1
            mask = torch.zeros(1, 1, length, length)
            for d in map(int, options.dimensions.split(",")):
                drawn = torch.Generator().manual_seed(100 * n + d)
                D = torch.zeros(1, d, *x.shape[1:])
                u = torch.randn(d, x.shape[-1], generator=drawn)
                D[0, :, length - 2] = u / u.norm(dim=-1, keepdim=True)
                for method, order in METHODS:
                    if d > MOST.get(order, d):
                        continue
                    bounded = BoundedModule(view, (x, mask), bound_opts={"order": order})
                    seconds = []
                    proves = functools.partial(proved, bounded, x, mask, C, D, method, seconds)
                    found = radius(proves)
                    mean = sum(seconds) / len(seconds)
                    print(f"| {d} | {method} | {order} | {found:.3f} | {mean:.2f} |", flush=True)


if __name__ == "__main__":
    main()
