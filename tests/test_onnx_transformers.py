"""Transformers as torch exports them: the same function, and bounds as tight as in the library."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from ranks import pool
from torch import nn

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_megatron.adapters.parallel_plan import plan_layers
from lirpa_megatron.networks.network import Network
from lirpa_megatron.networks.onnx_import import read_onnx


class Attention(nn.Module):
    def __init__(self, h, heads, fused):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.q, self.k, self.v, self.o = (nn.Linear(h, h) for _ in range(4))

    def forward(self, x):
        shape = *x.shape[:2], self.heads, x.shape[2] // self.heads
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1) @ v
        return self.o(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, h, heads, fused, norm_first):
        super().__init__()
        self.attention, self.norm_first = Attention(h, heads, fused), norm_first
        self.norms = nn.ModuleList(nn.LayerNorm(h) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(h, 2 * h), nn.GELU(), nn.Linear(2 * h, h))

    def forward(self, x):
        if self.norm_first:
            x = x + self.attention(self.norms[0](x))
            return x + self.mlp(self.norms[1](x))
        x = self.norms[0](x + self.attention(x))
        return self.norms[1](x + self.mlp(x))


class Pictures(nn.Module):
    """A vision transformer: patches, a class token, positions, two blocks."""

    def __init__(self, fused=False, h=8):
        super().__init__()
        self.patches = nn.Conv2d(1, h, 2, 2)
        self.token, self.places = (nn.Parameter(torch.randn(1, n, h) / 2) for n in (1, 5))
        self.blocks = nn.Sequential(*(Block(h, 2, fused, True) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(h), nn.Linear(h, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class Words(nn.Module):
    """A BERT on embeddings."""

    def __init__(self, fused=False, h=8):
        super().__init__()
        self.places, self.norm = nn.Parameter(torch.randn(1, 3, h) / 3), nn.LayerNorm(h)
        self.blocks = nn.Sequential(*(Block(h, 2, fused, False) for _ in range(2)))
        self.pooler, self.head = nn.Linear(h, h), nn.Linear(h, 2)

    def forward(self, x):
        x = self.blocks(self.norm(x + self.places))
        return self.head(torch.tanh(self.pooler(x[:, 0])))


class Causal(nn.Module):
    """torch's own encoder, with a causal mask."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    def forward(self, x):
        return self.head(self.encoder(x, mask=self.mask).mean(1))


PICTURE, SENTENCE = (1, 1, 4, 4), (1, 3, 8)
MODELS = {
    "pictures, set 11": (Pictures, PICTURE, 11),
    "pictures, set 17, batch open": (lambda: Pictures(fused=True), PICTURE, 17),
    "words, set 20": (Words, SENTENCE, 20),
    "words, set 14": (lambda: Words(fused=True), SENTENCE, 14),
    "torch's encoder": (Causal, SENTENCE, 17),
}
LAYERS = {name: 1 if name == "torch's encoder" else 2 for name in MODELS}


def imported(name, folder):
    """(the torch module, the imported network, an input [1, n]) in float64, the file's weights."""
    make, shape, opset = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():  # away from the initial zeros, and weights that matter
            p.mul_(1.5).add_(0.1 * torch.randn_like(p))
    x, path = torch.randn(shape), str(folder / "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, of its age
        torch.onnx.export(
            model, (x,), path, dynamo=False, input_names=["x"], opset_version=opset,
            dynamic_axes={"x": {0: "batch"}} if "open" in name else None,
        )
    result = read_onnx(path)
    network = Network.from_weights(result.description, result.weights, torch.float64)
    return model.double(), network.requires_grad_(False).eval(), x.double().flatten(1)


def bounds(module, x, eps, method):
    ball = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=eps))
    lower, upper = module.compute_bounds(x=(ball,), method=method)
    return lower.detach(), upper.detach()


def reached(network, x, eps):
    """Ends of the outputs that gradient steps find."""
    ends = []
    for sign in (-1, 1):
        found = []
        for j in range(network.description.n_out):
            at = (x + eps * (2 * torch.rand(16, x.shape[1]) - 1)).requires_grad_()
            for _ in range(15):
                (g,) = torch.autograd.grad(sign * network(at)[:, j].sum(), at)
                at = (at + 0.4 * eps * g.sign()).clamp(x - eps, x + eps).detach().requires_grad_()
            found.append(sign * (sign * network(at)[:, j]).max().detach())
        ends.append(torch.stack(found))
    return ends


@pytest.mark.parametrize("name", MODELS)
def test_a_transformer_is_imported_as_attention_norms_and_gates(name, tmp_path):
    model, network, x = imported(name, tmp_path)
    ops = [layer.op for layer in network.description.layers]
    assert ops.count("attend") == ops.count("scores") == LAYERS[name]
    # Whatever an exporter writes in parts would be bounded as if the parts were independent.
    assert not {"softmax", "mul", "erf", "sqrt", "reciprocal", "power"} & set(ops)
    # The file has GELU's root of 2, the scale of scores and eps rounded to float32.
    torch.testing.assert_close(
        network(x), model(x.view(MODELS[name][1])), rtol=3e-7, atol=3e-7
    )


@pytest.mark.parametrize("name", ["pictures, set 11", "words, set 14", "torch's encoder"])
def test_bounds_of_a_transformer_hold(name, tmp_path):
    _, network, x = imported(name, tmp_path)
    module = BoundedModule(network, x)
    for eps, methods in ((0.002, ("IBP", "CROWN", "forward")), (0.05, ("CROWN", "forward"))):
        least, most = reached(network, x, eps)
        for method in methods:
            lower, upper = bounds(module, x, eps, method)
            # Rounding of float64 at values of order 1.
            assert (lower <= least + 1e-12).all() and (most - 1e-12 <= upper).all(), (method, eps)
            # Small balls are bounded as a first derivative has it, but for forward's remainder.
            if eps == 0.002 and method == "CROWN":
                assert (upper - lower).max() < 1.2 * (most - least).max()


@pytest.mark.parametrize("name", ["pictures, set 11", "words, set 20"])
def test_bounds_are_as_tight_as_those_of_the_module_that_was_exported(name, tmp_path):
    model, network, x = imported(name, tmp_path)
    ours, its = BoundedModule(network, x), BoundedModule(model, x.view(MODELS[name][1]))
    for method in ("IBP", "CROWN"):
        widths = []
        for module, center in ((ours, x), (its, x.view(MODELS[name][1]))):
            lower, upper = bounds(module, center, 0.01, method)
            widths.append((upper - lower).mean())
        # IBP goes through the same operators; the constants of the file are rounded to float32.
        assert widths[0] <= widths[1] * (1 + 1e-6), method


def test_alpha_tightens_the_bounds_of_a_transformer(tmp_path):
    _, network, x = imported("words, set 14", tmp_path)
    module = BoundedModule(network, x, bound_opts={"optimize_bound_args": {"iteration": 3}})
    least, most = reached(network, x, 0.03)
    crown = bounds(module, x, 0.03, "CROWN")
    lower, upper = bounds(module, x, 0.03, "CROWN-Optimized")
    assert (lower <= least + 1e-12).all() and (most - 1e-12 <= upper).all()
    assert (upper - lower).mean() < (crown[1] - crown[0]).mean()


@pytest.mark.parametrize("size, kinds", [(2, {"column", "row"}), (4, {"replicated"})])
def test_attention_is_sharded_by_whole_heads(size, kinds, tmp_path):
    _, network, _ = imported("words, set 14", tmp_path)
    layers = {layer.name: layer for layer in network.description.layers}
    (attend,) = (layer for layer in layers.values() if layer.name == "attend1")
    around = [name for name, layer in layers.items() if layer.inputs == ("attend1",)]
    assert attend.attributes["heads"] == 2
    names = [name for name in ("fc1", "fc2", "fc3", *around) if layers[name].op == "tokens"]
    plan = plan_layers(network, size)
    assert len(names) == 4 and {plan[f"layers.{name}"].kind for name in names} == kinds
    if size == 4:  # of 8 features, which 4 divides
        assert "2 heads, which tensor-parallel size 4" in plan["layers.fc1"].reason


def _bounds_of(weights, description, x):
    from lirpa_megatron.adapters.parallelize import parallelize

    network = Network.from_weights(description, weights, torch.float64).requires_grad_(False)
    network = parallelize(network.eval())
    found = [bounds(BoundedModule(network, x), x, 0.01, m) for m in ("IBP", "CROWN", "forward")]
    sharded = [type(m).__name__ for m in network.modules()]
    return found, network(x), sharded.count("ColumnLinear"), sharded.count("RowLinear")


@pytest.mark.parametrize("name", ["pictures, set 17, batch open", "torch's encoder"])
def test_two_ranks_compute_the_bounds_of_one(name, tmp_path):
    _, network, x = imported(name, tmp_path)
    task = dict(network.state_dict()), network.description, x
    one, two = pool(1).run(_bounds_of, *task)[0], pool(2).run(_bounds_of, *task)
    layers = LAYERS[name]
    for found, y, columns, rows in two:
        assert (columns, rows) == (4 * layers, 2 * layers)  # q, k, v and up; out and down
        torch.testing.assert_close(y, one[1], rtol=1e-12, atol=1e-12)
        # Sums in another order; forward doubles no remainder that rounding could decide.
        torch.testing.assert_close(found, one[0], rtol=1e-9, atol=1e-9)
