"""Rows of A have the positions that a causal mask lets them reach, and no constants."""

from __future__ import annotations

import pytest
import torch
import transformer_cases
import transformers
from ranks import pool

from lirpa_megatron import BoundedModule, perturb_tokens
from lirpa_megatron.crown.pass_window import PassWindows

LATE = {"positions": [4]}


def bounds(name, given=None, norm=float("inf"), windows=True, options=None):
    """(lower, upper, windows of the passes) of a case by CROWN, with few rows at a time."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    _, view, further = transformer_cases.build_case(name, torch.float64)
    inputs = perturb_tokens(
        view.eval(), transformers.tokens()[0], eps=0.01, norm=norm, **(given or {}), **further
    )
    kept, found = PassWindows.of_start, []

    def noted(self, *args):
        found.append(kept(self, *args) if windows else None)
        return found[-1]

    PassWindows.of_start = noted
    try:
        bounded = BoundedModule(view, inputs, {"max_spec_rows": 20, **(options or {})})
        with torch.no_grad():
            lower, upper = bounded.compute_bounds(inputs, method="CROWN")
    finally:
        PassWindows.of_start = kept
    return lower.numpy(), upper.numpy(), [w and (w.first, w.end) for w in found]


@pytest.mark.parametrize(("name", "given", "norm"), [
    ("gpt", None, float("inf")), ("llama", LATE, float("inf")), ("gpt", LATE, 2.0),
])
def test_bounds_are_those_of_all_positions(name, given, norm, session, double):
    lower, upper, windows = bounds(name, given, norm)
    all_lower, all_upper, none = bounds(name, given, norm, windows=False)
    width = (all_upper - all_lower).max()
    # float64: zeros and constants left out, sums in another order
    assert abs(lower - all_lower).max() <= 1e-11 * width
    assert abs(upper - all_upper).max() <= 1e-11 * width
    found = {w for w in windows if w}
    assert len(windows) == len(none) and not any(none)
    ends, firsts = {end for _, end in found}, {first for first, _ in found}
    assert len(ends) > 2 and firsts == ({4} if given else {0})


def test_forms_are_processed_position_by_position_or_whole(session, double):
    from lirpa_megatron.operators.tuning import Tuning

    lower, upper, _ = bounds("gpt", LATE)
    other = bounds("gpt", LATE, options={"tuning": Tuning(whole_form={"cpu": 0})})
    assert abs(lower - other[0]).max() <= 1e-11 * (upper - lower).max()
    assert abs(upper - other[1]).max() <= 1e-11 * (upper - lower).max()


def test_words_that_see_each_other_have_all_positions(session, double):
    assert not any(bounds("bert")[2])


@pytest.mark.parametrize("moves, size", [
    ("weights", 2),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in (("A", 2), ("A", 4), ("weights", 4))),
])
def test_bounds_are_those_of_one_device(size, moves):
    for given in (None, LATE):
        lower, upper, _ = pool(1).run(bounds, "gpt", given)[0]
        width = (upper - lower).max()
        options = {"moves": moves, "form_memory": 0.0}
        for found in pool(size).run(bounds, "gpt", given, options=options):
            assert abs(found[0] - lower).max() <= 1e-10 * width
            assert abs(found[1] - upper).max() <= 1e-10 * width
            assert any(found[2])
