"""Sets of few dimensions, cut into pieces until all of them is proved."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import transformers
from ranks import pool
from torch import nn

from lirpa_megatron import (
    BoundedModule,
    BoundedTensor,
    PerturbationHull,
    PerturbationLpNorm,
    bound_by_splits,
    classification_margins,
    directions,
    next_token_margins,
    parallelize,
    perturb_tokens,
    segment,
    smallest_margin,
)
from lirpa_megatron.adapters.traceable import traceable
from lirpa_megatron.complete.covering import Leaf, cover
from lirpa_megatron.complete.pieces import Piece, cut_into_pieces
from lirpa_megatron.errors import UserError

pytestmark = pytest.mark.usefixtures("session", "one_thread", "double")

INFINITY = float("inf")


def never(rows, _):
    """A margin that nothing proves, and no point refutes."""
    return torch.where(rows[:, 0] < INFINITY, torch.nan, rows[:, 0])


def network():
    """(network, two inputs, the margins of their classes)."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    ).eval()
    x = torch.randn(2, 4)
    return net, x, classification_margins(net(x).argmax(1), 3)


def a_box(x, eps=0.4):
    low = x - eps * torch.tensor([1.0, 0.0, 1.0, 0.5])  # one coordinate stays
    high = x + eps * torch.tensor([1.0, 0.0, 0.2, 1.0])
    return BoundedTensor(x, PerturbationLpNorm(norm=INFINITY, x_L=low, x_U=high))


def hull_of(x, eps=0.5):
    """[B, 2, 3, 2]: the second word has two vertices, and repeats its first."""
    words = x.view(2, 2, 1, 2) + eps * torch.randn(2, 2, 3, 2)
    words[:, :, 0] = x.view(2, 2, 2)
    words[:, 1, 2] = words[:, 1, 0]
    return BoundedTensor(x.view(2, 2, 2), PerturbationHull(words))


SETS = {
    "box": a_box,
    "directions": lambda x: directions(x, 0.4 * torch.randn(3, 4)),
    "segment": lambda x: segment(x - 0.3, x + 0.5 * torch.randn(2, 4)),
    "hull": hull_of,
}


def points_of(set_, count):
    """Random points, corners and edges of each sample's set: [count, B, *shape]."""
    ptb = set_.ptb
    if isinstance(ptb, PerturbationHull):
        v = ptb.vertices
        shares = torch.rand(count, *v.shape[:3]) ** 4
        shares[: count // 2] = nn.functional.one_hot(shares[: count // 2].argmax(-1), v.shape[2])
        return torch.einsum("nbsk,bskh->nbsh", shares / shares.sum(-1, keepdim=True), v)
    t = 2 * torch.rand(count, *set_.shape) - 1 if hasattr(ptb, "x_L") else None
    if hasattr(ptb, "directions"):
        t = 2 * torch.rand(count, *ptb.directions.shape[:2]) - 1
        t[: count // 2] = t[: count // 2].sign()
        return ptb.centre + torch.einsum("nbd,bd...->nb...", t, ptb.directions)
    t[: count // 2] = t[: count // 2].sign()
    return (ptb.x_L + ptb.x_U) / 2 + t * (ptb.x_U - ptb.x_L) / 2


def descent(set_, function):
    """The least value of a function [B] over each sample's set that gradient steps find."""
    ptb, least = set_.ptb, torch.full((len(set_),), INFINITY)
    hull = isinstance(ptb, PerturbationHull)
    shape = ptb.vertices.shape[:-1] if hull else set_.shape
    shape = ptb.directions.shape[:2] if hasattr(ptb, "directions") else shape
    for _ in range(4):
        t = torch.randn(shape).requires_grad_()
        step = torch.optim.Adam([t], lr=0.3)
        for _ in range(15):
            if hull:
                x = torch.einsum("bsk,bskh->bsh", t.softmax(-1), ptb.vertices)
            elif hasattr(ptb, "directions"):
                x = ptb.centre + torch.einsum("bd,bd...->b...", t.clamp(-1, 1), ptb.directions)
            else:
                x = (ptb.x_L + ptb.x_U) / 2 + t.clamp(-1, 1) * (ptb.x_U - ptb.x_L) / 2
            value = function(x)
            least = torch.minimum(least, value.detach())
            step.zero_grad()
            value.sum().backward()
            step.step()
    return least


@pytest.mark.parametrize("name", SETS)
def test_pieces_cover_the_set_and_their_shares_add_to_one(name):
    """The pieces after some cuts: each point of the set is in one, none leaves the set."""
    _, x, _ = network()
    given = SETS[name](x)
    parts = cut_into_pieces(given)
    pieces = [piece for piece in parts.whole() if piece.sample == 1]
    for step in range(12):
        first = max(pieces, key=lambda piece: piece.share)
        pieces.remove(first)
        cuts = (len(parts.ends(first)) - 1) // 2
        pieces += parts.cut(first, step % cuts)
    assert sum(piece.share for piece in pieces) == 1.0 and len(pieces) == 13
    made = parts.perturbed(pieces)
    inside = points_of(given, 200)[:, 1]
    assert all(min(outside(made, i, p) for i in range(13)) < 1e-12 for p in inside)
    for piece in points_of(made, 20).transpose(0, 1):
        assert all(outside(given, 1, point) < 1e-12 for point in piece)


def outside(set_, sample, point):
    """How far a point is from being in a sample's set, by linear programming in few numbers."""
    ptb = set_.ptb
    if isinstance(ptb, PerturbationHull):
        worst = 0.0
        for place, vertices in zip(point, ptb.vertices[sample], strict=True):
            rows = torch.cat((vertices.t(), torch.ones(1, len(vertices))))
            target = torch.cat((place, torch.ones(1)))
            found = torch.linalg.lstsq(rows, target, driver="gelsd").solution
            if len({tuple(v.tolist()) for v in vertices}) < len(vertices):
                same = (vertices == vertices[0]).all(-1)  # a repeated vertex counts once
                found = torch.cat((found[same].sum()[None], found[~same]))
                rows = torch.cat((rows[:, :1], rows[:, ~same]), 1)
            off = (rows @ found - target).abs().max()
            worst = max(worst, float(off), float((-found).clamp(min=0).max()))
        return worst
    if hasattr(ptb, "directions"):
        D = ptb.directions[sample]
        t = torch.linalg.lstsq(D.t(), point - ptb.centre[sample]).solution
        off = (t @ D + ptb.centre[sample] - point).abs().max()
        return max(float(off), float((t.abs() - 1).clamp(min=0).max()))
    low, high = ptb.x_L[sample], ptb.x_U[sample]
    return float(torch.maximum(low - point, point - high).clamp(min=0).max())


class Flat(nn.Module):
    """A network whose input is [B, 2, 2]."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.flatten(1))


@pytest.mark.parametrize("name, method", [
    ("box", "CROWN"), ("box", "IBP"), ("directions", "forward"), ("segment", "CROWN"),
    ("segment", "CROWN-Optimized"), ("hull", "forward"), ("hull", "auto"),
])
def test_bounds_of_pieces_hold_over_the_whole_set_and_are_tighter(name, method):
    net, x, C = network()
    given = SETS[name](x)
    model = Flat(net) if given.ndim > 2 else net
    bounded = BoundedModule(
        model, given.data[:1], bound_opts={"optimize_bound_args": {"iteration": 3}}
    )
    whole = bound_by_splits(bounded, given, C, splits=0, method=method)
    found = bound_by_splits(bounded, given, C, splits=12, method=method, margin=never)
    points = points_of(given, 1000)
    y = torch.einsum("bsf,nbf->nbs", C, model(points.flatten(0, 1)).unflatten(0, (-1, 2)))
    assert (y >= found.lower - 1e-12).all() and (y <= found.upper + 1e-12).all()
    for row, sign in itertools.product(range(C.shape[1]), (1, -1)):
        low = descent(given, lambda x, row=row, sign=sign: sign * (C[:, row] * model(x)).sum(-1))
        bound = found.lower[:, row] if sign > 0 else -found.upper[:, row]
        assert (low >= bound - 1e-12).all()
    assert (found.lower >= whole.lower).all() and (found.upper <= whole.upper).all()
    if method != "CROWN-Optimized":
        assert (found.lower - whole.lower).max() > 1e-3 * (y.amax(0) - y.amin(0)).max()
    assert found.pieces.tolist() == [13, 13] and found.proved.tolist() == [0, 0]
    assert whole.pieces.tolist() == [1, 1]


def test_what_is_proved_leaves_and_the_share_says_how_much_it_is():
    """|x| - 0.3 on [-1, 1], of which 7/10 is proved; by IBP a piece is as good as its end."""

    class Distance(nn.Module):
        def forward(self, x):
            return x.relu() + (-x).relu() - 0.3

    x = BoundedTensor(torch.zeros(1, 1), PerturbationLpNorm(norm=INFINITY, eps=1.0))
    bounded = BoundedModule(Distance().eval(), torch.zeros(1, 1))
    shares = []
    for splits in (0, 2, 8, 40):
        found = bound_by_splits(
            bounded, x, splits=splits, method="IBP", stop_at_counterexample=False
        )
        shares.append(float(found.proved))
        assert found.pieces.item() == splits + 1
        assert found.margin.item() == found.lower.item() == -0.3
    assert shares[:2] == [0.0, 0.25] and shares[1] < shares[2] < shares[3]
    assert 0.68 < shares[3] < 0.7
    (point,) = found.counterexamples.values()
    assert abs(point.item()) <= 0.3
    stopped = bound_by_splits(bounded, x, splits=40, method="IBP")
    assert stopped.pieces.item() == 1 and stopped.counterexamples


def test_the_direction_that_moves_the_margin_is_cut():
    """Of two directions one does nothing, though it is the longer one."""
    net = nn.Sequential(nn.Linear(2, 8, bias=False), nn.Tanh(), nn.Linear(8, 1)).eval()
    with torch.no_grad():
        net[0].weight[:, 1] = 0.0
    x = torch.zeros(1, 2)
    given = directions(x, [torch.tensor([0.5, 0.0]), torch.tensor([0.0, 9.0])])
    bounded, seen = BoundedModule(net, x), []
    original = bounded.compute_bounds

    def noted(x, **words):
        seen.append(x[0].ptb.directions.abs().amax((0, 2)))
        return original(x, **words)

    object.__setattr__(bounded, "compute_bounds", noted)
    bound_by_splits(bounded, given, splits=3, margin=lambda rows, _: rows[:, 0] - 9,
                    stop_at_counterexample=False)
    widths = torch.stack(seen)
    assert (widths[:, 1] == 9.0).all() and widths[-1, 0] == 0.125


def test_the_largest_pieces_are_cut_first_and_time_ends_the_search():
    order, clock = [], iter([False, False, True])

    def bound(halves):
        order.extend(half.share for half, _ in halves)
        return [Leaf(half, -1.0) for half, _ in halves]

    def cut(leaves):
        return [tuple(Piece(0, leaf.piece.place, leaf.piece.share / 2) for _ in "ab")
                for leaf in leaves]

    root = Leaf(Piece(0, torch.zeros(2, 1)), -1.0)
    found = cover([root], bound, cut, splits=100, at_once=2, is_over=lambda: next(clock))
    assert order == [0.5, 0.5, 0.25, 0.25] and found.is_over
    assert sum(leaf.piece.share for leaf in found.leaves) == 1.0 and found.share(0) == 0.0


# ------------------------------------------------------------------- sharded models


def language_segment():
    """(model, ids, next tokens, the ends of 0.3 of the way to another sentence)."""
    model = transformers.gpt(torch.float64)
    ids = transformers.tokens()[0]
    other = ids.clone()
    other[:, 3] = (ids[:, 3] + 5) % transformers.VOCABULARY
    targets = model(ids, torch.arange(ids.shape[1]).unsqueeze(0), None)[:, -1].argmax(-1)
    ends = [perturb_tokens(model, words, eps=0.0)[0].data for words in (ids, other)]
    return model, ids, targets, (ends[0], ends[0] + 0.3 * (ends[1] - ends[0]))


def language_case(splits, method, order, least=0.05):
    """A GPT's next token along a segment between two sentences, and in a hull of words."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model, ids, targets, ends = language_segment()
    view = next_token_margins(model)
    few = {"order": order, "refined_rows": 0, "adjoint_rows": 2}  # for the time's sake
    bounded = BoundedModule(view, (ends[0], targets), bound_opts=few)
    return bound_by_splits(
        bounded, (segment(*ends), targets), splits=splits, method=method,
        margin=lambda rows, of: smallest_margin(rows, targets[of]) - least, at_once=4,
        stop_at_counterexample=False,
    )


def language_values(points):
    """Margins at points of that segment, [points, B, V]."""
    torch.set_default_dtype(torch.float64)
    model, ids, targets, ends = language_segment()
    net = traceable(next_token_margins(model))
    t = torch.linspace(0, 1, points).view(-1, 1, 1, 1)
    x = ends[0] + t * (ends[1] - ends[0])
    return net(x.flatten(0, 1), targets.repeat(points)).unflatten(0, (points, -1)).detach()


def network_case(splits, method):
    torch.set_num_threads(1)
    net, x, C = network()
    bounded = BoundedModule(parallelize(net), x)
    return bound_by_splits(bounded, a_box(x, 2.0), C, splits=splits, method=method,
                           stop_at_counterexample=False)


@functools.cache
def alone(case, *arguments):
    return pool(1).run(case, *arguments)[0]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case, arguments", [
    (network_case, (20, "CROWN")), (language_case, (4, "forward", 3)),
    pytest.param(language_case, (3, "CROWN", 1, 2.5), marks=pytest.mark.slow),
    pytest.param(network_case, (20, "IBP"), marks=pytest.mark.slow),
], ids=lambda value: getattr(value, "__name__", str(value)))
def test_every_rank_cuts_the_same_pieces_and_bounds_are_one_device_s(case, arguments, size):
    one, many = alone(case, *arguments), pool(size).run(case, *arguments)
    assert one.pieces.max() > 3
    for found in many:
        assert torch.equal(found.pieces, one.pieces) and torch.equal(found.proved, one.proved)
        width = (one.upper - one.lower).abs() + 1e-4
        for a, b in ((found.lower, one.lower), (found.upper, one.upper)):
            assert ((a - b).abs() <= 1e-10 * width).all()
        assert torch.equal(found.lower, many[0].lower)


def test_bounds_of_a_segment_s_pieces_hold_everywhere_on_it():
    found = alone(language_case, 4, "forward", 3)
    y = pool(1).run(language_values, 400)[0]
    assert (y >= found.lower - 1e-12).all() and (y <= found.upper + 1e-12).all()


# ------------------------------------------------------------------------ bad input


def test_what_cannot_be_cut_is_said_in_one_line():
    net, x, C = network()
    bounded = BoundedModule(net, x)

    def refused(match, given, error=UserError, splits=3, **words):
        with pytest.raises(error, match=match) as found:
            bound_by_splits(words.pop("on", bounded), given, C, splits=splits, **words)
        assert "\n" not in str(found.value)

    ball = BoundedTensor(x, PerturbationLpNorm(norm=2, eps=0.1))
    refused("an L2 ball cannot be cut", ball)
    wide = nn.Sequential(nn.Linear(17, 3)).eval()
    many = BoundedTensor(torch.zeros(2, 17), PerturbationLpNorm(norm=INFINITY, eps=0.1))
    refused("at most 16 dimensions, this one has 17", many, on=BoundedModule(wide, many.data))
    refused("for one perturbed input, here are 0", x)
    refused("splits is -1", a_box(x), splits=-1)
    refused("unknown method", a_box(x), error=ValueError, method="CORWN")
    refused("by lower bounds", a_box(x), error=ValueError, bound_lower=False)
    outward = BoundedModule(net, x, bound_opts={"rounding": "outward"})
    refused("is for boxes", SETS["segment"](x), error=NotImplementedError, on=outward)


def test_samples_are_cut_one_by_one():
    """Each has a budget of its own, and gets what it would get alone."""
    net, x, C = network()
    bounded, given = BoundedModule(net, x), a_box(x, 0.9)
    both = bound_by_splits(bounded, given, C, splits=9, stop_at_counterexample=False, at_once=1)
    for b, which in itertools.product((0, 1), ("lower", "upper", "proved", "pieces")):
        ptb = PerturbationLpNorm(
            norm=INFINITY, x_L=given.ptb.x_L[b : b + 1], x_U=given.ptb.x_U[b : b + 1]
        )
        one = bound_by_splits(bounded, BoundedTensor(x[b : b + 1], ptb), C[b : b + 1], splits=9,
                              stop_at_counterexample=False, at_once=1)
        # a batch's matrix products may round otherwise
        found, alone = getattr(both, which)[b].double(), getattr(one, which)[0].double()
        assert (found - alone).abs().max() < 1e-12
