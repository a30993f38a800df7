"""Outward rounding over pipeline stages: no value in real arithmetic is outside of the bounds."""

from __future__ import annotations

from fractions import Fraction

import pytest
import stage_models
import torch
from exact_networks import breaks, corners, random_net
from models import AS_PLAIN, drawn
from ranks import pool
from torch import nn

from lirpa_megatron import METHODS, BoundedModule
from lirpa_megatron.operators.coefficients import RowBounds
from lirpa_megatron.rounding.forms import with_further

OUTWARD = {**AS_PLAIN, "rounding": "outward"}
EPS = 0.1


def _cases_outside(widths, cuts, rounding, seeds):
    """(seed, method) of bounds that exclude the exact output of a point, on this rank."""
    torch.set_default_dtype(torch.float64)
    stage, _ = stage_models.place()
    found = []
    for seed in seeds:
        net, x = random_net(seed, widths, cancel=True), drawn(2, seed=seed + 99).tolist()
        points = breaks(net, x, EPS) if len(widths) == 3 else corners(x, EPS)
        exact = [net.exact(list(point)) for point in points]
        parts = [part for layer in net.layers for part in (layer, nn.ReLU())][:-1]
        ends = [0, *cuts, len(parts)]
        module = stage_models.PipelineStage(nn.Sequential(*parts[ends[stage] : ends[stage + 1]]))
        given = torch.tensor([x])
        bounded = BoundedModule(module.eval(), given, {**OUTWARD, "rounding": rounding})
        for method in METHODS[:3]:
            lower, upper = bounded.compute_bounds(
                (stage_models.perturbed(given, EPS),), method=method
            )
            ends_of = list(zip(lower[0].tolist(), upper[0].tolist(), strict=True))
            if any(not Fraction(l) <= y <= Fraction(u)
                   for values in exact for y, (l, u) in zip(values, ends_of, strict=True)):
                found.append((seed, method))
    return found


@pytest.mark.parametrize(("widths", "cuts"), [
    ((2, 4, 2), (1,)), ((2, 4, 2), (2,)),  # the weights that cancel are on the last stage
    ((2, 4, 4, 2), (3,)), pytest.param((2, 4, 4, 2), (2, 4), marks=pytest.mark.slow),
])
def test_no_exact_value_is_outside_of_the_bounds_of_stages(widths, cuts):
    stages = len(cuts) + 1
    ranks = pool(stages, 1, stages)
    if len(widths) == 3:  # without widening some are, else nothing would be tested
        assert any(ranks.run(_cases_outside, widths, cuts, "nearest", range(4)))
    assert not any(ranks.run(_cases_outside, widths, cuts, "outward", range(4)))


def _check_widening(found, want, methods):
    """Bounds lie just outside of ordinary ones of one process: 1e-8 is far above what was measured
    (below 1e-10), and a small part of a bound's width."""
    for of_rank in found:
        for method in methods:
            (lower, upper), (low, high) = want[method], of_rank[method]
            for added in (lower - low, high - upper):
                assert 0 < (added / (upper - lower)).min()
                assert (added / (upper - lower)).max() < 1e-8


@pytest.mark.parametrize(("kind", "tp", "pp"), [
    pytest.param(kind, tp, pp, marks=pytest.mark.slow)  # one is in test_stage_job
    for kind, tp, pp in (("gpt", 1, 2), ("gpt", 2, 2), ("gpt", 1, 4), ("llama", 2, 2),
                         ("llama", 1, 4))
])
def test_bounds_of_transformers_on_stages_are_widened_by_a_tiny_part(kind, tp, pp):
    # By IBP the llama's intermediate bounds are so wide that with their errors none is finite.
    methods = ("CROWN",) if kind == "llama" else ("CROWN-IBP", "CROWN")
    want = pool(1).run(stage_models.transformer_bounds, kind, methods)[0]
    found = pool(tp * pp, tp, pp).run(
        stage_models.transformer_bounds, kind, methods, options={"rounding": "outward"}
    )
    _check_widening(found, want, methods)


@pytest.mark.parametrize(("tp", "pp", "cuts"), [
    (2, 2, (4,)), pytest.param(1, 4, (2, 4, 8), marks=pytest.mark.slow),
])
def test_bounds_of_networks_on_stages_are_too(tp, pp, cuts):
    methods = METHODS[:3]
    want, *found = (
        {method: bounds[method, True] for method in methods}
        for size, shape in ((1, ((), 1, 1)), (tp * pp, (cuts, tp, pp)))
        for bounds in pool(size, *shape[1:]).run(
            stage_models.mlp_bounds, shape[0], "relu", methods, torch.float64,
            {"rounding": "outward"} if size > 1 else None,
        )
    )
    _check_widening(found, want, methods)


def test_what_a_pass_is_off_before_it_goes_down_is_in_the_slack_of_its_form():
    rows = drawn(3, 2, 6, seed=1).abs()
    off = drawn(2, 3, 2, seed=2).abs() * 1e-15
    found = RowBounds(None, None, None, None, off={"lower": off[0], "upper": off[1]})
    more = with_further(None, found, rows)
    assert torch.equal(more[..., :-1], rows[..., :-1])
    for slack, before, lower, upper in zip(
        *(x.flatten().tolist() for x in (more[..., -1], rows[..., -1], *off)), strict=True
    ):
        assert Fraction(slack) >= Fraction(before) + max(Fraction(lower), Fraction(upper))
        assert slack <= before * (1 + 1e-11) + 1e-11
