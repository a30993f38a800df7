"""`lirpa-megatron verify --complete`: verdicts, fields of results, refusals."""

import pytest
from commands import on_ranks, read
from complete_cases import HIGH, LOW, write_complete
from small_networks import property_text

from lirpa_megatron.cli.commands import main

pytestmark = pytest.mark.usefixtures("unchanged_environment")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_complete(tmp_path_factory.mktemp("complete"))


def run(folder, *arguments):
    instances = ["--instances", folder / "instances.csv", "--method", "IBP", "--attack-steps", 0]
    return ["verify", *map(str, (*instances, *arguments))]


def test_what_bounds_leave_open_is_decided(folder, tmp_path, session, capsys):
    assert main(run(folder, "--output", tmp_path / "before.jsonl")) == 0
    assert [r["result"] for r in read(tmp_path / "before.jsonl")] == ["unknown"] * 3
    assert main(run(folder, "--complete", "--output", tmp_path / "r.jsonl")) == 0
    holds, fails, both = read(tmp_path / "r.jsonl")
    assert [r["result"] for r in (holds, fails, both)] == ["unsat", "sat", "unsat"]
    assert {r["method"] for r in (holds, fails, both)} == {"branch-and-bound"}
    assert 0 < holds["bound"] <= 0.01 + 1e-9 and holds["lower_bounds"] == [holds["bound"]]
    assert holds["domains"] > 2 and holds["open_domains"] == 0
    assert len(fails["counterexample"]) == 2 and fails["violation"] >= 0
    assert "branch-and-bound" in capsys.readouterr().out
    # other results of these instances are not taken for these, and these are
    (tmp_path / "before.jsonl").write_text(
        (tmp_path / "before.jsonl").read_text() + (tmp_path / "r.jsonl").read_text()
    )
    assert main(run(folder, "--complete", "--resume", "--output", tmp_path / "before.jsonl")) == 0
    assert len(read(tmp_path / "before.jsonl")) == 6
    assert main(["report", str(tmp_path / "r.jsonl"), "--output", str(tmp_path / "r.html")]) == 0


def test_two_ranks_decide_the_same(folder, tmp_path, session):
    assert main(run(folder, "--complete", "--output", tmp_path / "one.jsonl")) == 0
    ended = on_ranks(2, *run(folder, "--complete", "--output", tmp_path / "two.jsonl"))
    one, two = read(tmp_path / "one.jsonl"), read(tmp_path / "two.jsonl")
    assert len(two) == 3, ended
    for a, b in zip(one, two, strict=True):
        assert b["tensor_parallel"] == 2
        assert (a["result"], a["domains"]) == (b["result"], b["domains"])
        # sums over ranks in another order, in float64
        assert a["bound"] == pytest.approx(b["bound"], abs=1e-10)


def test_a_limit_of_time_is_kept(folder, tmp_path, session):
    csv = tmp_path / "short.csv"
    csv.write_text(f"{folder}/net.onnx,{folder}/holds.vnnlib,60\n")
    arguments = ["verify", "--instances", str(csv), "--method", "IBP", "--attack-steps", "0"]
    arguments += ["--complete", "--timeout", "1e-6", "--output", str(tmp_path / "r.jsonl")]
    assert main(arguments) == 0
    (result,) = read(tmp_path / "r.jsonl")
    assert result["result"] == "timeout"


@pytest.mark.parametrize("arguments, message", [
    (["--outward"], "--complete has no --outward"),
    (["--data", "x.jsonl", "--load", "x"], "leave it out with --data"),
    (["--branching", "output"], "--branching: invalid choice"),
])
def test_what_does_not_go_together_is_refused(folder, arguments, message, session, capsys):
    given = [] if "--data" in arguments else run(folder)[1:]
    assert main(["verify", *given, "--complete", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_a_network_that_cannot_be_split_stays_unknown_and_that_is_said(
    folder, tmp_path, session
):
    """Unless its box may be cut, which decides."""
    text = property_text(LOW, HIGH, 3, "(<= Y_0 0.0)")
    (tmp_path / "p.vnnlib").write_text(text)
    prop = str(tmp_path / "p.vnnlib")
    arguments = ["verify", "--onnx", str(folder / "tanh.onnx"), "--vnnlib", prop, "--complete"]
    arguments += ["--attack-steps", "0", "--output", str(tmp_path / "r.jsonl")]
    assert main([*arguments, "--branching", "relu"]) == 0
    (result,) = read(tmp_path / "r.jsonl")
    assert result["result"] == "unknown" and "has a Tanh" in result["note"]
    assert main(arguments) == 0
    (result,) = read(tmp_path / "r.jsonl")
    assert (result["result"], result["branching"]) == ("sat", "input")
