"""Counterexamples: of the network as it is stored, in the box as it is written, beyond rounding."""

import numpy as np
import pytest
from commands import verify
from onnx import helper
from small_networks import model, property_text, save

from lirpa_megatron.cli.commands import main

pytestmark = pytest.mark.usefixtures("unchanged_environment")


def linear(weight, bias, dtype="float32"):
    """A network of one layer, y = weight x + bias."""
    weight = np.array([[weight]], dtype)
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)
    return model([node], {"w": weight, "b": np.array([bias], dtype)}, 1, 1, dtype)


def verified(tmp_path, proto, text, *arguments):
    save(proto, tmp_path / "net.onnx")
    (tmp_path / "p.vnnlib").write_text(text)
    arguments = ("--onnx", tmp_path / "net.onnx", "--vnnlib", tmp_path / "p.vnnlib", *arguments)
    _, (result,) = verify(*arguments, output=tmp_path / "r.jsonl")
    return result


def test_a_constant_that_float32_rounds_makes_no_counterexample(tmp_path):
    """y is at most 1, the property asks for 1 + 1e-9, which float32 rounds to 1."""
    text = property_text([0.0], [1.0], 1, "(>= Y_0 1.000000001)")
    result = verified(tmp_path, linear(1.0, 0.0), text)
    assert result["result"] in ("unknown", "unsat") and result["counterexample"] is None
    text = property_text([0.0], [1.0], 1, "(>= Y_0 1.0)")
    result = verified(tmp_path, linear(1.0, 0.0), text)
    assert result["result"] == "sat" and result["violation"] == 0.0
    text = property_text([0.0], [1.0], 1, "(> Y_0 1.0)")
    result = verified(tmp_path, linear(1.0, 0.0), text)
    assert result["result"] != "sat"  # a strict comparison is checked as one


def test_a_violation_within_rounding_is_said_not_sat(tmp_path):
    """0.1 x + 0.7 in float32 is above its float64 value at x = 1, by 1e-8."""
    exact = float(np.float32(0.1)) + float(np.float32(0.7))
    rounded = float(np.float32(0.1) + np.float32(0.7))
    assert exact < rounded < exact + 3e-8
    middle = (exact + rounded) / 2
    text = property_text([1.0], [1.0], 1, f"(>= Y_0 {middle!r})")
    result = verified(tmp_path, linear(0.1, 0.7), text)
    assert result["result"] == "unknown" and "not beyond rounding" in result["note"]
    text = property_text([1.0], [1.0], 1, f"(>= Y_0 {exact - 1e-6!r})")
    result = verified(tmp_path, linear(0.1, 0.7), text)
    assert result["result"] == "sat"
    assert result["float64_violation"] == pytest.approx(1e-6, rel=1e-3)
    assert result["violation"] == pytest.approx(1e-6 + rounded - exact, rel=1e-3)
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "r.jsonl"), "--output", str(page)]) == 0
    assert "1e-06 in float64" in page.read_text()


def test_counterexamples_lie_in_the_box_as_it_is_written(tmp_path):
    """0.1 is no float32: the network reads the nearest one, and the point is written as 0.1."""
    text = property_text([0.1], [0.1], 1, "(>= Y_0 0.0)")
    result = verified(tmp_path, linear(1.0, 0.0), text)
    assert result["result"] == "sat" and result["counterexample"] == [0.1]
    text = property_text([0.1], [0.3], 1, "(or (<= Y_0 0.10001) (>= Y_0 0.29999))")
    text = text.replace("(>= X_0", "(> X_0")  # which leaves 0.1 itself out
    result = verified(tmp_path, linear(1.0, 0.0), text)
    (x,) = result["counterexample"]
    assert result["result"] == "sat" and 0.1 < x <= 0.3 and np.float32(x) == x


def test_a_counterexample_is_one_of_the_network_as_it_is_stored(tmp_path):
    """float16: 0.1 x is 0.2998 at x = 3, and 0.29993 of the same weights in float32."""
    stored, exact = float(np.float16(0.1) * np.float16(3)), float(np.float16(0.1)) * 3
    assert stored < exact
    text = property_text([3.0], [3.0], 1, f"(>= Y_0 {(stored + exact) / 2!r})")
    result = verified(tmp_path, linear(0.1, 0.0, "float16"), text)
    assert result["result"] == "unknown" and result["stored_dtype"] == "float16"
    assert result["dtype"] == "float32"
    text = property_text([3.0], [3.0], 1, f"(>= Y_0 {stored - 1e-3!r})")
    result = verified(tmp_path, linear(0.1, 0.0, "float16"), text)
    assert result["result"] == "sat" and result["violation"] == pytest.approx(1e-3, rel=1e-9)


@pytest.mark.parametrize("upper", ["1.0", "0.12320000000000000001"])
def test_an_end_that_is_left_out_is_no_counterexample(tmp_path, upper):
    """float64's 0.1232 is larger than the decimal number, and so inside, but is written like it;
    the second box has no number of the type at all."""
    text = property_text([0.0], [1.0], 1, "(>= Y_0 -9.0)").replace(
        "(assert (<= X_0 1.0))", f"(assert (> X_0 0.1232)) (assert (<= X_0 {upper}))"
    )
    assert "(> X_0" in text
    result = verified(tmp_path, linear(1.0, 0.0, "float64"), text)
    if upper == "1.0":
        assert result["result"] == "sat" and result["counterexample"][0] > 0.1232
    else:
        assert result["result"] == "unknown" and "outside of the box" in result["note"]
