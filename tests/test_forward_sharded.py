"""Forward methods on the ranks of a pool: one device's bounds at every tensor-parallel size."""

from __future__ import annotations

import functools

import pytest
import torch
from ranks import pool
from releases import needs_query_groups
from transformer_cases import CASES, GROUPS, case_bounds, check_same

FORWARD = ("forward", "forward+backward")
_SLOW = pytest.mark.slow


@functools.cache
def one(name, dtype):
    return pool(1).run(case_bounds, name, dtype, FORWARD, 1e-3)[0]


@pytest.mark.parametrize(("name", "size"), [
    ("gpt", 2), *(pytest.param(name, 2, marks=_SLOW) for name in CASES[1:3] + CASES[4:]),
    *(pytest.param(name, 4, marks=_SLOW) for name in ("gpt", "llama", "bert")),
])
def test_bounds_are_those_of_one_device(name, size):
    needs_query_groups(GROUPS.get(name, 4), size)
    many = pool(size).run(case_bounds, name, torch.float64, FORWARD, 1e-3)[0]
    check_same(one(name, torch.float64), many, torch.float64)


@_SLOW
def test_norms_of_keys_that_several_ranks_compute_differ_a_little():
    """Their errors count once for each rank: 0.4% here, and sound."""
    name = CASES[3]
    needs_query_groups(1, 2)
    many = pool(2).run(case_bounds, name, torch.float64, FORWARD, 1e-3)[0]
    for method, (lower, upper) in one(name, torch.float64).items():
        width = (upper - lower).mean()
        assert all((a - b).abs().max() < 0.02 * width
                   for a, b in zip((lower, upper), many[method], strict=True))


@_SLOW
def test_in_float32_too():
    many = pool(2).run(case_bounds, "gpt", torch.float32, FORWARD, 1e-3)[0]
    check_same(one("gpt", torch.float32), many, torch.float32)
