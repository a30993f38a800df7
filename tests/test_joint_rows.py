"""Rows of a goal together: the sum's bound holds, is the best one, and its point attains it."""

from __future__ import annotations

import math

import pytest
import torch

from lirpa_megatron.complete.joint_rows import joint


def drawn(seed, rows=3, inputs=4):
    generator = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    low = some(5, inputs)
    return some(5, 2, rows, inputs), some(5, 2, rows), some(5, 2, rows), low, low + some(
        5, inputs).abs()


@pytest.mark.parametrize("seed", range(5))
def test_some_row_is_above_it_everywhere(seed):
    a, c, ends, low, high = drawn(seed)
    found = joint(a, c, ends, low, high)
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(2000, *low.shape, generator=generator, dtype=torch.float64)
    x = low + torch.cat([share, share.round()]) * (high - low)
    rows = torch.einsum("djrn,pdn->pdjr", a, x) + c - ends
    # 1e-12: rounding in float64
    assert bool((rows.amax(3) >= found.margins - 1e-12).all())
    inside = (found.points >= low[:, None]) & (found.points <= high[:, None])
    assert bool(inside.all()) and bool((found.size >= found.margins.abs()).all())


def test_two_rows_of_opposite_slopes_decide_where_neither_does():
    """x + 0.2 and 0.2 - x on [-1, 1]: each is negative somewhere, half of both is 0.2."""
    a = torch.tensor([[[[1.0], [-1.0]]]])
    found = joint(a, torch.full((1, 1, 2), 0.2), torch.zeros(1, 1, 2, dtype=torch.float64),
                  torch.tensor([[-1.0]]), torch.tensor([[1.0]]))
    assert float(found.margins) == pytest.approx(0.2, abs=1e-6)  # 0.2 in float32


def test_it_comes_close_to_the_best_weights():
    """Of two rows, all weights on a grid."""
    a, c, ends, low, high = drawn(7, rows=2)
    best = torch.full_like(c[..., 0], -math.inf)
    for w in torch.linspace(0, 1, 2001, dtype=torch.float64):
        slope = w * a[:, :, 0] + (1 - w) * a[:, :, 1]
        least = torch.where(slope > 0, slope * low[:, None], slope * high[:, None]).sum(2)
        ends_of = w * (c - ends)[..., 0] + (1 - w) * (c - ends)[..., 1]
        best = torch.maximum(best, least + ends_of)
    found = joint(a, c, ends, low, high).margins
    single = torch.where(a > 0, a * low[:, None, None], a * high[:, None, None]).sum(3) + c - ends
    # most of what a sum gains over the better row is found in a few steps
    single = single.amax(2)
    gain, missing = best - single, best - torch.maximum(found, single)
    assert bool((missing <= 0.1 * gain + 1e-3).all()) and float(gain.max()) > 0.1


def test_a_row_that_is_not_finite_proves_nothing():
    a, c, ends, low, high = drawn(1)
    a[0, 0, 0, 0], c[1, 1, 2] = math.nan, -math.inf
    found = joint(a, c, ends, low, high)
    assert found.margins[0, 0] == found.margins[1, 1] == -math.inf
    assert bool(found.margins[2:].isfinite().all())
