"""Branch and bound of networks with attention, norms and products: bounds, verdicts, records."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from attention_networks import box_of, boxed, imported, network_of, points_of
from complete_cases import check_refused
from ranks import pool
from small_networks import property_text

from lirpa_megatron import BoundedModule
from lirpa_megatron.cli.commands import main
from lirpa_megatron.complete import SearchOptions, branch_and_bound
from lirpa_megatron.complete.bounding import Bounder
from lirpa_megatron.complete.domain_pass import passes
from lirpa_megatron.complete.inner_values import _value
from lirpa_megatron.complete.problem import Problem
from lirpa_megatron.complete.roots import bound_roots
from lirpa_megatron.verify.properties.record_files import text_hash

pytestmark = pytest.mark.usefixtures("unchanged_environment")


def problem_of(low, high, rows, boxes=1):
    """Two goals of one row in each of some boxes, the later ones smaller; none of them holds."""
    shrunk = [(low + k * (high - low) / 8, high) for k in range(boxes)]
    C = rows[:, None].repeat(boxes, 1, 1)
    ends = torch.full((2 * boxes, 1), 100.0, dtype=torch.float64)
    of = tuple(k for k in range(boxes) for _ in range(2))
    return Problem(*(torch.stack(side) for side in zip(*shrunk, strict=True)), of, C, ends)


def neurons_at(graph, roots, x):
    """Pre-activations of this rank's neurons at points: [P, N]."""
    (leaf,) = roots.plan.leaves
    found = []
    for r in roots.operators:
        z = _value(graph, graph[r.name].inputs[0], {leaf.name: x})
        columns = roots.active_columns.get(graph[r.name].inputs[0].name)
        z = z if columns is None else z.index_select(-1, columns)
        found.append(z.flatten(1))
    return torch.cat(found, 1)


def shaken(batch, seed):
    """With random multipliers."""
    g = torch.Generator().manual_seed(seed)

    def random(t):
        return torch.rand(t.shape, generator=g).to(t)

    return replace(
        batch, alpha=random(batch.alpha), free=random(batch.free),
        beta=random(batch.beta), gamma=random(batch.gamma) - 0.5,
    )


@pytest.mark.parametrize("seed, dtype", [
    (0, torch.float64), (1, torch.float32), (5, torch.float64), *(
        pytest.param(seed, dtype, marks=pytest.mark.slow)
        for seed in range(2, 5) for dtype in (torch.float64, torch.float32))
])
def test_bounds_of_a_domain_hold_in_it_with_any_multipliers(seed, dtype, tmp_path, one_thread):
    """Also of domains of several boxes, in any order."""
    model, net, low, high, rows = network_of(seed, tmp_path, dtype)
    problem = problem_of(low, high, rows, boxes=1 + seed % 3)
    graph = BoundedModule(net, low[None])
    roots = bound_roots(graph, problem)
    assert roots.planes and roots.free
    x = points_of(low, high, 4000)
    z, y = neurons_at(graph, roots, x), model(x.double()) @ rows.double().t()
    bounder = Bounder(graph, problem, roots, SearchOptions())
    goals = [g for g in range(len(problem))][::-1]
    box = torch.tensor([problem.boxes[g] for g in goals])
    inside = ((x >= problem.low[box][:, None]) & (x <= problem.high[box][:, None])).all(2)
    noise, checked = 1e-9 if dtype is torch.float64 else 1e-3, 0
    with passes(graph, roots.active_columns):
        batch = bounder.whole(goals)
        for depth in range(3):
            for each in (batch, shaken(batch, 10 * seed + depth)):
                margins = bounder.quickly(each)[0]
                for d, goal in enumerate(goals):
                    if inside[d].any():
                        checked += 1
                        assert margins[d] <= y[inside[d], goal % 2].amin() - 100 + noise
            loss = (roots.upper - roots.lower)[box].clone()
            at = (loss + torch.rand(loss.shape, generator=torch.Generator().manual_seed(depth))
                  * loss.mean()).argmax(1)
            number = roots.number_of[at]
            curve = roots.of_curve[number]
            middle = torch.where(curve, (roots.lower + roots.upper)[box, at] / 2, 0.0)
            middle, sign = middle.float().double(), torch.tensor([1, -1]).repeat(len(goals))
            sign = sign[: len(goals)]
            batch = bounder.narrowed(batch.split(roots, number, sign, middle, bounder.units))
            inside &= (z[:, at].t() - middle[:, None]) * sign[:, None] >= 0
            batch = bounder.ascend(batch, 2).batch
    assert checked >= 6


# ---------------------------------------------------------------------------------- verdicts

SPLIT, SHARE = 2, 0.15
"""A network of which a row is proved by splits alone, a share of the way from CROWN-Optimized's
bound to the sampled minimum."""
FEW = {"keep_tree": True, "first_iterations": 20, "iterations": 8, "refinement_iterations": 4}


def aim(model, graph, low, high, row):
    """(CROWN-Optimized's bound, the sampled minimum) of a row in a box."""
    bound, _ = graph.compute_bounds(
        x=(boxed(low[None], high[None]),), C=row[None, None], method="CROWN-Optimized",
        bound_upper=False,
    )
    return float(bound.detach()), float((model(points_of(low, high, 5000)) @ row).amin())


def searched(path, threshold, **options):
    """Of one rank: what is found out of the first row of the network in a file."""
    torch.set_num_threads(1)
    low, high, rows = box_of(SPLIT, 2)
    found = branch_and_bound(
        imported(path), boxed(low[None], high[None]), rows[None, :1], threshold,
        options=SearchOptions(branching="nonlinear", **FEW | options),
    )
    leaves = [(leaf.goal, leaf.splits) for leaf in found.leaves]
    point = None if found.point is None else found.point.tolist()
    return found.status, found.margins, found.domains, leaves, point


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """(file, a threshold that splits prove, one that does not hold)."""
    folder = tmp_path_factory.mktemp("attention")
    model, net, low, high, rows = network_of(SPLIT, folder)
    graph = BoundedModule(net, low[None])
    bound, least = aim(model, graph, low, high, rows[0])
    return folder / f"{SPLIT}.onnx", bound + SHARE * (least - bound), least + 1e-3


def test_splits_prove_what_bounds_do_not_alike_on_two_ranks(split, one_thread):
    path, holds, fails = split
    want = searched(path, holds)
    assert want[0] == "proved" and len(want[3]) > 1
    wrong = searched(path, fails)
    assert wrong[0] == "refuted"
    for threshold, one in ((holds, want), (fails, wrong)):
        for got in pool(2).run(searched, path, threshold):
            assert (got[0], *got[2:4]) == (one[0], *one[2:4])
            # sums over ranks in another order, at bounds of size 1
            assert got[1] == pytest.approx(one[1], abs=1e-9)
            assert got[4] is None or got[4] == pytest.approx(one[4], abs=1e-9)


# ----------------------------------------------------------------------------------- records


def written(path, threshold):
    """The property that the first row of the network is above a threshold."""
    low, high, rows = box_of(SPLIT, 2)
    terms = " ".join(f"(* {c!r} Y_{j})" for j, c in enumerate(rows[0].tolist()))
    path.write_text(property_text(
        low.tolist(), high.tolist(), 3, f"(<= (+ {terms}) {threshold!r})"
    ))
    return path


@pytest.fixture(scope="module")
def record(split, tmp_path_factory, session):
    """Of a property that splits prove."""
    folder = tmp_path_factory.mktemp("record")
    prop, path = written(folder / "prop.vnnlib", split[1]), folder / "proof.json"
    assert main([
        "verify", "--onnx", str(split[0]), "--vnnlib", str(prop), "--method", "IBP",
        "--attack-steps", "0", "--complete", "--branching", "nonlinear", "--record", str(path),
    ]) == 0
    return path


def test_a_record_is_proved_again_leaf_by_leaf(record, capsys):
    (tree,) = json.loads(record.read_text())["trees"]
    assert len(tree["leaves"]) > 1
    assert main(["check", str(record)]) == 0
    assert f"{len(tree['leaves'])} leaves of 1 tree" in capsys.readouterr().out


def test_records_of_what_is_not_proved_are_refused(split, record, tmp_path, capsys):
    def dropped(content):
        content["trees"][0]["leaves"].pop()

    def another(content):  # of a property that does not hold
        prop = written(tmp_path / "false.vnnlib", split[2])
        content["property"] |= {"file": str(prop), "sha256": text_hash(prop)}

    check_refused(tmp_path, record, dropped, "no leaf covers the domain", capsys)
    check_refused(tmp_path, record, another, "is not proved, its bound is -", capsys)
