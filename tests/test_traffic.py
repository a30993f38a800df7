"""Bytes that the collectives send: what the layouts' formulas say, no more."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from ranks import pool
from torch import nn

ROOT = Path(__file__).resolve().parents[1]


def _predicted_bytes(*arguments):
    spec = importlib.util.spec_from_file_location("run", ROOT / "benchmarks" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.predicted_bytes(*arguments)


def _sent(widths, batch, moves):
    from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm, parallelize

    torch.manual_seed(0)
    layers = []
    for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
        layers += [nn.ReLU()] * (i > 0) + [nn.Linear(a, b)]
    x = torch.rand(batch, widths[0])
    options = {"moves": moves, "sparse_intermediate_bounds": False}  # known without the weights
    bounded = BoundedModule(parallelize(nn.Sequential(*layers)).eval(), x, options)
    ball = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=0.1))
    bounded.context.collectives.traffic.clear()  # of the forward pass that the constructor makes
    bounded.compute_bounds(x=(ball,), method="CROWN")
    return bounded.context.collectives.traffic.total_bytes


@pytest.mark.parametrize("widths", [(6, 16, 8, 16, 8, 16, 4), (6, 24, 10, 16, 12, 16, 8, 3)])
@pytest.mark.parametrize("size, batch", [(2, 3), (4, 1)])
def test_a_crown_run_sends_the_predicted_number_of_bytes(widths, size, batch):
    sent = {}
    for moves in ("A", "weights", "auto"):
        sent[moves] = _predicted_bytes(widths, size, batch, moves)
        assert pool(size).run(_sent, widths, batch, moves) == [sent[moves]] * size
    assert sent["auto"] <= min(sent["A"], sent["weights"])
