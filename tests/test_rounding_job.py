"""`lirpa-megatron verify --outward` end to end, in this process."""

from __future__ import annotations

import decimal
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentences
import torch
import transformers
from exact_networks import Pairs, breaks, random_net
from models import drawn
from onnx import helper
from small_networks import model, save

from lirpa_megatron import perturb_tokens
from lirpa_megatron.adapters.embeddings import off_sums
from lirpa_megatron.cli.commands import main
from lirpa_megatron.errors import UserError

EPS = 0.125

pytestmark = pytest.mark.usefixtures("unchanged_environment", "session")


def text(value: Fraction) -> str:
    """A number with a power of two below the line, in decimal places: exact."""
    with decimal.localcontext(prec=2000):
        return format(decimal.Decimal(value.numerator) / value.denominator, "f")


def write(folder: Path, net: Pairs, x: list[float]) -> tuple[str, str]:
    """The network as ONNX, and "Y_0 reaches its exact minimum", which is true: the paths."""
    nodes, constants, value = [], {}, "x"
    for i, layer in enumerate(net.layers):
        constants |= {f"w{i}": layer.weight.numpy(), f"b{i}": layer.bias.numpy()}
        out = "y" if i == len(net.layers) - 1 else f"g{i}"
        nodes.append(helper.make_node("Gemm", [value, f"w{i}", f"b{i}"], [out], transB=1))
        if out != "y":
            nodes.append(helper.make_node("Relu", [out], [f"a{i}"]))
            value = f"a{i}"
    n_out = net.layers[-1].weight.shape[0]
    least = min(net.exact(list(point))[0] for point in breaks(net, x, EPS))
    lines = [f"(declare-const X_{i} Real)" for i in range(2)]
    lines += [f"(declare-const Y_{j} Real)" for j in range(n_out)]
    for i, v in enumerate(x):
        lines.append(f"(assert (>= X_{i} {text(Fraction(v) - Fraction(EPS))}))")
        lines.append(f"(assert (<= X_{i} {text(Fraction(v) + Fraction(EPS))}))")
    lines.append(f"(assert (<= Y_0 {text(least)}))")
    (folder / "p.vnnlib").write_text("\n".join(lines) + "\n")
    save(model(nodes, constants, 2, n_out, "float64"), folder / "net.onnx")
    return str(folder / "net.onnx"), str(folder / "p.vnnlib")


def verify(folder: Path, paths: tuple[str, str], *more: Any) -> dict[str, Any]:
    output = folder / "r.jsonl"
    output.unlink(missing_ok=True)
    arguments = ["--onnx", paths[0], "--vnnlib", paths[1], "--attack-steps", "0"]
    assert main(["verify", *arguments, "--output", str(output), *map(str, more)]) == 0
    return json.loads(output.read_text())


def instance(folder: Path, seed: int) -> tuple[str, str]:
    torch.set_default_dtype(torch.float64)
    try:
        net = random_net(seed, (2, 4, 2), cancel=True)
        for parameter in net.parameters():
            parameter.requires_grad_(False)
        return write(folder, net, np.round(drawn(2, seed=seed).numpy() * 64).tolist())
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_rounding_alone_proves_is_not_proved_with_outward(tmp_path):
    """A property that a point violates exactly: `unsat` without --outward, by rounding."""
    wrong = 0
    for seed in range(12):
        paths = instance(tmp_path, seed)
        result = verify(tmp_path, paths, "--outward")
        assert result["result"] == "unknown" and result["lower_bounds"][0] <= 0
        assert result["rounding"] == "outward" and result["dtype"] == "float64"
        ordinary = verify(tmp_path, paths)
        assert "rounding" not in ordinary
        wrong += ordinary["result"] == "unsat"
        if wrong and seed > 2:
            return
    raise AssertionError("no bound was wrong: nothing was tested")


def test_what_holds_is_proved_and_resumed_runs_tell_the_two_apart(tmp_path):
    net, prop = instance(tmp_path, 0)
    text = Path(prop).read_text()
    least = text.rsplit("Y_0 ", 1)[1].split(")")[0]
    Path(prop).write_text(text.replace(f"Y_0 {least}", f"Y_0 {float(least) - 1:.3f}"))
    assert verify(tmp_path, (net, prop), "--outward")["result"] == "unsat"
    output = tmp_path / "r.jsonl"
    again = ["verify", "--onnx", net, "--vnnlib", prop, "--resume", "--output", str(output)]
    assert main([*again, "--outward"]) == 0 and len(output.read_text().splitlines()) == 1
    assert main(again) == 0 and len(output.read_text().splitlines()) == 2


def test_float32_is_refused_in_one_line(tmp_path, capsys):
    net, prop = instance(tmp_path, 0)
    arguments = ["verify", "--onnx", net, "--vnnlib", prop, "--outward", "--dtype", "float32"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "--outward computes bounds in float64" in error and error.count("\n") == 1
    (tmp_path / "d.jsonl").write_text('{"ids": [1, 2]}\n')
    arguments = ["verify", "--load", str(tmp_path), "--data", str(tmp_path / "d.jsonl")]
    arguments += ["--question", "certify", "--eps", "0.1"]
    assert main([*arguments, "--outward", "--dtype", "float32"]) == 2
    assert "--outward computes bounds in float64" in capsys.readouterr().err


@pytest.mark.parametrize("question", [
    ("certify", "--eps", "0.001"),
    pytest.param(("certify", "--eps", "0.001", "--norm", "2"), marks=pytest.mark.slow),
    pytest.param(("synonyms", "--shape", "hull"), marks=pytest.mark.slow),
    pytest.param(("synonyms", "--words", "each"), marks=pytest.mark.slow),
])
def test_margins_of_sentences_are_just_below_the_ordinary_ones(question, tmp_path):
    sentences.save_checkpoint("bert", tmp_path / "c", dtype=torch.float32)
    line = {"sentence": "w1 w5 w3", "candidates": [[], ["w5", "w7"], []]}
    data = sentences.write_lines(tmp_path / "d.jsonl", line)
    arguments = ["verify", "--load", tmp_path / "c", "--data", data, "--attack-steps", "0",
                 "--question", *question]
    found = []
    for more in (["--dtype", "float64"], ["--outward"]):
        output = tmp_path / f"{more[0]}.jsonl"
        assert main([*map(str, arguments), *more, "--output", str(output)]) == 0
        found.append(json.loads(output.read_text()))
    ordinary, outward = found
    assert outward["rounding"] == "outward" and "rounding" not in ordinary
    assert outward["dtype"] == "float64" and outward["result"] == ordinary["result"]
    finding = ordinary if ordinary["margin"] is not None else ordinary["positions"][0]
    widened = outward if outward["margin"] is not None else outward["positions"][0]
    assert 0 < finding["margin"] - widened["margin"] < 1e-9


def test_embeddings_whose_sums_are_rounded_are_widened_or_refused(tmp_path):
    torch.manual_seed(1)
    model = transformers.gpt(**sentences.SMALL).float().double()
    ids = torch.tensor([[1, 2, 3]])
    assert off_sums(model, ids).max() == 0  # of float32 numbers
    with torch.no_grad():
        model.embedding.word_embeddings.weight.mul_(1 / 3)
    off = off_sums(model, ids)
    assert 0 < off.max() < 1e-15
    (hidden,) = perturb_tokens(model, ids, eps=0.0, rounding="outward")
    words, places = (
        table[i].tolist() for table, i in (
            (model.embedding.word_embeddings.weight, ids[0]),
            (model.embedding.position_embeddings.weight, torch.arange(3)))
    )
    for s in range(3):
        for a, b, l, u in zip(words[s], places[s], hidden.ptb.x_L[0, s].tolist(),
                              hidden.ptb.x_U[0, s].tolist(), strict=True):
            assert Fraction(l) <= Fraction(a) + Fraction(b) <= Fraction(u)
    with pytest.raises(UserError, match="sums are not exact in float64.*L2 ball"):
        perturb_tokens(model, ids, eps=0.1, norm=2, rounding="outward")
    with pytest.raises(UserError, match="layer 1"):
        deep = transformers.gpt(**{**sentences.SMALL, "num_layers": 2}).double()
        perturb_tokens(deep, ids, eps=0.1, start_layer=1, rounding="outward")
