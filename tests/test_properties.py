"""Networks, sets and options drawn at random: bounds as on one device, and no violation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    ACTIVATIONS,
    AS_PLAIN,
    HOSTS_OWN,
    REGIONS,
    Net,
    attack,
    build,
    plain,
    plain_compute,
    region,
    relative_error,
    specification,
)
from ranks import pool

from lirpa_megatron import METHODS, BoundedModule, parallelize
from lirpa_megatron.compat import auto_lirpa

BATCH = 2
ALPHA = {"iteration": 3, "optimizer": "sgd"}  # why not Adam: see `ITERATIONS` in test_exactness
WIDTHS = st.integers(2, 12)  # most do not divide by 4, many not by 2


@dataclass(frozen=True)
class Call:
    """One call of `compute_bounds`."""

    method: str
    rows: int
    """Of C; 0 for no C."""
    where: str
    eps: float
    options: tuple


@st.composite
def nets(draw: Any) -> Net:
    depth = draw(st.integers(1, 4))
    long_skip = draw(st.booleans())
    first = draw(WIDTHS)
    hidden = tuple(first if long_skip else draw(WIDTHS) for _ in range(depth))
    residual = draw(st.booleans())
    width = draw(st.integers(2, 8))
    return Net(
        inputs=width if residual else draw(st.integers(2, 6)),
        hidden=hidden, width=width, outputs=draw(st.integers(1, 4)),
        acts=tuple(draw(st.lists(st.sampled_from(sorted(ACTIVATIONS)), min_size=1, max_size=3))),
        bias=draw(st.booleans()), residual=residual, skip_hidden=draw(st.booleans()),
        long_skip=long_skip, constants=draw(st.booleans()), act_first=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def calls(draw: Any) -> Call:
    return Call(
        method=draw(st.sampled_from(METHODS)), rows=draw(st.sampled_from([0, 1, 3, 5])),
        where=draw(st.sampled_from(REGIONS)), eps=draw(st.sampled_from([0.0, 0.02, 0.2, 1.0])),
        options=(
            ("final_rows", draw(st.sampled_from(["auto", "own"]))),
            ("max_spec_rows", draw(st.sampled_from([None, 1, 3]))),
        ),
    )


def possible(net: Net, call: Call) -> tuple[Net, Call]:
    """Replaces what plain auto_LiRPA cannot do, or does wrongly."""
    if call.where in ("l1", "l2"):
        # It takes a ball that an activation reads for its center; in IBP also one that a sum reads.
        net = replace(net, act_first=False)
        if call.method in ("IBP", "CROWN-IBP"):
            net = replace(net, residual=False)
    if auto_lirpa.IS_03 and not net.bias and call.method in ("IBP", "CROWN-IBP"):
        call = replace(call, rows=0)  # 0.3 cannot merge C into a last layer without a bias
    return net, call


def sharded(net: Net, call: Call) -> list:
    torch.set_default_dtype(torch.float64)
    where = region(net, call.where, call.eps, BATCH)
    options = {**dict(call.options), "optimize_bound_args": ALPHA}
    model, options = parallelize(build(net).eval()), {**AS_PLAIN, **options}
    module = BoundedModule(model, where.center, options, custom_ops=HOSTS_OWN)
    C = specification(BATCH, call.rows, net.outputs) if call.rows else None
    bounds = module.compute_bounds(x=(where.bounded(),), C=C, method=call.method)
    return [b.detach().numpy() for b in bounds]


DRAWN = given(net=nets(), call=calls(), tp=st.sampled_from([1, 2, 4]))


@settings(derandomize=True, deadline=None, max_examples=4, database=None)
@DRAWN
def test_bounds_are_those_of_one_device_and_hold(net, call, tp):
    check(net, call, tp)


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=100, database=None)
@DRAWN
def test_bounds_of_many_more_are_those_of_one_device_and_hold(net, call, tp):
    check(net, call, tp)


def check(net: Net, call: Call, tp: int) -> None:
    net, call = possible(net, call)
    results = pool(tp).run(sharded, net, call)
    for of_rank in results[1:]:
        assert all((a == b).all() for a, b in zip(of_rank, results[0], strict=True))
    lower, upper = got = [torch.from_numpy(b) for b in results[0]]

    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        model = build(net).eval()
        where = region(net, call.where, call.eps, BATCH)
        C = specification(BATCH, call.rows, net.outputs) if call.rows else None
        module = plain(model, where.center, optimize_bound_args=ALPHA)
        want = plain_compute(module, where.bounded(), C, call.method)
        # Relative to the width, or for a set (nearly) of one point to the size of the values.
        size = max(1.0, lower.abs().max().item(), upper.abs().max().item())
        scale = (want[1] - want[0]).abs().clamp_min(1e-3 * size)
        assert relative_error(got, want, scale) <= 1e-10  # float64; measured: below 1e-12

        def function(x: torch.Tensor) -> torch.Tensor:
            y = model(x)
            if C is None:
                return y
            return torch.einsum("bso,nbo->nbs", C, y.view(-1, BATCH, net.outputs)).flatten(0, 1)

        # Rounding in float64 of sums of a few hundred terms.
        assert attack(function, where, lower, upper, count=60, steps=4) <= 1e-12 * size
    finally:
        torch.set_default_dtype(torch.float32)
