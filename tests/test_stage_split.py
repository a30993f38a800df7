"""The split of layers into pipeline stages that does as much work on each."""

from __future__ import annotations

import itertools

import pytest

from lirpa_megatron import UserError
from lirpa_megatron.crown.stage_split import balanced_split, stage_cost


def costs(split):
    ends = [0, *itertools.accumulate(split)]
    return [stage_cost(a, b, ends[-1]) for a, b in itertools.pairwise(ends)]


def splits(layers, stages):
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        yield [b - a for a, b in itertools.pairwise((0, *cuts, layers))]


@pytest.mark.parametrize("layers", [1, 2, 5, 6, 9])
def test_no_other_split_has_a_cheaper_dearest_stage(layers):
    for stages in range(1, layers + 1):
        split = balanced_split(layers, stages)
        assert len(split) == stages and sum(split) == layers and min(split) >= 1
        least = min(max(costs(other)) for other in splits(layers, stages))
        assert max(costs(split)) == least


def test_costs_are_passes_through_layers():
    # Of passes from the layers 0 ... 5 to the input, a layer's own counted half, the last one's
    # once more.
    for begin, end in [(0, 6), (0, 2), (2, 5), (5, 6)]:
        counted = sum((0.5 if i == start else 1) * (0.5 if start == 5 else 1) for start in range(6)
                      for i in range(begin, end) if i <= start)
        assert stage_cost(begin, end, 6) == counted


@pytest.mark.parametrize(("layers", "stages", "split"), [
    (24, 1, [24]), (24, 2, [7, 17]), (12, 2, [3, 9]), (12, 4, [2, 2, 2, 6]), (6, 2, [2, 4]),
    (4, 4, [1, 1, 1, 1]),
])
def test_splits_of_some_models(layers, stages, split):
    assert balanced_split(layers, stages) == split


def test_the_dearest_stage_of_a_deep_model_is_within_a_layer_of_the_mean():
    # A layer of the first stage costs 80 passes, and half a layer either way is rounding.
    found = costs(balanced_split(80, 8))
    assert max(found) <= sum(found) / len(found) + 80 / 2


@pytest.mark.parametrize(("layers", "stages"), [(3, 4), (3, 0)])
def test_more_stages_than_layers_are_refused_with_both_numbers(layers, stages):
    with pytest.raises(UserError, match=f"{layers} layers cannot be split into {stages}"):
        balanced_split(layers, stages)
