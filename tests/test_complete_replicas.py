"""Branch and bound by several replicas: verdicts are one process's, trees are whole, no domain is
lost with a replica."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from commands import on_ranks, read
from complete_cases import ROWS, branched, write_complete
from ranks import RankPool, pool

from lirpa_megatron.cli.commands import main
from lirpa_megatron.complete import exploring, refinement, search
from lirpa_megatron.complete.tree import tree_of


def decided(offset, rounds, shared=True, before=None):
    """Of one rank: what is found out of a network whose thresholds lie below CROWN's bounds by
    `offset` of the gap to a sampled minimum, and how many domains were bounded here.

    Args:
        rounds: whether inner neurons' bounds are raised.
        shared: whether replicas share the work.
        before: called with the number of batches before each.
    """
    # batches are small: each step takes the ranks several collectives
    options = {} if rounds else {"refinement_iterations": 0}
    batches, halves = [], exploring.Explorer.halves

    def counted(self, parents):
        if before is not None:
            before(len(batches))
        batches.append(len(parents))
        return halves(self, parents)

    few = search._GOALS, refinement._ROWS, refinement._DOMAINS, refinement._VALUES
    # batches of this network are small
    search._GOALS, refinement._ROWS, refinement._DOMAINS, refinement._VALUES = 2, 4, 4, 4
    exploring.Explorer.halves = counted
    try:
        found = branched("relu", offset, shared=shared, batch=2, **options)
    finally:
        exploring.Explorer.halves = halves
        search._GOALS, refinement._ROWS, refinement._DOMAINS, refinement._VALUES = few
    trees = [[leaf.splits for leaf in found.leaves if leaf.goal == g] for g in range(2 * ROWS)]
    trees += [claim.leaves for claim in found.claims]
    proved = found.status == "proved"
    widest = max(len(tree) for tree in trees if tree_of(tree, 22)) if proved else 0
    return found.status, found.domains, sum(batches), widest, found.leaves, found.point


CASES = {"proved": (0.94, True), "unaided": (0.94, False), "refuted": (1.05, True)}


@pytest.mark.parametrize("tp, case", [
    (1, "proved"), (2, "proved"), (1, "refuted"),
    pytest.param(1, "unaided", marks=pytest.mark.slow),
    pytest.param(2, "refuted", marks=pytest.mark.slow),
    pytest.param(2, "unaided", marks=pytest.mark.slow),
])
def test_replicas_find_what_one_process_finds(tp, case):
    want = decided(*CASES[case], shared=False)
    torch.set_default_dtype(torch.float32)
    assert want[0] == ("refuted" if case == "refuted" else "proved")
    found = pool(2 * tp, tp).run(decided, *CASES[case])
    for status, domains, own, widest, leaves, point in found:
        assert status == want[0]
        # one tree of all, which is whole (`tree_of` raises otherwise)
        assert domains == found[0][1] and leaves == found[0][4]
        assert (point is None) == (want[5] is None)
        if point is not None:
            assert torch.equal(point, found[0][5])
        if case != "refuted":
            assert widest > 8 and domains > 20
            # no replica runs dry while the other has work
            assert 0.2 * domains < 2 * own < 0.8 * domains


def killed(victim, *arguments):
    def before(batch):
        if batch == 2 and torch.distributed.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)

    return decided(*arguments, before=before)


@pytest.mark.parametrize("tp, victim", [
    (1, 0), pytest.param(2, 3, marks=pytest.mark.slow), pytest.param(1, 1, marks=pytest.mark.slow),
])
def test_domains_of_a_killed_replica_are_decided_by_the_others(tp, victim):
    own = RankPool(2 * tp, tp)
    try:
        outcomes = own.outcomes(killed, victim, *CASES["unaided"], timeout=60)
    finally:
        own.close()
    assert outcomes[victim].error == "Died"
    for rank, outcome in enumerate(outcomes):
        if rank // tp != victim // tp:
            status, domains, own, widest, *_ = outcome.value
            assert status == "proved" and widest > 8
            assert own < domains  # the other one has done some before


def broken(rank, *arguments):
    def before(batch):
        if batch == 1 and torch.distributed.get_rank() == rank:
            raise ZeroDivisionError("nothing can be divided")

    return decided(*arguments, before=before)


@pytest.mark.parametrize("tp, rank", [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_a_rank_that_fails_ends_all_replicas_with_its_message(tp, rank):
    for outcome in pool(2 * tp, tp).outcomes(broken, rank, *CASES["proved"], timeout=60):
        assert outcome.error and "nothing can be divided" in outcome.message


# ------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_complete(tmp_path_factory.mktemp("complete"))


def job(tp, victim, step, *arguments):
    """Of one rank: the command's exit status; the victim is killed at its first `step`."""
    rank, before = torch.distributed.get_rank(), getattr(exploring.Explorer, step)

    def fatal(self, *given):
        if rank == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(self, *given)

    setattr(exploring.Explorer, step, fatal)
    os.environ["RANK"] = str(rank)
    try:
        return main([*arguments, "--tensor-parallel-size", str(tp)])
    finally:
        setattr(exploring.Explorer, step, before)
        del os.environ["RANK"]


def arguments_for(folder, *more):
    return ["verify", "--onnx", str(folder / "net.onnx"), "--method", "IBP", "--attack-steps", "0",
            "--complete", *map(str, more)]


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_job_of_replicas_writes_one_result_of_each_instance(folder, tmp_path, tp):
    output = tmp_path / "r.jsonl"
    arguments = arguments_for(folder, "--instances", folder / "instances.csv", "--output", output)
    assert pool(2 * tp, tp).run(job, tp, None, "halves", *arguments) == [0] * 2 * tp
    holds, fails, both = read(output)
    assert [r["property"] for r in (holds, fails, both)] == ["holds", "fails", "both"]
    assert [r["result"] for r in (holds, fails, both)] == ["unsat", "sat", "unsat"]
    assert {r["tensor_parallel"] for r in (holds, fails, both)} == {tp}
    assert holds["domains"] > 2 and holds["open_domains"] == 0 and fails["violation"] >= 0
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_instances_of_a_killed_replica_are_verified_by_the_others(folder, tmp_path, victim):
    output = tmp_path / "r.jsonl"
    arguments = arguments_for(folder, "--instances", folder / "instances.csv", "--output", output)
    own = RankPool(2, 1)
    try:
        outcomes = own.outcomes(job, 1, victim, "whole", *arguments, timeout=60)
    finally:
        own.close()
    assert outcomes[1 - victim].value == 0 and outcomes[victim].error == "Died"
    found = read(output)
    assert sorted(r["property"] for r in found) == ["both", "fails", "holds"]
    assert {r["property"]: r["result"] for r in found} == {
        "holds": "unsat", "fails": "sat", "both": "unsat"}
    assert list(tmp_path.iterdir()) == [output]


def test_a_run_that_is_resumed_has_the_results_of_all_replicas(folder, tmp_path, session, capsys):
    """Those of a run in which all were killed lie in several files."""
    output, part = tmp_path / "r.jsonl", tmp_path / "r.jsonl.1"
    arguments = arguments_for(folder, "--instances", folder / "instances.csv")
    assert main([*arguments, "--output", str(output)]) == 0
    lines = output.read_text().splitlines(keepends=True)
    output.write_text(lines[0] + lines[2][:30])
    part.write_text(lines[1] + lines[2][:20])
    assert main([*arguments, "--output", str(output)]) == 2
    assert "give --resume to keep them" in capsys.readouterr().err
    assert main([*arguments, "--output", str(output), "--resume"]) == 0
    assert [r["property"] for r in read(output)] == ["holds", "fails", "both"]
    assert output.read_text().startswith(lines[0] + lines[1])
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("tp, victim", [
    (1, None), (1, 0), pytest.param(2, None, marks=pytest.mark.slow),
    pytest.param(2, 3, marks=pytest.mark.slow),
])
def test_the_record_of_replicas_is_whole_also_where_one_is_killed(
    folder, tmp_path, tp, victim, session, unchanged_environment
):
    path, output = tmp_path / "proof.json", tmp_path / "r.jsonl"
    arguments = arguments_for(
        folder, "--vnnlib", folder / "holds.vnnlib", "--record", path, "--output", output
    )
    own = RankPool(2 * tp, tp)
    try:
        outcomes = own.outcomes(job, tp, victim, "halves", *arguments, timeout=60)
    finally:
        own.close()
    for rank, outcome in enumerate(outcomes):
        if victim is None or rank // tp != victim // tp:
            assert outcome.value == 0, outcome
    (result,) = read(output)
    assert result["result"] == "unsat"
    assert main(["check", str(path)]) == 0


def test_replicas_cut_boxes_together(folder, tmp_path, session, unchanged_environment):
    path = tmp_path / "proof.json"
    arguments = arguments_for(folder, "--vnnlib", folder / "holds.vnnlib", "--record", path,
                              "--branching", "input", "--output", tmp_path / "r.jsonl")
    assert pool(2, 1).run(job, 1, None, "halves", *arguments) == [0, 0]
    (result,) = read(tmp_path / "r.jsonl")
    assert (result["result"], result["branching"]) == ("unsat", "input")
    assert result["domains"] > 20
    assert main(["check", str(path)]) == 0


def test_replicas_are_for_branch_and_bound(folder, tmp_path):
    arguments = arguments_for(folder, "--instances", folder / "instances.csv")
    arguments.remove("--complete")
    ended = on_ranks(2, *arguments, "--tensor-parallel-size", 1)
    assert ended.returncode == 2 and "only --data and --complete" in ended.stderr
