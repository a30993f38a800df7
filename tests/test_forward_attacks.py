"""10^5 attacks on each model: corners, random points and gradient steps stay within the bounds."""

from __future__ import annotations

import math

import models
import pytest
import torch
from test_forward import NETS, ROUNDING, inputs_of, region, segments

from lirpa_megatron import BoundedModule

pytestmark = [pytest.mark.usefixtures("session", "one_thread", "double"), pytest.mark.slow]

ATTACKS, AT_ONCE = 100_000, 500


def points_of(view, inputs, place):
    """Values [N B, ...] of the output in batches, ATTACKS points for each sample.

    Args:
        view: the model.
        inputs: tensors [B, ...], the first the perturbed one, and the others.
        place: (parameters t [N, B, *set] in [-1, 1] -> first inputs [N, B, ...], set).
    """
    at, shape = place
    x, *rest = (each.detach().as_subclass(torch.Tensor) for each in inputs)
    B = len(x)
    rest = [
        r.repeat(AT_ONCE, *[1] * (r.ndim - 1)) if r.ndim and len(r) == B else r for r in rest
    ]

    def run(t):
        return view(at(t).flatten(0, 1), *rest).unflatten(0, (AT_ONCE, B))

    for batch in range(math.ceil(ATTACKS / AT_ONCE)):
        t = 2 * torch.rand(AT_ONCE, B, *shape) - 1
        if batch % 4:  # corners three times as often as inner points
            t = torch.where(t < 0, -1.0, 1.0)
        if batch % 2:  # a step to the corner that moves some outputs most, up or down
            t.requires_grad_()
            y = run(t)
            rows = torch.randn_like(y) * (torch.rand_like(y) < 2 / y[0, 0].numel())
            (grad,) = torch.autograd.grad((rows * y).sum(), t)
            t = torch.where(grad == 0, t.detach(), grad.sign())
        with torch.no_grad():
            yield run(t)


def check(view, inputs, place, *all_options, methods=("forward", "forward+backward")):
    bounds = []
    for options in all_options or ({},):
        bounded = BoundedModule(view, inputs, bound_opts=options)
        with torch.no_grad():
            bounds += [bounded.compute_bounds(inputs, method=method) for method in methods]
    assert all((upper - lower).isfinite().all() for lower, upper in bounds)
    for y in points_of(view, inputs, place):
        room = ROUNDING * y.abs().max()
        for lower, upper in bounds:
            assert (y >= lower - room).all() and (y <= upper + room).all()


def box(inputs):
    """The box of the first input."""
    lower, upper = inputs[0].ptb.x_L, inputs[0].ptb.x_U
    middle, half = (lower + upper) / 2, (upper - lower) / 2
    return (lambda t: middle + t * half), tuple(middle.shape[1:])


@pytest.mark.parametrize("eps", [0.003, 0.03])
@pytest.mark.parametrize("name", ["gpt", "llama", "bert"])
def test_a_word_s_box(name, eps):
    view, inputs = inputs_of(name, eps=eps, positions=[3])
    check(view, inputs, box(inputs), {"kept_errors": 0}, {"kept_errors": 300})


@pytest.mark.parametrize("name, radius", [("gpt", 0.01), ("llama", 0.01), ("bert", 0.3)])
def test_two_directions_at_degree_3(name, radius):
    view, inputs = segments(name, 2, radius)
    x, D = inputs[0].ptb.centre, inputs[0].ptb.directions  # [B, ...], [B, 2, ...]
    place = (lambda t: x + (t[..., None, None] * D).sum(2), (2,))
    check(view, inputs, place, {"order": 3}, methods=("forward",))


@pytest.mark.parametrize("name", ["relu", "tanh and sigmoid"])
def test_a_network_s_box(name):
    net = NETS[name]
    model, among = models.build(net).eval(), region("box", net, 0.5)
    inputs = (among.bounded(),)
    check(model, inputs, box(inputs))
