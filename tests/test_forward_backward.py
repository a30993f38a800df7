"""Backward rows over the ranges of forms that go forward (`forward+backward`)."""

from __future__ import annotations

import models
import pytest
import torch
from test_forward import NETS, ROUNDING, inputs_of, region

from lirpa_megatron import BoundedModule

pytestmark = pytest.mark.usefixtures("session", "one_thread", "double")


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_backward_rows_over_forward_ranges_hold(name):
    """Looser than with CROWN's own ranges and forms, by a factor of 2 here, and much cheaper."""
    view, inputs = inputs_of(name, eps=1e-3, positions=[3])
    bounded = BoundedModule(view, inputs)
    with torch.no_grad():
        lower, upper = bounded.compute_bounds(inputs, method="forward+backward")
        crown = bounded.compute_bounds(inputs, method="CROWN")
        box = inputs[0].ptb
        for _ in range(50):
            corner = torch.where(torch.randn_like(box.x_L) > 0, box.x_L, box.x_U)
            y = bounded(corner.as_subclass(torch.Tensor), *inputs[1:])
            assert (y >= lower - 1e-12).all() and (y <= upper + 1e-12).all()
    assert (upper - lower).mean() < 2.5 * (crown[1] - crown[0]).mean()


def test_backward_rows_over_forward_ranges_hold_for_networks():
    net = NETS["relu"]
    model = models.build(net).eval()
    for kind in models.REGIONS:
        among = region(kind, net, 0.3)
        bounded = BoundedModule(model, among.center)
        with torch.no_grad():
            lower, upper = bounded.compute_bounds((among.bounded(),), method="forward+backward")
            points = among.random(1000)
            y = model(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        assert (y >= lower - ROUNDING).all() and (y <= upper + ROUNDING).all()
