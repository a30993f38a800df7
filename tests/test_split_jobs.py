"""`verify` with --splits and --question direction: what is proved, said, refused and resumed."""

from __future__ import annotations

import json

import commands
import numpy as np
import pytest
import torch
from commands import CENTER, SIZES
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save_file
from sentences import finish, read, start, verify, write_job, write_lines
from small_networks import others_win, property_text, save, stack

from lirpa_megatron.cli.commands import main
from lirpa_megatron.errors import UserError
from lirpa_megatron.report.page import write_report
from lirpa_megatron.report.reader import read_lines
from lirpa_megatron.verify.sentences.vectors import read_vectors

pytestmark = pytest.mark.usefixtures("unchanged_environment", "session")

HIDDEN = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory, session):
    """A BERT and a GPT with hidden size 8, and files of vectors."""
    folder = write_job(tmp_path_factory.mktemp("directions"))
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(2, HIDDEN, generator=generator).double()
    np.save(folder / "two.npy", D.numpy())
    (folder / "one.json").write_text(json.dumps(D[0].tolist()))
    save_file({"a": D[0].contiguous(), "b": D[1:].contiguous()}, folder / "two.safetensors")
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """net.onnx, and properties that intervals prove in pieces, refute, and leave open."""
    folder = tmp_path_factory.mktemp("networks")
    proto = stack(SIZES)
    save(proto, folder / "net.onnx")
    center = np.array([CENTER], dtype="float32")
    label = int(ReferenceEvaluator(proto).run(None, {"x": center})[0].argmax())
    for name, eps in (("pieces", 0.03), ("refuted", 0.4)):
        low, high = [v - eps for v in CENTER], [v + eps for v in CENTER]
        (folder / f"{name}.vnnlib").write_text(property_text(low, high, 3, others_win(label, 3)))
    save(stack([17, 4, 3]), folder / "wide.onnx")
    wide = property_text([0.0] * 17, [0.1] * 17, 3, others_win(0, 3))
    (folder / "wide.vnnlib").write_text(wide)
    return folder


IBP = ("--method", "IBP", "--attack-steps", 0)


def of_network(networks, name, *arguments, output):
    _, (result,) = commands.verify(
        "--onnx", networks / "net.onnx", "--vnnlib", networks / f"{name}.vnnlib", *IBP, *arguments,
        output=output,
    )
    return result


def test_a_property_of_few_inputs_is_proved_in_pieces(networks, tmp_path):
    """More cuts never prove less; what is left open without them is proved at last."""
    found = [
        of_network(networks, "pieces", *cuts, output=tmp_path / "r.jsonl")
        for cuts in ((), ("--splits", 4), ("--splits", 2000))
    ]
    assert [r["result"] for r in found] == ["unknown", "unknown", "unsat"]
    assert "splits" not in found[0] and "proved_share" not in found[0]
    assert found[1]["splits"] == 4 and found[1]["pieces"] == 5
    assert 0 <= found[1]["proved_share"] < 1.0 == found[2]["proved_share"]
    bounds = [min(r["lower_bounds"]) for r in found]
    assert bounds[0] <= bounds[1] <= bounds[2]
    for row, least in enumerate(found[2]["lower_bounds"]):  # the union holds
        assert least <= worst_of(networks / "net.onnx", 0.03)[row] + 1e-5


def worst_of(path, eps):
    """The rows of the property at random points and corners of the box, the least of each."""
    import onnx

    network, generator = ReferenceEvaluator(onnx.load(path)), np.random.default_rng(0)
    center = np.array([CENTER])
    label = int(network.run(None, {"x": center.astype("float32")})[0].argmax())
    moves = generator.uniform(-eps, eps, (2000, len(CENTER)))
    moves[::2] = np.sign(moves[::2]) * eps
    y = np.concatenate([
        network.run(None, {"x": (center + m).astype("float32")})[0] for m in moves
    ])
    return [(y[:, label] - y[:, j]).min() for j in range(3) if j != label]


def test_a_point_of_a_piece_refutes_a_property_if_the_network_confirms_it(networks, tmp_path):
    result = of_network(networks, "refuted", "--splits", 50, output=tmp_path / "r.jsonl")
    assert result["result"] == "sat" and result["violation"] >= 0
    assert np.abs(np.array(result["counterexample"]) - CENTER).max() <= 0.4 + 1e-12


def test_resume_does_not_take_bounds_of_fewer_pieces(networks, tmp_path):
    output, words = tmp_path / "r.jsonl", []
    for cuts in (0, 2000, 2000, 4):
        commands.verify("--onnx", networks / "net.onnx", "--vnnlib", networks / "pieces.vnnlib",
                        *IBP, "--splits", cuts, "--resume", output=output)
        words.append([r.get("splits") for r in commands.read(output)])
    assert words == [[None], [None, 2000], [None, 2000], [None, 2000, 4]]


@pytest.mark.slow
def test_two_processes_cut_the_same_pieces_of_a_property(networks, tmp_path):
    one = of_network(networks, "pieces", "--splits", 300, output=tmp_path / "one.jsonl")
    ended = commands.on_ranks(
        2, "verify", "--onnx", networks / "net.onnx", "--vnnlib", networks / "pieces.vnnlib", *IBP,
        "--splits", 300, "--output", tmp_path / "two.jsonl",
    )
    assert ended.returncode == 0, ended.stderr
    (two,) = commands.read(tmp_path / "two.jsonl")
    assert [two[k] for k in ("result", "pieces", "proved_share")] == [
        one[k] for k in ("result", "pieces", "proved_share")]
    assert commands.largest_difference([one], [two]) < 1e-5


def test_more_inputs_than_splits_are_for_is_one_line(networks, capsys):
    arguments = ("verify", "--onnx", networks / "wide.onnx", "--vnnlib", networks / "wide.vnnlib",
                 "--splits", 3)
    assert main([*map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "at most 16 inputs move, in property wide 17 do" in line


# --------------------------------------------------------------------------- directions

QUICK = ("--question", "direction", "--method", "forward", "--attack-steps", 5,
         "--attack-restarts", 2, "--tolerance", 0.5)


def direction(folder, *arguments, output, model="bert"):
    data = write_lines(output.with_suffix(".data"), {"id": "x", "sentence": "w3 w5"})
    status, results = verify(folder, *QUICK, *arguments, data=data, model=model, output=output)
    assert status == 0
    return results[-1]


def test_radii_along_a_vector_are_certified_and_attacked(folder, tmp_path):
    found = [
        direction(folder, "--vectors", folder / "one.json", *more, output=tmp_path / "r.jsonl")
        for more in ((), ("--order", 3), ("--order", 3, "--splits", 6))
    ]
    radii = [r["certified_radius"] for r in found]
    assert all(r["result"] == "unsat" and r["question"] == "direction" for r in found)
    assert 0 < radii[0] < radii[1] <= radii[2] * 1.5
    attacked = [r["attacked_radius"] for r in found if r["attacked_radius"] is not None]
    assert attacked and all(min(attacked) >= radius for radius in radii)
    assert found[2]["proved_share"] == 1.0 and found[2]["pieces"] >= 1
    assert found[0]["vectors"].startswith("one.json (sha256 ")
    inside = direction(folder, "--vectors", folder / "one.json", "--order", 3, "--eps",
                       radii[1] * 0.9, output=tmp_path / "r.jsonl")
    assert inside["result"] == "unsat" and inside["certified_radius"] is None
    beyond = direction(folder, "--vectors", folder / "one.json", "--splits", 3, "--eps",
                       2 * min(attacked), output=tmp_path / "r.jsonl")
    assert beyond["result"] == "sat" and beyond["proved_share"] < 1
    page = tmp_path / "page.html"
    write_report(read_lines(tmp_path / "r.jsonl"), page, "r.jsonl")
    assert "direction" in page.read_text()


def test_each_word_of_a_bert_and_a_gpt_moves_along_vectors_of_any_file(folder, tmp_path):
    for model, task in (("gpt", ("--task", "next-token")), ("bert", ())):
        task = (*task, "--words", "each", "--eps", 1e-2)
        found = direction(folder, "--vectors", folder / "two.npy", *task,
                          output=tmp_path / "r.jsonl", model=model)
        assert len(found["positions"]) == 2
        same = direction(folder, "--vectors", folder / "two.safetensors", *task,
                         output=tmp_path / "s.jsonl", model=model)
        assert same["positions"] == found["positions"]


def test_resume_tells_vectors_and_splits_apart(folder, tmp_path):
    output = tmp_path / "r.jsonl"
    certify = ("--eps", 1e-3, "--resume")
    asked = [("--vectors", folder / "one.json"), ("--vectors", folder / "two.npy"),
             ("--vectors", folder / "one.json", "--splits", 3)]
    for vectors in (*asked, *asked):
        direction(folder, *vectors, *certify, output=output)
    assert [r.get("splits") for r in read(output)] == [None, None, 3]


@pytest.mark.slow
def test_two_processes_say_the_same_of_a_direction(folder, tmp_path):
    arguments = ("--vectors", folder / "two.npy", "--order", 2, "--splits", 10, "--eps", 0.3)
    one = direction(folder, *arguments, output=tmp_path / "one.jsonl")
    process = start(2, "--load", folder / "bert", "--data", tmp_path / "one.data", *QUICK,
                    *arguments, "--output", tmp_path / "two.jsonl")
    assert finish(process, 200)[0] == 0
    (two,) = read(tmp_path / "two.jsonl")
    for name in ("result", "pieces", "proved_share"):
        assert one[name] == two[name]
    assert abs(one["margin"] - two["margin"]) < 1e-8


WRONG = {
    "no vectors": ((), "give --vectors FILE"),
    "norm": (("--vectors", "one.json", "--norm", "2"), "not --norm 2"),
    "outward": (("--vectors", "one.json", "--outward"), "does not cover directions"),
    "layer": (("--vectors", "one.json", "--layer", 5), "there is no layer 5: the model has 1"),
    "no file": (("--vectors", "none.npy"), "none.npy cannot be read: No such file"),
    "kind": (("--vectors", "data.jsonl"), "give a file .npy, .json, .safetensors"),
    "size": (("--vectors", "short.json"), "have 3 numbers each, but the model's hidden size is 8"),
    "zero": (("--vectors", "zero.json"), "vector 1 is zero"),
    "ragged": (("--vectors", "ragged.json"), "different lengths, 8 and 7"),
    "infinite": (("--vectors", "infinite.npy"), "vector 0 has numbers that are not finite"),
    "text": (("--vectors", "text.json"), "not a list of numbers"),
    "pickle": (("--vectors", "pickle.npy"), "not an array of numbers that numpy.save"),
    "corrupt": (("--vectors", "corrupt.safetensors"), "corrupt.safetensors is corrupt"),
    "whole numbers": (("--vectors", "whole.safetensors"), "'a' is torch.int64"),
    "many": (("--vectors", "many.npy", "--splits", 2), "has 17 vectors, but --splits is for at"),
    "degree": (("--vectors", "two.npy", "--order", 8), "--order 8 is for at most 1: choose"),
    "radius": (("--question", "radius", "--vectors", "one.json"), "is of --question direction"),
    "layer alone": (("--question", "radius", "--layer", 1), "--layer is of --question direction"),
    "splits of all words": (("--question", "radius", "--splits", 2), "sets of few dimensions"),
    "splits of a box": (("--question", "synonyms", "--shape", "box", "--splits", 2), "shape hull"),
}


def test_wrong_options_and_files_of_vectors_are_one_line(folder, capsys):
    files = {
        "short.json": [1, 2, 3], "zero.json": [[1] * HIDDEN, [0] * HIDDEN], "text.json": ["a"],
        "ragged.json": [[1] * 8, [1] * 7],
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    np.save(folder / "infinite.npy", np.full((1, HIDDEN), np.inf))
    np.save(folder / "many.npy", np.ones((17, HIDDEN)))
    np.save(folder / "pickle.npy", np.array([{}], dtype=object), allow_pickle=True)
    (folder / "corrupt.safetensors").write_bytes(b"\xff" * 20)
    save_file({"a": torch.ones(HIDDEN, dtype=torch.long)}, folder / "whole.safetensors")
    for name, (arguments, said) in WRONG.items():
        paths = [folder / a if "." in str(a) else a for a in arguments]
        status = main([
            "verify", "--load", str(folder / "bert"), "--data", str(folder / "data.jsonl"),
            "--question", "direction", "--method", "forward", *map(str, paths),
        ])
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        assert status == 2 and said in line, (name, line)


def test_vectors_are_read_from_every_kind_of_file(folder):
    both = read_vectors(folder / "two.npy", HIDDEN)
    assert both.shape == (2, HIDDEN) and both.dtype == torch.float64
    assert torch.equal(read_vectors(folder / "two.safetensors", HIDDEN), both)
    assert torch.equal(read_vectors(folder / "one.json", HIDDEN), both[:1])
    with pytest.raises(UserError, match="hidden size is 9"):
        read_vectors(folder / "two.npy", 9)
