"""No point of the set violates a bound of GPT, LLaMA-like and BERT models, and bounds are met."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from ranks import pool
from transformer_cases import CASES, ROUNDS, case_bounds

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm, embed
from lirpa_megatron.adapters.traceable import traceable

_SLOW = pytest.mark.slow


def attacked(name, eps, dtype, methods=ROUNDS, options=None):
    """Largest violation by random points, corners and gradient ascent, relative to the size.

    Returns:
        method -> violation, method -> mean width.
    """
    found, inputs, net = case_bounds(name, dtype, methods, eps, options, eager=True)
    net, rounds = net.to(dtype), 12
    center = inputs[0].detach()
    further = [i.detach().repeat(rounds, *[1] * (i.ndim - 1)) for i in inputs[1:]]
    generator = torch.Generator().manual_seed(3)
    worst = {method: -math.inf for method in found}
    u = 2 * torch.rand(rounds, *center.shape, generator=generator, dtype=dtype) - 1
    u[3:] = u[3:].sign()
    x, direction = center + eps * u, None
    for _ in range(8):
        x = x.detach().requires_grad_(True)
        y = net(x.flatten(0, 1), *further).unflatten(0, x.shape[:2])
        if direction is None:
            direction = torch.randn(y.shape, generator=generator, dtype=dtype)
        for method, (lower, upper) in found.items():
            size = torch.stack((lower, upper)).abs().max()
            gap = torch.max((lower - y).max(), (y - upper).max()) / size
            worst[method] = max(worst[method], gap.item())
        (gradient,) = torch.autograd.grad((y * direction).sum(), x)
        x = (x + 0.5 * eps * gradient.sign()).clamp(center - eps, center + eps)
    return worst, {m: (upper - lower).mean().item() for m, (lower, upper) in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_no_point_violates_a_bound(name):
    for eps in (0.003, 0.05, 0.5):
        gaps, _ = pool(1).run(attacked, name, eps, torch.float64)[0]
        for method, gap in gaps.items():
            assert gap < 1e-12, (method, eps)


def test_alpha_crown_is_tighter_than_crown_and_no_point_violates_it():
    options = {"optimize_bound_args": {"iteration": 8}}  # at auto_LiRPA's learning rate
    methods = ("CROWN", "CROWN-Optimized")
    run = (attacked, "gpt", 0.02, torch.float64, methods, options)
    gaps, widths = pool(1).run(*run)[0]
    assert gaps["CROWN-Optimized"] < 1e-12
    assert widths["CROWN-Optimized"] < 0.98 * widths["CROWN"]


def _extremes(name, eps, options):
    """method -> (lower, upper), and the least and the largest value of each output that is met."""
    found, inputs, net = case_bounds(
        name, torch.float64, ("CROWN", "CROWN-Optimized"), eps, options, eager=True
    )
    center, further = inputs[0].detach(), [i.detach() for i in inputs[1:]]
    x = center.clone().requires_grad_(True)
    y = net(x, *further)
    least, most = y.detach().clone(), y.detach().clone()
    for i in range(y[0].numel()):
        (gradient,) = torch.autograd.grad(y.flatten(1)[:, i].sum(), x, retain_graph=True)
        for sign, met in ((-1, least), (1, most)):
            with torch.no_grad():
                corner = net(center + sign * eps * gradient.sign(), *further)
            met.flatten(1)[:, i] = corner.flatten(1)[:, i]
    return found, least, most


@pytest.mark.parametrize("name", ["gpt", pytest.param("llama", marks=_SLOW),
                                  pytest.param("bert", marks=_SLOW)])
def test_where_bounds_are_all_but_exact_alpha_crown_stays_outside_of_what_is_met(name):
    # So close that a wrong term of any plane shows. Twenty steps go wherever the bound improves.
    options = {"optimize_bound_args": {"iteration": 20}}
    found, least, most = pool(1).run(_extremes, name, 1e-4, options)[0]
    for lower, upper in found.values():
        width = (upper - lower).mean()
        assert ((most - least).mean() / width) > 0.98
        assert ((least - lower) / width).min() > -1e-9
        assert ((upper - most) / width).min() > -1e-9


def test_a_block_a_layer_attention_and_mlp_are_bounded_on_their_own():
    assert pool(2).run(_parts)[0] == ["block", "layer", "attention", "mlp"]


def _parts():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model = transformers.llama(torch.float64)
    block = model.decoder
    parts = {"block": block, "layer": block.layers[0], "attention": block.layers[0].self_attention,
             "mlp": block.layers[0].mlp}
    x = embed(model, transformers.tokens()[0]).detach()
    for part in parts.values():
        bounded = BoundedModule(part, x)
        ball = BoundedTensor(x, PerturbationLpNorm(norm=math.inf, eps=0.01))
        with torch.no_grad():
            lower, upper = bounded.compute_bounds((ball,), method="CROWN")
            net = traceable(part)
            for _ in range(20):
                y = net(x + 0.01 * torch.randn_like(x).sign())
                assert (lower <= y + 1e-12).all() and (y <= upper + 1e-12).all()
        assert torch.isfinite(upper - lower).all()
    return list(parts)
