"""The relaxation of ReLUs with splits: lines that hold in the domain, right gradients."""

from __future__ import annotations

import pytest
import scipy.optimize
import torch
from torch import nn

from lirpa_megatron import BoundedModule
from lirpa_megatron.complete.bounding import Bounder
from lirpa_megatron.complete.domain_pass import passes
from lirpa_megatron.complete.linear_leaves import solve_game
from lirpa_megatron.complete.problem import Domain, Problem, SearchOptions
from lirpa_megatron.complete.roots import bound_roots
from lirpa_megatron.complete.split_relu import LeastOverBox, Lines, SplitRelu
from lirpa_megatron.operators.coefficients import LowerUpper

R, D, n = 2, 4, 7


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relaxed(seed=0):
    """Bounds with stable, unstable, zero-width and split neurons; A, alpha and beta."""
    ends = torch.stack([drawn(D, n, seed=seed), drawn(D, n, seed=seed + 1)])
    lower, upper = ends.amin(0), ends.amax(0)
    upper[0, 0] = lower[0, 0]
    lower[1, 1], upper[1, 1] = 0, 0
    unstable = (lower < 0) & (upper > 0)
    signs = torch.where(unstable, drawn(D, n, seed=seed + 2).sign(), 0.0)
    signs[:, n // 2 :] = 0
    alpha = drawn(R, D, n, seed=seed + 3).sigmoid()
    beta = drawn(R, D, n, seed=seed + 4).abs() * (signs != 0)
    return lower, upper, signs, alpha, beta, drawn(R, D, n, seed=seed + 5)


@pytest.mark.parametrize("seed", range(0, 60, 6))
def test_both_sides_hold_wherever_the_splits_do(seed):
    lower, upper, signs, alpha, beta, A = relaxed(seed)
    split = SplitRelu(Lines.of(lower, upper, signs), alpha, signs * beta)
    found = split.bound_backward(LowerUpper(A, A))
    low = torch.where(signs > 0, lower.clamp(min=0), lower)
    high = torch.where(signs < 0, upper.clamp(max=0), upper)
    share = torch.rand(500, D, n, generator=torch.Generator().manual_seed(seed)).double()
    share[:100] = share[:100].round()
    z = low + share * (high - low)
    y = torch.einsum("rdn,pdn->prd", A, z.relu())
    below = torch.einsum("rdn,pdn->prd", found.A[0].lower, z) + found.bias.lower
    above = torch.einsum("rdn,pdn->prd", found.A[0].upper, z) + found.bias.upper
    # 1e-12: sums of seven products in float64
    assert (below <= y + 1e-12).all() and (above >= y - 1e-12).all()
    assert (y - below).amin() < 0.1  # lines that are far below everywhere would hold, too


def test_gradients_are_those_of_finite_differences():
    lower, upper, signs, alpha, beta, A = relaxed(7)
    lines = Lines.of(lower, upper, signs)
    low, high = drawn(D, n, seed=20) - 2, drawn(D, n, seed=21) + 2

    def bound(A, alpha, beta):
        found = SplitRelu(lines, alpha, signs * beta).bound_backward(LowerUpper(A, None))
        least, *_ = LeastOverBox.apply(found.A[0].lower, low, high)
        return least + found.bias.lower

    given = [t.requires_grad_(True) for t in (A, alpha, beta)]
    assert torch.autograd.gradcheck(bound, given, eps=1e-7, atol=1e-6)


@pytest.fixture(scope="module")
def network():
    """A network of two inputs, and a box in which neurons of each layer are unstable."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
    ).double().requires_grad_(False)
    low, high = -torch.ones(1, 2).double(), torch.ones(1, 2).double()
    C = drawn(2, 1, 2, seed=3)
    problem = Problem(low, high, (0, 0), C, torch.full((2, 1), 100.0).double())
    graph = BoundedModule(model, low)
    return model, graph, problem, bound_roots(graph, problem)


def _pre_activations(model, x):
    """[P, neurons], by their numbers: from the last ReLU to the first."""
    first = model[0](x)
    return torch.cat([model[2](first.relu()), first], 1)


def test_bounds_of_a_domain_hold_in_it_and_grow_with_each_split(network, one_thread):
    model, graph, problem, roots = network
    unstable = ((roots.lower < 0) & (roots.upper > 0))[0]
    numbers = roots.number_of[unstable]
    first = numbers[numbers >= 5]  # of the first layer: no other line depends on its neurons'
    assert len(first) >= 2
    numbers = torch.cat([first[:2], numbers[:1]])
    x = torch.rand(20000, 2, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    z, y = _pre_activations(model, x), model(x)
    options = SearchOptions()
    bounder = Bounder(graph, problem, roots, options)
    with passes(graph, roots.active_columns):
        found = bounder.ascend(bounder.whole([0, 1]), 40)
        parents = found.batch
        before, A, _ = bounder.quickly(parents)
        checked = 0
        inside = torch.ones(2, len(x), dtype=torch.bool)
        for depth in range(3):
            number = numbers[depth].repeat(2)
            signs = torch.tensor([1, -1]) if depth % 2 else torch.tensor([-1, 1])
            batch = parents.split(roots, number, signs, torch.zeros(2), bounder.units, A)
            # Where the ascent begins: the parent's bound at least; rounding as below.
            begin = bounder.quickly(batch)[0]
            assert depth == 2 or (begin >= before - 1e-9).all()
            found = bounder.ascend(batch, 40)
            assert (found.margins >= begin - 1e-9).all()
            inside &= z[:, numbers[depth]] * signs[:, None] >= 0
            for d in range(2):
                true = (y @ problem.C[d, 0])[inside[d]] - 100.0
                if len(true):
                    checked += 1
                    assert found.margins[d] <= true.amin() + 1e-9  # rounding of sums of size 100
            parents = found.batch
            before, A, _ = bounder.quickly(parents)
    assert checked >= 4


def test_beta_proves_what_no_bound_without_it_does(network, one_thread):
    """Where splits contradict each other, the bound exceeds what c . y is anywhere in the box."""
    model, graph, problem, roots = network
    x = torch.rand(200000, 2, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    z = _pre_activations(model, x) >= 0
    unstable = ((roots.lower < 0) & (roots.upper > 0))[0]
    numbers = roots.number_of[unstable].tolist()
    pairs = [
        ((a, s, 0.0), (b, t, 0.0))
        for a in numbers for b in numbers for s in (1, -1) for t in (1, -1)
        if a < b and not ((z[:, a] == (s > 0)) & (z[:, b] == (t > 0))).any()
    ]
    assert pairs
    largest = (model(x) @ problem.C[0, 0]).amax()
    easy = Problem(problem.low, problem.high, (0, 0), problem.C, largest.expand(2, 1))
    empty = problem.C.new_zeros(1, 0)
    bounder = Bounder(graph, easy, roots, SearchOptions())
    domains = []
    for pair in pairs:
        alpha = problem.C.new_zeros(1, roots.neurons)
        domains.append(Domain(0, pair, 0.0, alpha, empty, ()))
    with passes(graph, roots.active_columns):
        batch = bounder.batch(domains)
        without, _, _ = bounder.quickly(batch)
        found = bounder.ascend(batch, 400, decay=1.0)
    assert bool(found.proved.any()) and not bool((without > 0).any())


@pytest.mark.parametrize("seed", range(8))
def test_games_of_linear_leaves_have_the_value_that_a_linear_program_has(seed):
    rows, inputs = 2 + seed % 5, 1 + seed % 4
    M, b = drawn(rows, inputs, seed=seed), drawn(rows, seed=seed + 100)
    low = drawn(inputs, seed=seed + 200)
    high = low + drawn(inputs, seed=seed + 300).abs()
    high[0] = low[0] if seed % 3 == 0 else high[0]  # an input of no width
    w, x = solve_game(M, b, low, high)
    found = scipy.optimize.linprog(
        [*[0] * inputs, 1], A_ub=torch.cat([M, -torch.ones(rows, 1)], 1).numpy(), b_ub=-b.numpy(),
        bounds=[*zip(low.tolist(), high.tolist(), strict=True), (None, None)],
    )
    below = (w @ b) + torch.where(w @ M > 0, low, high) @ (w @ M)
    # The barrier ends at mu of 1e-11 of the sizes, and both ends of the game meet there.
    assert float(below) == pytest.approx(found.fun, abs=1e-7)
    assert float((M @ x + b).amax()) == pytest.approx(found.fun, abs=1e-7)
    assert bool((low <= x).all() and (x <= high).all())
