"""megatron-core's parallel layers with all their flags, bounded as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layers import around, drawn_input, drawn_weights, shard
from ranks import pool
from torch import nn

from lirpa_megatron import BoundedModule


class Pairs(nn.Module):
    """Column, activation, Row, twice, with every bias where the flags put it."""

    def __init__(self, column_flags, row_flags, bias=True):
        super().__init__()
        self.layers = nn.ModuleList()
        for i, (w, b) in enumerate(drawn_weights(6, 12, 8, 16, 4)):
            kind, flags = ("row", row_flags) if i % 2 else ("column", column_flags)
            b = b if bias else None
            self.layers.append(shard(kind, w.shape[1], w.shape[0], w, b, **flags))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x, outside = layer(x)
            x = x if outside is None else x + outside
            x = torch.relu(x) if i < 3 else x
        return x


class FullPairs(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.layers = nn.ModuleList()
        for w, b in drawn_weights(6, 12, 8, 16, 4):
            layer = nn.Linear(w.shape[1], w.shape[0], bias=bias).double()
            layer.weight.data.copy_(w)
            if bias:
                layer.bias.data.copy_(b)
            self.layers.append(layer)

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            x = torch.relu(x) if i < 3 else x
        return x


def _bounds(model, x, methods=("IBP", "CROWN-IBP", "CROWN"), **opts):
    bounded = BoundedModule(model, x, bound_opts=opts)
    return {m: bounded.compute_bounds(x=(around(x),), method=m) for m in methods}


def _compare(model, full, x, **opts):
    """Largest difference of the sharded model's bounds from the full model's, over the width."""
    torch.set_default_dtype(torch.float64)
    errors = {"forward": (BoundedModule(model, x)(x) - full(x)).abs().max().item()}
    ours, theirs = _bounds(model, x, **opts), _bounds(full, x)
    for method, (lower, upper) in theirs.items():
        width = (upper - lower).mean()
        difference = torch.stack(ours[method]) - torch.stack((lower, upper))
        errors[method] = (difference.abs().max() / width).item()
    return errors


def _flags_against_full(column_flags, row_flags, bias):
    torch.set_default_dtype(torch.float64)
    return _compare(Pairs(column_flags, row_flags, bias), FullPairs(bias), drawn_input())


FLAGS = {
    "plain": ({}, {}, True),
    "no bias": ({}, {}, False),
    "skip_bias_add": ({"skip_bias_add": True}, {"skip_bias_add": True}, True),
    "gathered between": ({"gather_output": True}, {"input_is_parallel": False}, True),
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_bounds_with_every_flag_equal_those_of_the_full_layers(name, size):
    for errors in pool(size).run(_flags_against_full, *FLAGS[name]):
        assert max(errors.values()) < 1e-10, errors  # float64 rounding over sums of 16 terms


def _gather_in_every_pass():
    torch.set_default_dtype(torch.float64)
    model = Pairs({"gather_output": True}, {"input_is_parallel": False})
    return _compare(model, FullPairs(), drawn_input(), final_rows="own", max_spec_rows=2)


def test_gathered_layers_are_exact_in_chunked_spec_sharded_passes():
    for errors in pool(2).run(_gather_in_every_pass):
        assert max(errors.values()) < 1e-10, errors


def _sequence_parallel():
    """Megatron's own forward on sequence shards, against the facade's on the full sequence."""
    from megatron.core.tensor_parallel.mappings import (
        gather_from_sequence_parallel_region,
        scatter_to_sequence_parallel_region,
    )

    torch.set_default_dtype(torch.float64)
    model = Pairs({"sequence_parallel": True}, {"sequence_parallel": True})
    x = drawn_input(batch=8)
    theirs = gather_from_sequence_parallel_region(model(scatter_to_sequence_parallel_region(x)))
    bounded = BoundedModule(model, x)
    return (bounded(x) - theirs).abs().max().item(), _compare(model, FullPairs(), x)


def test_sequence_parallel_layers_are_bounded_as_the_full_function_they_compute():
    for difference, errors in pool(2).run(_sequence_parallel):
        assert difference < 1e-12
        assert max(errors.values()) < 1e-10, errors


class SharedHidden(nn.Module):
    """A hidden layer used twice: one module, one operator, tied weights."""

    def __init__(self):
        super().__init__()
        (w1, b1), (w2, b2) = drawn_weights(6, 12, 6)
        self.up = shard("column", 6, 12, w1, b1)
        self.down = shard("row", 12, 6, w2, b2)

    def forward(self, x):
        for _ in range(2):
            x = x + self.down(torch.relu(self.up(x)[0]))[0]
        return x


class FullSharedHidden(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = drawn_weights(6, 12, 6)

    def forward(self, x):
        (w1, b1), (w2, b2) = self.parts
        for _ in range(2):
            x = x + F.linear(torch.relu(F.linear(x, w1, b1)), w2, b2)
        return x


def _tied_and_frozen():
    torch.set_default_dtype(torch.float64)
    model, full = SharedHidden(), FullSharedHidden()
    errors = _compare(model, full, drawn_input())
    model.up.weight.requires_grad_(False)
    bounded = BoundedModule(model, drawn_input()).train()
    lower, _ = bounded.compute_bounds(x=(around(drawn_input()),), method="CROWN")
    lower.sum().backward()
    state = {
        "frozen": model.up.weight.requires_grad,
        "frozen gradient": model.up.weight.grad,
        "tied gradient": model.down.weight.grad.abs().sum().item(),
    }
    bounded.eval()
    lower, _ = bounded.compute_bounds(x=(around(drawn_input()),), method="CROWN")
    return errors, state, lower.requires_grad, model.down.weight.requires_grad


def test_tied_weights_are_exact_and_frozen_weights_stay_frozen():
    for errors, state, eval_graph, trainable in pool(2).run(_tied_and_frozen):
        assert max(errors.values()) < 1e-10, errors
        assert state["frozen"] is False and state["frozen gradient"] is None
        assert state["tied gradient"] > 0
        assert not eval_graph, "eval() makes parameters constants of the bounds"
        assert trainable, "eval() of the bounded module must not freeze the model"


class WithVocabulary(nn.Module):
    """A hidden pair and an output layer over a vocabulary of 12, sharded or gathered; its weight
    may come from outside, as Megatron's tied output layer takes it."""

    def __init__(self, gather, tied):
        super().__init__()
        (w1, b1), (w2, b2), (w3, _) = drawn_weights(6, 8, 6, 12)
        self.up, self.down = shard("column", 6, 8, w1, b1), shard("row", 8, 6, w2, b2)
        self.out = shard("column", 6, 12, w3, None, gather_output=gather,
                         skip_weight_param_allocation=tied)
        self.shared = self._shard(w3) if tied else None

    @staticmethod
    def _shard(weight):
        from lirpa_megatron.parallel import runtime

        part = nn.Parameter(weight.chunk(runtime.tp_size())[runtime.tp_rank()].clone())
        part.tensor_model_parallel, part.partition_dim = True, 0
        return part

    def forward(self, x):
        x = self.down(torch.relu(self.up(x)[0]))[0]
        return self.out(x, weight=self.shared)[0]


def _vocabulary(gather, tied):
    torch.set_default_dtype(torch.float64)
    from lirpa_megatron.parallel import runtime

    (w1, b1), (w2, b2), (w3, _) = drawn_weights(6, 8, 6, 12)
    full = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6), nn.Linear(6, 12, bias=False))
    for layer, w, b in ((full[0], w1, b1), (full[2], w2, b2), (full[3], w3, None)):
        layer.weight.data.copy_(w)
        if b is not None:
            layer.bias.data.copy_(b)
    x, C = drawn_input(), torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1))
    steps = {"optimize_bound_args": {"iteration": 3, "optimizer": "sgd"}}
    ours, theirs = (BoundedModule(m, x, steps) for m in (WithVocabulary(gather, tied), full))
    errors = {}
    for method in ("IBP", "CROWN-IBP", "CROWN", "CROWN-Optimized"):
        for c in (None, C):
            if c is None and not gather and method == "CROWN-Optimized":
                continue
            expected = torch.stack(theirs.compute_bounds(x=(around(x),), C=c, method=method))
            part = slice(None)
            mine = c
            if not gather:
                width = 12 // runtime.tp_size()
                part = slice(runtime.tp_rank() * width, (runtime.tp_rank() + 1) * width)
                mine = None if c is None else c[..., part]
            got = torch.stack(ours.compute_bounds(x=(around(x),), C=mine, method=method))
            if c is None:
                expected = expected[..., part]
            errors[method, c is None] = (got - expected).abs().max().item()
    return errors


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_a_vocabulary_output_layer_works_sharded_and_gathered(gather, tied):
    for errors in pool(2).run(_vocabulary, gather, tied):
        assert max(errors.values()) < 1e-10, errors


def _sharded_output_optimized():
    x = drawn_input().float()
    model = WithVocabulary(False, False).float()
    BoundedModule(model, x).compute_bounds(x=(around(x),), method="CROWN-Optimized")


def test_alpha_crown_of_a_sharded_output_without_c_is_refused_by_name():
    for outcome in pool(2).outcomes(_sharded_output_optimized):
        assert outcome.error == "NotImplementedError"
        assert "gather_output=True" in outcome.message


class Selected(nn.Module):
    """Gathered features of which each rank takes its own choice, as attention with fewer
    key/value groups than ranks does."""

    def __init__(self):
        super().__init__()
        (w1, b1), _, (w3, b3) = drawn_weights(6, 8, 12, 4)
        self.up, self.down = shard("column", 6, 8, w1, b1), shard("row", 12, 4, w3, b3)

    def forward(self, x):
        from lirpa_megatron.adapters.linear_facades import gather_features, select_from_region
        from lirpa_megatron.adapters.traceable import collectives_of

        tp = getattr(self.up, "tp", None) or collectives_of(self)  # of the facade, or as it is
        x = gather_features(torch.relu(self.up(x)[0]), tp)
        return self.down(torch.relu(select_from_region(x, _chosen(tp.size, tp.rank), tp)))[0]


def _chosen(size, rank):
    """Twelve of eight features, some of them twice; this rank's part of the choice."""
    return torch.tensor([0, 1, 2, 6, 7, 1, 5, 4, 3, 1, 0, 7]).chunk(size)[rank]


def _selected():
    torch.set_default_dtype(torch.float64)
    (w1, b1), _, (w3, b3) = drawn_weights(6, 8, 12, 4)
    full = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    with torch.no_grad():
        full[0].weight.copy_(w1), full[0].bias.copy_(b1)
        full[2].weight.copy_(torch.eye(8)[_chosen(1, 0)]), full[2].bias.zero_()
        full[4].weight.copy_(w3), full[4].bias.copy_(b3)
    x, model = drawn_input(), Selected()
    errors = _compare(model, full, x, **{"final_rows": "own", "max_spec_rows": 3})
    errors |= {(m, "whole"): e for m, e in _compare(model, full, x).items()}
    gradients = []
    for module, weight in ((model, model.up.weight), (full, full[0].weight)):
        bounded = BoundedModule(module, x).train()
        lower, upper = bounded.compute_bounds(x=(around(x),), method="CROWN")
        gradients.append(torch.autograd.grad((upper - lower).sum(), weight)[0])
    return errors, gradients[0], gradients[1]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_features_that_ranks_select_from_a_gathered_value_are_exact(size):
    for rank, (errors, ours, full) in enumerate(pool(size).run(_selected)):
        assert max(errors.values()) < 1e-10, errors
        torch.testing.assert_close(ours, full.chunk(size)[rank], rtol=1e-10, atol=1e-12)


def _expert_layer():
    torch.set_default_dtype(torch.float64)
    model = Pairs({}, {})
    model.layers[2].is_expert = True
    BoundedModule(model, drawn_input())


def test_expert_layers_are_refused_by_their_name():
    for outcome in pool(2).outcomes(_expert_layer):
        assert outcome.error == "NotImplementedError"
        assert "layers.2" in outcome.message and "expert" in outcome.message


def _columns_in_a_row():
    (w1, b1), (w2, b2) = drawn_weights(6, 12, 24)
    first, second = shard("column", 6, 12, w1, b1), shard("column", 6, 24, w2[:, :6], b2)

    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            return self.second(self.first(x)[0])[0]

    torch.set_default_dtype(torch.float64)
    BoundedModule(Wrong(), drawn_input())


def test_a_column_on_a_sharded_value_is_refused_instead_of_bounded_wrongly():
    for outcome in pool(2).outcomes(_columns_in_a_row):
        assert outcome.error == "NotImplementedError" and "sharded already" in outcome.message


def _replica_bounds():
    """In each TP=2 group of a TP=2 x DP=2 world: other data, so other bounds, per replica."""
    import torch.distributed as dist

    torch.set_default_dtype(torch.float64)
    replica = dist.get_rank() // 2
    x = drawn_input() + replica
    errors = _compare(Pairs({}, {}), FullPairs(), x)
    bounded = BoundedModule(Pairs({}, {}), x)
    # The replicas do different work: only one of them bounds a second time.
    for _ in range(1 + replica):
        lower, _ = bounded.compute_bounds(x=(around(x),), method="CROWN")
    return errors, lower.detach(), bounded.context.collectives.size


@pytest.mark.slow
def test_tensor_parallel_groups_inside_a_larger_world_keep_to_themselves():
    results = pool(4, 2).run(_replica_bounds)
    assert [size for _, _, size in results] == [2] * 4
    for errors, _, _ in results:
        assert max(errors.values()) < 1e-10, errors
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.allclose(results[0][1], results[2][1])
