"""Small random transformers of few inputs, as torch exports them."""

import itertools
import math
import warnings

import torch
from torch import nn

from lirpa_megatron import BoundedTensor, PerturbationLpNorm, parallelize
from lirpa_megatron.networks.network import Network
from lirpa_megatron.networks.onnx_import import read_onnx

TOKENS, WIDTH, HEADS, OUTPUTS = 3, 4, 2, 3
KINDS = (
    ("layer", nn.GELU, False), ("rms", nn.SiLU, True), ("none", nn.ReLU, False),
    ("layer", nn.ReLU, True), ("rms", nn.Tanh, False), ("none", nn.GELU, True),
)
"""Norms, activation, and whether it is a gate's."""


class _Rms(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * self.weight


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        shape = *x.shape[:2], HEADS, WIDTH // HEADS
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v
        return self.o(y.transpose(1, 2).reshape(x.shape))


class _Block(nn.Module):
    def __init__(self, norm, activation, gated):
        super().__init__()
        make = {"layer": lambda: nn.LayerNorm(WIDTH), "rms": _Rms, "none": nn.Identity}[norm]
        self.norms = nn.ModuleList(make() for _ in range(2))
        self.attention, self.act, self.gated = _Attention(), activation(), gated
        self.up, self.gate = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.norms[0](x))
        z = self.norms[1](x)
        y = self.act(self.up(z))
        return x + self.down(y * self.gate(z) if self.gated else y)


class Transformer(nn.Module):
    """Inputs -> tokens -> blocks -> the mean's logits."""

    def __init__(self, inputs, kind, blocks):
        super().__init__()
        self.tokens = nn.Linear(inputs, TOKENS * WIDTH)
        self.blocks = nn.Sequential(*(_Block(*kind) for _ in range(blocks)))
        self.head = nn.Linear(WIDTH, OUTPUTS)

    def forward(self, x):
        x = self.tokens(x).view(len(x), TOKENS, WIDTH)
        return self.head(self.blocks(x).mean(1))


def exported(seed, path, inputs=2, blocks=1):
    """A model with random weights, in the file."""
    torch.manual_seed(seed)
    model = Transformer(inputs, KINDS[seed % len(KINDS)], blocks).eval().requires_grad_(False)
    for p in model.parameters():
        p.mul_(1.5).add_(0.1 * torch.randn_like(p))
    model.tokens.weight.normal_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of its age
        torch.onnx.export(model, (torch.zeros(1, inputs),), str(path), dynamo=False,
                          input_names=["x"], opset_version=17)
    return model


def network_of(seed, folder, dtype=torch.float64, **sizes):
    """(torch's module in float64, the imported network, a box, rows)."""
    path = folder / f"{seed}.onnx"
    model = exported(seed, path, **sizes)
    return model.double(), imported(path, dtype), *box_of(seed, model.tokens.in_features, dtype)


def imported(path, dtype=torch.float64):
    """The network, on the ranks that there are."""
    result = read_onnx(path)
    network = Network.from_weights(result.description, result.weights, dtype)
    return parallelize(network.requires_grad_(False).eval())


def box_of(seed, n, dtype=torch.float64):
    """(low [n], high, two rows)."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.randn(n, generator=generator) / 2
    radius = 0.02 + 0.06 * torch.rand(n, generator=generator)
    rows = torch.randn(2, OUTPUTS, generator=generator)
    return tuple(t.to(dtype) for t in (center - radius, center + radius, rows))


def boxed(low, high):
    """Boxes [B, inputs]."""
    ends = PerturbationLpNorm(norm=float("inf"), x_L=low, x_U=high)
    return BoundedTensor(low / 2 + high / 2, ends)


def points_of(low, high, count, seed=0):
    """Points of a box [inputs], some of them its corners: [count, inputs]."""
    share = torch.rand(count, len(low), generator=torch.Generator().manual_seed(seed)).to(low)
    corners = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(low)))).to(low)
    share[: len(corners)] = corners
    return low + share * (high - low)
