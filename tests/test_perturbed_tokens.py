"""Bounds of perturbed tokens: sound, the same at every size, with gradients for the words."""

from __future__ import annotations

import pytest
import torch
import transformers
from perturbed_tokens import SUBSTITUTES, mixed, near_words, short_ids
from ranks import pool
from torch import nn

from lirpa_megatron import BoundedModule, PerturbationHull
from lirpa_megatron.problem.perturbations import PerturbationPositions

CASES = {
    "box": {"substitutes": SUBSTITUTES},
    "hull": {"substitutes": SUBSTITUTES, "shape": "hull"},
    "larger box": {"substitutes": SUBSTITUTES, "eps": 0.002},
    "positions": {"eps": 0.02, "positions": [1]},
    "each its own": {"eps": torch.tensor([0.004, 0.01, 0.0], dtype=torch.float64)},
    "joint ball": {"eps": 0.05, "norm": 2, "positions": [1, 2]},
    "balls": {"eps": torch.tensor([0.02, 0.05, 0.0], dtype=torch.float64), "norm": 2},
    "L1 balls": {"eps": torch.tensor([0.02, 0.05, 0.0], dtype=torch.float64), "norm": 1},
}


def _points(x, number=40):
    """Points of the set of a BoundedTensor, [number, B, S, h]."""
    ptb = x.ptb
    if isinstance(ptb, PerturbationHull):
        return mixed(ptb.vertices, number)
    if not isinstance(ptb, PerturbationPositions):
        share = torch.rand(number, *x.shape)
        share[: number // 2] = share[: number // 2].round()
        return ptb.x_L + share * (ptb.x_U - ptb.x_L)
    order = 2 if ptb.dual == 2 else 1
    moved = torch.randn(number, *x.shape) * (ptb.radii > 0).unsqueeze(-1)
    norms = moved.flatten(2) if ptb.joint else moved
    norms = norms.norm(order, -1, keepdim=True).clamp_min(1e-300)
    moved = moved / (norms.unsqueeze(-1) if ptb.joint else norms)
    return x + moved * ptb.radii.unsqueeze(-1)


def _language_model(names, samples):
    """Case -> CROWN's bounds; and where sampling finds them wrong."""
    from lirpa_megatron import at_position, perturb_tokens
    from lirpa_megatron.adapters.traceable import traceable

    torch.set_default_dtype(torch.float64)
    view = at_position(near_words(transformers.gpt(num_layers=1)), -1)
    facade = traceable(view)
    found, wrong, ids = {}, [], short_ids()
    bounded = None
    for name in names:
        inputs = perturb_tokens(view, ids, **CASES[name])
        bounded = bounded or BoundedModule(view, inputs)
        lower, upper = bounded.compute_bounds(x=inputs, method="CROWN")
        found[name] = torch.stack((lower, upper))
        if samples:
            points = _points(inputs[0], samples)
            y = facade(points.flatten(0, 1)).unflatten(0, points.shape[:2])
            if not ((lower <= y + 1e-12) & (y <= upper + 1e-12)).all():
                wrong.append(name)
    return found, wrong


def test_bounds_of_perturbed_tokens_are_sound_and_the_same_at_every_size():
    expected, wrong = pool(1).run(_language_model, list(CASES), 100)[0]
    assert wrong == []
    width = {name: (upper - lower).mean() for name, (lower, upper) in expected.items()}
    assert width["hull"] < 0.95 * width["box"] and width["box"] < width["larger box"]
    for size, names in ((2, list(CASES)), (4, ["hull", "balls"])):
        for found, _ in pool(size).run(_language_model, names, 0):
            for name, bounds in found.items():
                assert (bounds - expected[name]).abs().max() < 1e-10 * width[name], (size, name)


def _gradients():
    """Gradients of bounds of a small network for the words' embeddings: this rank's rows."""
    from lirpa_megatron import parallelize, perturb_tokens

    torch.set_default_dtype(torch.float64)
    model = transformers.gpt(num_layers=1).train()
    net = nn.Sequential(
        nn.Linear(transformers.HIDDEN, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    net, found = parallelize(net), {}
    cases = {**CASES, "all": {"eps": 0.01}, "all, L2": {"eps": 0.01, "norm": 2}}
    bounded = BoundedModule(net, perturb_tokens(model, short_ids(), eps=0), {"final_rows": "own"})
    for name, arguments in cases.items():
        for method in ("IBP", "CROWN-IBP", "CROWN")[2 * ("norm" in arguments) :]:
            inputs = perturb_tokens(model, short_ids(), **arguments)
            assert inputs[0].requires_grad
            lower, _ = bounded.compute_bounds(x=inputs, method=method)
            wanted = (lower.flatten() * torch.arange(1.0, 1 + lower.numel())).sum()
            words = model.embedding.word_embeddings.weight
            found[name, method] = torch.autograd.grad(wanted, words)[0]
    return found


def test_gradients_reach_the_words_and_are_the_same_at_every_size():
    expected = pool(1).run(_gradients)[0]
    for size in (2, 4):
        for rank, found in enumerate(pool(size).run(_gradients)):
            for key, full in expected.items():
                error = (found[key] - full.chunk(size)[rank]).abs().max() / full.abs().max()
                assert full.abs().max() > 0 and error < 1e-10, key


def _ranks_differ(which):
    from lirpa_megatron import perturb_tokens
    from lirpa_megatron.parallel import runtime

    torch.set_default_dtype(torch.float64)
    model = transformers.gpt(num_layers=1)
    arguments = {"substitutes": {1: [4, 5]}, "shape": "hull"} if which == "vertices" else {
        "eps": 0.1, "norm": 2, "positions": [1]}
    inputs = perturb_tokens(model, short_ids(), **arguments)
    if runtime.tp_rank() == 1:
        getattr(inputs[0].ptb, which)[0, 1] += 1e-9
    BoundedModule(model, inputs).compute_bounds(x=inputs, method="CROWN-IBP")


@pytest.mark.parametrize("which", ["vertices", "radii"])
def test_ranks_that_differ_in_a_perturbation_are_an_error(which):
    for outcome in pool(2).outcomes(_ranks_differ, which):
        assert outcome.error == "SPMDError" and f"{which} of input 0" in outcome.message
