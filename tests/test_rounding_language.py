"""Outward rounding of products, norms, softmax and attention, compared with 200 bits (mpmath)."""

from __future__ import annotations

from typing import Any

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
import transformers
from exact_graphs import evaluate, exact
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from models import drawn
from ranks import pool
from torch import nn

from lirpa_megatron import (
    METHODS,
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    next_token_margins,
    perturb_tokens,
)
from lirpa_megatron.errors import BoundsError
from lirpa_megatron.parallel import runtime

OUTWARD = {"rounding": "outward"}
CANCELS = 1e8


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ------------------------------------------------------------------------- plain modules


class Small(nn.Module):
    """x -> W2 f(W1 x): f a gate, a norm or a softmax. With `cancels` W2 has columns 1e8 and -1e8 on
    neurons that are alike."""

    def __init__(self, kind: str, seed: int, cancels: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.other = nn.Linear(2, 4), nn.Linear(2, 4)
        self.second = nn.Linear(4, 2)
        self.norm = nn.RMSNorm(4, eps=1e-5) if kind == "rms" else nn.LayerNorm(4)
        for i, parameter in enumerate(self.parameters()):
            parameter.data = drawn(*parameter.shape, seed=seed + 13 * i)
            parameter.requires_grad_(False)
        if cancels:
            for layer in (self.first, self.other):
                layer.weight[1::2] = layer.weight[::2]
                layer.bias[1::2] = layer.bias[::2] + 1e-3
            for parameter in self.norm.parameters():
                parameter[1::2] = parameter[::2]
            self.second.weight[:, ::2] = CANCELS
            self.second.weight[:, 1::2] = -CANCELS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        if self.kind == "gate":
            y = F.silu(y) * self.other(x)
        elif self.kind == "softmax":
            y = torch.softmax(y, -1)
        else:
            y = self.norm(y)
        return self.second(y)


KINDS = ("gate", "layer", "rms", "softmax")


def outside(net: nn.Module, x: torch.Tensor, eps: float, method: str, options: Any) -> float:
    """By how much bounds exclude exact values; negative: they do not."""
    module = BoundedModule(net.eval(), x, options)
    given = BoundedTensor(x, PerturbationLpNorm(eps=eps))
    bounds = module.compute_bounds(x=(given,), method=method)
    shares = torch.tensor([[0.0, 0], [1, 1], [1, -1], [-1, 1], [-1, -1]])
    shares = torch.cat((shares, 2 * torch.rand(6, 2) - 1))
    return worst(module, bounds, [
        (exact(x) + mp.mpf(eps) * exact(share),) for share in shares
    ])


def worst(module: BoundedModule, bounds: Any, points: list[tuple]) -> float:
    lower, upper = (exact(bound).flatten() for bound in bounds)
    found = mp.mpf(-(10**30))
    for point in points:
        y = evaluate(module, *point).flatten()
        found = max(found, (lower - y).max(), (y - upper).max())
    return float(found)


@pytest.mark.parametrize("kind", KINDS)
def test_no_exact_value_of_a_small_network_is_outside(kind):
    for seed, eps, method in [
        (1, 0.0, "IBP"), (1, 0.0, "CROWN"), (2, 1e-9, "CROWN"), (3, 0.1, "IBP"),
        (3, 0.1, "CROWN-IBP"), (3, 0.1, "CROWN"), (4, 3.0, "CROWN"), (3, 0.1, "CROWN-Optimized"),
    ]:
        x = drawn(1, 2, seed=seed)
        assert outside(Small(kind, seed), x, eps, method, OUTWARD) <= 0, (eps, method)


@pytest.mark.parametrize("kind", KINDS[:3])  # a softmax's bounds have more margin than it needs
def test_without_widening_bounds_of_weights_that_cancel_are_wrong(kind):
    wrong = 0
    for seed in range(2):
        net, x = Small(kind, seed, cancels=True), drawn(1, 2, seed=seed)
        for method in ("IBP", "CROWN"):
            try:
                wrong += outside(net, x, 0.0, method, {}) > 0
            except BoundsError:  # they exclude the model's own output
                wrong += 1
            assert outside(net, x, 0.0, method, OUTWARD) <= 0, (seed, method)
    assert wrong, "no bound was wrong: nothing was tested"


# ----------------------------------------------------------------------- language models


def gpt(kind: str) -> GPTModel:
    """One layer: "gpt" with LayerNorm and learned positions, "llama" with RMSNorm, SwiGLU, rotary
    positions and grouped queries. The same weights at every size: releases before 0.16 draw others
    for a sharded gate."""
    llama = kind == "llama"
    more: dict[str, Any] = {
        "normalization": "RMSNorm", "gated_linear_unit": True, "activation_func": F.silu,
        "num_query_groups": 2, "add_bias_linear": False,
    } if llama else {}
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, init_method_std=0.4,
        ffn_hidden_size=16, use_cpu_initialization=True,
        tensor_model_parallel_size=runtime.tp_size(), **more,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm" if llama else None)
    model = GPTModel(
        config, spec, vocab_size=8, max_sequence_length=4, parallel_output=False,
        position_embedding_type="rope" if llama else "learned_absolute",
    )
    return transformers.filled(model)


IDS = torch.tensor([[3, 1, 5]])


def bounded(kind: str, options: Any, eps: float, norm: float = float("inf")) -> tuple:
    """(BoundedModule of the margins of the next token, its inputs)."""
    torch.set_default_dtype(torch.float64)
    model = gpt(kind)
    inputs = (*perturb_tokens(model, IDS, eps=eps, norm=norm), torch.tensor([2]))
    return BoundedModule(next_token_margins(model), inputs, options), inputs


def bounds(kind: str, options: Any, calls: list[tuple]) -> list:
    found = []
    for method, eps, norm in calls:
        module, inputs = bounded(kind, options, eps, norm)
        found.append(tuple(b.detach() for b in module.compute_bounds(inputs, method=method)))
    return found


def check_language_model(kind: str, tp: int, calls: list[tuple], most: float = 1e-8) -> None:
    """No exact value is outside, and ordinary bounds are widened by at most `most` of their width
    (1e-10 was measured at small radii)."""
    with runtime.session():
        ordinary = bounds(kind, {}, calls)
        for result in pool(tp).run(bounds, kind, OUTWARD, calls):
            for (method, eps, norm), (low, high), (l, u) in zip(
                calls, result, ordinary, strict=True
            ):
                width = (u - l).clamp(min=1e-300)
                added = torch.stack([(l - low) / width, (high - u) / width])[..., width[0] > 1e-9]
                assert added.max() <= most, (method, added.max())
                module, (hidden, target) = bounded(kind, OUTWARD, eps)
                share = 2 * torch.rand(3, *hidden.shape) - 1
                if norm == 2:
                    share /= 1.001 * share.flatten(1).norm(dim=1)[:, None, None, None]
                points = [exact(hidden) + mp.mpf(eps) * exact(s) for s in share]
                assert worst(module, (low, high), [(p, exact(target)) for p in points]) <= 0


INF = float("inf")


@pytest.mark.parametrize("kind, tp", [
    ("gpt", 1), *(pytest.param(*case, marks=pytest.mark.slow)
                  for case in (("llama", 2), ("gpt", 2), ("llama", 1))),
])
def test_no_exact_margin_of_a_language_model_is_outside(kind, tp):
    calls = [("CROWN", 0.01, INF), ("CROWN-IBP", 0.001, INF), ("CROWN", 0.001, 2)]
    check_language_model(kind, tp, calls)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("tp", [1, 2])
def test_no_exact_margin_is_outside_by_any_method(kind, tp):
    calls = [(method, eps, INF) for method in METHODS for eps in (1e-6, 0.003, 0.3)]
    # In boxes as wide as at 0.3 a norm's length may be 0, where 1/length is steepest (2e-8).
    check_language_model(kind, tp, calls, most=1e-6)
