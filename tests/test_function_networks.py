"""Networks of plain torch code with the elementwise functions, maximum, minimum and softmax."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Region, attack, relative_error
from ranks import pool
from torch import nn
from torch_functions import FUNCTIONS, WIDTH, Between

from lirpa_megatron import (
    METHODS,
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    parallelize,
)
from lirpa_megatron.errors import UserError
from lirpa_megatron.operators.elementwise import functions
from lirpa_megatron.operators.elementwise.curves import Curve

BY_NAME = pytest.mark.parametrize("name", FUNCTIONS)
ITERATIONS = {"optimize_bound_args": {"iteration": 3, "lr_alpha": 0.2}}
SHARDED = ["softplus, beta 3", "ELU, alpha 0.4", "sin", "PReLU", "maximum", "softsign"]
"""What the default run looks at on two ranks, one after another in one network."""


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network(name: str, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Between:
    """Linear(function(Linear x)), the same in every process."""
    return Between(FUNCTIONS[name](), scale=scale).to(dtype).eval()


def inputs(eps: float, dtype: torch.dtype = torch.float64, seed: int = 1) -> Region:
    generator = torch.Generator().manual_seed(seed)
    center = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    return Region(center.to(dtype), float("inf"), eps)


def bounds_of(
    model: nn.Module, where: Region, method: str, **alpha: object
) -> tuple[torch.Tensor, torch.Tensor]:
    options = {"optimize_bound_args": {"iteration": 5, "lr_alpha": 0.2, **alpha}}
    module = BoundedModule(model, where.center, options)
    lower, upper = module.compute_bounds(x=(where.bounded(),), method=method)
    return lower.detach(), upper.detach()


def violation(
    model: nn.Module, where: Region, bounds: tuple, count: int, steps: int
) -> torch.Tensor:
    """The worst of an attack on the network in float64, relative to what its sums round to."""
    exact, set_ = model.double(), where.to(torch.float64)
    lower, upper = (b.double() for b in bounds)
    if not (lower.isfinite().any() or upper.isfinite().any()):
        return torch.tensor(-math.inf)  # e^500 is infinite, and so are its bounds
    worst = attack(exact, set_, lower, upper, count=count, steps=steps)
    size = torch.cat([lower[lower.isfinite()].abs(), torch.ones(1)]).amax()
    return worst / size


@BY_NAME
def test_no_point_violates_the_bounds_and_alpha_helps(name: str):
    model, where, widths = network(name), inputs(0.3), {}
    module = BoundedModule(model, where.center, ITERATIONS)
    for method in ("IBP", "CROWN", "CROWN-Optimized"):
        lower, upper = (
            b.detach() for b in module.compute_bounds(x=(where.bounded(),), method=method)
        )
        torch.manual_seed(0)
        assert attack(model, where, lower, upper, count=40, steps=4) <= 1e-12 * upper.abs().max()
        widths[method] = (upper - lower).mean()
    assert all(width.isfinite() for width in widths.values())
    assert widths["CROWN-Optimized"] <= widths["CROWN"] * (1 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@BY_NAME
def test_a_hundred_thousand_attacks_at_every_width(name: str, dtype: torch.dtype):
    """Random points, corners and gradients at widths of 1e-6 to 1e3, by each method.

    The network is evaluated in float64. Its linear layers round in the bounds' type: 1e-5 of the
    size of the bounds in float32, 1e-11 in float64 (the attack finds nothing beyond a tenth).
    """
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    for width in (1e-6, 1e-3, 0.1, 1.0, 10.0, 1e3):
        for method in ("IBP", "CROWN", "CROWN-Optimized"):
            torch.set_default_dtype(dtype)
            where = inputs(width / 2, dtype, seed=3)
            bounds = bounds_of(network(name, dtype), where, method)
            torch.set_default_dtype(torch.float64)
            torch.manual_seed(0)
            model = network(name, dtype)
            assert violation(model, where, bounds, count=3000, steps=10) <= tolerance


@settings(derandomize=True, deadline=None, max_examples=8, database=None)
@given(
    names=st.lists(st.sampled_from(list(FUNCTIONS)), min_size=1, max_size=2),
    eps=st.sampled_from([0.0, 1e-3, 0.1, 1.0, 30.0]), seed=st.integers(0, 50),
    method=st.sampled_from(METHODS),
)
def test_functions_of_functions(names, eps, seed, method):
    made = [FUNCTIONS[name]() for name in names]

    def function(x: torch.Tensor) -> torch.Tensor:
        for one in made:
            x = one(x)
        return x

    model = Between(function, seed, scale=0.5).double().eval()
    for module in made:
        if isinstance(module, nn.Module):
            module.double()
    where = inputs(eps, seed=seed)
    bounds = bounds_of(model, where, method)
    assert not any(b.isnan().any() for b in bounds)
    assert violation(model, where, bounds, count=60, steps=4) <= 1e-11


# ------------------------------------------------------------------------- several ranks


class Chain(nn.Module):
    """Linear, function, Linear for each of some functions, added to what comes in."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(4, 8) for _ in names)
        self.down = nn.ModuleList(nn.Linear(8, 4) for _ in names)
        self.functions = [FUNCTIONS[name]() for name in names]
        generator = torch.Generator().manual_seed(3)
        for parameter in self.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = 0.4 * drawn
        for i, function in enumerate(self.functions):
            if isinstance(function, nn.Module):
                setattr(self, f"function{i}", function.double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down, function in zip(self.up, self.down, self.functions, strict=True):
            x = x + down(function(up(x)))
        return x


def chain_bounds(names: list[str], methods: tuple[str, ...]) -> tuple[list, int]:
    """On each rank: (lower, upper) by each method, and how many layers are sharded."""
    torch.set_default_dtype(torch.float64)
    model = parallelize(Chain(names).eval())
    sharded = sum(getattr(p, "tensor_model_parallel", False) for p in model.parameters())
    where = inputs(0.05)
    # Adam turns rounding into steps where a gradient is about 0; see test_exactness.
    alpha = {"iteration": 3, "optimizer": "sgd"}
    return [[b.numpy() for b in bounds_of(model, where, m, **alpha)] for m in methods], sharded


@cache
def one_device(names: tuple[str, ...], methods: tuple[str, ...]) -> list:
    return chain_bounds(list(names), methods)[0]


def compare(tp: int, names: list[str], methods: tuple[str, ...]) -> None:
    want = one_device(tuple(names), methods)
    for result, sharded in pool(tp).run(chain_bounds, names, methods):
        assert sharded == 3 * len(names)  # Column's weight and bias, Row's weight
        for method, got, expected in zip(methods, result, want, strict=True):
            lower, upper = (torch.from_numpy(b) for b in expected)
            error = relative_error([torch.from_numpy(b) for b in got], [lower, upper],
                                   upper - lower)
            # Alpha moves with the rounding of sums over ranks; see test_activation_ops.
            assert error <= (1e-8 if method == "CROWN-Optimized" else 1e-10), method


def test_sharded_networks_of_functions_have_the_bounds_of_one_device():
    compare(2, SHARDED, METHODS)


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(
    "name", [n for n in FUNCTIONS if "softmax" not in n and "channel" not in n and n != "sign"
             and "constant" not in n
             and n != "minimum"]  # torch.min may be a reduction: its layers stay replicated
)
def test_every_function_is_sharded_with_the_bounds_of_one_device(name, tp):
    compare(tp, [name], METHODS)


# ----------------------------------------------------------------------------- one entry


def test_one_entry_in_the_table_is_all_that_a_function_needs():
    @functions.elementwise("GudermannLike", {"aten::asinh": ()})
    def asinh() -> Curve:
        return Curve(torch.asinh, lambda x: (1 + x * x).rsqrt(), "+-", (0.0,))

    try:
        model, where = Between(torch.asinh).double().eval(), inputs(0.4)
        module = BoundedModule(model, where.center, ITERATIONS)
        kinds = [type(node).__name__ for node in module.named_nodes().values()]
        assert "BoundGudermannLike" in kinds
        widths = []
        for method in ("IBP", "CROWN", "CROWN-Optimized"):
            lower, upper = module.compute_bounds(x=(where.bounded(),), method=method)
            assert attack(model, where, lower, upper) <= 1e-12
            widths.append((upper - lower).mean().item())
        assert widths == sorted(widths, reverse=True)
    finally:
        del functions.FUNCTIONS["GudermannLike"]


def test_what_no_entry_covers_is_refused_by_name():
    x = torch.rand(2, 4)
    weight = nn.Parameter(torch.ones(4))

    def refused(function) -> str:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = weight

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return function(x, self.weight)

        with pytest.raises((UserError, NotImplementedError)) as error:
            BoundedModule(Model(), x)
        return str(error.value)

    assert "the exponent of a power" in refused(lambda x, w: x**w)
    assert "dimension 0" in refused(lambda x, w: x.softmax(0) + w)
    assert "alpha must be positive" in refused(lambda x, w: F.celu(x, -1.0) + w)
    assert "ELU with alpha -1, scale 1" in refused(lambda x, w: F.elu(x, -1.0) + w)
    assert "the base must be positive" in refused(lambda x, w: (-2.0) ** x + w)


# ------------------------------------------------------------------------------- softmax


@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_softmax_alone_has_the_exact_range_by_ibp(function):
    class Alone(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x, 1)

    where = inputs(0.7)
    lower, upper = bounds_of(Alone(), where, "IBP")
    n = where.center.shape[1]
    turn = 2 * torch.eye(n) - 1  # row j: x_j up, the others down
    for sign, bound in ((1, upper), (-1, lower)):
        corners = function(where.center[:, None] + sign * 0.7 * turn, 2)
        value = corners.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(bound, value, atol=1e-12, rtol=1e-12)


def test_the_weights_of_a_softmax_still_add_up_to_one():
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.Softmax(-1)).double().eval()
    where = inputs(0.5)
    module = BoundedModule(model, where.center)
    C = torch.ones(2, 1, WIDTH)
    lower, upper = module.compute_bounds(x=(where.bounded(),), C=C, method="CROWN")
    assert (upper - lower).max() < 1e-13 and (lower - 1).abs().max() < 1e-13


@pytest.mark.parametrize("name", ["softmax", "log-softmax"])
@pytest.mark.parametrize("eps", [0.0, 0.1, 50.0, 1e4])
def test_softmax_holds_and_is_tight_at_every_width(name, eps):
    model, where = network(name), inputs(eps)
    for method in ("IBP", "CROWN", "CROWN-Optimized"):
        lower, upper = bounds_of(model, where, method)
        torch.manual_seed(0)
        assert violation(model, where, (lower, upper), count=200, steps=8) <= 1e-12
        if eps == 0:
            torch.testing.assert_close(lower, upper, atol=1e-12, rtol=1e-12)
        if name == "softmax":
            hull = model.last.weight.amax(1) - model.last.weight.amin(1)
            assert (upper - lower <= hull * (1 + 1e-9) + 1e-12).all() or method == "IBP"


# ---------------------------------------------------------------------- certified training


@pytest.mark.parametrize("name", ["PReLU of each channel", "sqrt", "maximum", "softmax",
                                  "log-softmax"])
def test_gradients_of_bounds_are_those_of_differences(name):
    model, where = network(name).train(), inputs(0.2)
    module = BoundedModule(model, where.center, ITERATIONS)

    def width() -> torch.Tensor:
        lower, upper = module.compute_bounds(x=(where.bounded(),), method="CROWN")
        return (upper - lower).sum()

    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(width(), parameters.values(), allow_unused=True)
    step = 1e-6
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        if gradient is None:
            continue
        assert gradient.isfinite().all()
        flat = parameter.data.view(-1)
        for i in range(0, len(flat), max(1, len(flat) // 2)):
            values = []
            for sign in (1, -1):
                flat[i] += sign * step
                with torch.no_grad():
                    values.append(width().item())
                flat[i] -= sign * step
            slope = (values[0] - values[1]) / (2 * step)
            assert gradient.reshape(-1)[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_bounds_of_an_output_that_is_a_function_stay_in_its_range():
    """A line through an interval leaves the range of the function; the output's bounds do not."""
    lower, upper = torch.tensor([[-1.0, -4.0, 3.0]]), torch.tensor([[2.0, 6.0, 3.5]])
    where = BoundedTensor((lower + upper) / 2, PerturbationLpNorm(x_L=lower, x_U=upper))
    for function in (torch.sigmoid, torch.abs, lambda x: x.softmax(1)):
        class Model(nn.Module):
            def forward(self, x: torch.Tensor, function=function) -> torch.Tensor:
                return function(x)

        module = BoundedModule(Model(), where.data)
        exact = module.compute_bounds(x=(where,), method="IBP")
        for method in ("CROWN", "CROWN-Optimized"):
            for got, want in zip(module.compute_bounds(x=(where,), method=method), exact,
                                 strict=True):
                torch.testing.assert_close(got.detach(), want, atol=1e-12, rtol=0)
        only, _ = module.compute_bounds(x=(where,), method="CROWN", bound_upper=False)
        torch.testing.assert_close(only.detach(), exact[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["tanh", "x * x", "log-sigmoid", "abs"])
def test_alpha_finds_the_best_line_of_wide_intervals(name):
    """One neuron: the best line below (or above) it is flat at the least (greatest) value, or
    passes through an end; CROWN's own lines are far from there."""
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(1, 1)
            self.last.weight.data.fill_(1.0)
            self.last.bias.data.zero_()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(FUNCTIONS[name]()(x))

    for ends in ((-6.0, 4.0), (-1.0, 3.0), (-5.0, 0.5)):
        lower, upper = (torch.tensor([[x]]) for x in ends)
        where = BoundedTensor((lower + upper) / 2, PerturbationLpNorm(x_L=lower, x_U=upper))
        module = BoundedModule(Model(), where.data)
        widths = [
            (high - low).item()
            for low, high in (module.compute_bounds(x=(where,), method=m)
                              for m in ("IBP", "CROWN-Optimized"))
        ]
        # Below abs the best slope, 0, is where the gradient jumps: Adam goes back and forth.
        assert widths[1] <= (1.04 if name == "abs" else 1.02) * widths[0], ends
