"""A small network and properties that are decided by branch and bound alone."""

import json
import re

import numpy as np
import torch
from exact_minima import minimum
from models import Net, build, region, specification
from onnx import numpy_helper
from small_networks import property_text, save, stack

from lirpa_megatron import BoundedModule, parallelize
from lirpa_megatron.cli.commands import main
from lirpa_megatron.complete import SearchOptions, branch_and_bound
from lirpa_megatron.parallel.replicas import ALONE, Replicas

NET = Net(inputs=4, hidden=(8, 8), width=6, outputs=3)
ROWS = 2

LOW, HIGH = [-0.9, -0.8], [0.8, 0.9]


def write_complete(folder):
    """A network of two inputs, and properties whose thresholds lie close to the true minimum of its
    first output, or of the larger one of two."""
    proto = stack([2, 8, 6, 3], seed=3, dtype="float64")
    save(proto, folder / "net.onnx")
    values = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    layers = [(values[f"w{i}"], values[f"b{i}"]) for i in range(3)]
    (least,) = minimum(layers, np.array(LOW), np.array(HIGH), np.eye(3)[:1])
    formulas = {
        "holds": f"(<= Y_0 {least - 0.01:.9f})",
        "fails": f"(<= Y_0 {least + 0.01:.9f})",
        "both": f"(and (<= Y_0 {least - 0.01:.9f}) (<= Y_1 100.0))",
    }
    for name, formula in formulas.items():
        (folder / f"{name}.vnnlib").write_text(property_text(LOW, HIGH, 3, formula))
    (folder / "instances.csv").write_text("".join(f"net.onnx,{n}.vnnlib,60\n" for n in formulas))
    save(stack([2, 8, 3], activation="Tanh"), folder / "tanh.onnx")
    return folder


def branched(branching, offset, net=NET, shared=False, **options):
    """What branch and bound finds out of a small network in two boxes, with a goal for each row,
    whose thresholds lie below CROWN's bounds by `offset` of the gap to a sampled minimum.

    Args:
        branching: what is split.
        offset: above 1: the goals do not hold.
        net: the network's sizes.
        shared: whether all replicas share the work.
        options: of the search; all have few steps, each of which takes the ranks collectives.
    """
    torch.set_default_dtype(torch.float64)
    where = region(net, eps=0.9, batch=2)
    model = parallelize(build(net).requires_grad_(False).eval())
    C = specification(2, ROWS, net.outputs)
    graph = BoundedModule(model, where.center)
    lower, _ = graph.compute_bounds(x=(where.bounded(),), C=C, method="CROWN")
    torch.manual_seed(0)
    points = where.random(2000)
    with torch.no_grad():
        y = model(points.flatten(0, 1)).view(2000, 2, -1)
    least = torch.einsum("pbo,bso->pbs", y, C).amin(0)
    few = {
        "keep_tree": True, "batch": 8, "tried": 4, "iterations": 6, "first_iterations": 10,
        "refinement_iterations": 4, "refinement_domains": 4, "box_batch": 16,
    }
    return branch_and_bound(
        graph, where.bounded(), C, lower + offset * (least - lower),
        options=SearchOptions(branching=branching, **few | options),
        replicas=Replicas.of_megatron() if shared else ALONE,
    )


def check_refused(folder, record, change, message, capsys):
    """`check` refuses a record after a change, in one line."""
    content = json.loads(record.read_text())
    change(content)
    (folder / "changed.json").write_text(json.dumps(content))
    assert main(["check", str(folder / "changed.json")]) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(message, said) and len(said.splitlines()) == 1, said
