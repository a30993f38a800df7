"""docs/extending.md: its code is run here as it stands, and the bounds that it makes attacked."""

import re
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from models import Region, attack, drawn
from ranks import pool
from torch import nn

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm, parallelize
from lirpa_megatron.adapters import registry
from lirpa_megatron.errors import LiveModelError
from lirpa_megatron.operators.elementwise import functions
from lirpa_megatron.parallel import runtime

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "extending.md").read_text("utf-8")
ROUNDING = 1e-12
"""Bounds and outputs are float64 numbers of size 1, sums of less than a hundred terms."""


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def code(section):
    """The names that the code of a section defines."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    names = {"__name__": "extending"}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    return names


def bounds(model, x, given, methods):
    """Method -> (lower, upper)."""
    module = BoundedModule(model, x, {"optimize_bound_args": {"iteration": 3}})
    return {m: tuple(b.detach() for b in module.compute_bounds(x=(given,), method=m))
            for m in methods}


# --------------------------------------------------------------------------- an activation


class Between(nn.Module):
    """torch.asinh between two layers: one of width 8, which two ranks share."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x):
        return self.last(torch.asinh(self.first(x)))


def bounds_with_the_entry():
    torch.set_default_dtype(torch.float64)
    code("An activation function")
    try:
        model = parallelize(Between().eval().requires_grad_(False))
        where = Region(torch.linspace(-1, 1, 8).view(2, 4), float("inf"), 0.3)
        return bounds(model, where.center, where.bounded(), ("IBP", "CROWN", "CROWN-Optimized"))
    finally:
        del functions.FUNCTIONS["Asinh"]


def test_an_activation_is_one_entry():
    found = bounds_with_the_entry()
    where = Region(torch.linspace(-1, 1, 8).view(2, 4), float("inf"), 0.3)
    for lower, upper in found.values():
        assert attack(Between(), where, lower, upper) <= ROUNDING
    widths = [float((upper - lower).mean()) for lower, upper in found.values()]
    assert widths == sorted(widths, reverse=True)
    for other in pool(2).run(bounds_with_the_entry):
        for method in ("IBP", "CROWN"):
            torch.testing.assert_close(other[method], found[method], rtol=0, atol=ROUNDING)


# -------------------------------------------------------------------------- a Megatron module


@pytest.fixture
def session():
    with runtime.session():
        yield


def hidden():
    """A box around hidden states [B, S, h] that differ at each sample and position."""
    center = drawn(2, 3, 4, seed=1)
    return Region(center, float("inf"), 0.2)


def with_the_module(function):
    """`function` of the page's module, registered and with the same weights at every size."""
    torch.set_default_dtype(torch.float64)
    names = code("A Megatron module")
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1, hidden_size=4, ffn_hidden_size=8, num_attention_heads=2,
        use_cpu_initialization=True, tensor_model_parallel_size=runtime.tp_size(),
        params_dtype=torch.float64, gradient_accumulation_fusion=False, init_method_std=0.5,
    )
    model = names["FeedForward"](config).eval().requires_grad_(False)
    try:
        return function(model)
    finally:
        registry.unregister(names["FeedForward"])


def bounds_with_the_adapter():
    where = hidden()
    return with_the_module(
        lambda model: bounds(model, where.center, where.bounded(), ("IBP", "CROWN"))
    )


def test_a_megatron_module_is_one_adapter_and_one_registration(session):
    def run(x):
        y, bias = model(x.transpose(0, 1))
        return (y + bias).transpose(0, 1)

    found = bounds_with_the_adapter()
    model, where = with_the_module(lambda model: model), hidden()
    for lower, upper in found.values():
        assert attack(run, where, lower, upper) <= ROUNDING
    for other in pool(2).run(bounds_with_the_adapter):
        for method, of_one in found.items():
            torch.testing.assert_close(other[method], of_one, rtol=0, atol=ROUNDING)


def test_an_adapter_is_compared_with_its_module(session):
    def changed(model):
        where = hidden()
        module = BoundedModule(model, where.center)
        model.down.bias += 0.1  # shared with the facade: the same function
        module.compute_bounds(x=(where.bounded(),), method="IBP")
        model.forward = lambda x: (x, model.down.bias)
        with pytest.raises((LiveModelError, NotImplementedError), match="FeedForward|forward"):
            module.compute_bounds(x=(where.bounded(),), method="IBP")

    with_the_module(changed)


# -------------------------------------------------------------------------- a set of inputs


class Segment(Region):
    """The points center + t direction, for the attack."""

    def __init__(self, center, direction):
        super().__init__(center, float("inf"), 0.0)
        self.direction = direction

    def vertex(self, direction):
        along = (direction * self.direction).flatten(2).sum(-1)[..., None, None].sign()
        return self.center + along.view(*direction.shape[:2], 1) * self.direction


def bounds_of_the_segment():
    torch.set_default_dtype(torch.float64)
    where = Segment(torch.linspace(-1, 1, 8).view(2, 4), torch.linspace(0.1, -0.4, 8).view(2, 4))
    segment = code("A perturbation set")["PerturbationSegment"](where.center, where.direction)
    box = PerturbationLpNorm(norm=float("inf"), x_L=segment.x_L, x_U=segment.x_U)
    model = Relu()
    sharded = parallelize(model)
    return where, *(
        bounds(sharded, where.center, BoundedTensor(where.center, ptb), ("IBP", "CROWN"))
        for ptb in (segment, box)
    )


class Relu(Between):
    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


def test_a_set_of_inputs_is_one_class():
    where, found, in_box = bounds_of_the_segment()
    for lower, upper in found.values():
        assert attack(Relu(), where, lower, upper) <= ROUNDING
    width, of_box = ((u - l).mean() for l, u in (found["CROWN"], in_box["CROWN"]))
    assert width < 0.8 * of_box  # the set is a line in a box of four dimensions
    for _, other, _ in pool(2).run(bounds_of_the_segment):
        for method, of_one in found.items():
            torch.testing.assert_close(other[method], of_one, rtol=0, atol=ROUNDING)


def other_segments():
    torch.set_default_dtype(torch.float64)
    x, model = torch.zeros(1, 4), parallelize(Relu())
    direction = torch.full((1, 4), 0.1)
    if runtime.tp_rank() == 1:
        direction[0, 0] = -0.1  # the same box, another segment in it
    segment = code("A perturbation set")["PerturbationSegment"](x, direction)
    BoundedModule(model, x).compute_bounds(x=(BoundedTensor(x, segment),), method="CROWN")


def test_ranks_with_other_sets_in_the_same_box_are_told_apart():
    for outcome in pool(2).outcomes(other_segments):
        assert outcome.error == "SPMDError" and "direction of input 0" in outcome.message
