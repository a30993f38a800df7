"""The live model is what is compared with: no bounds of another function, nothing left behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from live_models import ball, clean, network, patched
from torch import nn

from lirpa_megatron import BoundedModule
from lirpa_megatron.errors import LiveModelError


def test_a_patched_class_is_found_and_the_first_module_that_differs_is_named_with_both_values():
    net = network().eval()
    with patched(nn.Linear, lambda self, y: y * 1.001 if self is net[2] else y):
        with pytest.raises(LiveModelError) as caught:
            BoundedModule(net, clean())
    text = str(caught.value)
    assert text.startswith("2: the model itself computes ") and "its graph of bounds" in text
    live, graph = (float(text.split(part)[1].split()[0].rstrip(";")) for part in (
        "itself computes", "graph of bounds"
    ))
    assert abs(live / graph - 1.001) < 1e-4 and "\n" not in text


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.one(x) if bool(x.sum() > -1) else self.other(x)


class Reading(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(6, 3), how
        self.register_buffer("limit", torch.tensor(5.0))

    def forward(self, x):
        y = self.linear(x)
        if self.how == "a number":
            return y * max(1.0, y.max().item())
        if self.how == "equality":
            return y if not torch.equal(y, y + 1) else y * 2
        return y * 2 if self.limit > 4 and x.shape[0] == 2 else y  # of a constant and a shape


@pytest.mark.parametrize("how", ["a branch", "a number", "equality"])
def test_values_of_the_input_that_decide_what_is_computed_are_refused_with_their_line(how):
    model = Branches() if how == "a branch" else Reading(how)
    with pytest.raises(LiveModelError, match=r"values of the input \(\w+ at .*\.py:\d+ \(forward"):
        BoundedModule(model.eval(), clean())


def test_constants_and_shapes_may_decide():
    model = Reading("a constant").eval()
    lower, upper = BoundedModule(model, clean()).compute_bounds(x=(ball(),), method="IBP")
    assert (lower <= model(clean())).all() and (model(clean()) <= upper).all()


def test_a_branch_that_is_not_looked_for_is_found_where_its_values_differ():
    bounded = BoundedModule(Branches().eval(), clean(), {"check_live": False})
    bounded.compute_bounds(x=(ball(x=clean() - 5),), method="IBP")  # nobody looks


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.factor = nn.Linear(6, 3), 2.0
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x):
        return self.linear(x) * self.factor + self.shift


@pytest.mark.parametrize("change", ["number", "buffer", "parameter", "own class"])
def test_a_model_that_was_changed_after_building_is_found(change):
    model = Scaled().eval()
    bounded = BoundedModule(model, clean())
    bounded.compute_bounds(x=(ball(),), method="IBP")
    if change == "number":
        model.factor = 3.0
    elif change == "buffer":
        model.shift = torch.zeros(3)
    elif change == "parameter":
        model.linear.weight = nn.Parameter(torch.zeros(3, 6))
    else:
        model.__class__ = type("Other", (Scaled,), {"forward": lambda self, x: self.linear(x)})
    with pytest.raises(LiveModelError):
        bounded.compute_bounds(x=(ball(),), method="IBP")


def test_new_values_of_the_same_parameters_are_not_a_change():
    model = network().eval()
    bounded = BoundedModule(model, clean())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    lower, upper = bounded.compute_bounds(x=(ball(),), method="CROWN")
    assert (lower <= model(clean())).all() and (model(clean()) <= upper).all()


class Counting(nn.Module):
    """Notes on itself, counts, draws numbers, and says whether gradients are recorded."""

    def __init__(self):
        super().__init__()
        self.net, self.calls, self.seen = network(), 0, []
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x):
        if not torch.jit.is_tracing():
            self.calls += 1
            self.note = "there"
            self.total += 1
            torch.rand(3)
            self.seen.append(torch.is_grad_enabled())
        return self.net(x)


def test_one_forward_pass_is_run_and_leaves_nothing_behind():
    model = Counting().eval()
    bounded = BoundedModule(model, clean())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls, runs = model.calls, bounded.live.runs
    model.seen.clear()
    state = torch.get_rng_state()
    note = getattr(model, "note", None)
    bounded.compute_bounds(x=(ball(),), method="CROWN")
    assert bounded.live.runs == runs + 1 and model.seen == [False]
    assert bounded.live.seconds > 0
    assert model.calls == calls and getattr(model, "note", None) == note
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_batch_norms_counters_and_modes_are_as_before():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model.eval()
    bounded = BoundedModule(model, clean())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()  # bounded is the function that it had when it was built
    model[0].eval()
    bounded.compute_bounds(x=(ball(),), method="IBP")
    assert [m.training for m in model] == [False, True, True, True]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_in_training_only_the_first_of_so_many_calls_is_looked_at():
    bounded = BoundedModule(network(), clean(), {"check_live_every": 3}).train()
    runs = [bounded.live.runs]
    for _ in range(4):
        bounded.compute_bounds(x=(ball(),), method="CROWN-IBP")
        runs.append(bounded.live.runs)
    assert [b - a for a, b in zip(runs, runs[1:], strict=False)] == [1, 0, 0, 1]
    with torch.no_grad():
        bounded.compute_bounds(x=(ball(),), method="CROWN-IBP")
    assert bounded.live.runs == runs[-1] + 1


def test_method_auto_compares_once():
    bounded = BoundedModule(network().eval(), clean())
    runs = bounded.live.runs
    bounded.compute_bounds(x=(ball(5.0),), method="auto")
    assert bounded.live.runs == runs + 1
    bounded.compute_bounds(x=(ball(5.0),), method="IBP")
    assert bounded.live.runs == runs + 2


def test_the_check_is_switched_off_by_name():
    net = network().eval()
    with patched(nn.Linear, lambda self, y: y * 2 if self is net[2] else y):
        bounded = BoundedModule(net, clean(), {"check_live": False})
        bounded.compute_bounds(x=(ball(),), method="IBP")
    assert bounded.live is None
    with pytest.raises(ValueError, match="check_live"):
        BoundedModule(net, clean(), {"check_live": "no"})
    with pytest.raises(ValueError, match="check_live_every"):
        BoundedModule(net, clean(), {"check_live_every": 0})


class Cancelling(nn.Module):
    """float32 rounding of 6e-5 in outputs of about 1: (1e3 + a) - (1e3 + b)."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)
        with torch.no_grad():
            self.a.bias.add_(1e3)
            self.b.bias.add_(1e3)

    def forward(self, x):
        if torch.jit.is_tracing():
            return self.a(x) - self.b(x)
        return self.a.bias - self.b.bias + F.linear(x, self.a.weight) - F.linear(x, self.b.weight)


def test_rounding_that_cancellation_makes_large_is_told_from_another_function():
    torch.manual_seed(0)
    model = Cancelling().eval()
    bounded = BoundedModule(model, clean(), {"check_live": True})
    assert bounded.live.runs == 2 and bounded.live.difference > 1e-5  # the second in float64
    with torch.no_grad():
        model.a.weight[0, 0] += 1e-3  # a change of that size in the function itself is seen
    kept = model.a.weight
    model.a.weight = nn.Parameter(kept.detach().clone())
    with pytest.raises(LiveModelError, match=r"a: weight was replaced"):
        bounded.compute_bounds(x=(ball(),), method="IBP")


def test_a_forward_that_raises_is_one_clear_line():
    net = network().eval()
    bounded = BoundedModule(net, clean())

    def broken(self, y):
        raise ZeroDivisionError("no\nsuch luck")

    with patched(nn.Linear, broken), pytest.raises(LiveModelError) as caught:
        bounded.compute_bounds(x=(ball(),), method="IBP")
    assert "ZeroDivisionError" in str(caught.value) and "check_live=False" in str(caught.value)
    assert "\n" not in str(caught.value)
