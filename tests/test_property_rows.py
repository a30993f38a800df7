"""Rows of a property: contradictions, numbers that a type does not have, what bounds prove."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import parse

from lirpa_megatron.verify.properties.contradictions import contradict
from lirpa_megatron.verify.properties.property import OutputRow
from lirpa_megatron.verify.properties.specification import (
    RowsToBound,
    inward_box,
    is_impossible,
    open_disjuncts,
    outward_box,
    region_rows,
    reported_bounds,
    specification_matrix,
)

row_lists = st.lists(
    st.tuples(st.lists(st.integers(-2, 2), min_size=3, max_size=3).filter(any),
              st.integers(-3, 3), st.booleans()), min_size=1, max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(row_lists)
def test_rows_contradict_each_other_exactly_if_a_linear_program_says_so(rows):
    made = [
        OutputRow({j: Fraction(c) for j, c in enumerate(cs) if c}, Fraction(bound), 1, strict)
        for cs, bound, strict in rows
    ]
    # Variables 3 and 4: as far inside as possible all strict rows are satisfied, at most by 1.
    A = np.array([[*cs, float(strict)] for cs, _, strict in rows])
    found = scipy.optimize.linprog(
        [0, 0, 0, -1], A_ub=A, b_ub=[bound for _, bound, _ in rows],
        bounds=[(None, None)] * 3 + [(0, 1)],
    )
    possible = found.status == 0 and (found.x[3] > 1e-7 or not any(r.strict for r in made))
    assert contradict(made) == (not possible)


def test_many_rows_are_not_eliminated_for_ever():
    generator = np.random.default_rng(0)
    rows = [
        OutputRow({j: Fraction(int(c)) for j, c in enumerate(cs) if c}, Fraction(1), 1)
        for cs in generator.integers(-9, 10, (60, 12))
    ]
    assert not contradict(rows)


def test_boxes_are_rounded_outwards():
    (region,) = parse("(<= Y_0 Y_1)", (0.1, -0.3), (0.1, 0.7)).regions
    lower, upper = outward_box(region, torch.float32)
    assert (lower.double().numpy() <= region.lower).all()
    assert (upper.double().numpy() >= region.upper).all()
    exact_lower, _ = outward_box(region, torch.float64)
    assert (exact_lower.numpy() == region.lower).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_points_inside_a_box_are_numbers_of_the_type_in_it(dtype):
    (region,) = parse(
        "(and (< X_0 0.7) (> X_0 -0.1) (<= Y_0 Y_1))", (-0.1, -0.3, 0.0, 0.1), (0.9, 1.0, 0.0, 0.1)
    ).regions
    lower, upper = (end.double().tolist() for end in inward_box(region, dtype))
    for index in (0, 1, 2):
        interval = region.box[index]
        for end in (lower[index], upper[index]):
            assert interval.holds(Fraction(end))
        # and the next ones beyond them are not, or are printed like a number that is not
        step = torch.finfo(dtype).eps
        for end, sign in ((lower[index], -1), (upper[index], 1)):
            beyond = end + sign * step * max(abs(end), 1e-30)
            assert not (interval.holds(Fraction(beyond)) and interval.holds(Fraction(repr(beyond))))
    assert lower[3] == upper[3] == torch.tensor(0.1, dtype=dtype).item()  # there is none in it


@pytest.mark.parametrize("unsafe, whole", [
    ("(<= (* 0.1 Y_0) (* 0.3 Y_1))", True), ("(<= (* 0.1 Y_0) (* 0.30000000000000001 Y_1))", False),
    ("(<= (+ (* 1.5 Y_0) (/ Y_1 3)) 0.7)", True), ("(<= (* 16777217 Y_0) (* 3 Y_1))", False),
])
def test_coefficients_that_a_type_does_not_have_are_bounded_safely(unsafe, whole):
    """Of outputs in a box: what is said is never above the smallest slack, and close to it."""
    (row,) = parse(unsafe).rows
    rows = RowsToBound([row], torch.float32)
    C = torch.zeros(len(rows), 2)
    rows.fill(C)
    low, high = np.array([-3.0, 0.3]), np.array([2.0, 0.7])
    center, radius = (low + high) / 2, (high - low) / 2
    matrix = C.double().numpy()
    (value,) = rows.values(matrix @ center - abs(matrix) @ radius)
    corners = [(a, b) for a in (low[0], high[0]) for b in (low[1], high[1])]
    smallest = min(-row.slack([Fraction(a), Fraction(b)]) for a, b in corners)
    size = sum(abs(float(c)) for c in row.coefficients.values())
    assert value <= smallest + Fraction(size * 1e-15)  # rounding of the float64 product above
    assert value >= smallest - (0 if not whole else 1e-14) - size * 6e-7
    assert (len(rows) == 1) == whole


def test_a_disjunct_is_refuted_by_any_of_its_rows():
    prop = parse("(or (and (<= Y_0 1.0) (<= Y_1 2.0)) (<= Y_0 3.0))")
    (region,) = prop.regions
    assert region_rows(region) == [0, 1, 2]
    assert open_disjuncts(region, {0: -1.0, 1: 0.5, 2: 0.1}) == []
    assert open_disjuncts(region, {0: -1.0, 1: 0.0, 2: 0.1}) == [0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
def test_nothing_but_a_positive_finite_bound_proves_anything(value):
    assert not is_impossible(value)
    assert reported_bounds(parse("(<= Y_0 1.0)"), [{0: float("nan")}]) == [None]


def test_right_hand_sides_are_subtracted_from_the_bounds():
    prop = parse("(or (<= Y_0 1.5) (>= (* 2.0 Y_1) (+ Y_0 1.0)))")
    C = specification_matrix(prop.rows, 2, torch.float32)
    assert C.tolist() == [[[1.0, 0.0], [1.0, -2.0]]]
    # c . y <= d as c . y - d: Y_0 - 1.5, and Y_0 - 2 Y_1 + 1.
    assert RowsToBound(prop.rows, torch.float32).values(np.array([2.0, 0.0])) == [0.5, 1.0]
