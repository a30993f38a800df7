"""`verify --data` stopped, cut off or shared by replicas: nothing is lost or done twice."""

import json
import os
import resource
import signal

import psutil
import pytest
from forks import launch
from sentences import (
    CERTIFY,
    finish,
    read,
    start,
    verify,
    wait_for_lines,
    without_times,
    write_job,
    write_lines,
)

from lirpa_megatron.cli.commands import main
from lirpa_megatron.verify.sentences.sentence import SentenceVerifier

pytestmark = pytest.mark.usefixtures("unchanged_environment", "session")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, session):
    return write_job(tmp_path_factory.mktemp("job"))


def test_a_cut_run_goes_on_where_it_was(folder, tmp_path):
    _, whole = verify(folder, *CERTIFY, output=tmp_path / "whole.jsonl")
    cut = tmp_path / "cut.jsonl"
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    cut.write_bytes(lines[0] + lines[1] + lines[2][:40])
    status, results = verify(folder, *CERTIFY, "--resume", output=cut)
    assert status == 0 and cut.read_bytes().startswith(lines[0] + lines[1])
    assert without_times(results) == without_times(whole)
    before = cut.read_bytes()
    assert verify(folder, *CERTIFY, "--resume", output=cut)[0] == 0
    assert cut.read_bytes() == before  # nothing was left to do


@pytest.mark.parametrize("change", [
    ("--eps", 2e-4), ("--norm", "2"), ("--words", "each"), ("--method", "IBP"),
    ("--dtype", "float32"), ("--prompt", "w1 {text}"),
], ids=str)
def test_results_of_another_question_are_not_taken_for_this_one(folder, tmp_path, change):
    data, output = tmp_path / "d.jsonl", tmp_path / "r.jsonl"
    write_lines(data, {"sentence": "w9"})
    verify(folder, *CERTIFY, data=data, output=output)
    _, results = verify(folder, *CERTIFY, *change, "--resume", data=data, output=output)
    assert len(results) == 2
    _, results = verify(folder, *CERTIFY, *change, "--resume", data=data, output=output)
    assert len(results) == 2


def test_bounds_of_another_degree_are_computed_anew(folder, tmp_path):
    data, output = tmp_path / "d.jsonl", tmp_path / "r.jsonl"
    write_lines(data, {"sentence": "w9 w3", "candidates": [["w10"], []]})
    asked = ("--question", "synonyms", "--method", "forward")
    for order, count in ((1, 1), (2, 2), (2, 2), (1, 2)):
        _, results = verify(
            folder, *asked, "--order", order, "--resume", data=data, output=output
        )
        assert len(results) == count
    assert [r.get("order") for r in results] == [None, 2]
    assert "error" not in [r["result"] for r in results]


def test_a_sentence_that_was_changed_is_done_again(folder, tmp_path):
    data, output = tmp_path / "d.jsonl", tmp_path / "r.jsonl"
    for text in ("w9", "w10", "w10"):
        write_lines(data, {"id": "x", "sentence": text})
        _, results = verify(folder, *CERTIFY, "--resume", data=data, output=output)
    assert [r["text"] for r in results] == ["w9", "w10"]


def stopped_after(count, monkeypatch):
    """SIGTERM arrives while this many sentences are done and one is worked on."""
    calls, original = [], SentenceVerifier.verify

    def slowly(self, *arguments, **named):
        calls.append(1)
        if len(calls) == count + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **named)

    monkeypatch.setattr(SentenceVerifier, "verify", slowly)


def test_sigterm_ends_the_run_after_the_sentence(folder, tmp_path, monkeypatch, capsys):
    output, before = tmp_path / "r.jsonl", signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stopped_after(1, patch)
        status, results = verify(folder, *CERTIFY, output=output)
    assert status == 143 and [r["result"] for r in results] == ["unsat", "unsat"]
    assert json.loads((tmp_path / "summary.json").read_text())["groups"][0]["inputs"] == 2
    assert signal.getsignal(signal.SIGTERM) == before
    status, results = verify(folder, *CERTIFY, "--resume", output=output)
    assert status == 0 and len({r["property"] for r in results}) == len(results) == 6


def test_a_full_disk_is_one_line_and_resume_goes_on(folder, tmp_path, capsys):
    output, limits = tmp_path / "r.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        status = verify(folder, *CERTIFY, "--output", output)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert status == 2 and line.endswith("r.jsonl cannot be written: File too large")
    assert output.read_bytes().count(b"\n") >= 1
    status, results = verify(folder, *CERTIFY, "--resume", output=output)
    assert status == 0 and len({r["property"] for r in results}) == len(results) == 6


def test_replicas_share_the_sentences(folder, tmp_path):
    output = tmp_path / "r.jsonl"
    arguments = ("--load", folder / "bert", "--data", folder / "data.jsonl", *CERTIFY)
    arguments += ("--tensor-parallel-size", 1, "--output", output)
    run = launch(2, main, ["verify", *map(str, arguments)], timeout=200)
    assert run.returncode == 0, run.stderr
    results = read(output)
    (tmp_path / "alone").mkdir()
    _, alone = verify(folder, *CERTIFY, output=tmp_path / "alone" / "r.jsonl")
    by_name = {r["property"]: r for r in without_times(results)}
    assert len(results) == len(by_name) == len(alone)
    assert [by_name[r["property"]] for r in alone] == without_times(alone)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "r.jsonl", "summary.json"]
    assert run.stdout.count("seconds per input") == 1


def test_what_replicas_left_is_kept_by_resume_alone(folder, tmp_path, capsys):
    """Of a run that was killed: a part, half a line in it, and a merge that was cut off."""
    verify(folder, *CERTIFY, "--limit", 4, output=tmp_path / "r.jsonl")
    lines = (tmp_path / "r.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "r.jsonl").write_bytes(lines[0] + lines[2])
    (tmp_path / "r.jsonl.1").write_bytes(lines[2] + lines[1] + lines[3][:50])
    (tmp_path / "r.jsonl.old").write_text("something else")
    capsys.readouterr()
    assert verify(folder, *CERTIFY, "--output", tmp_path / "r.jsonl")[0] == 2
    assert "r.jsonl.1 has results of a run that did not finish" in capsys.readouterr().err
    assert (tmp_path / "r.jsonl").read_bytes() == lines[0] + lines[2]
    status, results = verify(folder, *CERTIFY, "--resume", output=tmp_path / "r.jsonl")
    names = [r["property"] for r in results]
    assert status == 0 and names == ["first", "line-3", "line-2", "line-4", "line-5", "6"]
    assert (tmp_path / "r.jsonl").read_bytes().startswith(lines[0] + lines[2] + lines[1])
    assert not (tmp_path / "r.jsonl.1").exists() and (tmp_path / "r.jsonl.old").exists()


# Long enough for a signal to arrive between two of them on a busy machine.
COUNT, SLOW = 60, ("--attack-steps", 0, "--tolerance", 0.02)


def many(tmp_path):
    return write_lines(
        tmp_path / "many.jsonl",
        *({"sentence": " ".join(f"w{1 + (i * k) % 31}" for k in range(1, 8))}
          for i in range(COUNT)),
    )


def rank_process(launched, rank):
    """The process of a rank among torchrun's children."""
    for child in psutil.Process(launched.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_and_resume_completes_it(folder, tmp_path, size, victim):
    """Of a sharded model, and of replicas: what is finished is kept, nothing is done twice."""
    data, output = many(tmp_path), tmp_path / "r.jsonl"
    arguments = ("--load", folder / "bert", "--data", data, *SLOW, "--output", output)
    launched = start(2, *arguments, "--tensor-parallel-size", size)
    wait_for_lines(output, 3, launched)
    rank_process(launched, victim).kill()
    status, _, err = finish(launched, 90)
    assert status != 0, err
    kept = output.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert 3 <= kept.count(b"\n") < COUNT
    assert all(json.loads(line)["result"] != "error" for line in kept.splitlines())
    assert main(["verify", *map(str, arguments), "--resume"]) == 0
    assert output.read_bytes().startswith(kept)
    results = read(output)
    assert len({r["property"] for r in results}) == len(results) == COUNT
    assert {r["result"] for r in results} == {"unsat"}


@pytest.mark.slow
def test_sigterm_to_torchrun_ends_all_ranks_after_their_sentence(folder, tmp_path):
    data, output = many(tmp_path), tmp_path / "r.jsonl"
    arguments = ("--load", folder / "bert", "--data", data, *SLOW, "--output", output)
    launched = start(2, *arguments)
    wait_for_lines(output, 2, launched)
    launched.send_signal(signal.SIGTERM)
    status, out, err = finish(launched, 90)
    assert status != 0 and "lirpa-megatron: error" not in err  # torchrun has a traceback of its own
    lines = output.read_bytes()
    assert lines.endswith(b"\n") and 2 <= lines.count(b"\n") < COUNT
    assert json.loads((tmp_path / "summary.json").read_text())["groups"][0]["inputs"] >= 2
    limit = lines.count(b"\n") + 2
    assert main(["verify", *map(str, arguments), "--resume", "--limit", str(limit)]) == 0
    assert output.read_bytes().startswith(lines) and len(read(output)) == limit
