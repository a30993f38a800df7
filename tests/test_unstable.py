"""Rows of stable neurons, and columns that ReLUs cut off, are left out; the bounds stay the same.

`test_exactness` compares the same options with plain auto_LiRPA on its networks; here neurons are
stable where a test wants them to be: on one rank and not on the other, everywhere, nowhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import plain, plain_compute, relative_error
from ranks import pool
from torch import nn

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm, parallelize
from lirpa_megatron.backward import BackwardPass
from lirpa_megatron.operators.linear import LocalLinear
from lirpa_megatron.unstable import live_columns, unstable_rows

BATCH = 3
ALPHA = {"iteration": 3, "optimizer": "sgd"}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "every neuron": {"sparse_intermediate_bounds": False},
    "few rows at once": {"max_spec_rows": 2, "moves": "A"},
    "one row at once, weights move": {"max_spec_rows": 1, "moves": "weights"},
}
ON, OFF, CUT = 100.0, -100.0, 0.0
BIASES = {
    # Of the second layer inside a pair (16 neurons: 8 on each of two ranks, 4 on each of four).
    "one rank has all that are cut": [ON] * 4 + [OFF] * 8 + [CUT] * 4,
    "every second one": [ON, CUT] * 4 + [OFF, CUT] * 4,
    "none is cut": [ON, OFF] * 8,
    "all are cut off": [OFF] * 16,
    "one is left": [OFF] * 15 + [CUT],
    "more than nine tenths are cut": [CUT] * 15 + [OFF],
}


def network(biases: str) -> nn.Sequential:
    """6-16-8-16-3, in float64, the same in every process; some neurons between pairs are stable."""
    torch.manual_seed(3)
    layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in ((6, 16), (16, 8), (8, 16), (16, 3))]
    net = nn.Sequential(*(x for layer in layers for x in (layer, nn.ReLU())))[:-1].eval()
    with torch.no_grad():
        net[0].bias += torch.tensor([0.0, 0.0, OFF, ON] * 4)
        net[2].bias += torch.tensor([0.0, OFF, 0.0, 5 * ON] * 2)
        net[4].bias += torch.tensor(BIASES[biases])
    return net


def ball() -> BoundedTensor:
    x = torch.rand(BATCH, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=0.3))


def bounds_and_work(biases: str, method: str) -> dict[str, Any]:
    """Of each option: the bounds, rows of A that began a pass and numbers of A that came by."""
    results = {}
    torch.set_default_dtype(torch.float64)  # auto_LiRPA's alpha needs it
    for name, options in OPTIONS.items():
        options = {**options, "optimize_bound_args": ALPHA}
        bounded = BoundedModule(parallelize(network(biases)), ball().detach(), options)
        work = {"rows": 0, "numbers": 0}
        steps, enter = BackwardPass.steps, LocalLinear.bound_backward

        def counted_steps(self, C, *rest, work=work, steps=steps):
            work["rows"] += C.shape[0]
            return steps(self, C, *rest)

        def counted(self, lA, uA, *x, work=work, enter=enter, **kwargs):
            work["numbers"] += lA.numel() if isinstance(lA, torch.Tensor) else 0
            return enter(self, lA, uA, *x, **kwargs)

        BackwardPass.steps, LocalLinear.bound_backward = counted_steps, counted
        try:
            with torch.set_grad_enabled(method == "CROWN-Optimized"):
                lower, upper = bounded.compute_bounds(x=(ball(),), method=method)
        finally:
            BackwardPass.steps, LocalLinear.bound_backward = steps, enter
        results[name] = [lower.detach().numpy(), upper.detach().numpy()], work
    return results


@pytest.mark.parametrize("biases, size", [
    *((biases, 2) for biases in BIASES), ("one rank has all that are cut", 1),
    ("one rank has all that are cut", 4), ("one is left", 4),
])
def test_the_bounds_are_plain_auto_lirpas_wherever_the_stable_neurons_are(biases, size):
    by_rank = pool(size).run(bounds_and_work, biases, "CROWN")
    for name in OPTIONS:
        module = plain(network(biases), ball().detach(),
                       sparse_intermediate_bounds=name != "every neuron")
        want = [b.detach() for b in plain_compute(module, ball(), None, "CROWN")]
        for result in by_rank:
            got = [torch.from_numpy(b) for b in result[name][0]]
            assert relative_error(got, want, want[1] - want[0]) <= 1e-10, name
    for result in by_rank:
        less, all_of_it = result["default"][1], result["every neuron"][1]
        assert less["numbers"] < all_of_it["numbers"]
        saved = all_of_it["rows"] - less["rows"]
        assert saved > 0  # at least between the pairs, where half of the neurons are stable
        if biases in ("none is cut", "all are cut off"):
            assert saved > 16 // size  # all of the rank's inside the pair too
        assert by_rank[0]["default"][1]["rows"] == less["rows"]  # all ranks do the same


def test_alpha_has_all_rows_and_the_columns_that_are_left():
    by_rank = pool(2).run(bounds_and_work, "every second one", "CROWN-Optimized")
    for result in by_rank:
        want = [torch.from_numpy(b) for b in result["every neuron"][0]]
        for name in OPTIONS:
            got = [torch.from_numpy(b) for b in result[name][0]]
            assert relative_error(got, want, want[1] - want[0]) <= 1e-10, name
        assert result["default"][1]["rows"] == result["every neuron"][1]["rows"]
        assert result["default"][1]["numbers"] < result["every neuron"][1]["numbers"]


def gradients(sparse: bool) -> list:
    """Of the lower bounds' sum, for the rank's parameters."""
    model = parallelize(network("one rank has all that are cut")).train()
    bounded = BoundedModule(model, ball().detach(), {"sparse_intermediate_bounds": sparse})
    bounded.compute_bounds(x=(ball(),), method="CROWN")[0].sum().backward()
    return [p.grad.numpy() for p in model.parameters()]


def test_gradients_do_not_notice_what_is_left_out():
    for less, every in zip(*(pool(2).run(gradients, sparse) for sparse in (True, False)),
                           strict=True):
        assert any(abs(g).max() > 1e-3 for g in every)
        for a, b in zip(less, every, strict=True):
            assert abs(a - b).max() <= 1e-12 * max(abs(b).max(), 1e-3)


def test_nothing_is_known_of_neurons_whose_bounds_are_nan():
    lower = torch.tensor([[1.0, -1.0, float("nan"), -1.0, 0.0], [1.0, -1.0, 1.0, -2.0, 0.0]])
    upper = torch.tensor([[2.0, float("nan"), 3.0, -0.5, 0.0], [2.0, -0.1, 3.0, 1.0, 0.0]])
    bounded = BoundedModule(nn.Linear(2, 2), torch.zeros(1, 2))
    rows = unstable_rows(bounded.layout.collectives, (lower, upper), sharded=False)
    assert rows.own.tolist() == rows.filled.tolist() == [1, 2, 3]
    assert rows.share == 3 / 5
    assert live_columns(upper).tolist() == [0, 1, 2, 3]


def test_a_graph_that_reads_a_neuron_elsewhere_too_keeps_its_column():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
            with torch.no_grad():
                self.first.bias -= 100 * (torch.arange(8) % 2)

        def forward(self, x):
            h = self.first(x)
            return self.last(torch.relu(h) + 0.01 * h)

    model = Skip().double().eval()
    x = torch.rand(5, 4, dtype=torch.float64)
    given = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=0.1))
    got = [BoundedModule(model, x, {"sparse_intermediate_bounds": sparse}).compute_bounds(
        x=(given,), method="CROWN") for sparse in (True, False)]
    assert all(torch.equal(a, b) for a, b in zip(*got, strict=True))
