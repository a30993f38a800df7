"""GPT, LLaMA-like and BERT models: one device's bounds at every tensor-parallel size.

Sizes are compared in float64 to 1e-10 of a bound's width, in float32 to 1e-5 of it (plus 1e-5 of
its magnitude where the width is smaller than the rounding of the forward pass).
"""

from __future__ import annotations

import functools
import math
from unittest import mock

import pytest
import torch
import transformers
from ranks import pool
from releases import needs_query_groups
from transformer_cases import ALPHA, CASES, GROUPS, ROUNDS, build_case, case_bounds, check_same

from lirpa_megatron import (
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    at_position,
    from_layer,
    perturb_tokens,
)
from lirpa_megatron.adapters.traceable import traceable
from lirpa_megatron.operators.norm import norm
from lirpa_megatron.operators.tuning import Tuning

_SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, 2) if name != "bert's language head" else pytest.param(name, 2, marks=_SLOW)
     for name in CASES]
    + [(name, 4) if name == "llama" else pytest.param(name, 4, marks=_SLOW)
       for name in CASES],
)
def test_bounds_are_those_of_one_device(name, size):
    needs_query_groups(GROUPS.get(name, 4), size)
    one = _one(name, torch.float64)
    many = pool(size).run(case_bounds, name, torch.float64)[0]
    check_same(one, many, torch.float64)
    for method in ROUNDS:
        assert torch.isfinite(torch.stack(one[method])).all()


@functools.lru_cache(maxsize=32)
def _one(name, dtype, methods=ROUNDS):
    return pool(1).run(case_bounds, name, dtype, methods)[0]


@pytest.mark.parametrize(
    "name", ["gpt", pytest.param("llama", marks=_SLOW), pytest.param("bert", marks=_SLOW)]
)
def test_in_float32_too(name):
    two = pool(2).run(case_bounds, name, torch.float32)[0]
    check_same(_one(name, torch.float32), two, torch.float32)


@pytest.mark.parametrize(
    ("name", "intermediate"),
    [("gpt", "auto"), pytest.param("llama", "auto", marks=_SLOW),
     pytest.param("bert", True, marks=_SLOW),
     pytest.param("llama", True, marks=_SLOW)],
)
def test_alpha_crown_is_the_same_on_two_ranks_and_no_looser_than_crown(name, intermediate):
    options = {"optimize_bound_args": ALPHA, "optimize_intermediate": intermediate}
    methods = ("CROWN", "CROWN-Optimized")
    run = (case_bounds, name, torch.float64, methods, 0.003, options)
    one, two = pool(1).run(*run)[0], pool(2).run(*run)[0]
    check_same(one, two, torch.float64)
    widths = [(upper - lower).mean() for lower, upper in (one[m] for m in methods)]
    assert widths[1] <= widths[0] * (1 + 1e-9)


@pytest.mark.parametrize(
    "options",
    [pytest.param({"max_spec_rows": 5}, marks=_SLOW), {"pass_memory": 0.2},
     pytest.param({"max_spec_rows": 50}, marks=_SLOW), pytest.param({"moves": "A"}, marks=_SLOW),
     {"moves": "weights", "max_spec_rows": 50}],
    ids=str,
)
def test_rows_in_chunks_and_whatever_moves_are_the_same_rows(options):
    many = pool(2).run(case_bounds, "llama", torch.float64, ("CROWN",), 0.01, options)[0]
    check_same({"CROWN": _one("llama", torch.float64)["CROWN"]}, many, torch.float64)


def _bounded_on_the_way(options, of=None):
    """BERT's two rows, and the norms' rows that were bounded by passes of their own."""
    from lirpa_megatron.crown.auxiliary_rows import Directions

    seen, along = [], Directions.along

    def counted(self, node, vectors, **how):
        seen.append(vectors.shape[0])
        found = along(self, node, vectors, **how)
        return found if of is None else of(found)

    Directions.along = counted
    try:
        return case_bounds("bert", torch.float64, ("CROWN",), 0.02, options), seen
    finally:
        Directions.along = along


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=_SLOW)])
def test_rows_that_are_bounded_on_the_way_of_own_rows_are_the_same_rows(ranks):
    one, seen = pool(1).run(_bounded_on_the_way, None)[0]
    own, seen_by_ranks = pool(ranks).run(_bounded_on_the_way, {"final_rows": "own"})[0]
    check_same(one, own, torch.float64)
    assert seen.count(4) > 3 and seen.count(1) > 2  # s of both sides in the last pass, t before
    assert len(seen) == len(seen_by_ranks)


def _unknown(found):
    infinite = torch.full_like(found.lower, math.inf)
    return type(found)(-infinite, infinite, None)


def test_rows_that_are_bounded_on_the_way_make_bounds_tighter():
    (with_them, _), (without, _) = (
        pool(1).run(_bounded_on_the_way, None, of)[0] for of in (None, _unknown)
    )
    widths = [(u - l).mean() for l, u in (x["CROWN"] for x in (with_them, without))]
    assert widths[0] < 0.9 * widths[1]


@pytest.mark.parametrize(
    "name", [name if name in ("bert", CASES[3]) else pytest.param(name, marks=_SLOW)
             for name in CASES]
)
def test_weights_move_and_bounds_stay(name):
    ranks = 4 if name.startswith("one key group") else 2
    needs_query_groups(GROUPS.get(name, 4), ranks)
    run = (case_bounds, name, torch.float64, ("CROWN",), 0.01, {"moves": "weights"})
    many = pool(ranks).run(*run)[0]
    check_same({"CROWN": _one(name, torch.float64)["CROWN"]}, many, torch.float64)


def _in_positions(name):
    """Arguments of `_bounds`."""
    options = {"optimize_bound_args": ALPHA}
    return name, torch.float64, ("CROWN", "CROWN-Optimized"), 0.003, options


def _position_by_position(name):
    """Bounds with the form of each position and each side by itself, but all queries at once."""
    *run, options = _in_positions(name)
    tuning = Tuning(whole_form={"cpu": 0}, few=0, pairs={"cpu": 2**26})
    return case_bounds(*run, {**options, "tuning": tuning})


@_SLOW
@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_forms_used_position_by_position_give_the_same_bounds(name):
    whole = pool(1).run(case_bounds, *_in_positions(name))[0]
    parts = pool(2).run(_position_by_position, name)[0]
    check_same(whole, parts, torch.float64)


def _dealt(name):
    """Bounds with norms' forms dealt out to the ranks, and how many norms' were."""
    dealt = []

    class Counted(norm.RoundRobinTensors):
        def __init__(self, *args):
            super().__init__(*args)
            dealt.append(self)

    options = {"form_memory": 0, "tuning": Tuning(whole_form={"cpu": 0})}
    with mock.patch.object(norm, "RoundRobinTensors", Counted):
        found = case_bounds(name, torch.float64, ("CROWN",), 0.01, options)
    return found, len(dealt)


@pytest.mark.parametrize(
    ("name", "ranks"), [("gpt", 2), pytest.param("bert", 4, marks=_SLOW),
                        pytest.param(CASES[3], 2, marks=_SLOW)],
)
def test_forms_that_the_ranks_share_give_the_same_bounds(name, ranks):
    found, norms = pool(ranks).run(_dealt, name)[0]
    check_same({"CROWN": _one(name, torch.float64)["CROWN"]}, found, torch.float64)
    assert norms > 0


def test_an_l2_ball_and_chosen_positions_are_bounded_alike_on_two_ranks():
    one, two = (pool(size).run(_sets)[0] for size in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert (a - b).abs().max() <= 1e-10 * (a.abs().max())


def _sets():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model = transformers.gpt(torch.float64)
    view, ids = at_position(model, -1).eval(), transformers.tokens()[0]
    found = []
    for description in ({"eps": 0.02, "norm": 2}, {"eps": 0.05, "positions": [2]},
                        {"substitutes": {1: [3, 4], 5: [7]}, "shape": "hull"}):
        inputs = perturb_tokens(view, ids, **description)
        bounded = BoundedModule(view, inputs)
        with torch.no_grad():
            lower, upper = bounded.compute_bounds(inputs, method="CROWN")
        assert (lower <= upper).all() and torch.isfinite(lower).all()
        found += [lower, upper]
    return found


def _at_one_position_and_at_all(name, position):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model, _, further = build_case(name, torch.float64)
    ids = transformers.tokens()[0]
    found = []
    for view in (from_layer(model, 0), at_position(model, position)):
        view.eval()
        inputs = perturb_tokens(view, ids, eps=0.01, **further)
        with torch.no_grad():
            bounds = BoundedModule(view, inputs).compute_bounds(inputs, method="CROWN")
        found.append([b if b.ndim == 2 else b[:, position] for b in bounds])
    return found


@pytest.mark.parametrize(
    ("name", "position"),
    [("gpt", 1), pytest.param("llama", -1, marks=_SLOW), pytest.param("gpt", -1, marks=_SLOW),
     pytest.param("llama", 1, marks=_SLOW)],
)
def test_one_position_has_the_bounds_that_it_has_among_all(name, position):
    everywhere, alone = pool(1).run(_at_one_position_and_at_all, name, position)[0]
    for a, b in zip(everywhere, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def _few_logits(vocabulary):
    """Bounds of a few logits that are gathered, and whether points of the set stay inside."""
    model = transformers.gpt(
        torch.float64, {"vocab_size": vocabulary, "position_embedding_type": "none"},
        num_layers=1, hidden_size=64, ffn_hidden_size=64,
    )
    view = at_position(model, -1)
    x = torch.randn(1, 2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ball = BoundedTensor(x, PerturbationLpNorm(norm=math.inf, eps=0.01))
    with torch.no_grad():
        lower, upper = BoundedModule(view, (x,)).compute_bounds((ball,), method="CROWN")
        noise = 2 * torch.rand(400, 2, 64, dtype=torch.float64) - 1
        noise[:200] = noise[:200].sign()
        y = traceable(view)(x + 0.01 * noise)
    return lower.numpy(), upper.numpy(), bool(((y >= lower) & (y <= upper)).all())


@pytest.mark.parametrize("vocabulary", [16, 32])
def test_few_outputs_that_are_gathered_ask_for_rows_of_all_ranks(vocabulary):
    """Each rank has the rows of its block; what operators want to know is of all of them.

    Of 32 logits in 64 features, the ranks together have too many rows to ask for more.
    """
    ((lower, upper, holds),) = pool(1).run(_few_logits, vocabulary)
    assert holds
    width = (upper - lower).max()
    for size in (2, 4):
        for found in pool(size).run(_few_logits, vocabulary):
            assert found[2]
            assert abs(found[0] - lower).max() <= 1e-10 * width
            assert abs(found[1] - upper).max() <= 1e-10 * width
