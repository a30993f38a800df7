"""Inputs that hardly move are part of the first layer's bias, and bounds stay what they are."""

from __future__ import annotations

import pytest
import torch
from models import Net, build
from ranks import pool

from lirpa_megatron import BoundedModule, parallelize
from lirpa_megatron.complete import strategy
from lirpa_megatron.complete.inputs import box_of, input_names
from lirpa_megatron.crown.folded_inputs import FoldedInputs, can_fold, folding

pytestmark = pytest.mark.usefixtures("unchanged_environment")

MOVING = (1, 4)
NETS = [
    Net(inputs=6, hidden=(12, 8), width=8, outputs=4, acts=("relu", "sigmoid", "tanh")),
    Net(inputs=6, hidden=(12, 8), width=8, outputs=4),
    # all rows of a start node begin at a first layer, and one has no bias
    Net(inputs=6, hidden=(12,), outputs=4, acts=("sigmoid",), bias=False),
]


def boxes(others):
    """Two boxes in which MOVING move by 0.8, the others by twice `others`."""
    center = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)
    radius = torch.full((6,), others, dtype=torch.float64)
    radius[list(MOVING)] = 0.4
    return center - radius, center + radius


def bounds(net, others, fold):
    """Bounds of the outputs in both boxes, and A at the input."""
    torch.set_default_dtype(torch.float64)
    low, high = boxes(others)
    graph = BoundedModule(parallelize(build(net).requires_grad_(False).eval()), low)
    (leaf,) = input_names(graph)
    folded = None
    if fold:
        assert can_fold(graph, leaf)
        folded = FoldedInputs.of(leaf, torch.tensor(MOVING), low, high)
    with torch.no_grad(), folding(graph, folded):
        *found, A = graph.compute_bounds(
            x=(box_of(graph, low, high),), method="CROWN", return_A=True,
            needed_A_dict={graph.final_name: {leaf}},
        )
    return *found, A[graph.final_name][leaf]["lA"]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_bounds_and_their_slopes_are_those_of_the_whole_input(net, ranks):
    want = bounds(net, 0.0, False)
    torch.set_default_dtype(torch.float32)
    assert want[2].shape[2] == 6
    for lower, upper, A in pool(ranks).run(bounds, net, 0.0, True):
        torch.testing.assert_close(lower, want[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(upper, want[1], rtol=0, atol=1e-12)
        torch.testing.assert_close(A, want[2][..., list(MOVING)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("net", NETS)
def test_bounds_hold_however_far_the_others_move(net):
    """And are no tighter than those of the whole input. Without the error's term they fail."""
    low, high = boxes(0.1)
    ((lower, upper, _),) = pool(1).run(bounds, net, 0.1, True)
    want = bounds(net, 0.1, False)
    torch.set_default_dtype(torch.float32)
    assert bool((lower <= want[0] + 1e-12).all() and (upper >= want[1] - 1e-12).all())
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(20_000, 2, 6, generator=generator, dtype=torch.float64)
    share[:10_000].round_()
    with torch.no_grad():
        y = build(net)((low + share * (high - low)).flatten(0, 1)).view(20_000, 2, -1)
    assert bool((y >= lower).all() and (y <= upper).all())


def test_numbers_that_the_dtype_lacks_do_not_count_as_moving():
    """They are enclosed by neighbours; with them 6 inputs would move, and ReLUs would be split."""
    net = Net(inputs=6, hidden=(40,), outputs=2)
    model = build(net, torch.float32).requires_grad_(False).eval()
    center = torch.full((1, 6), 0.3)
    graph = BoundedModule(model, center)
    low = torch.nextafter(center, torch.tensor(-1.0))
    high = torch.nextafter(center, torch.tensor(1.0))
    assert strategy.chosen(graph, low.clone(), high.clone()) == "relu"
    low[0, 2] = -0.5
    assert strategy.chosen(graph, low, high) == "input"
