"""Queries of VNN-LIB 2.0 mean what their formulas say, and what is none is refused in one line."""

import operator
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from queries import box, is_violated, needs_parser, network, one, parsed, query

from lirpa_megatron.errors import UserError
from lirpa_megatron.verify.properties import vnnlib2, vnnlib2_parser, vnnlib2_text
from lirpa_megatron.verify.properties.vnnlib import read_vnnlib

pytestmark = needs_parser

OPERATORS = {
    "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq,
    "!=": operator.ne,
}
PAIR = network("f", {"X": [2]}, {"Y": [1]}) + network(
    "g", {"A": [2]}, {"B": [1]}, "  (isomorphic-to f)\n"
)
# Numbers are multiples of 1/4: no rounding anywhere.
numbers = st.integers(-8, 8).map(lambda n: n / 4)
VARIABLES = {
    "X[0]": lambda x, y: x[0], "X[1]": lambda x, y: x[1], "A[0]": lambda x, y: x[2],
    "A[1]": lambda x, y: x[3], "Y[0]": lambda x, y: y[0], "B[0]": lambda x, y: y[1],
}


@st.composite
def sums(draw, names):
    """A linear expression: text and meaning."""
    factors = {name: draw(numbers) for name in draw(st.lists(st.sampled_from(names), max_size=3))}
    constant = draw(numbers)
    terms = [f"(* {factor} {name})" for name, factor in factors.items()]

    def meaning(x, y):
        return constant + sum(f * VARIABLES[name](x, y) for name, f in factors.items())

    if not terms:
        return f"{constant}", meaning
    shapes = [f"(+ {constant} {' '.join(terms)})", f"(- {constant} (- (+ {' '.join(terms)})))"]
    return draw(st.sampled_from(shapes)), meaning


@st.composite
def comparisons(draw, names):
    (left, first), (right, second) = draw(sums(names)), draw(sums(names))
    sign = draw(st.sampled_from(list(OPERATORS)))
    return f"({sign} {left} {right})", lambda x, y: OPERATORS[sign](first(x, y), second(x, y))


def joined(inner):
    def join(word, reduce):
        def made(parts):
            texts, meanings = zip(*parts, strict=True)
            return f"({word} {' '.join(texts)})", lambda x, y: reduce(m(x, y) for m in meanings)

        return st.lists(inner, min_size=1, max_size=3).map(made)

    return join("and", all) | join("or", any)


def formulas(names):
    return st.recursive(comparisons(names), joined, max_leaves=5)


@settings(max_examples=120, deadline=None)
@given(
    formulas(["X[0]", "Y[0]", "Y[0]", "B[0]"]), st.lists(formulas(list(VARIABLES)), max_size=2),
    st.sets(st.sampled_from(["(== X[0] A[0])", "(== A[1] X[1])", "(== X[0] X[1])"])),
    st.integers(0, 2**31),
)
def test_a_query_of_two_networks_means_what_its_formulas_say(formula, more, equal, seed):
    texts, meanings = zip(formula, *more, strict=True)
    asserted = "".join(f"(assert {text})\n" for text in (*texts, *sorted(equal)))
    try:
        prop = parsed(query(PAIR, box("X", [-2.0] * 2, [2.0] * 2) + asserted
                            + box("A", [-2.0] * 2, [2.0] * 2)))
    except UserError as error:
        assert "has no" not in str(error)
        raise
    generator = np.random.default_rng(seed)
    for _ in range(15):
        x, y = generator.integers(-8, 9, size=4) / 4, generator.integers(-8, 9, size=2) / 4
        if "(== X[0] A[0])" in equal:
            x[2] = x[0]
        if "(== X[0] X[1])" in equal:
            x[1] = x[0]
        if "(== A[1] X[1])" in equal:
            x[3] = x[1]
        linked = all(
            x[i] == x[j] for text, i, j in (
                ("(== X[0] A[0])", 0, 2), ("(== A[1] X[1])", 1, 3), ("(== X[0] X[1])", 0, 1),
            ) if text in equal
        )
        wanted = linked and all(meaning(x, y) for meaning in meanings)
        assert is_violated(prop, x, y) == wanted, (asserted, x, y)


def test_tensors_are_flattened_in_row_major_order_one_after_the_other():
    declared = network("f", {"X": [2, 3], "Z": []}, {"Y": [1, 2], "W": [2]})
    bounds = "".join(
        f"(assert (<= {name} {i}.0)) (assert (>= {name} -1.0))"
        for i, name in enumerate([*(f"X[{i},{j}]" for i in (0, 1) for j in (0, 1, 2)), "Z"])
    )
    prop = parsed(query(declared, bounds + "(assert (or (<= Y[0,1] 1.0) (>= W[1] 2.0)))"))
    assert prop.regions[0].upper.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert [row.coefficients for row in prop.rows] == [{1: 1}, {3: -1}]
    assert prop.wiring is None and (prop.n_in, prop.n_out) == (7, 4)


def test_bounds_of_inputs_follow_from_linear_constraints_on_them():
    declared = network("f", {"X": [3]}, {"Y": [1]})
    prop = parsed(query(declared, """
        (assert (and (>= X[0] 0.0) (<= X[0] 4.0)))
        (assert (<= (+ X[1] (* 2.0 X[0])) 8.0))
        (assert (> (- X[1] X[0]) -1.0))
        (assert (== (+ X[2] X[1]) 1.0))
        (assert (<= Y[0] X[2]))"""))
    (region,) = prop.regions
    assert region.lower.tolist() == [0, -1, -7] and region.upper.tolist() == [4, 8, 2]
    assert region.box[1].lower_open and region.box[2].upper_open and not region.box[0].upper_open


def test_what_a_large_file_is_cut_into_does_not_change_it(monkeypatch):
    boxes = "".join(
        f"(and (>= X[0] {i / 64}) ; part {i} (of many\n (<= X[0] {(i + 1) / 64}) "
        f"(or (<= Y[0] {i}.0) (<= Y[1] {i}.5)))\n" for i in range(40)
    )
    text = one(f"(or {boxes})") + "(assert (and (or (<= Y[0] 1.0)) (<= Y[1]\n (* Y[0] 2.0))))"
    whole = parsed(text)
    for piece in (1, 300, 2000):
        monkeypatch.setattr(vnnlib2_text, "PIECE", piece)
        monkeypatch.setattr("lirpa_megatron.verify.properties.vnnlib2.PIECE", piece)
        assert parsed(text) == whole
        with pytest.raises(Exception, match="no numbers like '1e3': write 1000.0") as error:
            parsed(text.replace("37.5", "1e3"))
        assert error.value.line == 8 + 2 * 37 + 1


GOOD = one("(<= Y[0] Y[1])")
BAD = {
    "scientific notation": ("X[0] 1.0", "X[0] 1e-3", "line 6: .* no numbers like '1e-3': write"),
    "exponent taken for a variable": (
        "Y[0] Y[1]", "Y[0] (* 2e0 Y[1])", "line 8: .* no numbers like '2e0': write 2.0"),
    "number and word": ("X[0] 1.0", "X[0] 1.0f", "line 6: .* does not allow '1.0f' here"),
    "plus": ("X[0] 1.0", "X[0] +1.0", "line 6: .* like '.1.0': write 1.0"),
    "no digit before the dot": ("X[0] 1.0", "X[0] .5", "line 6: .* like '.5': write 0.5"),
    "no digit after the dot": ("X[0] 1.0", "X[0] 1.", "line 6: .* like '1.': write 1.0"),
    "whole number": ("X[0] 1.0", "X[0] 1", "line 6: '1' is a whole number .*: write 1.0"),
    "huge number": ("X[0] 1.0", f"X[0] {'9' * 400}.0", "line 6: number '9+...' is too large"),
    "huge whole number": ("X[0] 1.0", f"X[0] {'9' * 30}", "line 6: number '9+' is too large"),
    "tiny number": ("X[0] 1.0", f"X[0] 0.{'0' * 400}1", "line 6: number .* is too small"),
    "digits": ("X[0] 1.0", f"X[0] 0.{'1' * 5000}", "line 6: number .* more than 1000 digits"),
    "negative index": ("X[1] 1.0", "X[-1] 1.0", r"line 7: '\[-1\]' is no list of whole numbers"),
    "fractional index": ("X[1] 1.0", "X[0.7] 1.0", r"line 7: '\[0.7\]' is no list of whole"),
    "fractional shape": ("real [2]", "real [2.5]", r"line 3: '\[2.5\]' is no list of whole"),
    "huge index": ("X[1] 1.0", f"X[{'9' * 30}] 1.0", "line 7: number '9+' is too large"),
    "index too large": ("X[1] 1.0", "X[2] 1.0", r"line 7: .*out of bounds.* 'X\[2\]'"),
    "too many indices": ("X[1] 1.0", "X[1,0] 1.0", "line 7: Too many indices"),
    "no index": ("X[1] 1.0", "X 1.0", "line 7: Not enough indices"),
    "undeclared": ("X[1] 1.0", "Z[1] 1.0", "line 7: Undeclared variable: 'Z'"),
    "unbounded": ("(<= X[1] 1.0)", "(<= X[0] 1.0)", r"X\[1\] has no upper bound"),
    "product": ("Y[0] Y[1]", "Y[0] (* Y[0] Y[1])", "line 8: a product of variables"),
    "quotient": ("Y[0] Y[1]", "Y[0] (/ Y[1] 2.0)", "line 8: .* does not allow '/' here"),
    "negation": ("(<= Y[0] Y[1])", "(not (<= Y[0] Y[1]))", "line 8: .* not allow 'not' here"),
    "hidden": ("  (declare-output", '  (declare-hidden H real [2] "3a;é")\n  (declare-output',
               None),  # is read: no assertion is about it
    "hidden used": ("  (declare-output", '  (declare-hidden Z real [2] "a;(")\n  (declare-output',
                    "line 9: Z is an output of a hidden layer"),
    "type": ("real [2])\n)", "int8 [2])\n)", "Y has type int8"),
    "no type": ("X real", "X Double", "X has type Double"),
    "version 3": ("<2.0>", "<3.0>", "line 1: version 3.0 is not supported"),
    "no version": ("(vnnlib-version <2.0>)", "", r"line 2: expected \(vnnlib-version <2.0>\)"),
    "nul": ("(assert (<= Y", "\0(assert (<= Y", "line 8: it has a NUL character"),
    "letters": ("(assert (<= Y", "é(assert (<= Y", "line 8: unexpected character 'é'"),
    "unclosed": ("Y[1]))", "Y[1])", r"line 8: '\(' is never closed"),
    "stray": ("Y[1]))", "Y[1])))", r"line 8: '\)' without its"),
    "words between": ("(assert (<= Y", "so (assert (<= Y", "line 8: expected '.', found 'so'"),
    "no assertion": (GOOD[GOOD.index("(assert"):], "", "line 5: it has no assertion"),
    "late network": (
        "(assert (<= Y", network("g", {"A": [1]}, {"B": [1]}) + "(assert (<= Y",
        "line 8: expected .assert"),
    "two equivalences": (
        "(assert (and (>= X[0]", network("g", {"A": [2]}, {"B": [2]},
                                         "(equal-to f) (isomorphic-to f)")
        + "(assert (and (>= X[0]", "both equal-to and isomorphic-to"),
    "equal to nothing": (
        "(assert (and (>= X[0]", network("g", {"A": [2]}, {"B": [2]}, "(equal-to h)")
        + "(assert (and (>= X[0]", "line 7: .* 'h'"),
    "three networks": (
        "(assert (and (>= X[0]", network("g", {"A": [2]}, {"B": [2]})
        + network("h", {"C": [2]}, {"D": [2]}) + "(assert (and (>= X[0]",
        r"3 networks \(f, g, h\): at most two"),
    "deep": ("(<= Y[0] Y[1])", "(and " * 300 + "(<= Y[0] Y[1])" + ")" * 300, "line 8: nested"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_query_is_refused_in_one_line(name, tmp_path):
    old, new, message = BAD[name]
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    if name == "hidden used":
        text = text.replace("Y[0]", "Z[0]")
    path = tmp_path / "prop.vnnlib"
    path.write_text(text)
    if message is None:
        assert read_vnnlib(path, 2, 2).rows
        return
    with pytest.raises(UserError, match=message) as caught:
        read_vnnlib(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_comments_line_ends_and_later_minor_versions_are_read():
    whole = parsed(GOOD)
    for text in (
        GOOD.replace("\n", "\r\n"), GOOD.replace("\n", "\r"), "; (old [0.5] é\n" + GOOD,
        GOOD.replace("<2.0>", "<2.1>"), GOOD.replace("real", "Real"),
    ):
        assert parsed(text).regions == whole.regions


def test_without_its_parser_a_query_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vnnlib", None)
    (tmp_path / "p.vnnlib").write_text(GOOD)
    with pytest.raises(UserError, match="p.vnnlib: .*pip install vnnlib==1.0.2"):
        read_vnnlib(tmp_path / "p.vnnlib")


def test_the_parser_in_a_process_of_its_own_says_the_same(monkeypatch):
    text = one("(or (<= Y[0] (- (* 2.0 Y[1]) 1.0 X[0])) (!= Y[1] 0.5))")
    whole = parsed(text)
    for module in (vnnlib2_text, vnnlib2):
        monkeypatch.setattr(module, "PIECE", 20)
    monkeypatch.setattr(vnnlib2_parser, "_PIECES", 1)  # a process for each piece
    assert parsed(text) == whole
    for old, new, message in (("2.0 Y[1]", "2e0 Y[1]", "'2e0'"),
                              ("-1.0", f"-1.{'0' * 999}1", "1000 digits")):
        with pytest.raises(Exception, match=message) as error:
            parsed(text.replace(old, new, 1))
        assert error.value.line in (7, 8)


def test_a_parser_that_dies_is_an_error_of_its_piece():
    with vnnlib2_parser.Worker() as worker:
        assert worker.parse(GOOD)[0] == "assertions"
        worker._process.kill()
        assert worker.parse(GOOD) == ("died", "exit status -9")
