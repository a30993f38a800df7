"""Token ids as perturbed inputs: which sets they become, exact on shards, and sound."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from models import plain, plain_compute
from perturbed_tokens import mixed, short_ids
from ranks import pool
from torch import nn

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationHull
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.problem.perturbations import PerturbationPositions


def _sets():
    """What `perturb_tokens` makes of its arguments, against Megatron's own embedding."""
    from lirpa_megatron import at_position, embed, from_layer, next_token_margins, perturb_tokens
    from lirpa_megatron.adapters.traceable import traceable

    torch.set_default_dtype(torch.float64)
    gpt, bert, ids = transformers.gpt(), transformers.bert(), short_ids()
    _, positions, padding, types = (x[:, :3] for x in transformers.tokens())
    padding = padding.clone()
    padding[1, 2] = 0
    hidden = embed(gpt, ids)

    (x,) = perturb_tokens(gpt, ids, eps=0.1)
    assert isinstance(x, BoundedTensor) and torch.equal(x, hidden)
    assert (x.ptb.norm, x.ptb.eps, x.ptb.x_L) == (math.inf, 0.1, None)
    (x,) = perturb_tokens(gpt, ids, eps=0.1, norm=2)
    assert type(x.ptb) is auto_lirpa.PerturbationLpNorm and (x.ptb.norm, x.ptb.eps) == (2, 0.1)

    def radii(**arguments):
        ptb = perturb_tokens(gpt, ids, **arguments)[0].ptb
        assert torch.allclose(ptb.x_U + ptb.x_L, 2 * hidden)
        half = (ptb.x_U - ptb.x_L) / 2
        assert torch.allclose(half, half[..., :1].expand_as(half))
        return half[..., 0]

    chosen = torch.tensor([0, 0.1, 0.1]).expand(2, 3)
    assert torch.allclose(radii(eps=0.1, positions=[1, -1]), chosen)
    each = torch.tensor([[0.1, 0, 0.3], [0.2, 0.5, 0]])
    assert torch.allclose(radii(eps=each[0]), each[:1].expand(2, 3))
    assert torch.allclose(radii(eps=each, positions=[0]), each * torch.tensor([1, 0, 0]))
    for norm in (1, 2):
        assert torch.allclose(radii(eps=each, norm=norm), each)
        assert torch.allclose(radii(eps=0.1, norm=norm, positions=[1, 2]), chosen)

    every = [{1: [4, 5, 6]}, {0: [7], 2: [8, 9]}]
    (hull,) = perturb_tokens(gpt, ids, substitutes=every, shape="hull")
    (box,) = perturb_tokens(gpt, ids, substitutes=every)
    (more,) = perturb_tokens(gpt, ids, substitutes=every, eps=0.1, positions=[1])
    vertices = hull.ptb.vertices
    assert vertices.shape == (2, 3, 4, transformers.HIDDEN)
    for b, sample in enumerate(every):
        for s in range(3):
            words = [int(ids[b, s]), *sample.get(s, ())]
            expected = torch.stack([embed(gpt, _replaced(ids, b, s, w))[b, s] for w in words])
            assert torch.equal(vertices[b, s, : len(words)], expected)
            own = expected[:1].expand(4 - len(words), -1)
            assert torch.equal(vertices[b, s, len(words) :], own)
            assert torch.equal(box.ptb.x_L[b, s], expected.amin(0))
            assert torch.equal(box.ptb.x_U[b, s], expected.amax(0))
    grown = torch.tensor([0, 0.1, 0]).view(3, 1)
    assert torch.equal(more.ptb.x_L, box.ptb.x_L - grown)
    assert torch.equal(more.ptb.x_U, box.ptb.x_U + grown)

    causal = torch.ones(3, 3).triu(1).bool()[None, None]
    x, mask = perturb_tokens(gpt, ids, eps=0.1, attention_mask=causal)
    assert mask.dtype == x.dtype and torch.equal(mask, causal.double().expand(2, 1, 3, 3))
    x, mask = perturb_tokens(
        bert, ids, eps=0.1, attention_mask=padding, tokentype_ids=types, position_ids=positions
    )
    assert torch.equal(x, embed(bert, ids, None, types))
    assert torch.equal(mask, bert.bert_extended_attention_mask(padding).double())

    def entering(model, arguments, mask, *inputs):
        seen = []
        block = model.decoder if model is gpt else model.encoder
        hook = block.layers[1].register_forward_pre_hook(
            lambda layer, args, kwargs: seen.append(
                (args[0] if args else kwargs["hidden_states"]).transpose(0, 1)
            ), with_kwargs=True,
        )
        with torch.compiler.set_stance("force_eager"):
            model(*inputs)
        hook.remove()
        for chosen in (from_layer(model, 1), next_token_margins(from_layer(model, 1))):
            x, *rest = perturb_tokens(chosen, ids, eps=0.1, **arguments)
            assert (x - seen[0]).abs().max() < 1e-12 and x.ptb.eps == 0.1
        again, *rest = perturb_tokens(model, ids, eps=0.1, start_layer=1, **arguments)
        assert torch.equal(again, x) and len(rest) == (mask is not None)
        whole = traceable(model)(embed(model, ids, None, arguments.get("tokentype_ids")), *rest)
        assert (traceable(from_layer(model, 1))(x, *rest) - whole).abs().max() < 1e-12

    entering(gpt, {}, None, ids, positions, None)
    words = {"attention_mask": padding, "tokentype_ids": types}
    entering(bert, words, padding, ids, padding, types)
    assert torch.equal(perturb_tokens(at_position(gpt, -1), ids, eps=0.1)[0], hidden)
    assert not x.requires_grad and not hull.ptb.vertices.requires_grad, "a model in eval mode"


def _replaced(ids, b, s, word):
    ids = ids.clone()
    ids[b, s] = word
    return ids


@pytest.mark.parametrize("size", [1, 2])
def test_each_way_to_perturb_tokens_gives_the_set_that_it_names(size):
    pool(size).run(_sets)


def _vertices(batch=2, length=3, count=4, width=5):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, count, width, generator=generator, dtype=torch.float64)


def test_a_linear_function_over_a_hull_is_extreme_where_sampling_finds_it_extreme():
    torch.manual_seed(0)
    vertices = _vertices()
    hull, A = PerturbationHull(vertices), torch.randn(2, 7, 3, 5).double()
    lower, upper = (hull.concretize(vertices[:, :, 0], A, sign) for sign in (-1, 1))
    values = torch.einsum("brsh,nbsh->nbr", A, mixed(vertices, 4000))
    assert (values >= lower - 1e-12).all() and (values <= upper + 1e-12).all()
    assert (values.amin(0) - lower).max() < 1e-9 and (upper - values.amax(0)).max() < 1e-9
    flat = hull.concretize(vertices[:, :, 0], A.flatten(2), 1)
    assert torch.equal(flat, upper) and hull.concretize(vertices[:, :, 0], None) is None


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("joint", [False, True])
def test_a_linear_function_over_balls_is_extreme_where_its_gradient_points(norm, joint):
    torch.manual_seed(0)
    x, A = torch.randn(2, 3, 5).double(), torch.randn(2, 7, 3, 5).double()
    radii = torch.tensor([[0, 0.3, 0.3], [0.3, 0, 0.3]]).double()
    radii = radii if joint else radii * torch.tensor([1, 2, 3])
    ball = PerturbationPositions(x, radii, norm, joint)
    upper, lower = ball.concretize(x, A, 1), ball.concretize(x, A, -1)
    direction = A * (radii > 0).unsqueeze(1).unsqueeze(-1)
    groups = direction.flatten(2) if joint else direction
    if norm == 2:
        step = groups / groups.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    else:
        largest = groups.abs().argmax(-1, keepdim=True)
        step = torch.zeros_like(groups).scatter_(-1, largest, groups.gather(-1, largest).sign())
    step = step.view_as(A) * radii.unsqueeze(1).unsqueeze(-1)
    center = torch.einsum("brsh,bsh->br", A, x)
    reached = (A * step).flatten(2).sum(-1)
    assert torch.allclose(upper, center + reached) and torch.allclose(lower, center - reached)
    assert (step.abs() <= (ball.x_U - x).unsqueeze(1) + 1e-12).all(), "inside of its box"


def test_an_activation_that_reads_a_hull_directly_is_bounded_over_its_box():
    torch.manual_seed(0)
    vertices = _vertices()
    first = nn.Sequential(nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    second = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    x = BoundedTensor(vertices[:, :, 0].clone(), PerturbationHull(vertices))
    box = auto_lirpa.PerturbationLpNorm(norm=math.inf, x_L=x.ptb.x_L, x_U=x.ptb.x_U)
    points = mixed(vertices, 4000)
    for net in (first, second):
        bounded = BoundedModule(net, x)
        for method in ("IBP", "CROWN-IBP", "CROWN", "CROWN-Optimized"):
            if auto_lirpa.IS_03 and method == "CROWN-Optimized":
                continue  # an output of three dimensions
            lower, upper = bounded.compute_bounds(x=(x,), method=method)
            y = net(points)
            assert (lower <= y + 1e-12).all() and (y <= upper + 1e-12).all()
            around = BoundedTensor(vertices[:, :, 0].clone(), box)
            low, high = bounded.compute_bounds(x=(around,), method=method)
            ratio = ((upper - lower).sum() / (high - low).sum()).item()
            assert abs(ratio - 1) < 1e-9 if method == "IBP" else ratio < 1 + 1e-9
            if net is second and method == "CROWN":
                assert ratio < 0.9, "a hull's first linear layer is bounded over the hull"


def test_auto_lirpa_itself_takes_a_hull():
    """`PerturbationHull` keeps the host's interface: no part of this package is needed."""
    torch.manual_seed(0)
    vertices = _vertices()
    x = BoundedTensor(vertices[:, :, 0].clone(), PerturbationHull(vertices))
    torch.set_default_dtype(torch.float64)
    try:
        net = nn.Sequential(nn.Flatten(), nn.Linear(15, 4), nn.Linear(4, 2))
        theirs, ours = plain(net, x), BoundedModule(net, x)
        for method in ("IBP", "CROWN"):
            found = plain_compute(theirs, x, None, method)
            own = ours.compute_bounds(x=(x,), method=method)
            assert torch.allclose(torch.stack(found), torch.stack(own))
    finally:
        torch.set_default_dtype(torch.float32)


def _bad(case):
    from lirpa_megatron import from_layer, perturb_tokens

    gpt, bert = transformers.gpt(), transformers.bert()
    ids, types = short_ids(), torch.zeros(2, 3).long()
    model, given, arguments = gpt, ids, {"eps": 0.1}
    substitutes = {1: [3]}
    changes = {
        "ids": {"given": ids + 31}, "float ids": {"given": ids.float()}, "flat": {"given": ids[0]},
        "nothing": {"eps": None}, "negative": {"eps": -0.1}, "nan": {"eps": float("nan")},
        "infinite": {"eps": float("inf")}, "eps shape": {"eps": torch.ones(2)},
        "norm": {"norm": 3}, "shape": {"shape": "ball"},
        "position": {"positions": [3]}, "only positions": {
            "eps": None, "substitutes": substitutes, "positions": [1]},
        "substitute": {"substitutes": {1: [32]}}, "place": {"substitutes": {-4: [3]}},
        "samples": {"substitutes": [substitutes]},
        "hull and eps": {"substitutes": substitutes, "shape": "hull"},
        "box and L2": {"substitutes": substitutes, "norm": 2},
        "layer": {"start_layer": 2}, "words later": {"start_layer": 1, "substitutes": substitutes},
        "view": {"model": from_layer(gpt, 1), "start_layer": 0},
        "model": {"model": nn.Linear(2, 2)}, "block": {"model": from_layer(gpt.decoder, 1)},
        "mask": {"attention_mask": torch.ones(2, 3)},
        "bert mask": {"model": bert, "tokentype_ids": types,
                      "attention_mask": torch.ones(2, 1, 3, 3)},
        "types": {"tokentype_ids": types}, "no types": {"model": bert},
        "position ids": {"position_ids": torch.arange(3)},
    }[case]
    model, given = changes.pop("model", model), changes.pop("given", given)
    perturb_tokens(model, given, **{**arguments, **changes})


BAD = {
    "ids": "the vocabulary has 32 entries", "float ids": "token ids are whole numbers",
    "flat": "token ids have shape (3,)", "nothing": "nothing is perturbed",
    "negative": "smallest value is -0.1", "nan": "smallest value is nan",
    "infinite": "at least 0 and finite", "eps shape": "eps has shape (2,)",
    "norm": "norm is 3", "shape": "no shape 'ball'", "position": "no position 3 in a sequence of 3",
    "only positions": "positions say where eps applies", "substitute": "vocabulary has 32 entries",
    "place": "no position -4", "samples": "given for 1 samples, there are 2",
    "hull and eps": "cannot be added to a hull", "box and L2": "norm is inf, not 2",
    "layer": "no layer 2: the model has 2", "words later": "substitutes are words",
    "view": "start_layer is 0, but the view of the model starts at layer 1",
    "model": "Linear has no embedding", "block": "TransformerBlock has no embedding",
    "mask": "attention_mask has shape (2, 3)", "bert mask": "attention_mask has shape (2, 1, 3, 3)",
    "types": "no embeddings for tokentype_ids", "no types": "needs tokentype_ids",
    "position ids": "position_ids have shape (3,)",
}


@pytest.mark.parametrize("case", BAD)
def test_what_tokens_cannot_be_is_one_clear_line(case):
    outcome = pool(1).outcomes(_bad, case)[0]
    assert outcome.error == "UserError", outcome
    assert BAD[case] in outcome.message and "\n" not in outcome.message


def test_vertices_of_another_shape_are_refused():
    from lirpa_megatron import UserError

    with pytest.raises(UserError, match=r"vertices have shape \(2, 3, 5\)"):
        PerturbationHull(torch.zeros(2, 3, 5))
