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
from lirpa_megatron.crown.backward_pass import BackwardPass
from lirpa_megatron.crown.relu_sparsity import live_columns, unstable_rows
from lirpa_megatron.operators.linear.local import LocalLinear

BATCH = 3
ALPHA = {"iteration": 3, "optimizer": "sgd"}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "every neuron": {"sparse_intermediate_bounds": False},
    "few rows at once": {"max_spec_rows": 2, "moves": "A"},
    "one row at once, weights move": {"max_spec_rows": 1, "moves": "weights"},
}
ON, OFF, CUT = 4.0, -4.0, 0.0
"""What a neuron's input is in the middle of the balls, of radius 0.1 to 1."""
BIASES = {
    # Of the third layer, inside a pair (16 neurons: 8 on each of two ranks, 4 on each of four).
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
    wanted = [CUT, CUT, OFF, ON] * 4, [CUT, OFF, CUT, ON] * 2, BIASES[biases]
    h = ball().detach().mean(0)
    with torch.no_grad():
        for layer, values in zip(layers, wanted, strict=False):
            layer.bias += torch.tensor(values, dtype=torch.float64) - layer(h)
            h = torch.relu(layer(h))
    return net


def ball() -> BoundedTensor:
    x = torch.rand(BATCH, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=0.3))


def bounds_and_work(biases: str, method: str) -> dict[str, Any]:
    """Of each option: the bounds, rows of A that began a pass, numbers of A that came by, and
    numbers of alpha.
    """
    results = {}
    torch.set_default_dtype(torch.float64)  # auto_LiRPA's alpha needs it
    names = OPTIONS if method == "CROWN" else ("default", "every neuron", "few rows at once")
    for name in names:
        options = {**OPTIONS[name], "optimize_bound_args": ALPHA}
        bounded = BoundedModule(parallelize(network(biases)), ball().detach(), options)
        work = {"rows": 0, "numbers": 0}
        steps, enter = BackwardPass.steps, LocalLinear.bound_backward

        def counted_steps(self, C, *rest, work=work, steps=steps):
            work["rows"] += C.either.shape[0]
            return steps(self, C, *rest)

        def counted(self, A, visit, work=work, enter=enter):
            work["numbers"] += A.lower.numel() if isinstance(A.lower, torch.Tensor) else 0
            return enter(self, A, visit)

        BackwardPass.steps, LocalLinear.bound_backward = counted_steps, counted
        try:
            with torch.set_grad_enabled(method == "CROWN-Optimized"):
                lower, upper = bounded.compute_bounds(x=(ball(),), method=method)
        finally:
            BackwardPass.steps, LocalLinear.bound_backward = steps, enter
        work["alpha"] = sum(
            alpha.numel() for node in bounded.optimizable_activations
            for alpha in node.alpha.values()
        ) if method == "CROWN-Optimized" else 0
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
            assert relative_error(got, want, _width(want)) <= 1e-10, name
    for result in by_rank:
        less, all_of_it = result["default"][1], result["every neuron"][1]
        assert less["numbers"] < all_of_it["numbers"]
        saved = all_of_it["rows"] - less["rows"]
        assert saved > 0  # at least between the pairs, where half of the neurons are stable
        if biases in ("none is cut", "all are cut off"):
            assert saved > 16 // size  # all of the rank's inside the pair too
        assert by_rank[0]["default"][1]["rows"] == less["rows"]  # all ranks do the same


@pytest.mark.parametrize("biases, size", [
    ("every second one", 2), ("all are cut off", 2),
    pytest.param("one rank has all that are cut", 4, marks=pytest.mark.slow),
])
def test_alpha_has_the_rows_that_crown_leaves_unstable(biases, size):
    """The others' lines are the same whatever their alpha while they are stable, as they stay on
    this network, so bounds are those of all rows (where they do not stay: `test_exactness`).
    """
    for result in pool(size).run(bounds_and_work, biases, "CROWN-Optimized"):
        want = [torch.from_numpy(b) for b in result["every neuron"][0]]
        for name in result:
            got = [torch.from_numpy(b) for b in result[name][0]]
            assert relative_error(got, want, _width(want)) <= 1e-10, name
        for what in ("rows", "numbers", "alpha"):
            assert result["default"][1][what] < result["every neuron"][1][what], what


def _width(bounds: list[torch.Tensor]) -> torch.Tensor:
    """Of bounds; where a network is cut off altogether there is none to compare with."""
    return (bounds[1] - bounds[0]).clamp_min(1e-3)


ELSEWHERE = {
    "the same": (0.0, 0.3), "inside": (0.0, 0.2), "wider": (0.0, 0.5), "beside": (0.2, 0.3),
}
"""How far the middle is moved, and the radius there."""


def elsewhere(where: str) -> BoundedTensor:
    move, eps = ELSEWHERE[where]
    return BoundedTensor(ball().detach() + move, PerturbationLpNorm(norm=float("inf"), eps=eps))


def reused_alpha(biases: str) -> dict[str, list]:
    """Bounds with alpha of one ball for others; then again with A of a layer inside."""
    torch.set_default_dtype(torch.float64)
    bounded = BoundedModule(parallelize(network(biases)), ball().detach(),
                            {"optimize_bound_args": ALPHA})
    bounded.compute_bounds(x=(ball(),), method="CROWN-Optimized")
    inside = {node.inputs[0].name: {bounded.input_name[0]} for node in bounded.relus}
    results = {}
    with torch.no_grad():
        for where in ELSEWHERE:
            found = bounded.compute_bounds(
                x=(elsewhere(where),), method="CROWN", reuse_alpha=True)
            results[where] = [b.numpy() for b in found]
            with_A = bounded.compute_bounds(
                x=(elsewhere(where),), method="CROWN", reuse_alpha=True, return_A=True,
                needed_A_dict=inside)
            results[where + ", with A"] = [b.numpy() for b in with_A[:2]]
    return results


def plainly_reused_alpha(biases: str) -> dict[str, list]:
    """The same of plain auto_LiRPA, which has alpha for all rows."""
    torch.set_default_dtype(torch.float64)
    module = plain(network(biases), ball().detach(), sparse_intermediate_bounds=False,
                   optimize_bound_args=ALPHA)
    plain_compute(module, ball(), None, "CROWN-Optimized")
    with torch.no_grad():
        return {where: [b.numpy() for b in plain_compute(
            module, elsewhere(where), None, "CROWN", reuse_alpha=True)] for where in ELSEWHERE}


def test_alpha_can_be_used_again():
    """It is that of some rows; for other inputs other neurons are unstable, which go without."""
    biases = "every second one"
    one, two = (pool(size).run(reused_alpha, biases)[0] for size in (1, 2))
    every = pool(1).run(plainly_reused_alpha, biases)[0]
    net = network(biases)
    for where, (move, eps) in ELSEWHERE.items():
        want = [torch.from_numpy(b) for b in every[where]]
        width = want[1] - want[0]
        got, with_A = (
            [torch.from_numpy(b) for b in one[name]] for name in (where, where + ", with A")
        )
        for name, bounds in ((where, got), (where + ", with A", with_A)):
            again = [torch.from_numpy(b) for b in two[name]]
            assert relative_error(again, bounds, width) <= 1e-10, name
        if where == "the same":
            assert relative_error(got, want, width) <= 1e-10
        else:  # others have alpha there that was made for another ball: better or worse than none
            assert 0.9 < ((got[1] - got[0]).mean() / width.mean()) < 1.001, where
        generator = torch.Generator().manual_seed(5)
        for i in range(50):
            draw = torch.rand(ball().shape, generator=generator, dtype=torch.float64) * 2 - 1
            y = net(ball().detach() + move + eps * (draw.sign() if i % 2 else draw)).detach()
            for lower, upper in (got, with_A):
                assert (lower <= y).all() and (y <= upper).all()


def test_what_ended_in_an_error_leaves_no_alpha_behind(monkeypatch):
    bounded = BoundedModule(network("every second one"), ball().detach(),
                            {"optimize_bound_args": ALPHA})
    before = bounded.compute_bounds(x=(ball(),), method="CROWN")
    steps, calls = BackwardPass.steps, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 7:  # 3 passes before alpha is used, 3 in each iteration
            assert {node.opt_stage for node in bounded.relus} == {"opt"}
            raise MemoryError("enough")
        return steps(self, *args)

    monkeypatch.setattr(BackwardPass, "steps", failing)
    with pytest.raises(MemoryError, match="enough"):
        bounded.compute_bounds(x=(ball(),), method="CROWN-Optimized")
    monkeypatch.setattr(BackwardPass, "steps", steps)
    after = bounded.compute_bounds(x=(ball(),), method="CROWN")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


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
    rows = unstable_rows(bounded.context.collectives, (lower, upper), sharded=False)
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
