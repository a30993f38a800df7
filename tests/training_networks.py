"""What tests of training share: a small network, a box, tokens with their targets."""

from __future__ import annotations

import math

import torch
import transformers
from torch import nn

from lirpa_megatron import BoundedTensor, PerturbationLpNorm

BATCH = 2


def tokens():
    """ids [4, 8] and labels: next tokens and classes."""
    generator = torch.Generator().manual_seed(3)
    shape = BATCH, transformers.LENGTH
    ids = torch.randint(0, transformers.VOCABULARY, shape, generator=generator)
    targets = torch.randint(0, transformers.VOCABULARY, (BATCH,), generator=generator)
    return ids, targets, targets % 2


def network(scale=1.0):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def box(x, eps):
    return BoundedTensor(x, PerturbationLpNorm(norm=math.inf, eps=eps))
