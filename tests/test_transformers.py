"""GPT, LLaMA-like and BERT models: one device's bounds at every tensor-parallel size, and sound.

Sizes are compared in float64 to 1e-10 of a bound's width, in float32 to 1e-5 of it (plus 1e-5 of
its magnitude where the width is smaller than the rounding of the forward pass).
"""

from __future__ import annotations

import functools
import math
from unittest import mock

import pytest
import torch
import transformers
from ranks import pool

from lirpa_megatron import (
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    at_position,
    bert_head,
    embed,
    from_layer,
    perturb_tokens,
)
from lirpa_megatron.adapters.traceable import traceable
from lirpa_megatron.operators.norm import norm
from lirpa_megatron.operators.tuning import Tuning

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ROUNDS = ("IBP", "CROWN-IBP", "CROWN")
ALPHA = {"iteration": 3, "lr_alpha": 30.0, "optimizer": "sgd", "early_stop_patience": 100}


def _build(name, dtype):
    """(model, view, further inputs) of a case."""
    if name == "gpt":
        model = transformers.gpt(dtype)
        return model, at_position(model, -1), {}
    if name == "gpt, squared relu, RMSNorm, untied":
        model = transformers.gpt(
            dtype, {"share_embeddings_and_output_weights": False, "parallel_output": True},
            activation_func=transformers_squared_relu(), normalization="RMSNorm",
        )
        return model, at_position(model, 3), {}
    if name == "llama":
        model = transformers.llama(dtype)
        return model, at_position(model, -1), {}
    if name == "one key group, norms of queries and keys":
        model = transformers.llama(dtype, spec={"qk_layernorm": True}, num_query_groups=1,
                                   qk_layernorm=True)
        return model, from_layer(at_position(model, -1), 1), {}
    model = transformers.bert(dtype)
    _, _, padding, types = transformers.tokens()
    further = {"attention_mask": padding, "tokentype_ids": types}
    if name == "bert":
        return model, bert_head(model, "binary"), further
    return model, at_position(bert_head(model, "lm"), 2), further


def transformers_squared_relu():
    from megatron.core.activations import squared_relu

    return squared_relu


CASES = ("gpt", "gpt, squared relu, RMSNorm, untied", "llama",
         "one key group, norms of queries and keys", "bert", "bert's language head")


def _bounds(name, dtype, methods=ROUNDS, eps=0.01, options=None, eager=False):
    """method -> (lower, upper), and outputs at points of the set if `eager`."""
    from lirpa_megatron.parallel import runtime

    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    model, view, further = _build(name, dtype)
    view.eval()
    ids = transformers.tokens()[0]
    inputs = perturb_tokens(view, ids, eps=eps, **further)
    bounded = BoundedModule(view, inputs, bound_opts=options)
    found = {}
    for method in methods:
        with torch.set_grad_enabled(method == "CROWN-Optimized"):
            pair = bounded.compute_bounds(inputs, method=method)
        pair = [b.detach() for b in pair]
        if getattr(view.model.output_layer, "gather_output", True) is False and _sharded(bounded):
            pair = [bounded.context.collectives.gather_features(b) for b in pair]
        found[method] = tuple(pair)
    if runtime.tp_size() > 1 and (options or {}).get("moves") == "weights":
        counted = bounded.schedule.communication.counted
        assert counted["chosen"] == counted["weights"] != counted["A"]  # they did move
    if not eager:
        return found if runtime.is_rank0() else None
    net = traceable(view)
    return found, inputs, net


def _sharded(bounded):
    return bounded.sharded[bounded.final_name]


def _compare(one, many, dtype):
    for method, pair in one.items():
        width = (pair[1] - pair[0]).abs()
        size = max(b.abs().max() for b in pair)
        for a, b in zip(pair, many[method], strict=True):
            difference = (a - b).abs()
            allowed = TOLERANCE[dtype] * width + (1e-5 if dtype == torch.float32 else 1e-14) * size
            assert (difference <= allowed).all(), (method, (difference / allowed).max())


_SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, 2) if name != "bert's language head" else pytest.param(name, 2, marks=_SLOW)
     for name in CASES]
    + [(name, 4) if name in ("llama", "bert") else pytest.param(name, 4, marks=_SLOW)
       for name in CASES],
)
def test_bounds_are_those_of_one_device(name, size):
    one = _one(name, torch.float64)
    many = pool(size).run(_bounds, name, torch.float64)[0]
    _compare(one, many, torch.float64)
    for method in ROUNDS:
        assert torch.isfinite(torch.stack(one[method])).all()


@functools.lru_cache(maxsize=32)
def _one(name, dtype, methods=ROUNDS):
    return pool(1).run(_bounds, name, dtype, methods)[0]


@pytest.mark.parametrize(
    "name", ["gpt", pytest.param("llama", marks=_SLOW), pytest.param("bert", marks=_SLOW)]
)
def test_in_float32_too(name):
    _compare(_one(name, torch.float32), pool(2).run(_bounds, name, torch.float32)[0], torch.float32)


@pytest.mark.parametrize(
    ("name", "intermediate"),
    [("gpt", "auto"), pytest.param("llama", "auto", marks=_SLOW),
     pytest.param("bert", True, marks=_SLOW),
     pytest.param("llama", True, marks=_SLOW)],
)
def test_alpha_crown_is_the_same_on_two_ranks_and_no_looser_than_crown(name, intermediate):
    options = {"optimize_bound_args": ALPHA, "optimize_intermediate": intermediate}
    methods = ("CROWN", "CROWN-Optimized")
    run = (_bounds, name, torch.float64, methods, 0.003, options)
    one, two = pool(1).run(*run)[0], pool(2).run(*run)[0]
    _compare(one, two, torch.float64)
    widths = [(upper - lower).mean() for lower, upper in (one[m] for m in methods)]
    assert widths[1] <= widths[0] * (1 + 1e-9)


@pytest.mark.parametrize(
    "options",
    [pytest.param({"max_spec_rows": 5}, marks=_SLOW), {"pass_memory": 0.2},
     pytest.param({"max_spec_rows": 50}, marks=_SLOW), pytest.param({"moves": "A"}, marks=_SLOW),
     {"moves": "weights", "max_spec_rows": 50}],
    ids=str,
)
def test_rows_in_chunks_and_whatever_moves_are_the_same_rows(options):
    many = pool(2).run(_bounds, "llama", torch.float64, ("CROWN",), 0.01, options)[0]
    _compare({"CROWN": _one("llama", torch.float64)["CROWN"]}, many, torch.float64)


def _bounded_on_the_way(options, of=None):
    """BERT's two rows, and the norms' rows that were bounded by passes of their own."""
    from lirpa_megatron.crown.auxiliary_rows import Directions

    seen, along = [], Directions.along

    def counted(self, node, vectors, **how):
        seen.append(vectors.shape[0])
        found = along(self, node, vectors, **how)
        return found if of is None else of(found)

    Directions.along = counted
    try:
        return _bounds("bert", torch.float64, ("CROWN",), 0.02, options), seen
    finally:
        Directions.along = along


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=_SLOW)])
def test_rows_that_are_bounded_on_the_way_of_own_rows_are_the_same_rows(ranks):
    one, seen = pool(1).run(_bounded_on_the_way, None)[0]
    own, seen_by_ranks = pool(ranks).run(_bounded_on_the_way, {"final_rows": "own"})[0]
    _compare(one, own, torch.float64)
    assert seen.count(4) > 3 and seen.count(1) > 2  # s of both sides in the last pass, t before
    assert len(seen) == len(seen_by_ranks)


def _unknown(found):
    infinite = torch.full_like(found.lower, math.inf)
    return type(found)(-infinite, infinite, None)


def test_rows_that_are_bounded_on_the_way_make_bounds_tighter():
    (with_them, _), (without, _) = (
        pool(1).run(_bounded_on_the_way, None, of)[0] for of in (None, _unknown)
    )
    widths = [(u - l).mean() for l, u in (x["CROWN"] for x in (with_them, without))]
    assert widths[0] < 0.9 * widths[1]


@pytest.mark.parametrize(
    "name", [name if name in ("bert", CASES[3]) else pytest.param(name, marks=_SLOW)
             for name in CASES]
)
def test_weights_move_and_bounds_stay(name):
    ranks = 4 if name.startswith("one key group") else 2
    run = (_bounds, name, torch.float64, ("CROWN",), 0.01, {"moves": "weights"})
    many = pool(ranks).run(*run)[0]
    _compare({"CROWN": _one(name, torch.float64)["CROWN"]}, many, torch.float64)


def _in_positions(name):
    """Arguments of `_bounds`."""
    options = {"optimize_bound_args": ALPHA}
    return name, torch.float64, ("CROWN", "CROWN-Optimized"), 0.003, options


def _position_by_position(name):
    """Bounds with the form of each position and each side by itself, but all queries at once."""
    *run, options = _in_positions(name)
    tuning = Tuning(whole_form={"cpu": 0}, few=0, pairs={"cpu": 2**26})
    return _bounds(*run, {**options, "tuning": tuning})


@pytest.mark.parametrize("name", ["gpt", pytest.param("bert", marks=_SLOW)])
def test_forms_used_position_by_position_give_the_same_bounds(name):
    whole = pool(1).run(_bounds, *_in_positions(name))[0]
    parts = pool(2).run(_position_by_position, name)[0]
    _compare(whole, parts, torch.float64)


def _dealt(name):
    """Bounds with norms' forms dealt out to the ranks, and how many norms' were."""
    dealt = []

    class Counted(norm.RoundRobinTensors):
        def __init__(self, *args):
            super().__init__(*args)
            dealt.append(self)

    options = {"form_memory": 0, "tuning": Tuning(whole_form={"cpu": 0})}
    with mock.patch.object(norm, "RoundRobinTensors", Counted):
        found = _bounds(name, torch.float64, ("CROWN",), 0.01, options)
    return found, len(dealt)


@pytest.mark.parametrize(
    ("name", "ranks"), [("gpt", 2), pytest.param("bert", 4, marks=_SLOW),
                        pytest.param(CASES[3], 2, marks=_SLOW)],
)
def test_forms_that_the_ranks_share_give_the_same_bounds(name, ranks):
    found, norms = pool(ranks).run(_dealt, name)[0]
    _compare({"CROWN": _one(name, torch.float64)["CROWN"]}, found, torch.float64)
    assert norms > 0


def _attacked(name, eps, dtype, methods=ROUNDS, options=None):
    """Largest violation by random points, corners and gradient ascent, relative to the size.

    Returns:
        method -> violation, method -> mean width.
    """
    found, inputs, net = _bounds(name, dtype, methods, eps, options, eager=True)
    net = net.to(dtype)
    center = inputs[0].detach()
    further = [i.detach() for i in inputs[1:]]
    generator = torch.Generator().manual_seed(3)
    worst = {method: -math.inf for method in found}
    for round_ in range(12):
        u = 2 * torch.rand(center.shape, generator=generator, dtype=dtype) - 1
        x = center + eps * (u if round_ < 3 else u.sign())
        direction = None
        for _ in range(8):
            x.requires_grad_(True)
            y = net(x, *further)
            if direction is None:
                direction = torch.randn(y.shape, generator=generator, dtype=dtype)
            for method, (lower, upper) in found.items():
                size = torch.stack((lower, upper)).abs().max()
                gap = torch.max((lower - y).max(), (y - upper).max()) / size
                worst[method] = max(worst[method], gap.item())
            if round_ < 3:
                break
            (gradient,) = torch.autograd.grad((y * direction).sum(), x)
            x = (x.detach() + 0.5 * eps * gradient.sign()).clamp(center - eps, center + eps)
    return worst, {m: (upper - lower).mean().item() for m, (lower, upper) in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_no_point_violates_a_bound(name):
    for eps in (0.003, 0.05, 0.5):
        gaps, _ = pool(1).run(_attacked, name, eps, torch.float64)[0]
        for method, gap in gaps.items():
            assert gap < 1e-12, (method, eps)


def test_alpha_crown_is_tighter_than_crown_and_no_point_violates_it():
    options = {"optimize_bound_args": {"iteration": 8, "lr_alpha": 0.1, "optimizer": "adam"}}
    methods = ("CROWN", "CROWN-Optimized")
    run = (_attacked, "gpt", 0.02, torch.float64, methods, options)
    gaps, widths = pool(1).run(*run)[0]
    assert gaps["CROWN-Optimized"] < 1e-12
    assert widths["CROWN-Optimized"] < 0.98 * widths["CROWN"]


def _extremes(name, eps, options):
    """method -> (lower, upper), and the least and the largest value of each output that is met."""
    found, inputs, net = _bounds(
        name, torch.float64, ("CROWN", "CROWN-Optimized"), eps, options, eager=True
    )
    center, further = inputs[0].detach(), [i.detach() for i in inputs[1:]]
    x = center.clone().requires_grad_(True)
    y = net(x, *further)
    least, most = y.detach().clone(), y.detach().clone()
    for i in range(y[0].numel()):
        (gradient,) = torch.autograd.grad(y.flatten(1)[:, i].sum(), x, retain_graph=True)
        for sign, met in ((-1, least), (1, most)):
            with torch.no_grad():
                corner = net(center + sign * eps * gradient.sign(), *further)
            met.flatten(1)[:, i] = corner.flatten(1)[:, i]
    return found, least, most


@pytest.mark.parametrize("name", ["gpt", pytest.param("llama", marks=_SLOW),
                                  pytest.param("bert", marks=_SLOW)])
def test_where_bounds_are_all_but_exact_alpha_crown_stays_outside_of_what_is_met(name):
    # So close that a wrong term of any plane shows. Twenty steps go wherever the bound improves.
    options = {"optimize_bound_args": {"iteration": 20}}
    found, least, most = pool(1).run(_extremes, name, 1e-4, options)[0]
    for lower, upper in found.values():
        width = (upper - lower).mean()
        assert ((most - least).mean() / width) > 0.98
        assert ((least - lower) / width).min() > -1e-9
        assert ((upper - most) / width).min() > -1e-9


def _gradients(name, method, options=None):
    """Gradients of a function of the bounds, by parameter name, whole."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model, view, further = _build(name, torch.float64)
    view.train()
    # Intervals soon meet the constants of the norms.
    eps = {"CROWN": 0.003, "CROWN-IBP": 1e-7, "IBP": 1e-8}[method]
    ids = transformers.tokens()[0]
    bounded = BoundedModule(view, perturb_tokens(view, ids, eps=eps, **further), options)
    # Made after the conversion, which writes to the parameters that these depend on.
    inputs = perturb_tokens(view, ids, eps=eps, **further)
    lower, upper = bounded.compute_bounds(inputs, method=method)
    weights = torch.linspace(-1, 1, lower.numel(), dtype=lower.dtype).view_as(lower)
    (lower * weights.cos() + upper * weights).sum().backward()
    tp = bounded.context.collectives
    whole = {}
    for parameter, value in model.named_parameters():
        if value.grad is None:
            continue
        whole[parameter] = transformers.whole_gradient(parameter, value, value.grad, model, tp)
    return whole


@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param("llama", "CROWN", marks=_SLOW),  # test_training has one with its loss
     ("llama", "CROWN-IBP"), pytest.param("gpt", "CROWN", marks=_SLOW),
     pytest.param("one key group, norms of queries and keys", "IBP", marks=_SLOW),
     pytest.param("one key group, norms of queries and keys", "CROWN", marks=_SLOW)],
)
def test_gradients_are_those_of_one_device(name, method):
    one = pool(1).run(_gradients, name, method)[0]
    two = pool(2).run(_gradients, name, method)[0]
    assert one.keys() == two.keys() and len(one) > 8
    moved = 0
    for parameter, gradient in one.items():
        assert torch.isfinite(gradient).all(), parameter
        size = gradient.abs().max()
        moved += bool(size > 0)
        assert (gradient - two[parameter]).abs().max() <= 1e-8 * size + 1e-12, parameter
    assert moved > 8


@pytest.mark.parametrize(
    ("rows", "at_once"),
    # In chunks a rank's own rows are bounded by others too.
    [("own", None), pytest.param("own", 7, marks=_SLOW), pytest.param("whole", None, marks=_SLOW)],
)
def test_gradients_through_rows_that_are_bounded_on_the_way_are_those_of_one_device(rows, at_once):
    # Two rows of BERT's: the norms have s bounded for them.
    options = {"final_rows": rows, "max_spec_rows": at_once}
    one = pool(1).run(_gradients, "bert", "CROWN")[0]
    two = pool(2).run(_gradients, "bert", "CROWN", options)[0]
    for parameter, gradient in one.items():
        size = gradient.abs().max()
        assert (gradient - two[parameter]).abs().max() <= 1e-8 * size + 1e-12, parameter


def test_a_block_a_layer_attention_and_mlp_are_bounded_on_their_own():
    assert pool(2).run(_parts)[0] == ["block", "layer", "attention", "mlp"]


def _parts():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model = transformers.llama(torch.float64)
    block = model.decoder
    parts = {"block": block, "layer": block.layers[0], "attention": block.layers[0].self_attention,
             "mlp": block.layers[0].mlp}
    x = embed(model, transformers.tokens()[0]).detach()
    for part in parts.values():
        bounded = BoundedModule(part, x)
        ball = BoundedTensor(x, PerturbationLpNorm(norm=math.inf, eps=0.01))
        with torch.no_grad():
            lower, upper = bounded.compute_bounds((ball,), method="CROWN")
            net = traceable(part)
            for _ in range(20):
                y = net(x + 0.01 * torch.randn_like(x).sign())
                assert (lower <= y + 1e-12).all() and (y <= upper + 1e-12).all()
        assert torch.isfinite(upper - lower).all()
    return list(parts)


def test_an_l2_ball_and_chosen_positions_are_bounded_alike_on_two_ranks():
    one, two = (pool(size).run(_sets)[0] for size in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert (a - b).abs().max() <= 1e-10 * (a.abs().max())


def _sets():
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model = transformers.gpt(torch.float64)
    view, ids = at_position(model, -1).eval(), transformers.tokens()[0]
    found = []
    for description in ({"eps": 0.02, "norm": 2}, {"eps": 0.05, "positions": [2]},
                        {"substitutes": {1: [3, 4], 5: [7]}, "shape": "hull"}):
        inputs = perturb_tokens(view, ids, **description)
        bounded = BoundedModule(view, inputs)
        with torch.no_grad():
            lower, upper = bounded.compute_bounds(inputs, method="CROWN")
        assert (lower <= upper).all() and torch.isfinite(lower).all()
        found += [lower, upper]
    return found


def _at_one_position_and_at_all(name, position):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    model, _, further = _build(name, torch.float64)
    ids = transformers.tokens()[0]
    found = []
    for view in (from_layer(model, 0), at_position(model, position)):
        view.eval()
        inputs = perturb_tokens(view, ids, eps=0.01, **further)
        with torch.no_grad():
            bounds = BoundedModule(view, inputs).compute_bounds(inputs, method="CROWN")
        found.append([b if b.ndim == 2 else b[:, position] for b in bounds])
    return found


@pytest.mark.parametrize(
    ("name", "position"),
    [("gpt", 1), pytest.param("llama", -1, marks=_SLOW), pytest.param("gpt", -1, marks=_SLOW),
     pytest.param("llama", 1, marks=_SLOW)],
)
def test_one_position_has_the_bounds_that_it_has_among_all(name, position):
    everywhere, alone = pool(1).run(_at_one_position_and_at_all, name, position)[0]
    for a, b in zip(everywhere, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
