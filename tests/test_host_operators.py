"""The list of auto_LiRPA's own operators that are used: each entry is attacked, by every method."""

import pytest
import torch
import torch.nn.functional as F
from boxes import boxed, violation
from torch import nn

from lirpa_megatron import METHODS, BoundedModule
from lirpa_megatron.compat.host_operators import HELD


class Facade(nn.Module):
    """Calls that reach the host as they are: the package's own modules make them so."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(2)
        self.function, self.a, self.b = function, nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.function(self.a(x)))


# As code of this package, whose calls are not replaced (`adapters.plain.functions`).
_W = torch.linspace(-1, 1, 64, dtype=torch.float64).view(8, 8)
_AS_OURS = {"__name__": "lirpa_megatron.test", "torch": torch, "W": _W}
exec(compile("""
def add(h): return torch.relu(h) + h + 0.5
def sub(h): return 0.5 - (torch.relu(h) - h)
def neg(h): return -torch.relu(h)
def mul(h): return 1.5 * torch.relu(h) * -2
def div(h): return torch.relu(h) / 4
def relu(h): return torch.relu(h)
def gemm(h): return torch.relu(h)
def identity(h): return torch.relu(h).clone()
def matmul(h): return torch.relu(h) @ W
def tanh(h): return torch.tanh(h)
def sigmoid(h): return torch.sigmoid(h)
""", "ours", "exec"), _AS_OURS)
CASES = {
    "onnx::Add": "add", "onnx::Sub": "sub", "onnx::Neg": "neg", "onnx::Mul": "mul",
    "onnx::Div": "div", "onnx::Relu": "relu", "onnx::Gemm": "gemm", "onnx::Identity": "identity",
    "onnx::MatMul": "matmul", "onnx::Tanh": "tanh", "onnx::Sigmoid": "sigmoid",
}


def convolution():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Unflatten(1, (2, 1, 3)), nn.Conv2d(2, 4, (1, 2), padding=(0, 1), bias=True), nn.ReLU(),
        nn.Conv2d(4, 2, (1, 3), stride=(1, 2), groups=2, bias=False), nn.Flatten(),
        nn.Linear(2, 3),
    )


def test_every_entry_of_the_list_is_attacked():
    assert set(HELD) == {*CASES, "onnx::Conv"}


@pytest.mark.parametrize("kind", sorted({*CASES, "onnx::Conv"}))
@pytest.mark.parametrize("eps", [1e-6, 0.3, 30.0])
def test_the_operators_of_the_host_that_are_used_hold(kind, eps):
    model = convolution() if kind == "onnx::Conv" else Facade(_AS_OURS[CASES[kind]])
    model = model.double().eval()
    torch.manual_seed(4)
    x = torch.randn(2, 6, dtype=torch.float64)
    module = BoundedModule(model, x)
    for method in METHODS:
        lower, upper = module.compute_bounds((boxed(x, eps),), method=method)
        # float64: some hundred roundings of values of the size of eps.
        assert violation(model, x, lower, upper, eps, steps=3) <= 1e-12 * max(1, 10 * eps)


@pytest.mark.parametrize("function", [F.softmax, torch.cumsum, torch.sort, torch.round, torch.fmod])
def test_operators_that_are_not_on_the_list_are_refused_by_name(function):
    class Calls(nn.Module):
        def forward(self, x):
            y = function(x, 1) if function is not torch.round else function(x)
            return y if isinstance(y, torch.Tensor) else y[0]

    if function is F.softmax:
        pytest.importorskip("lirpa_megatron")  # a later table of the exporter may have it
    try:
        module = BoundedModule(Calls(), torch.randn(2, 6))
    except NotImplementedError as error:
        assert function.__name__ in str(error) and "not supported" in str(error)
    else:
        assert any(type(node).__module__.startswith("lirpa_megatron")
                   for node in module.named_nodes().values())
