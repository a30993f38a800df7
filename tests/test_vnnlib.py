"""Properties mean what their formulas say."""

import gzip
import operator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_networks import MNIST_FC, needs_mnist_fc, others_win, parse, property_text

from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.properties.specification import reported_bounds
from lirpa_megatron.verify.properties.vnnlib import parse_vnnlib, read_vnnlib

BOX = property_text([0.0, -1.0], [1.0, 1.0], 2, "(<= Y_0 Y_1)")


def is_violated(prop, x, y):
    """Whether input x with output y violates the property, by its definition."""
    x, y = ([Fraction(float(v)) for v in values] for values in (x, y))
    return any(
        all(interval.holds(v) for interval, v in zip(region.box, x, strict=True))
        and any(
            all(prop.rows[row].allows(prop.rows[row].slack(y)) for row in disjunct)
            for disjunct in region.disjuncts
        )
        for region in prop.regions
    )


# Formulas as pairs of text and meaning. Numbers are multiples of 1/4: no rounding anywhere.
numbers = st.integers(-8, 8).map(lambda n: n / 4)


OPERATORS = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "=": operator.eq,
}


@st.composite
def comparisons(draw):
    left, right, more = draw(numbers), draw(numbers), draw(numbers)
    sign, choice = draw(st.sampled_from(list(OPERATORS))), draw(st.integers(0, 5))
    texts = [
        (f"Y_0 {right}", lambda x, y: (y[0], right)),
        (f"(+ (* {left} Y_0) Y_1) {right}", lambda x, y: (left * y[0] + y[1], right)),
        (f"(- Y_1 Y_0 {left}) (- {right})", lambda x, y: (y[1] - y[0] - left, -right)),
        (f"X_0 {right}", lambda x, y: (x[0], right)),
        (f"{left} Y_0 (/ {right} -2)", lambda x, y: (left, y[0], right / -2)),
        (f"{left} X_0 {right} (/ X_0 2.) {more}", lambda x, y: (left, x[0], right, x[0] / 2, more)),
    ]
    text, sides = texts[choice]

    def meaning(x, y):
        values = sides(x, y)
        return all(OPERATORS[sign](a, b) for a, b in zip(values, values[1:], strict=False))

    return f"({sign} {text})", meaning


def trees(inner):
    def join(word, reduce):
        def made(parts):
            texts, meanings = zip(*parts, strict=True)
            return f"({word} {' '.join(texts)})", lambda x, y: reduce(m(x, y) for m in meanings)

        return st.lists(inner, min_size=1, max_size=3).map(made)

    negations = inner.map(lambda part: (f"(not {part[0]})", lambda x, y: not part[1](x, y)))
    return join("and", all) | join("or", any) | negations


formulas = st.recursive(comparisons(), trees, max_leaves=6)


@settings(max_examples=150, deadline=None)
@given(formulas, st.integers(0, 2**31))
def test_disjuncts_mean_what_the_formula_says(formula, seed):
    text, meaning = formula
    try:
        prop = parse(text, (-2.0,), (2.0,))
    except UserError as error:
        assert "constrains no output" in str(error)
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


@pytest.mark.parametrize("head", [
    '(set-info :source |Made by hand (see notes); second\ndraft|)', '(set-info :n "a ""b"" ( ;")',
    "(set-logic QF_LRA)\r; (old\r", "\ufeff; (a mark\n", "\r\n(set-option :x true)\r\n",
])
def test_strings_quoted_symbols_and_line_ends_are_read(head, tmp_path):
    path = tmp_path / "prop.vnnlib"
    for text in (head + BOX, head + BOX.replace("\n", "\r"), head + BOX.replace("X_0", "|X_0|")):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            path.write_bytes(text.removeprefix("\ufeff").encode(encoding))
            found = read_vnnlib(path)
            assert found.regions == parse_vnnlib(BOX, "prop").regions
            assert found.rows[0].coefficients == {0: 1, 1: -1}


def test_lines_are_counted_in_strings_too():
    with pytest.raises(Exception, match="Y_9 is not declared") as caught:
        parse_vnnlib('(set-info :a "b\r\n\r\n")\r' + BOX.replace("Y_0 Y_1", "Y_0 Y_9"), "test")
    assert caught.value.line == 12


@pytest.mark.parametrize("text, value", {
    "1e-3": "1/1000", "+1.0": "1", ".5": "1/2", "-0.0": "0", "1.": "1", "1E2": "100",
    "0e99999": "0", "1e-400": f"1/1{'0' * 400}", "(- 2)": "-2", "(/ 1 3)": "1/3",
    "(/ 1 -3 2.0)": "-1/6",
    "(* 0.1 3 (+ 1 1))": "3/5", "(- (- 0.1) 0.2)": "-3/10", "0.1": "1/10",
}.items())
def test_numbers_are_exact(text, value):
    assert parse(f"(<= Y_0 {text})").rows[0].bound == Fraction(value)


def boxes(prop):
    return [(r.lower[0], r.upper[0], r.disjuncts) for r in prop.regions]


def test_boxes_with_holes_are_all_combinations_but_the_empty_ones():
    holes = " ".join(f"(or (<= X_0 {i / 64}) (>= X_0 {(i + 1) / 64}))" for i in range(0, 64, 2))
    prop = parse(f"(and {holes} (<= Y_0 1.0))")  # 2^32 combinations
    assert [b[:2] for b in boxes(prop)] == [(0.0, 0.0)] + [
        ((i + 1) / 64, (i + 2) / 64) for i in range(0, 64, 2)
    ]
    texts = BOX.replace("(assert (<= Y_0 Y_1))", f"(assert (<= Y_0 1.0)) (assert {holes})".replace(
        ") (or", ")) (assert (or"))
    assert boxes(parse_vnnlib(texts, "test")) == boxes(prop)


def test_a_disjunct_outside_of_the_box_is_dropped():
    prop = parse("(or (and (>= X_0 2) (<= X_0 3) (>= Y_0 0)) (and (<= X_0 0.25) (>= Y_0 1.5)))")
    assert boxes(prop) == [(0.0, 0.25, ((1,),))] and prop.vacuous is None


@pytest.mark.parametrize("unsafe, why", [
    ("(and (<= X_0 -1.0) (<= Y_0 1))", "no input"), ("(and (< X_0 0) (<= Y_0 1))", "no input"),
    ("(and (or (< X_0 0) (> X_0 1)) (<= Y_0 1))", "no input"),
    ("(and (<= Y_0 0.4) (>= Y_0 0.6))", "no outputs"), ("(< Y_0 Y_1 Y_0)", "no outputs"),
    ("(and (<= Y_0 Y_1) (>= Y_0 (+ Y_1 1e-30)))", "no outputs"), ("(not (= Y_0 Y_0 Y_0 ))", None),
    ("(and (<= Y_0 1) (>= Y_0 1))", None), ("(and (<= Y_0 1) (> Y_0 1))", "no outputs"),
    ("(or (and (<= Y_0 1) (>= Y_0 2)) (and (>= Y_1 3) (<= (+ Y_0 Y_1) 1) (>= Y_0 0)))",
     "no outputs"),
    ("(or (and (<= Y_0 1) (>= Y_0 2)) (<= Y_1 1))", None),
])
def test_what_no_input_or_no_outputs_satisfy_holds(unsafe, why):
    try:
        prop = parse(unsafe)
    except UserError as error:
        assert why is None and "constrains no output" in str(error)
        return
    assert (prop.vacuous or "None").startswith(str(why))
    assert (prop.regions == ()) == (why is not None)


def test_thousands_of_disjuncts_are_read_quickly():
    pieces = " ".join(
        f"(and (>= X_0 {i / 8192}) (<= X_0 {(i + 1) / 8192}) (<= Y_0 {i}))" for i in range(8192)
    )
    prop = parse(f"(or {pieces})")
    assert len(prop.regions) == 8192 and len(prop.rows) == 8192
    bounds = reported_bounds(prop, [{i: float(i)} for i in range(8192)])
    assert bounds == [float(i) for i in range(8192)]


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
    "unclosed parenthesis": ("(assert (<= Y_0 Y_1))", "(assert (<= Y_0", r"line 9: '\(' is never"),
    "stray parenthesis": ("(assert (<= Y_0", ") (assert (<= Y_0", r"line 9: '\)' without"),
    "undeclared variable": ("(<= Y_0 Y_1)", "(<= Y_0 Y_7)", "line 9: Y_7 is not declared"),
    "gap in the numbering": ("Y_1", "Y_2", "Y_1 is not declared, but Y_2 is"),
    "product of variables": ("Y_0 Y_1)", "Y_0 (* Y_0 Y_1))", "line 9: a product"),
    "product of input and output": ("Y_0 Y_1)", "Y_0 (* X_0 Y_1))", "line 9: a product"),
    "bound by an unbounded input": (
        "X_0 1.0))\n(assert (>= X_1 -1.0))\n(assert (<= X_1 1.0))", "X_0 X_1))",
        "X_0 has no upper bound"),
    "no constraint on outputs": ("(<= Y_0 Y_1)", "(<= X_0 1.0)", "constrains no output"),
    "unknown command": ("(assert (<= Y_0 Y_1))", "(push 1)", "line 9: unknown command 'push'"),
    "let": ("(<= Y_0 Y_1)", "(let ((a 1)) (<= Y_0 a))", "line 9: let .* is not supported"),
    "ite": ("Y_0 Y_1)", "Y_0\n(ite true 1 Y_1))", "line 10: ite .* is not supported"),
    "division by zero": ("Y_0 Y_1)", "Y_0 (/ Y_1 0.0))", "line 9: a division by zero"),
    "division by a variable": ("Y_0 Y_1)", "Y_0 (/ 1 Y_1))", "line 9: a division by a variable"),
    "one operand": ("Y_0 Y_1)", "Y_0)", "line 9: <= takes two operands, found 1"),
    "not of two": ("(<= Y_0 Y_1)", "(not (<= Y_0 1) (<= Y_1 1))", "line 9: not takes one formula"),
    "open string": ("(assert (<= Y_0", '(set-info :x "y) (assert (<= Y_0', "line 9: the quotation"),
    "quoted name": ("X_1 Real", "|X 1| Real", "line 2: variable '.X 1.' is neither X_i nor"),
    "exponent": ("X_0 1.0", "X_0 1e9999999999", "line 6: number .* has too large an exponent"),
    "digits": ("X_0 1.0", f"X_0 0.{'1' * 5000}", "line 6: number .* more than 1000 digits"),
    "product too large": ("X_0 1.0", "X_0 (* 1e300 1e300)", "line 6: a number .* is too large"),
    "newer version": ("(assert (<= Y_0 Y_1))", "(vnnlib-version <2.0>)",
                      "line 9: vnnlib-version must come first"),
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


@pytest.mark.parametrize("name", [".", "..", "/", "folder"])
def test_a_folder_in_place_of_a_file_is_refused(name, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"property {name} is not a regular file"):
        read_vnnlib(name)


def test_a_name_that_the_system_refuses_is_an_error_that_names_it():
    with pytest.raises(UserError, match="property nnn.* cannot be read: .*too long"):
        read_vnnlib("n" * 5000)


def test_others_win_is_what_it_says():
    prop = parse(others_win(1, 3), n_out=3)
    x = np.array([0.5, 0.0])
    assert is_violated(prop, x, [0.0, 1.0, 1.0]) and not is_violated(prop, x, [0.0, 1.0, 0.5])
