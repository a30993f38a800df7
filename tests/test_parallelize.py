"""parallelize: any stack of Linear layers, sharded by its graph, never changed in function."""

from __future__ import annotations

import pytest
import torch
from ranks import pool
from torch import nn

from lirpa_megatron import explain, parallelize
from lirpa_megatron.adapters.parallel_plan import plan_layers


class Residual(nn.Module):
    """Definition order is not graph order, on purpose."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)
        self.down = nn.ModuleList([nn.Linear(16, 8), nn.Linear(12, 8)])
        self.up = nn.ModuleList([nn.Linear(8, 16), nn.Linear(8, 12)])
        self.embed = nn.Linear(20, 8)

    def forward(self, x):
        x = self.embed(torch.flatten(x, 1))
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return self.head(torch.relu(x))


class Gated(nn.Module):
    """Two writers of one stream: both become Column."""

    def __init__(self):
        super().__init__()
        self.gate, self.value, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(torch.sigmoid(self.gate(x)) * self.value(x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.same, self.out = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.out(torch.relu(self.same(torch.relu(self.same(x)))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(torch.relu(self.b(torch.relu(self.a(x)))))


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(x)) if x.sum() > 0 else self.b(x)


class HiddenIsAnOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        hidden = torch.relu(self.a(x))
        return self.b(hidden) + torch.flatten(hidden, 1)


def _mlp(*widths):
    layers = []
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(a, b)]
    return nn.Sequential(*layers)


NETS = {
    "mlp": (lambda: _mlp(6, 16, 8, 16, 3), 6),
    "uneven widths": (lambda: _mlp(6, 15, 8, 10, 12, 3), 6),
    "no bias": (lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 3)), 6),
    "residual": (Residual, 20),
    "gated": (Gated, 6),
    "called twice": (Twice, 8),
    "tied weights": (Tied, 8),
    "data dependent": (DataDependent, 8),
    "hidden is read by other operators": (HiddenIsAnOutput, 8),
}


def _kinds(net, size):
    return {name: decision.kind for name, decision in plan_layers(net, size).items()}


def test_the_graph_decides_and_not_the_order_of_definition():
    # The residual stream has only Linear writers and readers: sharding it reaches every layer.
    assert _kinds(Residual(), 4) == {
        "head": "row", "down.0": "column", "down.1": "column",
        "up.0": "row", "up.1": "row", "embed": "column",
    }
    # Its width 8 cannot be split in 16, nor can the hidden width 12; the hidden width 16 can.
    assert _kinds(Residual(), 16) == {
        "head": "replicated", "down.0": "row", "down.1": "replicated",
        "up.0": "column", "up.1": "replicated", "embed": "replicated",
    }
    assert _kinds(Gated(), 2) == {"gate": "column", "value": "column", "out": "row"}


def test_the_choice_of_pairs_shards_the_most_weights():
    # 6-16 16-8 | 8-16 16-3 rather than 16-8 8-16 alone, which a greedy choice would take
    assert list(_kinds(_mlp(6, 16, 8, 16, 3), 4).values()) == ["column", "row"] * 2


@pytest.mark.parametrize("net, size, layer, words", [
    (_mlp(6, 15, 3), 2, "0", "15 is not divisible by tensor-parallel size 2"),
    (Twice(), 2, "same", "called 2 times"),
    (Tied(), 2, "a", "shares a parameter with b"),
    (HiddenIsAnOutput(), 2, "a", "flatten"),
    (DataDependent(), 2, "a", "cannot trace"),
])
def test_what_stays_replicated_is_explained(net, size, layer, words):
    decision = plan_layers(net, size)[layer]
    assert decision.kind == "replicated" and words in decision.reason
    assert words in explain(net, size)


def _function(name):
    torch.manual_seed(0)
    make, features = NETS[name]
    net = make().double()
    x = torch.randn(4, features, dtype=torch.float64)
    sharded = parallelize(net)
    names = {n for n, _ in net.named_parameters()}
    assert {n for n, _ in sharded.named_parameters()} == names
    own = sum(p.numel() for p in sharded.parameters())
    return (sharded(x) - net(x)).abs().max().item(), own / sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_function_and_the_names_are_unchanged(name, size):
    for difference, _ in pool(size).run(_function, name):
        assert difference < 1e-12  # float64 sums of at most 20 terms


def test_a_rank_holds_its_share_of_the_weights():
    (_, share), *_ = pool(4).run(_function, "mlp")
    assert share < 0.35  # 1/4 of the weights and Column biases, all of the Row biases


def _on_meta():
    with torch.device("meta"):
        net = _mlp(6, 16, 8)
    sharded = parallelize(net)
    return [(n, tuple(p.shape), p.is_meta, p.partition_dim)
            for n, p in sharded.named_parameters() if getattr(p, "tensor_model_parallel", False)]


def test_modules_without_storage_can_be_sharded():
    assert pool(2).run(_on_meta)[1] == [
        ("0.weight", (8, 6), True, 0), ("0.bias", (8,), True, 0), ("2.weight", (8, 8), True, 1),
    ]


def test_without_a_process_group_the_module_is_returned_as_it_is():
    net = _mlp(4, 4, 4)
    assert parallelize(net) is net
