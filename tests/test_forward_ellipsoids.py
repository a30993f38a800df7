"""Ellipsoids around many errors contain them, also where numbers are tiny, huge, still or equal."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lirpa_megatron.forward import jets, squares
from lirpa_megatron.forward.domains import Domain, Group
from lirpa_megatron.forward.ellipsoids import ellipsoid
from lirpa_megatron.forward.error_symbols import product_range
from lirpa_megatron.forward.form import Form
from lirpa_megatron.operators.elementwise.functions import FUNCTIONS

ALONE = SimpleNamespace(size=1)
ERRORS = {
    "many errors": (lambda: torch.randn(300, 2, 4, 5), lambda: torch.randn(20, 2, 4, 5)),
    "no ball": (lambda: torch.randn(30, 2, 4, 5), lambda: torch.randn(0, 2, 4, 5)),
    "a ball alone": (lambda: torch.randn(0, 2, 4, 5), lambda: torch.randn(20, 2, 4, 5)),
    "one direction, without a factor": (
        lambda: torch.ones(9, 1, 1, 1) * torch.randn(1, 1, 4, 5), lambda: torch.zeros(2, 1, 4, 5)
    ),
    "huge and tiny numbers": (
        lambda: torch.randn(60, 2, 4, 5) * torch.logspace(-30, 15, 20).reshape(4, 5),
        lambda: torch.randn(20, 2, 4, 5) * 1e-20,
    ),
    "numbers of one sample alone": (
        lambda: torch.randn(30, 2, 4, 5) * torch.tensor([[[[1.0]]], [[[0.0]]]]).movedim(0, 1)[0],
        lambda: torch.zeros(0, 2, 4, 5),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ERRORS)
def test_every_row_s_reach_is_within_the_ellipsoid_s(name, dtype):
    torch.manual_seed(0)
    g, G = (make().to(dtype) for make in ERRORS[name])
    L = ellipsoid(g, [G], ALONE)
    assert L.isfinite().all()
    reach = (g.double().abs().sum(0) + G.double().square().sum(0).sqrt()).flatten(1)
    assert ((L == 0).all(0).flatten(1) == (reach == 0)).all()
    unit = torch.where(reach > 0, 1 / reach.clamp(min=1e-300), 0.0)
    g, G, L = (x.double().flatten(2) * unit for x in (g, G, L))
    rows = torch.randn(500, 1, 1, g.shape[2], dtype=torch.float64)
    rows = torch.cat((rows, torch.eye(g.shape[2], dtype=torch.float64)[:, None, None]))
    inside = (rows * g).sum(-1).abs().sum(1) + (rows * G).sum(-1).square().sum(1).sqrt()
    around = (rows * L).sum(-1).square().sum(1).sqrt()
    assert (inside <= around * (1 + 1e-6)).all()
    if name == "many errors":  # and not much wider than they are
        assert (around[:500].mean(0) < 1.5 * inside[:500].mean(0)).all()


def _drawn(domain: Domain, count: int) -> torch.Tensor:
    """Points of a domain of boxes and L2 balls, most of them at its border: [count, symbols]."""
    parts = []
    for group in domain.groups:
        for _ in range(group.count):
            x = torch.randn(count, group.size)
            parts.append(x.sign() if group.kind == "box" else x / x.norm(dim=1, keepdim=True))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("groups", [
    [Group("box", 1, 6), Group("l2", 7), Group("box", 1, 20)],
    [Group("l2", 3, 2), Group("box", 1, 2)],
])
@pytest.mark.usefixtures("double")
def test_boxes_beside_balls_bound_numbers_vectors_and_products(groups):
    torch.manual_seed(1)
    domain = Domain(groups, 1)
    a, b = torch.randn(2, domain.symbols, 2, 3, 4)
    points = _drawn(domain, 20000)
    x, y = (torch.tensordot(points, part, 1) for part in (a, b))
    size = domain.size(a, 1)
    assert (x.abs().amax(0) <= size).all()
    best = torch.zeros_like(size)
    first = 0
    for group in groups:  # exact, by the formula of `domains`
        own = a[first: first + group.symbols].unflatten(0, (group.count, group.size))
        first += group.symbols
        best += (own.abs() if group.kind == "box" else own.norm(dim=1, keepdim=True)).sum((0, 1))
    assert torch.allclose(size, best)
    norm = domain.norm(a, 1)
    assert (x.norm(dim=-1).amax(0) <= norm).all()
    assert (norm <= size.norm(dim=-1) * (1 + 1e-12)).all()
    half, middle = product_range(domain, a, b)
    assert ((x * y - middle).abs() <= half).all()
    assert (half <= domain.size(a, 1) * domain.size(b, 1)).all()


class _Run:
    """What `squares` asks of a run, on one device."""

    def __init__(self, domain):
        self.domain, self.context = domain, SimpleNamespace(collectives=ALONE)

    def ranks(self, node):
        return SimpleNamespace(size=1, rank=0, most=lambda x: x)


def _farthest(found, errors, box):
    """Errors [points, B, T..., F] lie in the balls that take the place of the box: the largest |u|
    of all points, e = L u."""
    where, balls = found
    lengths = []
    for place in where.squeeze(-1).nonzero():
        own = balls[(slice(None), slice(None), *place)]
        (p,) = own.flatten(1).any(1).nonzero().flatten()
        u = torch.linalg.solve_triangular(
            own[p].T, errors[(slice(None), *place)].T, upper=False
        )
        lengths.append(u.square().sum(0).sqrt().max())
        rows = torch.randn(300, own.shape[-1])
        width = (rows.abs() * box[tuple(place)]).sum(1).mean()
        assert (rows @ own[p].T).norm(dim=1).mean() < width
    return torch.stack(lengths).max()


@pytest.mark.usefixtures("double")
def test_errors_of_many_squares_are_in_one_ball():
    torch.manual_seed(2)
    domain = Domain([Group("box", 1, 8), Group("l2", 5)], 1)
    run, points = _Run(domain), _drawn(domain, 4000)
    c = torch.randn(1 + domain.symbols, 2, 3, 120)
    c[1:] *= 0.004
    c[1:, :, 0] = 0.0  # a position that stands still
    x = Form(c, torch.zeros(2, 3, 120), torch.zeros(2, 3))
    taylor = jets.of(FUNCTIONS["GeluTanh"].curve())
    reach = domain.size(c[1:], 1)
    box = taylor.largest(2, c[0], reach) * reach.square() / 2
    value, slope, kappa, h = squares.parabola(taylor, c[0], reach)
    found = squares.of_curve(run, None, x, (kappa, h), reach, box)
    d = torch.tensordot(points, c[1:], 1)
    errors = taylor.jet(c[0] + d, 0)[0] - value - slope * d
    assert not found[0][:, 0].any()
    assert 0.8 < _farthest(found, errors, box) <= 1


@pytest.mark.usefixtures("double")
def test_errors_of_products_are_in_balls(monkeypatch):
    torch.manual_seed(3)
    domain = Domain([Group("box", 1, 8), Group("l2", 5), Group("box", 1, 4)], 1)
    run, points = _Run(domain), _drawn(domain, 4000)
    w, v = torch.randn(domain.symbols, 2, 2, 3, 4), torch.randn(domain.symbols, 2, 2, 4, 30)
    w[:, :, :, :, 0], v[:, :, :, 0] = 0.0, 0.0
    at_w, at_v = (torch.tensordot(points, x, 1) for x in (w, v))
    half, middle = product_range(domain, w.unsqueeze(-1), v.unsqueeze(3))
    box = half.sum(-2)
    found = squares.of_products(run, None, w, v, box)
    assert 0.3 < _farthest(found, at_w @ at_v, box) <= 1
    size = 2 * 2 * (3 * 3 + 3 * 30) ** 2  # samples, heads, and queries and keys that move
    monkeypatch.setattr(squares, "_MOST", size)
    assert squares.of_products(run, None, w, v, box) is not None
    monkeypatch.setattr(squares, "_MOST", size - 1)
    assert squares.of_products(run, None, w, v, box) is None
    i, z = 3 * torch.randn(domain.symbols, 2, 5), torch.randn(domain.symbols, 2, 5, 30)
    at_i, at_z = (torch.tensordot(points, x, 1) for x in (i, z))
    box = product_range(domain, i.unsqueeze(-1), z)[0]
    found = squares.of_norm(run, i, z, 0.01 * box, box)
    assert 0.3 < _farthest(found, at_i.unsqueeze(-1) * at_z, box) <= 1


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ["GeluTanh", "GeluErf", "Silu", "Tanh"])
def test_parabolas_hold_in_their_reach(name):
    torch.manual_seed(4)
    curve = FUNCTIONS[name].curve()
    c, reach = 3 * torch.randn(4000), 4 * torch.rand(4000) ** 4
    reach[:50] = 0.0
    value, slope, kappa, h = squares.parabola(jets.of(curve), c, reach)
    d = torch.linspace(-1, 1, 201)[:, None] * reach
    off = (curve.value(c + d) - value - slope * d - kappa * d.square()).abs().amax(0)
    assert (off <= h + 1e-15).all()
    near = (reach > 0.1) & (reach < 0.3)
    assert (off > 0.7 * h)[near].double().mean() > 0.5
