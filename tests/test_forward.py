"""Forward methods: forms that go through the network, and bounds from them."""

from __future__ import annotations

import functools

import forward_forms
import models
import pytest
import torch
import transformer_cases
import transformers

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm, perturb_tokens
from lirpa_megatron.errors import UserError
from lirpa_megatron.problem.perturbations import PerturbationSegments

pytestmark = pytest.mark.usefixtures("session", "one_thread", "double")

ROUNDING = 1e-12
"""Relative to a value's size; float64 with sums of some hundred terms."""
MODELS = ("gpt", "llama", "bert", "gpt, squared relu, RMSNorm, untied",
          "one key group, norms of queries and keys", "bert's language head")


@functools.cache
def case(name):
    model, view, further = transformer_cases.build_case(name, torch.float64)
    return model, view.eval(), further


def inputs_of(name, **perturbation):
    _, view, further = case(name)
    return view, perturb_tokens(view, transformers.tokens()[0], **perturbation, **further)


def segments(name, count, radius):
    """A set of `count` dimensions that moves two words."""
    view, (x, *rest) = inputs_of(name, eps=0.0)
    x = x.detach().as_subclass(torch.Tensor)
    D = torch.zeros(len(x), count, *x.shape[1:])
    D[:, :, 2] = torch.randn(len(x), count, x.shape[-1])
    D[:, :, 5, :3] = torch.randn(len(x), count, 3)
    return view, (BoundedTensor(x, PerturbationSegments(x, radius * D)), *rest)


def check_forms(bounded, inputs, points=6):
    run, forms = forward_forms.forms_of(bounded, inputs)
    worst, where = forward_forms.worst_escape(bounded, run, forms, inputs, points)
    assert worst < ROUNDING, where
    worst, *_ = forward_forms.worst_row(bounded, run, forms, inputs, points)
    assert worst < ROUNDING
    return forms


BALLS = {
    "one word's box": {"eps": 3e-3, "positions": [3]},
    "a wide box": {"eps": 0.5, "positions": [3]},
    "an L2 ball of all words": {"eps": 0.02, "norm": 2},
    "L2 balls of words": {"eps": torch.arange(8) * 1e-3, "norm": 2},
    "an L1 ball of two words": {"eps": 0.05, "norm": 1, "positions": [1, 4]},
    "a hull": {"substitutes": {3: [5, 7], 4: [9]}, "shape": "hull"},
}


def check_balls(name, balls):
    bounded = BoundedModule(*inputs_of(name, eps=0.0))
    for ball in balls:
        check_forms(bounded, inputs_of(name, **BALLS[ball])[1])


@pytest.mark.parametrize("name, balls", [
    ("gpt", ["one word's box", "a hull"]), ("llama", ["L2 balls of words"]),
    ("bert", ["a wide box", "an L1 ball of two words"]),
])
def test_every_node_stays_in_its_affine_form(name, balls):
    check_balls(name, balls)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "llama", "bert"])
def test_every_node_stays_in_its_affine_form_for_all_sets(name):
    check_balls(name, BALLS)


def check_error_symbols(name, balls, kept):
    bounded = BoundedModule(*inputs_of(name, eps=0.0), bound_opts={"kept_errors": kept})
    for ball in balls:
        forms = check_forms(bounded, inputs_of(name, **BALLS[ball])[1])
        own = len(next(iter(forms.values())).c)
        assert max(len(form.c) for form in forms.values()) > own


@pytest.mark.parametrize("name, ball, kept", [
    ("gpt", "one word's box", 40), ("llama", "a hull", 1000), ("bert", "a wide box", 100),
])
def test_nodes_stay_in_forms_with_symbols_of_errors(name, ball, kept):
    check_error_symbols(name, [ball], kept)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [1, 60, 3000])
@pytest.mark.parametrize("name", [*MODELS[:4], MODELS[5]])
def test_nodes_stay_in_forms_with_symbols_of_errors_for_all_sets(name, kept):
    check_error_symbols(name, BALLS, kept)


def test_symbols_of_errors_tighten_bounds_of_many_dimensions():
    view, inputs = inputs_of("gpt", eps=0.03, positions=[3])
    widths = []
    for kept in (0, 20, 1000):
        bounded = BoundedModule(view, inputs, bound_opts={"kept_errors": kept})
        with torch.no_grad():
            lower, upper = bounded.compute_bounds(inputs, method="forward")
        widths.append(float((upper - lower).mean()))
    assert widths[2] < widths[1] < widths[0]


def check_segments(name, cases):
    for count, order, radius in cases:
        view, inputs = segments(name, count, radius)
        check_forms(BoundedModule(view, inputs, bound_opts={"order": order}), inputs)


@pytest.mark.parametrize("name, cases", [
    ("gpt", [(1, 8, 0.03)]), ("llama", [(3, 2, 1e-3)]), ("bert", [(4, 3, 0.3)]),
])
def test_every_node_stays_in_its_taylor_model(name, cases):
    check_segments(name, cases)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "llama", "bert"])
def test_every_node_stays_in_its_taylor_model_for_all_sizes(name):
    degrees = [(1, 2), (1, 3), (1, 8), (3, 2), (4, 3), (8, 3)]
    check_segments(name, [(*each, radius) for each in degrees for radius in (1e-3, 0.03, 1.0)])


def test_a_taylor_model_holds_over_a_hull_of_substitutes():
    view, inputs = inputs_of("bert", substitutes={3: [5, 7, 9]}, shape="hull")
    check_forms(BoundedModule(view, inputs, bound_opts={"order": 3}), inputs)


@pytest.mark.parametrize("name", MODELS[3:])
def test_forms_hold_in_other_transformers(name):
    view, inputs = inputs_of(name, eps=3e-3, positions=[3])
    bounded = BoundedModule(view, inputs)
    check_forms(bounded, inputs)
    bounded.set_bound_opts({"order": 3})
    check_forms(bounded, segments(name, 2, 0.02)[1])


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_small_sets_are_bounded_as_tightly_as_by_crown(name):
    """What is left out is of second order: at 1e-5 both widths are the gradient's to 1e-3."""
    view, inputs = inputs_of(name, eps=1e-5, positions=[3])
    bounded = BoundedModule(view, inputs)
    widths = []
    for method in ("CROWN", "forward"):
        with torch.no_grad():
            lower, upper = bounded.compute_bounds(inputs, method=method)
        widths.append(float((upper - lower).mean()))
    assert widths[1] < widths[0] * 1.001


def test_higher_degrees_are_tighter():
    widths = []
    view, inputs = segments("bert", 1, 0.01)
    bounded = BoundedModule(view, inputs)
    for order in (1, 2, 4, 8):
        bounded.set_bound_opts({"order": order})
        with torch.no_grad():
            lower, upper = bounded.compute_bounds(inputs, method="forward")
        widths.append(float((upper - lower).mean()))
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("order, radius, most", [(1, 1e-9, 1e-12), (3, 1e-7, 1e-20)])
def test_remainders_of_tiny_sets_are_not_those_of_rounding(name, order, radius, most):
    """They are of second (fourth) order. Allowances for rounding in every operator would grow
    from layer to layer as errors do, until nothing is proved of a deep model in float32."""
    view, inputs = segments(name, 1, radius)
    bounded = BoundedModule(view, inputs, {"order": order, "refined_rows": 0})
    run, forms = forward_forms.forms_of(bounded, inputs)
    first = run.window.first if run.window else 0  # scores [B, n, Q, S] of earlier queries are hid
    boxes = [form.box[:, :, first:] if form.box.ndim == 4 else form.box for form in forms.values()]
    assert max(float(box.max()) for box in boxes if box.numel()) < most


def test_a_point_has_its_value_as_bounds():
    view, inputs = inputs_of("bert", eps=0.0)
    bounded = BoundedModule(view, inputs)
    with torch.no_grad():
        lower, upper = bounded.compute_bounds(inputs, method="forward")
    assert torch.equal(lower, upper)


def test_positions_before_the_perturbed_word_stay_points():
    view, inputs = inputs_of("gpt", eps=0.5, positions=[5])
    _, forms = forward_forms.forms_of(BoundedModule(view, inputs), inputs)
    for name, form in forms.items():
        if form.c.ndim == 4 and form.c.shape[2] == transformers.LENGTH:
            assert not form.c[1:, :, :5].any() and not form.box[:, :5].any(), name


def test_huge_sets_have_no_nan_and_prove_nothing():
    bounded = BoundedModule(*inputs_of("llama", eps=0.0))
    for eps in (1e3, 1e30, 1e200):
        _, inputs = inputs_of("llama", eps=eps, positions=[3])
        with torch.no_grad():
            lower, upper = bounded.compute_bounds(inputs, method="forward")
        assert not lower.isnan().any() and not upper.isnan().any() and (lower < upper).all()


# ------------------------------------------------------------------------------- networks

NETS = {
    "relu": models.Net(),
    "tanh and sigmoid": models.Net(acts=("tanh", "sigmoid")),
    "skips": models.Net(residual=True, hidden=(16, 16, 16), skip_hidden=True),
    "constants": models.Net(hidden=(16, 16), long_skip=True, constants=True),
    "an activation first": models.Net(act_first=True),
    "tokens": models.Net(tokens=3),
}


def region(kind, net, eps):
    shape = (2, net.tokens, net.inputs) if net.tokens else (2, net.inputs)
    x = torch.randn(*shape)
    if kind == "box":
        ends = x - eps * torch.rand(shape), x + eps * torch.rand(shape)
        return models.Region(x, float("inf"), eps, *ends)
    return models.Region(x, {"linf": float("inf"), "l2": 2.0, "l1": 1.0}[kind], eps)


@pytest.mark.parametrize("name", NETS)
def test_bounds_of_networks_hold(name):
    net = NETS[name]
    model = models.build(net).eval()
    bounded = BoundedModule(model, region("l2", net, 0.1).center)
    for kind, eps in (("linf", 0.05), ("l2", 0.5), ("l1", 5.0), ("box", 0.5), ("linf", 5.0)):
        among = region(kind, net, eps)
        inputs = (among.bounded(),)
        with torch.no_grad():
            lower, upper = bounded.compute_bounds(inputs, method="forward")
            points = among.random(1000)
            y = model(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        margin = ROUNDING * y.abs().max()
        assert (y >= lower - margin).all() and (y <= upper + margin).all()
        check_forms(bounded, inputs)


def test_symbols_of_errors_tighten_and_their_budget_is_kept():
    net = models.Net(inputs=12, hidden=(32, 32), width=24)
    model, among = models.build(net).eval(), region("linf", net, 0.05)
    widths = []
    for symbols in (0, 40, 1024):
        bounded = BoundedModule(model, among.center, bound_opts={"form_symbols": symbols})
        with torch.no_grad():
            lower, upper = bounded.compute_bounds((among.bounded(),), method="forward")
        widths.append(float((upper - lower).mean()))
    assert widths[2] < widths[1] <= widths[0]


def test_gradients_reach_the_weights():
    net = models.Net(acts=("tanh",))
    model, among = models.build(net), region("linf", net, 0.05)
    bounded = BoundedModule(model, among.center)
    bounded.train()
    lower, _ = bounded.compute_bounds((among.bounded(),), method="forward")
    lower.sum().backward()
    weight = next(model.parameters())
    found, step = weight.grad[0, 0].clone(), 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0] += sign * step
            low, _ = bounded.compute_bounds((among.bounded(),), method="forward")
            weight[0, 0] -= sign * step
            values.append(low.sum())
    difference = (values[0] - values[1]) / (2 * step)
    assert torch.allclose(found, difference, rtol=1e-4, atol=1e-6)  # of central differences


# ---------------------------------------------------------------------------------- costs


def test_rows_go_back_while_they_cost_no_more_than_the_pass_or_little():
    from lirpa_megatron.forward.costs import Costs

    costs = Costs(way=10**9)  # GPT-2 small at 16 tokens: the last norm reads 768 numbers
    assert not costs.affords(768, 2, None) and costs.spent == 0
    assert costs.affords(768, 769, None) and not costs.affords(768, 769, None)
    assert costs.affords(768, 2, 1024) and not costs.affords(768, 769, 0)
    small = Costs(way=10**6)
    assert all(small.affords(1024, 2, None) for _ in range(10))
    assert not small.affords(2048, 10**6, None)


def test_a_pass_counts_the_products_with_weights_and_of_attention():
    view, inputs = inputs_of("gpt", eps=1e-3, positions=[3])
    bounded = BoundedModule(view, inputs)
    run, _ = forward_forms.forms_of(bounded, inputs)
    T, h, f, V = transformers.LENGTH, transformers.HIDDEN, transformers.FFN, transformers.VOCABULARY
    moving = T - 3  # words before the perturbed one stand still
    layer = moving * (4 * h * h + 2 * h * f + 2 * T * h)
    last = moving * 2 * h * h + 2 * h * h + 2 * h * f + 2 * T * h  # one query
    assert run.costs.way == layer + last + h * V


# ----------------------------------------------------------------------------- bad input


def test_what_a_forward_method_cannot_do_is_said_in_a_line():
    view, inputs = inputs_of("gpt", eps=0.01)
    bounded = BoundedModule(view, inputs)
    with pytest.raises(NotImplementedError, match="return_A"):
        bounded.compute_bounds(inputs, method="forward", return_A=True)
    with pytest.raises(UserError, match="order=3 is for sets of at most 8 dimensions"):
        bounded.set_bound_opts({"order": 3})
        bounded.compute_bounds(inputs, method="forward")
    with pytest.raises(ValueError, match="order is 9"):
        bounded.set_bound_opts({"order": 9})
    outward = BoundedModule(*inputs_of("gpt", eps=0.01), bound_opts={"rounding": "outward"})
    with pytest.raises(NotImplementedError, match="outward"):
        outward.compute_bounds(inputs, method="forward")


def test_the_command_line_s_degree_is_of_the_forward_methods():
    from lirpa_megatron.verify.sentences.options import SentenceOptions

    options = SentenceOptions(method="forward", order=3)
    options.check()
    assert options.bound_opts()["order"] == 3 and options.key()["order"] == 3
    assert "order" not in SentenceOptions().key()
    for wrong in ({"method": "CROWN", "order": 2}, {"method": "forward", "order": 9}):
        with pytest.raises(UserError, match="--order"):
            SentenceOptions(**wrong).check()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_an_operator_without_a_rule_is_enclosed_at_every_degree(order):
    """Softmax over features, and a gate behind it that reads its coefficients."""

    class Gate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)

        def forward(self, x):
            return self.a(x).tanh() * self.b(x)

    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.Softmax(-1), Gate(), torch.nn.Linear(6, 3)
    ).eval()
    x, D = torch.randn(2, 4), 0.3 * torch.randn(2, 2, 4)
    bounded = BoundedModule(model, x, {"order": order})
    lower, upper = bounded.compute_bounds(
        (BoundedTensor(x, PerturbationSegments(x, D)),), method="forward"
    )
    t = 2 * torch.rand(500, 2, 2) - 1
    y = model(x + torch.einsum("nbd,bdf->nbf", t, D))
    assert (y >= lower - ROUNDING).all() and (y <= upper + ROUNDING).all()
    assert (upper - lower).isfinite().all()


def test_directions_of_another_shape_are_refused():
    x = torch.zeros(2, 3, 4)
    for shape in ((2, 3, 4), (2, 1, 3, 5), (1, 1, 3, 4), (2, 0, 3, 4)):
        with pytest.raises(UserError, match="directions have shape"):
            PerturbationSegments(x, torch.zeros(shape))


def test_segments_are_a_set_for_crown_too():
    view, inputs = segments("bert", 2, 0.01)
    bounded = BoundedModule(view, inputs)
    box = inputs[0].ptb
    ends = PerturbationLpNorm(x_L=box.x_L, x_U=box.x_U)
    around = (BoundedTensor(inputs[0].as_subclass(torch.Tensor), ends), *inputs[1:])
    with torch.no_grad():
        lower, upper = bounded.compute_bounds(inputs, method="CROWN")
        wider = bounded.compute_bounds(around, method="CROWN")
    assert (lower >= wider[0] - 1e-12).all() and (upper <= wider[1] + 1e-12).all()
    assert (upper - lower).mean() < 0.7 * (wider[1] - wider[0]).mean()
