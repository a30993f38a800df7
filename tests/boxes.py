"""Boxes around inputs, and attacks on the bounds over them."""

import torch

from lirpa_megatron import BoundedTensor, PerturbationLpNorm

EPS = 0.2


def boxed(x, eps=EPS, **more):
    """The box from x - eps to x + eps, as the input of `compute_bounds`."""
    return BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=eps, **more))


def violation(model, x, lower, upper, eps=EPS, steps=4):
    """How far outputs at corners, random points and points that gradients find are outside."""
    generator, worst = torch.Generator().manual_seed(0), -float("inf")
    for i in range(12):
        move = torch.rand(x.shape, generator=generator, dtype=x.dtype) * 2 - 1
        move = move.sign() if i % 2 else move
        for sign in (1, -1):
            at = x + eps * move
            for _ in range(steps):
                at = at.detach().requires_grad_()
                y = model(at)
                worst = max(worst, (lower - y).max().item(), (y - upper).max().item())
                output = y.reshape(len(y), -1)[:, i % y[0].numel()].sum()
                if not output.requires_grad:
                    break
                (slope,) = torch.autograd.grad(output, at, allow_unused=True)
                if slope is None:
                    break
                at = x + (at - x + sign * eps * slope.sign()).clamp(-eps, eps)
    return worst
