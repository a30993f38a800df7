"""Searches for the largest radius, and attacks within it and on words."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lirpa_megatron.verify.sentences import attack, search


@given(
    clean=st.floats(1e-3, 1e3), linear=st.floats(1e-6, 1e3), bend=st.floats(0, 100),
    tolerance=st.floats(1e-3, 0.3),
)
@settings(max_examples=100, deadline=None)
def test_the_certified_radius_was_proved_and_the_next_one_was_not(clean, linear, bend, tolerance):
    tried = {}

    def margin_at(radius):
        """Convex as bounds are: falls faster than the tangent, and is lost altogether far off."""
        value = clean * (1 - radius / linear - bend * (radius / linear) ** 2)
        tried[radius] = value if value > -9 * clean else -math.inf
        return tried[radius]

    found = search.largest_certified(margin_at, clean, linear, tolerance)
    assert tried[found] > 0
    assert any(found < r <= found * (1 + tolerance) * (1 + 1e-9) and tried[r] <= 0 for r in tried)
    assert len(tried) <= 60


@given(limit=st.floats(1e-9, 1e3), tolerance=st.floats(1e-3, 0.3))
@settings(max_examples=50, deadline=None)
def test_a_bound_may_reach_far_beyond_its_tangent_and_end_at_once(limit, tolerance):
    proved = []

    def margin_at(radius):
        if radius <= limit:
            proved.append(radius)
        return 1.0 if radius <= limit else -math.inf

    found = search.largest_certified(margin_at, 1.0, 1.0, tolerance)
    assert found == max(proved) and found * (1 + tolerance) * (1 + 1e-9) >= limit


def test_nothing_is_certified_where_nothing_is_proved():
    counted = itertools.count()
    assert search.largest_certified(lambda r: -next(counted) - 1.0, 1.0, 1.0, 0.02) == 0
    assert next(counted) <= 60
    assert search.largest_certified(lambda r: -math.inf, 1.0, 1e-12, 0.02) == 0


def test_a_margin_that_never_ends_ends_the_search():
    assert math.isfinite(search.largest_certified(lambda r: 1.0, 1.0, 1.0, 0.02))


def test_the_radius_is_doubled_until_an_attack_succeeds():
    assert search.smallest_attacked(lambda r: 0.7 if r >= 0.7 else None, 0.1) == 0.7
    assert search.smallest_attacked(lambda r: 0.7, 64.0) == 0.7
    assert search.smallest_attacked(lambda r: None, 0.1) is None


NORMS = {"inf": math.inf, "2": 2.0, "1": 1.0}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("radius", [0.0, 0.3, 5.0])
def test_projections_are_the_nearest_points_of_the_ball(norm, radius):
    torch.manual_seed(3)
    points = torch.randn(50, 3, 4, dtype=torch.float64)
    near = attack._project(points, norm, radius)
    assert (attack._size(near, norm) <= radius * (1 + 1e-12)).all()
    inside = attack._size(points, norm) <= radius
    assert torch.equal(near[inside], points[inside])
    # Of no other point of the ball is the given one nearer: <p - near, q - near> <= 0.
    others = attack._project(torch.randn(50, 1, 3, 4, dtype=torch.float64)[:, 0], norm, radius)
    outward, along = (points - near).flatten(1), (others - near).flatten(1)
    assert ((outward * along).sum(1) <= 1e-9).all()


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("shape", [(2, 3), (6, 32)])
def test_a_linear_margin_is_attacked_at_the_radius_of_the_dual_norm(norm, shape):
    torch.manual_seed(1)
    weight = torch.randn(shape, dtype=torch.float64)
    hidden = torch.randn(1, *shape, dtype=torch.float64)
    where = torch.ones(shape[0], dtype=torch.bool)
    where[0] = False
    dual = {math.inf: 1.0, 2.0: 2.0, 1.0: math.inf}[norm]
    want = 1 / torch.linalg.vector_norm(weight[1:].flatten(), ord=dual).item()

    def margin(points):
        assert torch.equal(points[:, 0], hidden[:, 0].expand(len(points), -1))  # does not move
        return ((points - hidden) * weight).flatten(1).sum(1) + 1

    def find(radius):
        return attack.smallest_success(margin, hidden, where, norm, radius, 40, 4, 0, None)

    assert find(0.99 * want) is None
    found = search.smallest_attacked(find, want / 3)
    assert want * (1 - 1e-9) <= found <= 1.05 * want


def test_a_tolerance_finer_than_numbers_ends():
    hidden, where = torch.zeros(1, 1, 2).double(), torch.ones(1, dtype=torch.bool)
    found = attack.smallest_success(
        lambda points: 1 - points.flatten(1).sum(1), hidden, where, 2.0, 1.0, 20, 3, 0, None,
        smaller=1e-30,
    )
    assert found == pytest.approx(0.5**0.5, rel=0.05)


def test_a_margin_that_is_nan_is_no_success():
    hidden, where = torch.zeros(1, 2, 2), torch.ones(2, dtype=torch.bool)

    def margin(points):
        return points.flatten(1).sum(1) * math.nan

    assert attack.smallest_success(margin, hidden, where, 2.0, 1.0, 3, 2, 0, None) is None


def embedded(ids):
    return ids.double().unsqueeze(-1)


def words_margin(bad):
    """At most 0 at the given sentences only, smaller the more of a bad sentence's words match."""
    def margin(points):
        values = [(points[..., 0] == torch.tensor(b).double()).sum(1) for b in bad]
        return len(bad[0]) - 0.5 - torch.stack(values).amax(0).double()
    return margin


def test_few_sentences_are_all_tried():
    ids, substitutes = torch.tensor([[1, 2, 3]]), {0: [4, 5], 2: [6]}
    found = attack.find_words(words_margin([[5, 2, 6]]), embedded, ids, substitutes, None)
    assert found == [5, 2, 6]
    for bad in ([5, 4, 6], [7, 2, 3]):  # not made of substitutes
        assert attack.find_words(words_margin([bad]), embedded, ids, substitutes, None) is None


def test_of_many_sentences_one_word_after_the_other_is_exchanged():
    ids, bad = torch.arange(10).unsqueeze(0), [p + 10 * (p % 4) for p in range(10)]
    substitutes = {p: [p + 10, p + 20, p + 30] for p in range(10)}  # 4^10 sentences
    found = attack.find_words(words_margin([bad]), embedded, ids, substitutes, None)
    assert found == bad
    assert attack.find_words(words_margin([[99] * 10]), embedded, ids, substitutes, None) is None


def test_without_substitutes_there_is_the_sentence_itself():
    ids = torch.tensor([[1, 2]])
    assert attack.find_words(words_margin([[1, 2]]), embedded, ids, {}, None) == [1, 2]
    assert attack.find_words(words_margin([[1, 3]]), embedded, ids, {}, None) is None
