"""Products with weights that are nearly all zero leave these out; bounds stay the same."""

from __future__ import annotations

import pytest
import torch
from models import relative_error
from ranks import pool
from torch import nn

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm, parallelize
from lirpa_megatron.operators.linear import sparse
from lirpa_megatron.operators.linear.sparse import SparseWeight

pytestmark = pytest.mark.usefixtures("session", "one_thread")

INPUTS = 64


def random_weight(outputs=512, inputs=256, each=3):
    generator = torch.Generator().manual_seed(1)
    w = torch.zeros(outputs, inputs, dtype=torch.float64)
    for column in range(1, inputs):  # the first one is empty
        rows = torch.randperm(outputs, generator=generator)[: 1 + column % each]
        w[rows, column] = torch.randn(len(rows), generator=generator, dtype=torch.float64)
    return w


def lattice() -> nn.Sequential:
    """The least of 64 sums of two inputs, by ReLUs: min(a, b) = (relu(a + b) - relu(-a - b)
    - relu(a - b) - relu(b - a)) / 2. The same in every process."""
    torch.manual_seed(2)
    layers, width = [nn.Linear(2, INPUTS, dtype=torch.float64)], INPUTS
    while width > 1:
        pairs = torch.eye(width // 2, dtype=torch.float64)
        block = torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]], dtype=torch.float64)
        least = torch.tensor([[0.5, -0.5, -0.5, -0.5]], dtype=torch.float64)
        for block_of, relu in ((block, True), (least, False)):
            w = torch.kron(pairs, block_of)
            layer = nn.Linear(w.shape[1], w.shape[0], dtype=torch.float64)
            with torch.no_grad():
                layer.weight.copy_(w)
                layer.bias.zero_()
            layers += [layer, nn.ReLU()] if relu else [layer]
        width //= 2
    return nn.Sequential(*layers).eval()


def ball() -> BoundedTensor:
    x = torch.tensor([[0.1, -0.2], [0.5, 0.3], [-0.4, 0.0]], dtype=torch.float64)
    return BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=0.2))


def bounds(least: int = 64) -> tuple[torch.Tensor, torch.Tensor, int]:
    """CROWN's bounds where weights of `least` numbers are looked at, and how many products skipped
    zeros."""
    products, product = [], SparseWeight.product
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_LEAST", least)
        patch.setattr(SparseWeight, "product",
                      lambda self, *given: products.append(1) or product(self, *given))
        bounded = BoundedModule(parallelize(lattice()), ball().detach())
        with torch.no_grad():
            lower, upper = bounded.compute_bounds((ball(),), method="CROWN")
    return lower, upper, len(products)


def test_a_sparse_product_is_the_dense_one():
    w = random_weight()
    found = SparseWeight.of(w)
    A = torch.randn(5, 2, 512, dtype=torch.float64)
    for out, into in ((None, None), (torch.arange(0, 512, 3), None),
                      (torch.arange(100, 400), torch.arange(7, 200, 2))):
        rows, columns = (torch.arange(n) if chosen is None else chosen
                         for n, chosen in zip(w.shape, (out, into), strict=True))
        want = A[..., rows] @ w[rows][:, columns]
        got = found.product(A[..., rows], out, into)
        assert torch.allclose(got, want, rtol=0, atol=1e-14 * 10)  # of three terms, of about 10
        by_columns = A[..., rows].permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert torch.equal(found.product(by_columns, out, into), got)
    none = torch.zeros(0, dtype=torch.int64)
    assert torch.equal(found.product(A[..., :0], none), torch.zeros(5, 2, 256, dtype=A.dtype))


def test_what_is_not_sparse_or_small_is_left_alone():
    assert SparseWeight.of(torch.randn(512, 256)) is None
    assert SparseWeight.of(random_weight(64, 64)) is None
    one_row = torch.zeros(512, 256)
    one_row[3] = 1.0
    assert SparseWeight.of(one_row) is not None and SparseWeight.of(one_row.t()) is None


def test_a_weight_that_changes_is_looked_at_again():
    w = random_weight()
    found = SparseWeight.of(w)
    assert found.is_still(w) and found.is_still(w.clone())
    (row, column), zero = w.nonzero()[5], (w == 0).nonzero()[9]
    changed, moved, more = w.clone(), w.clone(), w.clone()
    changed[row, column] += 1e-9
    moved[tuple(zero)], moved[row, column] = moved[row, column].item(), 0.0
    more[tuple(zero)] = 1.0
    for other in (changed, moved, more, w.float(), w[:-1]):
        assert not found.is_still(other)


def test_bounds_of_a_lattice_are_those_of_dense_products():
    lower, upper, count = bounds()
    *dense, none = bounds(least=10**9)
    assert count > 0 and none == 0
    # float64, and sums of other orders
    assert relative_error((lower, upper), dense, upper - lower) < 1e-10
    points = ball() + 0.2 * (2 * torch.rand(500, 1, 2, dtype=torch.float64) - 1)
    y = lattice()(points.detach().as_subclass(torch.Tensor))
    assert (y >= lower - 1e-12).all() and (y <= upper + 1e-12).all()


def test_bounds_follow_a_weight_that_is_changed_between_calls(monkeypatch):
    monkeypatch.setattr(sparse, "_LEAST", 64)
    net = lattice()
    bounded = BoundedModule(net, ball().detach())
    with torch.no_grad():
        bounded.compute_bounds((ball(),), method="CROWN")
        net[4].weight.data[0, 1] = 0.75  # no version counter sees it
        found = bounded.compute_bounds((ball(),), method="CROWN")
        want = BoundedModule(net, ball().detach()).compute_bounds((ball(),), method="CROWN")
    assert relative_error(found, want, want[1] - want[0]) < 1e-10


def test_two_ranks_have_the_same_bounds():
    lower, upper, _ = bounds()
    for got in pool(2).run(bounds):
        assert relative_error(got[:2], (lower, upper), upper - lower) < 1e-10 and got[2] > 0
