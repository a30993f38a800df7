"""Norms, scores, attention, rotary embedding: no point of a box violates a bound, at any width.

Bounds in float32 and float64 are held against the function in float64 at random points, corners
and the ends of gradient ascent. They are sums of tens of terms: the slack is 2e-5 or 1e-11 of the
largest bound (rounding), which a test shows to be far below what a wrong relaxation gives away.
"""

from __future__ import annotations

import math

import pytest
import torch
from models import drawn
from torch import nn
from transformer_ops import HEAD, METHODS, SLACK, Attention, B, Norm, T, attack, bounds, violation

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_megatron.adapters import traced_ops

WIDTHS = (0.0, 1e-5, 0.05, 0.4, 3.0, 1e3)


CAUSAL = torch.triu(torch.ones(T, T).double(), diagonal=1)[None, None]
PADDED = torch.zeros(B, 1, T, T).double()
PADDED[1, :, :, 2:] = 1
PADDED[1, :, 2:, :] = 1  # BERT's padded queries see nothing, so everything alike

NETS = {
    "LayerNorm": (lambda: Norm(), 8),
    "RMSNorm without bias": (lambda: Norm(rms=True, bias=False), 8),
    "norms of heads": (lambda: Norm(rms=True, groups=2), 8),
    # Two equal numbers: the slope is eps^-1/2, which a small eps would make of rounding in float32.
    "LayerNorm of two": (lambda: Norm(groups=4, deep=True, eps=1e-2), 8),
    "two LayerNorms": (lambda: Norm(deep=True), 8),
    "two RMSNorms": (lambda: Norm(rms=True, deep=True), 8),
    "attention": (lambda: Attention(), 6),
    "sharp attention": (lambda: Attention(sharp=3.0), 6),
    "causal attention": (lambda: Attention(CAUSAL), 6),
    "causal with -inf": (lambda: Attention(CAUSAL, float("-inf")), 6),
    "padded, shared keys": (lambda: Attention(PADDED, groups=1), 6),
    "rotary": (lambda: Attention(CAUSAL, rotary=True), 6),
}
_FUNCTIONS = {name: (build().eval(), width) for name, (build, width) in NETS.items()}


@pytest.mark.parametrize("dtype", list(SLACK))
@pytest.mark.parametrize("name", list(NETS))
def test_no_point_violates_a_bound_at_any_width(name, dtype):
    net, width = _FUNCTIONS[name]
    for seed, radius in enumerate(WIDTHS):
        x = drawn(B, T, width, seed=20 + seed)
        found, box = bounds(net, x, radius, dtype)
        outputs = attack(net, box)
        for method, pair in found.items():
            assert not torch.stack(pair).isnan().any(), (method, radius)
            assert violation(pair, outputs) < SLACK[dtype], (method, radius)


@pytest.mark.parametrize("name", list(NETS))
def test_where_only_some_coordinates_move_bounds_hold_and_a_point_is_exact(name):
    net, width = _FUNCTIONS[name]
    x = drawn(B, T, width, seed=30)
    radius = 0.3 * (torch.arange(width) % 3 == 0).double() * (torch.arange(T) == 1)[:, None]
    found, box = bounds(net, x, radius.expand(B, T, width), torch.float64)
    outputs = attack(net, box)
    for pair in found.values():
        assert violation(pair, outputs) < SLACK[torch.float64]
    at_point, _ = bounds(net, x, 0.0, torch.float64)
    for lower, upper in at_point.values():
        assert (upper - lower).abs().max() < 1e-9 and (lower - net(x)).abs().max() < 1e-9


class TwoInputs(nn.Module):
    """Queries of one input, keys of another, whose deviations have nothing in common."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(6, HEAD).double()
        self.map.weight.data = drawn(HEAD, 6, seed=70)
        self.map.bias.data.zero_()

    def forward(self, x, y):
        return traced_ops.scores(self.map(x), self.map(y), HEAD, 1.0)


def test_forms_of_different_inputs_are_not_taken_for_the_same_input():
    net, radius = TwoInputs(), 0.5
    xs = drawn(1, 2, 6, seed=71), drawn(1, 2, 6, seed=72)
    ball = PerturbationLpNorm(norm=math.inf, eps=radius)
    bounded = BoundedModule(net, xs)
    with torch.no_grad():
        found = bounded.compute_bounds(tuple(BoundedTensor(x, ball) for x in xs), method="CROWN")
        u = drawn(4000, 2, 6, seed=73).sign() * radius
        # The same deviation of both inputs, and opposite ones.
        outputs = torch.cat([net(xs[0] + u, xs[1] + sign * u) for sign in (1, -1)])
    assert violation(found, outputs) < SLACK[torch.float64]


@pytest.mark.parametrize("limit", [0, 2**9])
def test_without_room_for_forms_bounds_hold_and_are_looser(limit):
    net, width = _FUNCTIONS["attention"]
    x = drawn(B, T, width, seed=74)
    wide, box = bounds(net, x, 0.3, torch.float64, ("CROWN",), {"form_limit": limit})
    tight, _ = bounds(net, x, 0.3, torch.float64, ("CROWN",))
    assert violation(wide["CROWN"], attack(net, box)) < SLACK[torch.float64]
    widths = [(upper - lower).mean() for lower, upper in (tight["CROWN"], wide["CROWN"])]
    assert widths[0] < 0.98 * widths[1]


@pytest.mark.parametrize("dtype", list(SLACK))
@pytest.mark.parametrize("radius", [1e8, 1e20, 1e30])
@pytest.mark.parametrize("name", list(NETS))
def test_very_wide_boxes_give_bounds_that_are_wide_or_infinite_but_never_nan(name, radius, dtype):
    net, width = _FUNCTIONS[name]
    x = drawn(B, T, width, seed=40)
    found, box = bounds(net, x, radius, dtype)
    corners = torch.stack([box[0], box[1], torch.where(x > 0, *box)])
    outputs = torch.stack([net(c) for c in corners]).nan_to_num(0.0)
    for method, (lower, upper) in found.items():
        assert not lower.isnan().any() and not upper.isnan().any(), method
        size = outputs.abs().max()
        assert ((lower - outputs).max() <= 1e-4 * size) and ((outputs - upper).max() <= 1e-4 * size)
    if "Norm" in name:
        limit = math.sqrt(8) * net.weight.abs().max() + 4
        assert found["IBP"][1].max() < limit and found["CROWN"][1].max() < 8 * limit


def test_a_vector_that_can_be_constant_has_a_finite_norm():
    """The variance can be 0, and rounding must not make it negative."""
    net = Norm(eps=1e-12)
    x = torch.ones(1, 2, 8).double()
    for radius in (0.0, 1e-9, 1e-3, 1.0):
        found, box = bounds(net, x, radius, torch.float32)
        outputs = attack(net, box)
        for lower, upper in found.values():
            assert torch.isfinite(lower).all() and torch.isfinite(upper).all()
            assert violation((lower, upper), outputs) < SLACK[torch.float32]


def test_one_token_attends_to_itself_exactly():
    net = Attention()
    x = drawn(2, 1, 6, seed=50)
    found, _ = bounds(net, x, 0.5, torch.float64)
    values = net.v.weight.abs().sum(-1) * 0.5
    for method in METHODS:
        lower, upper = found[method]
        assert torch.allclose((upper - lower) / 2, values.expand_as(lower), rtol=1e-9)


def test_a_masked_key_has_no_influence():
    """Whatever the tokens are that nobody sees, the bounds of the others stay the same."""
    x, other = drawn(1, T, 6, seed=51), drawn(1, T, 6, seed=52, scale=4.0)
    other[:, :2] = x[:, :2]
    mask = torch.zeros(1, 1, T, T).double()
    mask[..., 2:] = 1
    for fill in (-10000.0, float("-inf")):
        net = Attention(mask, fill)
        one, _ = bounds(net, x, 0.3, torch.float64)
        two, _ = bounds(net, other, 0.3, torch.float64)
        for method in METHODS:
            for a, b in zip(one[method], two[method], strict=True):
                assert torch.allclose(a[:, :2], b[:, :2], rtol=1e-9, atol=1e-9), method


def test_with_finite_masks_and_scores_below_them_masked_keys_count():
    """Scores near -10000 do not let a key be ignored whose score is -10000."""
    mask = torch.zeros(1, 1, 2, 2).double()
    mask[..., 1] = 1
    net = Attention(mask)
    net.q.bias.data.fill_(150.0)
    net.k.bias.data.fill_(-35.0)  # scores of about -10500
    x = drawn(1, 2, 6, seed=52)
    assert (net.q(x) * net.k(x)).sum() / 4 < -10000
    found, box = bounds(net, x, 1.0, torch.float64)
    outputs = attack(net, box)
    assert (outputs - net.v(x)[:, :1]).abs().max() > 0.1  # the masked key is attended to
    for pair in found.values():
        assert violation(pair, outputs) < SLACK[torch.float64]


def test_a_query_without_keys_is_never_bounded():
    mask = torch.zeros(1, 1, T, T).double()
    mask[:, :, 1] = 1
    x = drawn(1, T, 6, seed=53)
    found, _ = bounds(Attention(mask, float("-inf")), x, 0.1, torch.float64)
    for lower, upper in found.values():
        assert lower[:, 1].max() == -math.inf and upper[:, 1].min() == math.inf
        assert torch.isfinite(lower[:, [0, 2, 3]]).all()
