"""Records of proved properties: `check` accepts them, and refuses every one that was changed."""

import json
import math
import re
from pathlib import Path

import pytest
from commands import on_ranks
from complete_cases import HIGH, LOW, write_complete
from small_networks import property_text, save, stack

from lirpa_megatron.cli.commands import main
from lirpa_megatron.complete.tree import tree_of

pytestmark = pytest.mark.usefixtures("unchanged_environment")


def arguments_for(folder, path):
    return [
        "verify", "--onnx", str(folder / "net.onnx"), "--vnnlib", str(folder / "holds.vnnlib"),
        "--method", "IBP", "--attack-steps", "0", "--complete", "--record", str(path),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_complete(tmp_path_factory.mktemp("complete"))


@pytest.fixture(scope="module")
def record(folder, tmp_path_factory, session):
    path = tmp_path_factory.mktemp("record") / "proof.json"
    assert main(arguments_for(folder, path)) == 0
    return path


def check(tmp_path, record, change, capsys, *more):
    """Status and message of `check` for a changed record."""
    content = json.loads(record.read_text())
    change(content)
    (tmp_path / "changed.json").write_text(json.dumps(content))
    status = main(["check", str(tmp_path / "changed.json"), *more])
    captured = capsys.readouterr()
    return status, (captured.out + captured.err).strip()


def leaves(content):
    (tree,) = content["trees"]
    return tree["leaves"]


def test_a_record_is_proved_again_leaf_by_leaf(tmp_path, record, capsys):
    content = json.loads(record.read_text())
    count = len(leaves(content))
    assert count > 3 and content["inner"]  # else nothing was split
    status, message = check(tmp_path, record, lambda content: None, capsys)
    assert status == 0 and f"holds: holds of net, {count} leaves of 1 trees" in message


@pytest.mark.slow
def test_a_record_of_two_ranks_is_one_of_the_same_tree(folder, tmp_path, record, capsys):
    on_ranks(2, *arguments_for(folder, tmp_path / "two.json"))
    one, two = (json.loads(p.read_text()) for p in (record, tmp_path / "two.json"))
    assert two["tensor_parallel"] == 2 and two["network"] == one["network"]
    paths = [[leaf["splits"] for leaf in leaves(content)] for content in (one, two)]
    assert paths[0] == paths[1]
    assert main(["check", str(tmp_path / "two.json")]) == 0


def _drop(content):
    leaves(content).pop(1)


def _flip(content):
    leaves(content)[0]["splits"][-1][1] *= -1


def _other_point(content):
    leaves(content)[0]["splits"][-1][2] += 0.5


def _moved_relu(content):
    for leaf in leaves(content):
        leaf["splits"][0][2] = 0.5


def _no_point(content):
    leaves(content)[0]["splits"][-1].pop()


def _other_neuron(content):
    leaves(content)[0]["splits"][-1][0] += 1


def _cut_off(content):
    content["trees"][0]["leaves"] = [{"splits": [], "bound": 1.0}]


def _no_proof(content):
    leaves(content)[0]["bound"] = -0.5


def _no_tree(content):
    content["trees"] = []


def _weights(content):
    content["network"]["sha256"] = "0" * 64


def _inner_bound(content):
    content["inner"][0]["bound"] += 1.0


def _inner_leaf(content):
    max(content["inner"], key=lambda claim: len(claim["leaves"]))["leaves"].pop()


def _inner_neuron(content):
    content["inner"][0]["neuron"] = 99


def _inner_sign(content):
    content["inner"][0]["sign"] = 0


def _first_layer(content):
    content["inner"].append(content["inner"][0] | {"neuron": 13, "bound": 50.0, "leaves": [[]]})


def _other_box(content):
    content["inner"].append(content["inner"][0] | {"box": 7, "bound": 50.0})


def _other_tree(content):
    content["trees"].append({"box": 0, "disjunct": 9, "leaves": []})


def _two_trees(content):
    content["trees"] *= 2


def _huge(content):
    leaves(content)[0]["bound"] = 10**400


def _text(content):
    leaves(content)[0]["bound"] = "1"


def _nan(content):
    content["inner"][0]["bound"] = float("nan")


def _folder(content):
    content["property"]["file"] = str(Path(content["property"]["file"]).parent)


def _damaged(content):
    del leaves(content)[0]["splits"]


@pytest.mark.parametrize("change, message", [
    (_drop, "no leaf covers the domain"),
    (_flip, "overlap|no leaf covers"),
    (_other_neuron, "neurons at once"),
    (_other_point, "split at 2 points of neuron"),
    (_moved_relu, "is a ReLU's, which is split at 0, not at 0.5"),
    (_no_point, "is damaged"),
    (_cut_off, "is not proved, its bound is -"),
    (_no_proof, "proves nothing"),
    (_no_tree, "has no tree for box 0, disjunct 0"),
    (_weights, "of another network"),
    (_inner_bound, r"box 0, neuron \d+: leaf 0 is not proved, its bound is"),
    (_inner_leaf, r"box 0, neuron \d+: no leaf covers the domain"),
    (_inner_neuron, "box 0, neuron 99: the network has 14 neurons"),
    (_inner_sign, "is damaged"),
    (_first_layer, "neuron 13 is in a first layer"),
    (_other_box, "a bound of neuron .* in box 7, which the property lacks"),
    (_other_tree, "a tree for box 0, disjunct 9, which the property lacks"),
    (_two_trees, "two trees for one box"),
    (_text, "is damaged"),
    (_nan, "is not proved, its bound is nan"),
    (_folder, "cannot be read"),
    (_damaged, "is damaged"),
])
def test_a_changed_record_is_refused_in_one_line(tmp_path, record, change, message, capsys):
    status, said = check(tmp_path, record, change, capsys)
    assert status == 2 and re.search(message, said) and len(said.splitlines()) == 1, said


def test_a_deep_file_is_no_record(tmp_path, capsys):
    """Nested deeper than any record is: it is not handed to Python's parser."""
    (tmp_path / "deep.json").write_text("[" * 1_000)
    assert main(["check", str(tmp_path / "deep.json")]) == 2
    assert "is not a JSON file" in capsys.readouterr().err


def test_a_bound_may_have_many_digits(tmp_path, record, capsys):
    """It is only said: the check finds its own."""
    status, said = check(tmp_path, record, _huge, capsys)
    assert status == 0 and "holds" in said


@pytest.mark.parametrize("version", [2, 3])
def test_records_from_before_boxes_were_cut_and_splits_had_points_are_read(
    tmp_path, record, capsys, version
):
    def older(content):
        content["version"] = version
        if version == 2:
            assert content.pop("cuts") == []
        claims = [leaf for claim in content["inner"] for leaf in claim["leaves"]]
        for splits in [leaf["splits"] for leaf in leaves(content)] + claims:
            for split in splits:
                assert split.pop() == 0.0

    assert check(tmp_path, record, older, capsys)[0] == 0
    status, said = check(tmp_path, record, lambda content: content.update(version=5), capsys)
    assert status == 2 and "has version 5; this program reads 4" in said


def test_a_record_of_another_network_or_property_is_refused(
    folder, tmp_path, record, capsys
):
    save(stack([2, 8, 6, 3], seed=4, dtype="float64"), tmp_path / "other.onnx")
    status, said = check(
        tmp_path, record, lambda content: None, capsys, "--onnx", str(tmp_path / "other.onnx")
    )
    assert status == 2 and "of another network" in said and len(said.splitlines()) == 1
    text = property_text(LOW, HIGH, 3, "(<= Y_0 -9.0)")
    (tmp_path / "other.vnnlib").write_text(text)
    status, said = check(
        tmp_path, record, lambda content: None, capsys, "--vnnlib", str(tmp_path / "other.vnnlib")
    )
    assert status == 2 and "of another property" in said and len(said.splitlines()) == 1


def test_a_record_is_of_one_property(folder, capsys, session):
    arguments = ["verify", "--instances", str(folder / "instances.csv"), "--record", "r.json"]
    assert main([*arguments, "--complete"]) == 2
    assert "--record writes the proof of one property" in capsys.readouterr().err


def test_leaves_are_a_tree_or_are_refused():
    on, off = (3, 1, 0.0), (3, -1, 0.0)
    tree = tree_of([(on,), (off, (0, 1, 0.0)), (off, (0, -1, 0.0))], 4)
    assert (tree.neuron, tree.on.leaf, tree.off.neuron, tree.off.off.leaf) == (3, 0, 0, 2)
    for leaves_, said in (
        ([(on,)], "no leaf covers"),
        ([], "no leaf covers"),
        ([((4, 1, 0.0),), ((4, -1, 0.0),)], "cannot be split at neuron 4"),
        ([((1, 2, 0.0),), ((1, -1, 0.0),)], "neither 1 nor -1"),
        ([(on, on), (on, off), (off,)], "cannot be split at neuron 3"),
        ([(on,), ((3, -1, 0.5),)], "split at 2 points of neuron 3"),
        ([((3, 1, math.inf),), ((3, -1, math.inf),)], "cannot be split at the point inf"),
    ):
        with pytest.raises(ValueError, match=said):
            tree_of(leaves_, 4)
    with pytest.raises(ValueError, match="5000 splits of one leaf are more than 400"):
        tree_of([tuple((i, 1, 0.0) for i in range(5000))], 5000)
