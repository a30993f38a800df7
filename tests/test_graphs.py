"""Graphs drawn at random of all operators of plain modules: no violation, no unnamed refusal."""

import pytest
import torch
import torch.nn.functional as F
from boxes import boxed, violation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lirpa_megatron import BoundedModule
from lirpa_megatron.errors import UserError

METHODS = ("IBP", "CROWN", "CROWN-Optimized")
REFUSED = (NotImplementedError, UserError)

UNARY = {
    "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "gelu": F.gelu,
    "silu": F.silu, "abs": torch.abs, "exp": lambda x: torch.exp(x.tanh()),
    "square": lambda x: x**2,
    "cube": lambda x: x**3, "leaky": F.leaky_relu, "elu": F.elu, "softplus": F.softplus,
    "clamp": lambda x: x.clamp(-0.5, 1), "sin": torch.sin, "reciprocal": lambda x: 1 / (x * x + 1),
    "sqrt": lambda x: torch.sqrt(x * x + 1), "softmax": lambda x: F.softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "negative": lambda x: 2 - x / 3, "where": lambda x: torch.where(
        torch.arange(x.shape[-1]) % 2 == 0, x, 0.25),
}
MOVES = {
    "flip": lambda x: x.flip(-1), "roll": lambda x: x.roll(1, -1),
    "slice": lambda x: x[..., : max(1, x.shape[-1] - 1)], "even": lambda x: x[..., ::2],
    "double": lambda x: x.repeat_interleave(2, -1)[..., : x.shape[-1] + 1],
    "fold": lambda x: x.unsqueeze(-1).expand(*x.shape, 2).sum(-1),
    "turn": lambda x: x.unsqueeze(1).transpose(1, 2).flatten(1),
    "pad": lambda x: F.pad(x, (1, 0), value=0.5),
    "means": lambda x: torch.cat([x, x.mean(-1, keepdim=True)], -1),
}
BINARY = {
    "add": torch.add, "subtract": torch.sub, "product": torch.mul, "maximum": torch.maximum,
    "minimum": torch.minimum,
}


class Graph(nn.Module):
    """Steps over a list of values [B, n]: a step reads values by their place and appends one."""

    def __init__(self, steps):
        super().__init__()
        self.steps, self.layers, widths = steps, nn.ModuleDict(), [4]
        torch.manual_seed(len(steps))
        for i, (kind, name, *places) in enumerate(steps):
            a, b = (widths[place % len(widths)] for place in (*places, 0)[:2])
            if kind == "linear":
                self.layers[str(i)] = nn.Linear(a, int(name))
                widths.append(int(name))
            elif kind == "move":
                widths.append(MOVES[name](torch.zeros(1, a)).shape[-1])
            else:
                widths.append({"unary": a, "join": a + b, "binary": min(a, b)}[kind])

    def forward(self, x):
        values = [x]
        for i, (kind, name, *places) in enumerate(self.steps):
            a, b = (values[place % len(values)] for place in (*places, 0)[:2])
            if kind == "linear":
                y = self.layers[str(i)](a)
            elif kind == "unary":
                y = UNARY[name](a)
            elif kind == "move":
                y = MOVES[name](a)
            elif kind == "join":
                y = torch.cat([a, b], 1)
            else:
                n = min(a.shape[1], b.shape[1])
                y = BINARY[name](a[:, :n], b[:, -n:])
            values.append(y)
        return values[-1]


PLACE = st.integers(0, 6)
STEP = st.one_of(
    st.tuples(st.just("linear"), st.sampled_from(["2", "3", "5"]), PLACE),
    st.tuples(st.just("unary"), st.sampled_from(sorted(UNARY)), PLACE),
    st.tuples(st.just("move"), st.sampled_from(sorted(MOVES)), PLACE),
    st.tuples(st.just("join"), st.just(""), PLACE, PLACE),
    st.tuples(st.just("binary"), st.sampled_from(sorted(BINARY)), PLACE, PLACE),
)
DRAWN = given(
    steps=st.lists(STEP, min_size=2, max_size=7), eps=st.sampled_from([0.0, 1e-3, 0.1, 0.5]),
    batch=st.integers(1, 2),
)


def check(steps, eps, batch):
    model = Graph(steps).double().eval()
    torch.manual_seed(batch)
    x = torch.randn(batch, 4, dtype=torch.float64)
    args = {"optimize_bound_args": {"iteration": 3}}
    try:
        module = BoundedModule(model, x, args)
    except REFUSED as error:
        assert "Graph" in str(error) or "depend" in str(error), error  # by its name
        return
    for method in METHODS:
        try:
            lower, upper = module.compute_bounds((boxed(x, eps),), method=method)
        except REFUSED as error:
            assert str(error), error
            continue
        size = 1 + max(y.nan_to_num(0, 0, 0).abs().max().item() for y in (lower, upper, model(x)))
        # float64; bounds of products of products may be far larger than what is attained.
        assert violation(model, x, lower, upper, eps, steps=3) <= 1e-11 * size


@settings(derandomize=True, deadline=None, max_examples=25, database=None)
@DRAWN
def test_bounds_of_drawn_graphs_hold_and_refusals_are_named(steps, eps, batch):
    check(steps, eps, batch)


@pytest.mark.slow
@settings(deadline=None, max_examples=1500, database=None, derandomize=True)
@DRAWN
def test_bounds_of_many_drawn_graphs_hold_and_refusals_are_named(steps, eps, batch):
    check(steps, eps, batch)
