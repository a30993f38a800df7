"""Branch and bound over boxes of inputs: verdicts of small networks are those of an enumeration."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from commands import read
from complete_cases import HIGH, NET, branched, check_refused, write_complete
from ranks import pool
from small_networks import property_text, save, stack
from test_complete import boxed, check_two_rows, check_verdict
from torch import nn

from lirpa_megatron import BoundedModule
from lirpa_megatron.cli.commands import main
from lirpa_megatron.complete import SearchOptions, box_search, branch_and_bound, strategy
from lirpa_megatron.complete.box_search import search_boxes
from lirpa_megatron.complete.cut_tree import Cut, CutTree, Piece, claimed
from lirpa_megatron.complete.problem import Problem
from lirpa_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("unchanged_environment")


def test_verdicts_are_those_of_all_activation_patterns(one_thread):
    for seed in range(16):
        check_verdict(seed, "input")
        check_two_rows(seed, "input")


@pytest.mark.slow
def test_verdicts_of_many_more_are_those_of_all_activation_patterns(one_thread):
    for seed in range(40, 540):
        check_verdict(seed, "input")
        check_two_rows(seed, "input")


def test_of_several_rows_one_has_to_hold_in_each_part_of_each_box(one_thread):
    """Y >= 0 or Y <= 0 holds everywhere, neither does alone; in the second box Y is above 1."""
    model = nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
        model[2].bias.fill_(0.0)
    low = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    high = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    graph = BoundedModule(model, low)
    C = torch.tensor([[[1.0], [-1.0]]] * 2, dtype=torch.float64)

    def solved(thresholds):
        problem = Problem(low, high, (0, 1), C, torch.tensor(thresholds, dtype=torch.float64))
        return search_boxes(
            graph, problem, SearchOptions(most_domains=4000),
            lambda goal, points: next(
                (p for p in points
                 if bool((C[goal] @ model(p) <= problem.thresholds[goal]).all())), None,
            ),
        )

    with torch.no_grad():
        found = solved([[-0.1, -0.1], [-0.2, -0.2]])
        assert found.status == "proved" and found.domains > 2 and min(found.margins) > 0
        found = solved([[-0.1, -0.1], [0.3, -0.1]])
        assert found.status == "refuted" and found.goal == 1
        # neither Y > 0.3 nor -Y > -0.1
        assert 0.1 <= float(model(found.point)) <= 0.3


def test_a_limit_of_time_is_kept(one_thread):
    """sum |x_i - x_(i+1) + b_i| > -0.001: parts have to be tiny all along a line, where it is 0."""
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 1, bias=False))
    steps, b = torch.eye(5, 6) - torch.eye(6)[1:], torch.linspace(0.01, 0.07, 5)
    with torch.no_grad():
        model[0].weight.copy_(torch.cat([steps, -steps]))
        model[0].bias.copy_(torch.cat([b, -b]))
        model[2].weight.fill_(1.0)
    found = branch_and_bound(
        model, boxed(-torch.ones(1, 6), torch.ones(1, 6)), torch.ones(1, 1, 1), -0.001,
        timeout=1.0, options=SearchOptions(branching="input"),
    )
    assert found.status == "timeout" and found.open > 0 and found.bound < 0
    assert found.seconds < 2  # a batch of these parts takes 10 ms


def test_a_box_of_one_point_and_a_part_that_cannot_be_cut_end_the_search(one_thread):
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).requires_grad_(False)
    x = torch.tensor([[0.1, -0.2]])
    y = float(model(x))

    def search(low, high, threshold, confirm=lambda goal, points: None):
        end = torch.tensor([[threshold]], dtype=torch.float64)
        problem = Problem(low, high, (0,), torch.ones(1, 1, 1), end)
        return search_boxes(BoundedModule(model, x), problem, SearchOptions(), confirm)

    assert search(x, x, y - 0.1).status == "proved"
    found = search(x, x, y + 0.1)
    assert (found.status, found.open) == ("unknown", 1) and "too small to be cut" in found.why
    assert search(x, x, y + 0.1, lambda goal, points: points[0]).status == "refuted"
    # one number between the ends: two cuts, then nothing is left
    high = torch.nextafter(torch.nextafter(x, x + 1), x + 1)
    found = search(x, high, y + 0.1)
    assert found.status == "unknown" and found.open == 4 and found.domains == 7


def test_boxes_are_cut_where_few_inputs_move_and_neurons_are_many(one_thread):
    def choice(inputs, neurons, activation=nn.ReLU, asked="auto"):
        model = nn.Sequential(nn.Linear(inputs, neurons), activation(), nn.Linear(neurons, 2))
        x = torch.zeros(1, inputs)
        return strategy.chosen(BoundedModule(model, x), x - 1, x + 1, asked)

    assert choice(5, 300) == "input" and choice(5, 60) == "relu" and choice(9, 300) == "relu"
    assert choice(12, 8, nn.Tanh) == "input"
    assert choice(5, 60, asked="input") == "input" and choice(5, 300, asked="relu") == "relu"
    with pytest.raises(UserError, match="has a Tanh"):
        choice(3, 8, nn.Tanh, "relu")
    with pytest.raises(UserError, match="choose one of auto, relu, nonlinear, input"):
        choice(3, 8, asked="output")


# ------------------------------------------------------------------------ tensor parallelism


def decided(net, offset, shared=False):
    """Of one rank: what is found out of a network whose thresholds lie below CROWN's bounds by
    `offset` of the gap to a sampled minimum; with `shared` by all replicas."""
    share, box_search._SHARE = box_search._SHARE, 4
    try:
        found = branched("input", offset, net, shared, most_domains=400)
    finally:
        box_search._SHARE = share
    point = None if found.point is None else found.point.tolist()
    cuts = [[(n.input, n.at) if isinstance(n, Cut) else n.proved for n in t.nodes]
            for t in found.cuts]
    return found.status, found.margins, found.domains, found.open, cuts, point


@pytest.mark.parametrize("offset, status", [(0.6, "proved"), (1.05, "refuted")])
def test_verdicts_bounds_and_cuts_of_two_ranks_are_those_of_one(offset, status):
    want = decided(NET, offset)
    torch.set_default_dtype(torch.float32)
    assert want[0] == status and (want[4] or status == "refuted")
    for got in pool(2).run(decided, NET, offset):
        # Sums over ranks are rounded in another order: 1e-10 of bounds of size 1 in float64.
        assert got[1] == pytest.approx(want[1], abs=1e-10)
        assert (got[0], *got[2:5]) == (want[0], *want[2:5])
        assert got[5] is None or got[5] == pytest.approx(want[5], abs=1e-10)


@pytest.mark.parametrize("offset, status", [(0.6, "proved"), (1.05, "refuted")])
def test_replicas_prove_one_tree_of_cuts(offset, status):
    """Whose parts are as many as one process's, or a few more: batches are larger."""
    one = decided(NET, offset)
    torch.set_default_dtype(torch.float32)
    found = pool(2, 1).run(decided, NET, offset, True)
    assert [got[0] for got in found] == [status] * 2
    assert found[0][2:] == found[1][2:]
    if status == "proved":
        assert one[2] <= found[0][2] < 2 * one[2] and len(found[0][4]) == 2


# ------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_complete(tmp_path_factory.mktemp("complete"))


def test_properties_are_decided_and_results_say_how(folder, tmp_path, session):
    arguments = ["verify", "--instances", str(folder / "instances.csv"), "--method", "IBP",
                 "--attack-steps", "0", "--complete", "--branching", "input"]
    assert main([*arguments, "--output", str(tmp_path / "r.jsonl")]) == 0
    results = read(tmp_path / "r.jsonl")
    assert [r["result"] for r in results] == ["unsat", "sat", "unsat"]
    assert all(r["branching"] == "input" and r["domains"] > 0 for r in results)
    assert results[0]["domains"] > 2
    assert 0 < results[0]["bound"] <= 0.01 + 1e-9 and results[0]["open_domains"] == 0


# -------------------------------------------------------------------------------- records


@pytest.fixture(scope="module")
def record(folder, tmp_path_factory, session):
    path = tmp_path_factory.mktemp("record") / "proof.json"
    assert main([
        "verify", "--onnx", str(folder / "net.onnx"), "--vnnlib", str(folder / "holds.vnnlib"),
        "--method", "IBP", "--attack-steps", "0", "--complete", "--branching", "input",
        "--record", str(path),
    ]) == 0
    return path


def nodes(content):
    (tree,) = content["cuts"]
    return tree["nodes"]


def _drop(content):
    nodes(content).pop()


def _one_leaf(content):
    """A cut and its two halves become one part, which is larger than what was proved."""
    content["cuts"][0]["nodes"] = [[[0], 1.0]]


def _too_large(content):
    """A part that was proved becomes larger: its neighbour is what is left."""
    first = next(i for i, node in enumerate(nodes(content)) if len(node) == 3)
    nodes(content)[first][1] = HIGH[nodes(content)[first][0]]


def _gap(content):
    first = next(i for i, node in enumerate(nodes(content)) if len(node) == 3)
    nodes(content)[first][1] = 5.0


def _too_many(content):
    nodes(content).append([[0], 1.0])


def _no_bound(content):
    next(node for node in nodes(content) if len(node) == 2)[0].clear()


def _no_tree(content):
    content["cuts"] = []


def _other_disjunct(content):
    nodes(content)[-1][0].append(7)


def _other_box(content):
    content["cuts"][0]["box"] = 3


def _twice(content):
    content["cuts"] *= 2


def _both(content):
    content["trees"] = [{"box": 0, "disjunct": 0, "leaves": [{"splits": [], "bound": None}]}]


def _damaged(content):
    nodes(content)[0][1] = "0"


def _nan(content):
    nodes(content)[0][1] = float("nan")


def _other_input(content):
    nodes(content)[0][0] = 9


def test_a_record_is_proved_again_part_by_part(record, capsys):
    content = json.loads(record.read_text())
    parts = sum(len(node) == 2 for node in nodes(content))
    assert parts > 3 and not content["trees"]
    assert main(["check", str(record)]) == 0
    assert f"and {parts} parts of boxes bounded in float64" in capsys.readouterr().out


@pytest.mark.parametrize("activation, least", [("Tanh", 0.05), ("Sigmoid", 0.33)])
def test_records_of_networks_without_relus_hold_where_bounds_have_proved_a_part(
    tmp_path, activation, least, capsys, one_thread
):
    """Of two disjuncts one is proved by the first bounds, the other by cuts of the box."""
    net, prop, path = (tmp_path / name for name in ("net.onnx", "prop.vnnlib", "proof.json"))
    save(stack([2, 8, 3], seed=3, activation=activation, dtype="float64"), net)
    prop.write_text(property_text(
        [-1.0, -1.0], [1.0, 1.0], 3, f"(or (and (<= Y_0 {least})) (and (<= Y_1 -100.0)))"
    ))
    assert main([
        "verify", "--onnx", str(net), "--vnnlib", str(prop), "--method", "IBP",
        "--attack-steps", "0", "--complete", "--record", str(path),
    ]) == 0
    content = json.loads(path.read_text())
    assert len(nodes(content)) > 2 and not content["trees"]
    assert nodes(content)[0][2] == [1]
    assert main(["check", str(path)]) == 0
    nodes(content)[0][2].clear()
    path.write_text(json.dumps(content))
    assert main(["check", str(path)]) == 2
    assert "has no tree for box 0, disjunct 1" in capsys.readouterr().err


def test_a_record_that_is_wrong_at_one_point_says_so(tmp_path, capsys, one_thread):
    """There is nothing to be cut in a box of one point."""
    net, prop, path = (tmp_path / name for name in ("net.onnx", "prop.vnnlib", "proof.json"))
    save(stack([2, 8, 3], activation="Tanh", dtype="float64"), net)
    prop.write_text(property_text([0.5, 0.5], [0.5, 0.5], 3, "(<= Y_0 -100.0)"))
    arguments = ["--vnnlib", str(prop), "--complete", "--record", str(path)]
    assert main(["verify", "--onnx", str(net), *arguments]) == 0
    assert main(["check", str(path)]) == 0
    content = json.loads(path.read_text())
    prop.write_text(prop.read_text().replace("-100.0", "100.0"))
    content["property"]["sha256"] = hashlib.sha256(prop.read_bytes()).hexdigest()
    path.write_text(json.dumps(content))
    assert main(["check", str(path)]) == 2
    assert "node 0 is not proved, its bound is -" in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    (_drop, "box 0: 1 parts of the box are in no leaf"),
    (_one_leaf, r"box 0, disjunct 0: the part of node 0 is not proved, its bound is -"),
    (_too_large, "is not proved, its bound is -|outside of its part"),
    (_gap, "outside of its part"),
    (_too_many, "is of no part of the box"),
    (_no_bound, "has no bound of goal 0"),
    (_no_tree, "has no tree for box 0, disjunct 0"),
    (_other_disjunct, r"box 0, disjuncts \[0, 7\], which the property lacks"),
    (_other_box, "tree of cuts for box 3"),
    (_twice, "two trees of cuts for one box"),
    (_both, "two trees for one box and disjunct"),
    (_damaged, "is damaged"),
    (_nan, "outside of its part"),
    (_other_input, "cuts input 9 of 2"),
])
def test_a_changed_record_is_refused_in_one_line(tmp_path, record, change, message, capsys):
    check_refused(tmp_path, record, change, message, capsys)


def test_what_a_tree_claims_covers_the_box_for_each_goal():
    tree = CutTree(0, (Cut(0, 0.5), Piece((0, 1)), Cut(1, 0.25, (1,)), Piece((0,)), Piece((0,))))
    found = [(c.node, c.low, c.high, c.goals) for c in claimed(tree, (0, 0), (1, 1), (0, 1))]
    assert found == [
        (1, (0, 0), (0.5, 1), (0, 1)), (2, (0.5, 0), (1, 1), (1,)),
        (3, (0.5, 0), (1, 0.25), (0,)), (4, (0.5, 0.25), (1, 1), (0,)),
    ]
    with pytest.raises(ValueError, match="no bound of goal 2"):
        list(claimed(tree, (0, 0), (1, 1), (0, 1, 2)))


def test_what_float32_finds_is_proved_in_float64(folder, tmp_path, session, capsys):
    """Though the box's ends are others: cuts are numbers that both types have."""
    save(stack([2, 8, 6, 3], seed=3), tmp_path / "net.onnx")
    path = str(tmp_path / "proof.json")
    assert main([
        "verify", "--onnx", str(tmp_path / "net.onnx"), "--vnnlib", str(folder / "holds.vnnlib"),
        "--method", "IBP", "--attack-steps", "0", "--complete", "--branching", "input",
        "--record", path,
    ]) == 0
    assert len(nodes(json.loads(Path(path).read_text()))) > 6
    capsys.readouterr()
    assert main(["check", path]) == 0
    assert "parts of boxes bounded in float64" in capsys.readouterr().out
