"""Searches that a signal or the clock has ended: `--resume` goes on with them, and believes
nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from commands import ROOT, read
from complete_cases import branched, write_complete
from ranks import pool

from lirpa_megatron.cli.commands import main
from lirpa_megatron.complete import box_search, exploring
from lirpa_megatron.complete.state import CLOSED, OPEN, StateError, split_leaves, split_tree
from lirpa_megatron.verify.properties import complete, instance
from lirpa_megatron.verify.stop_signal import StopSignal

pytestmark = pytest.mark.usefixtures("unchanged_environment")

STEP = {"relu": (exploring.Explorer, "halves"), "input": (box_search._Run, "_explored")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_complete(tmp_path_factory.mktemp("resume"))


def arguments_for(folder, branching, *more):
    files = ["--onnx", folder / "net.onnx", "--vnnlib", folder / "holds.vnnlib"]
    how = ["--method", "IBP", "--attack-steps", 0, "--complete", "--branching", branching]
    return ["verify", *map(str, (*files, *how, *more))]


def ended(arguments, branching, monkeypatch, number=signal.SIGTERM, step=3):
    """Exit status of a run that a signal reaches before one of its steps."""
    owner, name = STEP[branching]
    original, steps = getattr(owner, name), []

    def counted(self, *given):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return original(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        return main(arguments)


@pytest.fixture(scope="module")
def left(folder, tmp_path_factory, session):
    """What is left of a search by SIGTERM, for each kind of branching."""
    found, patch = {}, pytest.MonkeyPatch()
    for branching in STEP:
        path = tmp_path_factory.mktemp("left") / "proof.json"
        arguments = arguments_for(folder, branching, "--record", path)
        assert ended(arguments, branching, patch) == 143
        assert not path.exists()
        found[branching] = (path.parent / "proof.json.search").read_text()
    return found


@pytest.mark.parametrize("branching", STEP)
def test_a_search_that_sigterm_ended_goes_on_and_its_record_holds(
    folder, left, tmp_path, branching, monkeypatch, capsys
):
    record, search = tmp_path / "proof.json", tmp_path / "proof.json.search"
    search.write_text(left[branching])
    owner, name = STEP[branching]
    original, tried = getattr(owner, name), []

    def noted(self, parts, *given):
        tried.append([d.splits for d in parts] if branching == "relu" else len(parts))
        return original(self, parts, *given)

    monkeypatch.setattr(owner, name, noted)
    arguments = arguments_for(folder, branching, "--record", record, "--resume")
    assert main([*arguments, "--output", str(tmp_path / "r.jsonl")]) == 0
    (result,) = read(tmp_path / "r.jsonl")
    before = json.loads(left[branching])["domains"]
    assert result["result"] == "unsat" and result["domains"] > before and result["bound"] > 0
    # not from the root: what is split first has been split before, and parts are several
    assert all(tried[0]) if branching == "relu" else tried[0] > 1
    assert not search.exists()
    assert main(["check", str(record)]) == 0
    assert "holds" in capsys.readouterr().out


def test_a_search_out_of_time_goes_on_though_its_result_is_there(
    folder, tmp_path, monkeypatch, session
):
    output, steps, halves = tmp_path / "r.jsonl", [], exploring.Explorer.halves
    arguments = arguments_for(folder, "relu", "--output", output)

    def limited(self, parents):
        steps.append(1)
        return exploring.Explored(open=parents, is_over=True) if len(steps) == 3 \
            else halves(self, parents)

    with monkeypatch.context() as patch:
        patch.setattr(exploring.Explorer, "halves", limited)
        assert main(arguments) == 0
    (result,) = read(output)
    assert result["result"] == "timeout" and result["lower_bounds"] == [result["bound"]]
    assert (tmp_path / "r.jsonl.search").exists()
    assert main([*arguments, "--resume"]) == 0
    assert [r["result"] for r in read(output)] == ["timeout", "unsat"]
    assert not (tmp_path / "r.jsonl.search").exists()
    assert main([*arguments, "--resume"]) == 0 and len(read(output)) == 2


@pytest.fixture
def interrupts():
    """SIGINT as in a terminal; shells let what they start in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_leaves_other_instances_and_the_search(
    folder, tmp_path, monkeypatch, interrupts, session
):
    """Of several the one that was searched goes on, those after it begin."""
    output, csv = tmp_path / "r.jsonl", tmp_path / "two.csv"
    csv.write_text("".join(f"{folder}/net.onnx,{folder}/{p}.vnnlib,60\n"
                           for p in ("holds", "fails")))
    arguments = ["verify", "--instances", str(csv), "--method", "IBP"]
    arguments += ["--attack-steps", "0", "--complete", "--branching", "relu"]
    arguments += ["--output", str(output)]
    assert ended(arguments, "relu", monkeypatch, signal.SIGINT) == 130
    assert read(output) == [] and (tmp_path / "r.jsonl.search").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert main([*arguments, "--resume"]) == 0
    assert [r["result"] for r in read(output)] == ["unsat", "sat"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.jsonl", "two.csv"]


def test_a_signal_that_the_process_ignores_stays_ignored(interrupts):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignal((signal.SIGTERM, signal.SIGINT)).listening():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def _other_weights(content):
    content["network"]["sha256"] = "0" * 64


def _other_text(content):
    content["property"]["sha256"] = "0" * 64


def _other_dtype(content):
    content["dtype"] = "float32"


def _half_a_tree(content):
    content["trees"][0]["nodes"].pop()


def _twice_on_one_way(content):
    content["trees"][0]["nodes"] = [3, 3, CLOSED, CLOSED, CLOSED]


def _no_such_neuron(content):
    content["trees"][0]["nodes"] = [10**6, CLOSED, CLOSED]


def _no_such_box(content):
    content["trees"][0]["box"] = 7


def _bound_above_values(content):
    content["inner"][0]["bound"] += 1.0


def _text_for_a_number(content):
    content["inner"][0]["bound"] = "1"


def _no_rounds(content):
    del content["rounds"]


@pytest.mark.parametrize("change, message", [
    (_other_weights, "is of another network"), (_other_text, "is of another property"),
    (_other_dtype, "has computed in float32"), (_half_a_tree, "parts of the tree have no node"),
    (_twice_on_one_way, "cannot be split at 3"), (_no_such_neuron, "cannot be split at 1000000"),
    (_no_such_box, "box 7 does not exist"), (_bound_above_values, "has values below its bound"),
    (_text_for_a_number, "is damaged"), (_no_rounds, "is damaged"),
])
def test_a_damaged_search_is_refused_in_one_line(
    folder, left, tmp_path, change, message, capsys, session
):
    content = json.loads(left["relu"])
    change(content)
    (tmp_path / "proof.json.search").write_text(json.dumps(content))
    arguments = arguments_for(folder, "relu", "--record", tmp_path / "proof.json", "--resume")
    assert main(arguments) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert line.startswith("lirpa-megatron: error: search ") and message in line
    assert not (tmp_path / "proof.json").exists()


def test_other_branching_does_not_go_on_with_it(folder, left, tmp_path, capsys, session):
    (tmp_path / "proof.json.search").write_text(left["relu"])
    arguments = arguments_for(folder, "input", "--record", tmp_path / "proof.json", "--resume")
    assert main(arguments) == 2
    assert "neurons were split, and boxes are to be cut now" in capsys.readouterr().err


def test_a_search_that_cannot_be_gone_on_with_stays(
    folder, left, tmp_path, monkeypatch, capsys, session
):
    """Where nothing can be split, as by another --branching, and of another property."""
    search = tmp_path / "proof.json.search"
    search.write_text(left["relu"])
    arguments = arguments_for(folder, "relu", "--record", tmp_path / "proof.json", "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(complete, "why_not", lambda *_: "nothing can be split")
        assert main(arguments) == 0
    assert search.read_text() == left["relu"]
    arguments[arguments.index("--vnnlib") + 1] = str(folder / "fails.vnnlib")
    assert main(arguments) == 2
    assert re.search("is of property .*holds.vnnlib of network .*: remove it",
                     capsys.readouterr().err)
    assert search.read_text() == left["relu"]


@pytest.mark.parametrize("prop, message", [
    ("holds", "was ended before it was through: give --resume to go on with it, or remove it"),
    ("fails", "is of property .*holds.vnnlib of network .*: move it away"),
])
def test_without_resume_a_search_is_not_overwritten(
    folder, left, tmp_path, prop, message, capsys, session
):
    search, record = tmp_path / "proof.json.search", tmp_path / "proof.json"
    search.write_text(left["relu"])
    arguments = arguments_for(folder, "relu", "--record", record)
    arguments[arguments.index("--vnnlib") + 1] = str(folder / f"{prop}.vnnlib")
    assert main(arguments) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "error:" in x]
    assert re.search(f"search {search} {message}", line)
    assert search.read_text() == left["relu"] and not record.exists()
    search.unlink()
    assert main(arguments) == 0


def test_resume_is_offered_where_there_is_something_to_go_on_with(
    folder, tmp_path, monkeypatch, capsys, session
):
    arguments = arguments_for(folder, "relu", "--record", tmp_path / "proof.json")
    assert ended(arguments, "relu", monkeypatch) == 143
    assert capsys.readouterr().err.splitlines()[-1] == "ended by SIGTERM; --resume goes on"
    arguments = arguments_for(folder, "relu", "--output", tmp_path / "r.jsonl")
    batches = instance._batches

    def before_the_search(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return batches(*given)

    monkeypatch.setattr(instance, "_batches", before_the_search)
    assert main(arguments) == 143 and not (tmp_path / "r.jsonl.search").exists()
    assert capsys.readouterr().err.splitlines()[-1] == "ended by SIGTERM"


def test_where_no_search_can_be_written_the_run_does_not_begin(folder, tmp_path, capsys, session):
    (tmp_path / "proof.json.search").mkdir()
    assert main(arguments_for(folder, "relu", "--record", tmp_path / "proof.json")) == 2
    assert "proof.json.search is a directory" in capsys.readouterr().err


def test_cuts_outside_of_a_part_are_refused(folder, left, tmp_path, capsys, session):
    content = json.loads(left["input"])
    content["cuts"][0]["nodes"][0][1] = 7.0
    (tmp_path / "proof.json.search").write_text(json.dumps(content))
    arguments = arguments_for(folder, "input", "--record", tmp_path / "proof.json", "--resume")
    assert main(arguments) == 2
    assert re.search(r"a part of a box cannot be cut at \[[01], 7.0\]", capsys.readouterr().err)


@pytest.mark.parametrize("branching", STEP)
def test_a_search_that_claims_everything_proves_nothing(
    folder, left, tmp_path, branching, capsys, session
):
    """All leaves of a property that does not hold are said to be proved."""
    content = json.loads(left[branching])
    for tree in content["trees"] + content["cuts"]:
        tree["nodes"] = [CLOSED if node == OPEN else node for node in tree["nodes"]]
    fails = folder / "fails.vnnlib"
    arguments = arguments_for(folder, branching, "--record", tmp_path / "proof.json", "--resume")
    arguments[arguments.index("--vnnlib") + 1] = str(fails)
    content["property"] |= {
        "file": content["property"]["file"].replace("holds", "fails"),
        "sha256": hashlib.sha256(fails.read_bytes()).hexdigest(),
    }
    (tmp_path / "proof.json.search").write_text(json.dumps(content))
    assert main([*arguments, "--output", str(tmp_path / "r.jsonl")]) == 0
    (result,) = read(tmp_path / "r.jsonl")
    assert result["result"] == "sat" and not (tmp_path / "proof.json").exists()


@pytest.mark.parametrize("more", [
    ("--branching", "input"), ("--dtype", "float32"), ("--no-live-check",),
    ("--onnx-output", "y"),
], ids=str)
def test_results_of_another_question_are_not_taken_for_this_one(
    folder, tmp_path, more, session
):
    """The network's weights are float64."""
    output = tmp_path / "r.jsonl"
    files = ["--onnx", folder / "net.onnx", "--vnnlib", folder / "holds.vnnlib"]
    arguments = ["verify", *map(str, (*files, "--complete", "--output", output))]
    for options in ((), more, (), more):
        assert main([*arguments, "--resume", *options]) == 0
    assert len(read(output)) == 2


def test_trees_are_written_and_read_as_they_are():
    on, off = (4, 1, 0.0), (4, -1, 0.0)
    closed, left = [(on,), (off, (2, -1, 0.5))], [(off, (2, 1, 0.5))]
    nodes = split_tree(closed, left, 9)
    assert nodes == (4, CLOSED, (2, 0.5), OPEN, CLOSED)
    assert split_leaves(nodes, 9) == (closed, left)
    for wrong in ([4, CLOSED], [CLOSED, CLOSED], [4, True, CLOSED], [9, CLOSED, CLOSED], [-3], []):
        with pytest.raises(StateError):
            split_leaves(wrong, 9)


def gone_on(branching, shared=False):
    """Of one rank: what is found out by a search that goes on where another one had its limit."""
    how = {"branching": branching, "offset": 0.9 if branching == "relu" else 0.6, "shared": shared}
    first = branched(**how, most_domains=12)
    then = branched(**how, start=first.state)
    return first.status, then.status, then.domains, then.bound, first.state


@pytest.mark.parametrize("branching", [
    pytest.param("relu", marks=pytest.mark.slow), "input",
])
def test_two_ranks_go_on_alike(branching):
    want = gone_on(branching)
    torch.set_default_dtype(torch.float32)
    assert want[:2] == ("unknown", "proved")
    for got in pool(2).run(gone_on, branching):
        assert got[:3] == want[:3] and got[4].trees == want[4].trees
        # sums over ranks in another order, in float64
        assert got[3] == pytest.approx(want[3], abs=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("branching", STEP)
def test_two_replicas_go_on_together(branching):
    for got in pool(2, 1).run(gone_on, branching, True):
        assert got[:2] == ("unknown", "proved") and got[3] > 0


def test_bounds_that_do_not_hold_are_found_out_at_the_end():
    """Claims between what is proved and what the neurons attain."""
    state = branched("relu", 0.9, most_domains=12).state
    assert state.inner
    found = branched("relu", 0.9, start=replace(
        state, inner=tuple(replace(c, tree=(CLOSED,)) for c in state.inner),
    ))
    torch.set_default_dtype(torch.float32)
    assert found.status == "proved" and found.bound > 0


@pytest.mark.slow
def test_a_process_that_is_sent_sigterm_leaves_a_search(folder, tmp_path):
    """A process of its own; its progress says when it searches."""
    arguments = arguments_for(folder, "relu", "--record", tmp_path / "proof.json")
    program = "import time; from lirpa_megatron.complete import exploring\n" \
        "halves = exploring.Explorer.halves\n" \
        "def slowly(self, parents):\n    time.sleep(1); return halves(self, parents)\n" \
        "exploring.Explorer.halves = slowly\n" \
        "from lirpa_megatron.cli.commands import main; import sys; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = b""
    while b"domains left of 3" not in said:
        said += process.stderr.read1()
        assert process.poll() is None, said
    process.send_signal(signal.SIGTERM)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 143 and b"ended by SIGTERM; --resume goes on" in rest
    assert json.loads((tmp_path / "proof.json.search").read_text())["domains"] >= 3
    assert main([*arguments, "--resume"]) == 0
    assert main(["check", str(tmp_path / "proof.json")]) == 0
