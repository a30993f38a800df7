"""Affine forms, pairs and softmax weights: what they enclose stays inside, and near the ends."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from models import drawn

from lirpa_megatron.operators.affine.form import AffineForm
from lirpa_megatron.operators.affine.products import (
    Pairs,
    above_largest_eigenvalue,
    elementwise_range,
    product_range,
)
from lirpa_megatron.operators.attention import softmax_weights


def _form(*shape, n=6, seed=0, slack=0.0, norm=math.inf):
    A = drawn(*shape, n, seed=seed)
    return AffineForm(torch.zeros(shape).double(), A, torch.full(shape, slack).double(), norm)


def _ball(points, n, norm, seed=0):
    u = drawn(points, n, seed=seed)
    return u.sign() if norm == math.inf else u / u.norm(p=norm, dim=-1, keepdim=True)


@pytest.mark.parametrize("norm", [math.inf, 2.0, 1.0])
def test_products_of_forms_stay_in_their_range(norm):
    a = _form(2, 3, 4, seed=1, slack=0.1, norm=norm)
    b = _form(2, 5, 4, seed=2, slack=0.2, norm=norm)
    low, high = product_range(a, b)
    u = _ball(4000, 6, norm)
    da = torch.einsum("btdn,pn->pbtd", a.A, u) + 0.1 * drawn(4000, 2, 3, 4, seed=3).sign()
    db = torch.einsum("budn,pn->pbud", b.A, u) + 0.2 * drawn(4000, 2, 5, 4, seed=4).sign()
    products = torch.einsum("pbtd,pbud->pbtu", da, db)
    assert (products.amax(0) <= high).all() and (products.amin(0) >= low).all()
    tight = (products.amax(0) / high).mean()
    assert tight > (0.3 if norm == math.inf else 0.1), tight


@pytest.mark.parametrize("norm", [math.inf, 2.0, 1.0])
def test_elementwise_products_of_forms_stay_in_their_range(norm):
    a = _form(2, 3, 4, seed=1, slack=0.1, norm=norm)
    b = _form(2, 3, 4, seed=2, slack=0.2, norm=norm)
    low, high = elementwise_range(a, b)
    u = _ball(4000, 6, norm)
    da, db = (torch.einsum("btdn,pn->pbtd", x.A, u) for x in (a, b))
    da = da + 0.1 * drawn(4000, 2, 3, 4, seed=3).sign()
    products = da * (db + 0.2 * drawn(4000, 2, 3, 4, seed=4).sign())
    assert (products.amax(0) <= high).all() and (products.amin(0) >= low).all()
    tight = (products.amax(0) / high).mean()
    assert tight > (0.5 if norm == math.inf else 0.2), tight
    size = (a.reach() + a.slack) * (b.reach() + b.slack)
    assert norm == 1 or (high <= size * (1 + 1e-9)).float().mean() > 0.95


@pytest.mark.parametrize("norm", [math.inf, 2.0, 1.0])
def test_reaches_of_pairs_hold(norm):
    values = _form(1, 2, 3, 4, seed=5, slack=0.05, norm=norm)
    scores = _form(1, 2, 3, 3, seed=6, norm=norm)
    p = torch.softmax(drawn(1, 2, 3, 3, seed=7), -1)
    pairs = Pairs.of(values, p, scores)
    a = drawn(5, 1, 2, 3, 4, seed=8)
    W, slack, cross = pairs.reaches(a)
    u = _ball(3000, 6, norm, seed=9)
    dv = torch.einsum("bhjdn,pn->pbhjd", values.A, u)
    noise = 0.05 * drawn(*dv.shape, seed=10).sign()
    omega = torch.einsum("rbhid,pbhjd->prbhij", a, dv)
    omega = omega - (p * omega).sum(-1, keepdim=True)
    extra = torch.einsum("rbhid,pbhjd->prbhij", a, noise)
    extra = extra - (p * extra).sum(-1, keepdim=True)
    t = torch.einsum("bhijn,pn->pbhij", scores.A, u).unsqueeze(1)
    assert (omega.abs().amax(0) <= W + 1e-9).all()
    assert (extra.abs().amax(0) <= slack + 1e-9).all()
    assert ((omega * t).amin(0) >= (cross - W * pairs.size) / 2 - 1e-9).all()


@pytest.mark.parametrize("queries", [2, 3])
def test_pairs_of_several_queries_at_once_have_the_same_ranges(queries):
    a, b = _form(2, 1, 3, 4, seed=1, slack=0.1), _form(2, 1, 5, 4, seed=2, slack=0.2)
    scores = _form(2, 1, 3, 5, seed=5, slack=0.3)
    p, rows = torch.softmax(drawn(2, 1, 3, 5, seed=6), -1), drawn(7, 2, 1, 3, 4, seed=7)
    rows[:, :, :, 1] = 0

    def found(at_once=1):
        pairs = Pairs.of(b, p, scores, [5, 3, 4], at_once)
        reaches = (x[..., :3] for x in pairs.reaches(rows))
        return *product_range(a, b, at_once), *reaches, pairs.size[..., :3]

    at_once = queries * b.A.numel()
    assert len(Pairs.of(b, p, scores, [5, 3, 4], at_once).Q) < 3
    for one, other in zip(found(), found(at_once), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 40])
def test_powers_bound_the_largest_eigenvalue(dtype, rank):
    scale = 10 ** (8 * drawn(50, 1, 1, seed=rank))
    X = (drawn(50, 40, rank, seed=1) * scale).to(dtype)
    G = torch.cat((X @ X.mT, torch.eye(40, dtype=dtype)[None] * 1e-30, X.new_zeros(1, 40, 40)))
    exact, found = torch.linalg.eigvalsh(G.double())[:, -1], above_largest_eigenvalue(G).double()
    assert (found >= exact * (1 - 10 * torch.finfo(dtype).eps)).all() and found[-1] == 0
    assert (found <= exact * (40 ** (1 / 128) + 1e-5)).all()


def test_softmax_weights_stay_in_their_boxes():
    for width, seed in itertools.product((1e-3, 0.3, 2.0, 30.0), range(3)):
        s0 = drawn(4, 5, seed=seed, scale=2.0)
        p0 = torch.softmax(s0, -1)
        moved = s0 + width * (2 * torch.rand(2000, 4, 5, dtype=torch.float64) - 1).sign()
        p = torch.softmax(moved, -1)
        delta = moved - s0 - (p0 * (moved - s0)).sum(-1, keepdim=True)
        none = torch.zeros_like(s0).bool()
        for low, high in (
            softmax_weights.weight_box(p0, delta.amin(0), delta.amax(0)),
            softmax_weights.weight_interval(s0 - width, s0 + width, none, -10000.0),
        ):
            assert (low <= p.amin(0) + 1e-12).all() and (p.amax(0) <= high + 1e-12).all()
            assert (low >= 0).all() and (high <= 1).all()


def test_the_quotient_is_the_largest_there_is():
    H, P = drawn(50, 6, seed=60, scale=2.0), drawn(50, 6, seed=61).abs()
    f = torch.rand(4000, 50, 6, dtype=torch.float64).round()
    seen = ((f * P * H).sum(-1) / (1 + (f * P).sum(-1))).amax(0).clamp(min=0)
    bound = softmax_weights.quotient(H, P)
    assert (seen <= bound + 1e-12).all() and (seen > bound * 0.98 - 1e-9).double().mean() > 0.9
