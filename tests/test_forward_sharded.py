"""Forward methods on the ranks of a pool: one device's bounds at every tensor-parallel size."""

from __future__ import annotations

import functools

import pytest
import torch
from ranks import pool
from releases import needs_query_groups
from transformer_cases import CASES, GROUPS, HEADS_APART, case_bounds, check_same

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


@pytest.mark.parametrize(("name", "size"), [
    (CASES[3], 2), *(pytest.param(name, size, marks=_SLOW)
                     for name, size in ((CASES[3], 4), (HEADS_APART, 2), (HEADS_APART, 4))),
])
def test_norms_of_queries_and_keys_count_once_however_many_ranks_compute_them(name, size):
    needs_query_groups(GROUPS[name], size)
    many = pool(size).run(case_bounds, name, torch.float64, FORWARD, 1e-3)[0]
    check_same(one(name, torch.float64), many, torch.float64)


@_SLOW
def test_in_float32_too():
    many = pool(2).run(case_bounds, "gpt", torch.float32, FORWARD, 1e-3)[0]
    check_same(one("gpt", torch.float32), many, torch.float32)


@pytest.mark.parametrize(("name", "size"), [
    ("gpt", 2), *(pytest.param(name, size, marks=_SLOW) for name, size in (
        ("llama", 2), ("bert", 2), ("gpt", 4), ("bert", 4), ("llama", 4))),
])
def test_errors_that_are_symbols_are_those_of_one_device(name, size):
    needs_query_groups(GROUPS.get(name, 4), size)
    options = {"kept_errors": 150}
    want = pool(1).run(case_bounds, name, torch.float64, FORWARD, 1e-3, options)[0]
    many = pool(size).run(case_bounds, name, torch.float64, FORWARD, 1e-3, options)[0]
    check_same(want, many, torch.float64)
