"""Properties mean what their formulas say."""

import gzip

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import MNIST_FC, needs_mnist_fc, others_win, property_text

from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.specification import (
    is_impossible,
    minus_right_hand_sides,
    open_disjuncts,
    outward_box,
    region_rows,
    reported_bounds,
    specification_matrix,
)
from lirpa_megatron.verify.vnnlib import parse_vnnlib, read_vnnlib

BOX = property_text([0.0, -1.0], [1.0, 1.0], 2, "(<= Y_0 Y_1)")


def parse(unsafe, lower=(0.0, -1.0), upper=(1.0, 1.0), n_out=2):
    return parse_vnnlib(property_text(lower, upper, n_out, unsafe), "test")


def is_violated(prop, x, y):
    """Whether input x with output y violates the property, by its definition."""
    return any(
        np.all(region.lower <= x)
        and np.all(x <= region.upper)
        and any(
            all(
                sum(c * y[j] for j, c in prop.rows[row].coefficients.items())
                <= prop.rows[row].bound
                for row in disjunct
            )
            for disjunct in region.disjuncts
        )
        for region in prop.regions
    )


# Formulas as pairs of text and meaning. Numbers are multiples of 1/4: no rounding anywhere.
numbers = st.integers(-8, 8).map(lambda n: n / 4)


@st.composite
def comparisons(draw):
    left, right = draw(numbers), draw(numbers)
    sign, choice = draw(st.sampled_from(["<=", ">="])), draw(st.integers(0, 3))
    texts = [
        (f"Y_0 {right}", lambda x, y: (y[0], right)),
        (f"(+ (* {left} Y_0) Y_1) {right}", lambda x, y: (left * y[0] + y[1], right)),
        (f"(- Y_1 Y_0 {left}) (- {right})", lambda x, y: (y[1] - y[0] - left, -right)),
        (f"X_0 {right}", lambda x, y: (x[0], right)),
    ]
    text, sides = texts[choice]

    def meaning(x, y):
        a, b = sides(x, y)
        return a <= b if sign == "<=" else a >= b

    return f"({sign} {text})", meaning


def trees(inner):
    def join(word, reduce):
        def made(parts):
            texts, meanings = zip(*parts, strict=True)
            return f"({word} {' '.join(texts)})", lambda x, y: reduce(m(x, y) for m in meanings)

        return st.lists(inner, min_size=1, max_size=3).map(made)

    return join("and", all) | join("or", any)


formulas = st.recursive(comparisons(), trees, max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(formulas, st.integers(0, 2**31))
def test_disjuncts_mean_what_the_formula_says(formula, seed):
    text, meaning = formula
    try:
        prop = parse(text, (-2.0,), (2.0,))
    except UserError as error:  # the draw constrains inputs only, or leaves a box empty
        assert "empty" in str(error) or "constrains no output" in str(error)
        return
    generator = np.random.default_rng(seed)
    for _ in range(20):
        x = generator.integers(-8, 9, size=1) / 4
        y = generator.integers(-8, 9, size=2) / 4
        assert is_violated(prop, x, y) == meaning(x, y), (text, x, y)


def test_rows_keep_file_order():
    prop = parse("(and (or (<= Y_0 1.0) (<= Y_0 2.0)) (<= Y_1 3.0))")
    assert [row.bound for row in prop.rows] == [1.0, 2.0, 3.0]
    assert prop.regions[0].disjuncts == ((0, 2), (1, 2))


def test_a_disjunction_of_boxes_gives_one_region_each():
    prop = parse("(or (and (<= X_0 0.25) (<= Y_0 1)) (and (>= X_0 0.5) (<= Y_1 2)))")
    boxes = [(region.lower[0], region.upper[0], region.disjuncts) for region in prop.regions]
    assert boxes == [(0.0, 0.25, ((0,),)), (0.5, 1.0, ((1,),))]


def test_equality_is_two_rows():
    prop = parse("(= Y_0 2.0)")
    assert prop.regions[0].disjuncts == ((0, 1),)


def test_comments_older_declarations_and_exponents_are_read():
    text = BOX.replace("(declare-const X_0 Real)", "; first\n(declare-fun X_0 () Real)")
    prop = parse_vnnlib("(set-logic QF_LRA)\n" + text.replace("1.0", "1e+0"), "test")
    assert prop.regions[0].upper.tolist() == [1.0, 1.0]


@needs_mnist_fc
def test_published_property_is_read_as_published():
    prop = read_vnnlib(MNIST_FC / "vnnlib" / "prop_0_0.03.vnnlib", 784, 10)
    (region,) = prop.regions
    assert [row.coefficients for row in prop.rows] == [
        {j: -1.0, 4: 1.0} for j in range(10) if j != 4
    ]
    assert region.disjuncts == tuple((row,) for row in range(9))
    assert (region.lower >= 0).all() and (region.upper <= 1).all()
    assert 0.0 < (region.upper - region.lower).max() <= 0.06 + 1e-7


BAD = {
    "unbounded input": ("\n(assert (<= X_1 1.0))", "", "X_1 has no upper bound"),
    "empty box": ("(<= X_0 1.0)", "(<= X_0 -1.0)", "box is empty: X_0"),
    "unclosed parenthesis": ("(assert (<= Y_0 Y_1))", "(assert (<= Y_0", r"line 9: '\(' is never"),
    "stray parenthesis": ("(assert (<= Y_0", ") (assert (<= Y_0", r"line 9: '\)' without"),
    "undeclared variable": ("(<= Y_0 Y_1)", "(<= Y_0 Y_7)", "line 9: Y_7 is not declared"),
    "gap in the numbering": ("Y_1", "Y_2", "Y_1 is not declared, but Y_2 is"),
    "strict comparison": ("(<= Y_0 Y_1)", "(< Y_0 Y_1)", "line 9: expected and, or, <="),
    "product of variables": ("Y_0 Y_1)", "Y_0 (* Y_0 Y_1))", "line 9: a product"),
    "input related to output": ("Y_0 Y_1)", "Y_0 X_1)", "line 9: .* inputs to outputs"),
    "constraint on two inputs": ("X_0 1.0", "X_0 X_1", "line 6: .* several inputs"),
    "no constraint on outputs": ("(<= Y_0 Y_1)", "(<= X_0 1.0)", "constrains no output"),
    "unknown command": ("(assert (<= Y_0 Y_1))", "(push 1)", "line 9: unknown command 'push'"),
    "other types": ("X_0 Real", "X_0 Int", "line 1: X_0 has type 'Int'"),
    "double declaration": ("X_1 Real", "X_0 Real", "line 2: X_0 is declared twice"),
    "too large a number": ("X_0 1.0", "X_0 1e999", "line 6: number 1e999 is too large"),
    "no formula at all": (BOX, "", "no variable X_0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_properties_are_refused_in_one_line(name, tmp_path):
    old, new, message = BAD[name]
    assert old in BOX
    path = tmp_path / "prop.vnnlib"
    path.write_text(BOX.replace(old, new))
    with pytest.raises(UserError, match=message) as caught:
        read_vnnlib(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_too_deep_a_formula_is_refused():
    with pytest.raises(Exception, match="nested deeper"):
        parse("(and " * 1000 + "(<= Y_0 Y_1)" + ")" * 1000)


def test_too_many_disjuncts_are_refused():
    either = "(or (<= Y_0 1.0) (<= Y_1 1.0))"
    with pytest.raises(Exception, match="too many"):
        parse(f"(and {' '.join([either] * 40)})")


def test_numbers_of_variables_are_compared_with_the_network(tmp_path):
    path = tmp_path / "prop.vnnlib.gz"
    path.write_bytes(gzip.compress(BOX.encode()))
    assert read_vnnlib(tmp_path / "prop.vnnlib", 2, 2).name == "prop"
    with pytest.raises(UserError, match="declares 2 input variables, but net has 5 inputs"):
        read_vnnlib(path, 5, 2, "net")
    with pytest.raises(UserError, match="declares 2 output variables, but net has 3 outputs"):
        read_vnnlib(path, 2, 3, "net")


@pytest.mark.parametrize("data", [b"\x1f\x8b\x08", b"\x1f\x8b" + b"x" * 40, b"\xff\xfe\x00"])
def test_damaged_files_are_refused(data, tmp_path):
    path = tmp_path / "prop.vnnlib"
    path.write_bytes(data)
    with pytest.raises(UserError, match="truncated or corrupt|not a text file"):
        read_vnnlib(path)


def test_boxes_are_rounded_outwards():
    (region,) = parse("(<= Y_0 Y_1)", (0.1, -0.3), (0.1, 0.7)).regions
    lower, upper = outward_box(region, torch.float32)
    assert (lower.double().numpy() <= region.lower).all()
    assert (upper.double().numpy() >= region.upper).all()
    exact_lower, _ = outward_box(region, torch.float64)
    assert (exact_lower.numpy() == region.lower).all()


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
    assert minus_right_hand_sides(torch.tensor([[2.0, 0.0]]), prop.rows).tolist() == [0.5, 1.0]


def test_others_win_is_what_it_says():
    prop = parse(others_win(1, 3), n_out=3)
    x = np.array([0.5, 0.0])
    assert is_violated(prop, x, [0.0, 1.0, 1.0]) and not is_violated(prop, x, [0.0, 1.0, 0.5])
