"""Plain modules, the same on both versions of auto_LiRPA: structure, constants, what is refused."""

import pytest
import torch
import torch.nn.functional as F
from boxes import EPS, boxed, violation
from torch import nn

from lirpa_megatron import METHODS, BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_megatron.errors import UserError


class Of(nn.Module):
    """A function of a linear layer's output h [B, ..., 8], its parameters drawn from a seed."""

    def __init__(self, function, inputs=6):
        super().__init__()
        torch.manual_seed(3)
        self.function, self.a, self.b = function, nn.Linear(inputs, 8), nn.Linear(8, 5)
        self.matrix, self.vector = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8))
        self.row = nn.Parameter(torch.randn(1, 2))
        self.norm = nn.BatchNorm1d(8)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.function(self, x, self.a(x))


def relu_sum(s, x, h):
    h = F.relu(h) * 1
    h += s.vector
    h -= 1
    return s.b(h)


CASES = {
    "view with the size of the batch": lambda s, x, h: s.b(F.relu(h).view(x.size(0), -1)),
    "flatten, unflatten, mean": lambda s, x, h: F.relu(h).unflatten(1, (2, 4)).mean(1),
    "slices and cat": lambda s, x, h: torch.cat([F.relu(h)[:, :3], h[:, 2:]], 1) + 1,
    "steps, negative and new dimensions": lambda s, x, h: F.relu(h)[:, None, 1:-1:2].squeeze(1),
    "index by a list": lambda s, x, h: s.b(F.relu(h)[:, [7, 6, 5, 4, 0, 0, 1, 2]]),
    "unsqueeze and transpose": lambda s, x, h: F.relu(h).unsqueeze(1).transpose(1, 2).squeeze(-1),
    "chunk and stack": lambda s, x, h: torch.stack(F.relu(h).chunk(2, 1), 2).flatten(1),
    "split": lambda s, x, h: sum(part.sum(1, keepdim=True) for part in F.relu(h).split([3, 5], 1)),
    "expand and repeat": lambda s, x, h: F.relu(h)[:, :1].expand(-1, 4) + h[:, :2].repeat(1, 2),
    "flip, roll": lambda s, x, h: s.b(F.relu(h).flip(1).roll(3, 1)),
    "pad": lambda s, x, h: F.relu(F.pad(h, (1, 2), value=-0.5)) - 1,
    "an output of shape [B]": lambda s, x, h: F.relu(h).sum(1),
    "a product with a vector": lambda s, x, h: F.relu(h) @ s.vector,
    "a product with a matrix": lambda s, x, h: F.relu(h) @ (s.matrix * 2),
    "a gate": lambda s, x, h: h * F.relu(h).mean(1, keepdim=True),
    "a product of two values": lambda s, x, h: (
        F.relu(h).view(-1, 2, 4) @ h.view(-1, 4, 2)).flatten(1),
    "F.layer_norm": lambda s, x, h: s.b(F.layer_norm(h, (8,), s.vector)),
    "F.rms_norm": lambda s, x, h: s.b(F.rms_norm(h, (8,), s.vector)),
    "where by a constant": lambda s, x, h: torch.where(torch.arange(8) > 3, F.relu(h), 0.5),
    "masked_fill": lambda s, x, h: F.relu(h).masked_fill(torch.arange(8) > 3, -10000.0),
    "a row repeated for the batch": lambda s, x, h: F.relu(
        torch.cat([s.row.expand(x.size(0), -1), h], 1)),
    "constants made for the batch": lambda s, x, h: torch.cat([x.new_ones(len(x), 2), h], 1),
    "batch norm": lambda s, x, h: s.b(F.relu(s.norm(h))),
    "arithmetic with constants": lambda s, x, h: (2 - h) / 4 + 3 * h * s.vector - s.vector,
    "in place": relu_sum,
    "nothing to optimise": lambda s, x, h: s.b(h),
    "rows of different alpha": lambda s, x, h: s.b(F.relu(h)).unsqueeze(1),
}


@pytest.mark.parametrize("case", CASES)
def test_structure_and_constants_have_bounds_that_hold_and_that_any_batch_gets(case):
    torch.manual_seed(0)
    model, x = Of(CASES[case]).double().eval(), torch.randn(3, 6, dtype=torch.float64)
    module = BoundedModule(model, x)
    for method in METHODS:
        lower, upper = module.compute_bounds((boxed(x),), method=method)
        assert lower.shape == model(x).shape
        # float64, values up to 10 (10000 where that is filled in), some hundred roundings.
        assert violation(model, x, lower, upper) <= 1e-11
    two = x[:2] + 1
    lower, upper = module.compute_bounds((boxed(two),), method="CROWN")
    assert violation(model, two, lower, upper) <= 1e-11


def test_structure_is_exact_bounds_of_a_linear_model_are_attained():
    """Every operator of structure in one linear map: CROWN's bounds are reached at corners."""

    def function(s, x, h):
        h = torch.cat([h.view(-1, 2, 4).transpose(1, 2).flatten(1)[:, ::2], h.flip(1)], 1)
        h = F.pad(h.unsqueeze(1), (1, 1), value=0.3).repeat(1, 2, 1).sum(1)
        return h.roll(1, 1)[:, 2:11] * torch.arange(9) - 1

    torch.manual_seed(1)
    model, x = Of(function).double().eval(), torch.randn(2, 6, dtype=torch.float64)
    lower, upper = BoundedModule(model, x).compute_bounds((boxed(x),), method="CROWN")
    slopes = torch.autograd.functional.jacobian(lambda z: model(z).sum(0), x).transpose(0, 1)
    reach = EPS * slopes.abs().sum(-1)
    torch.testing.assert_close(lower, model(x) - reach, rtol=0, atol=1e-12)
    torch.testing.assert_close(upper, model(x) + reach, rtol=0, atol=1e-12)


def test_parameters_behind_constants_and_structure_get_gradients():
    model = Of(lambda s, x, h: F.relu(h) @ (2 * s.matrix)[:, 1:] + s.vector[:3]).double()
    model.norm = None
    x = torch.randn(3, 6, dtype=torch.float64)
    module = BoundedModule(model, x)
    module.train()
    lower, _ = module.compute_bounds((boxed(x),), method="IBP")
    lower.sum().backward()
    assert model.matrix.grad[:, 1:].abs().sum() > 0 and model.vector.grad[:3].abs().min() > 0
    assert model.matrix.grad[:, 0].abs().max() == 0
    with torch.no_grad():
        model.matrix *= 2
    changed, _ = module.compute_bounds((boxed(x),), method="IBP")
    y = model(x)
    assert (changed != lower).all() and (changed <= y).all()


def test_token_ids_are_constants_of_the_bounds():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(10, 6), nn.Linear(6, 2)

        def forward(self, x, ids):
            return self.out(F.relu(x + self.words(ids).mean(1)))

    torch.manual_seed(0)
    model = Tokens().double()
    x, ids = torch.randn(2, 6, dtype=torch.float64), torch.tensor([[1, 2, 3], [4, 5, 6]])
    module = BoundedModule(model, (x, ids))
    for method in METHODS:
        lower, upper = module.compute_bounds((boxed(x), ids + 1), method=method)
        assert violation(lambda z: model(z, ids + 1), x, lower, upper) <= 1e-12


# -------------------------------------------------------------------- alpha-CROWN


@pytest.mark.parametrize("shift", [100.0, -100.0])
def test_alpha_of_stable_relus_changes_nothing(shift):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    model[0].bias.data += shift
    x = torch.randn(2, 6, dtype=torch.float64)
    module = BoundedModule(model, x)
    crown = module.compute_bounds((boxed(x),), method="CROWN")
    best = module.compute_bounds((boxed(x),), method="CROWN-Optimized")
    torch.testing.assert_close(best, crown, rtol=0, atol=1e-9)


def test_alpha_needs_no_gradients_of_the_caller():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().train()
    x = torch.randn(2, 6, dtype=torch.float64)
    module = BoundedModule(model, x)
    with torch.no_grad():
        without = module.compute_bounds((boxed(x),), method="CROWN-Optimized")
    assert not any(b.requires_grad for b in without) and module.training
    assert all(p.grad is None for p in model.parameters())
    module.eval()
    usual = module.compute_bounds((boxed(x),), method="CROWN-Optimized")
    torch.testing.assert_close(without, usual, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- what is refused


REFUSED = {
    "softmax over the batch": (lambda s, x, h: F.softmax(h, 0), "softmax .*dimension 0"),
    "transposed batch": (lambda s, x, h: h.t(), "torch function t .*batch must stay"),
    "sum of everything": (lambda s, x, h: h.sum(), "torch.sum .*adds up all dimensions"),
    "samples joined": (lambda s, x, h: torch.cat([h, h]), "cat .*dimension 0"),
    "samples multiplied": (lambda s, x, h: h @ h.t(), "torch function t .*batch"),
    "where by values": (lambda s, x, h: torch.where(h > 0, h, 0.0), "torch function where"),
    "infinite mask": (
        lambda s, x, h: h.masked_fill(torch.arange(8) > 3, -torch.inf), "masked_fill .*finite"),
    "write in place": (
        lambda s, x, h: (h.__setitem__((slice(None), 0), 0.0), h)[1], "__setitem__"),
    "an operator that nobody knows": (
        lambda s, x, h: torch.erfinv(h), r"Of: torch\.erfinv \(aten::erfinv\) in test_plain_mod"),
    "a chosen row": (lambda s, x, h: h.gather(1, h.argmax(1, True)), "gather .*chooses"),
    "a cast": (lambda s, x, h: h.half().float(), "half .*casts torch.float32 to torch.float16"),
    "numbers of the batch": (lambda s, x, h: h * x.size(0), "size of the batch"),
    "active dropout": (lambda s, x, h: F.dropout(h, 0.5, True), "dropout .*eval"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_bounded_is_refused_by_function_module_and_line(case):
    function, message = REFUSED[case]
    model = Of(function).eval()
    with pytest.raises(NotImplementedError, match=message) as error:
        BoundedModule(model, torch.randn(3, 6))
    assert str(error.value).startswith("Of: ") and "test_plain_modules.py, line" in str(error.value)


@pytest.mark.parametrize("samples", [1, 5])
def test_a_batch_that_moves_is_found_whatever_its_size(samples):
    """With as many tokens as samples the shapes do not show it, and bounds were of other points."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU())

    class Moved(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    with pytest.raises(NotImplementedError, match="transpose .*batch must stay at dimension 0"):
        BoundedModule(Moved(), torch.randn(samples, 5, 6))


def test_two_heads_are_not_taken_for_a_batch_that_moves():
    class Heads(nn.Module):
        def forward(self, x):
            return x.view(*x.shape[:2], 2, -1).transpose(1, 2).flatten(1)

    x = torch.randn(1, 3, 8)
    module = BoundedModule(nn.Sequential(Heads(), nn.ReLU()), x)
    torch.testing.assert_close(module(x), Heads()(x).relu())


def test_the_submodule_of_an_unknown_operator_is_named():
    class Strange(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    model = nn.Sequential(nn.Linear(6, 4), nn.Sequential(Strange(), nn.Linear(4, 2)))
    with pytest.raises(NotImplementedError, match=r"^1\.0 \(Strange\): .*bessel_j0"):
        BoundedModule(model, torch.randn(2, 6))


def test_a_view_that_shares_memory_with_a_value_changed_in_place_is_refused():
    def function(s, x, h):
        part = h[:, :4]
        h.mul_(2)
        return part + 1  # of the doubled values

    with pytest.raises(NotImplementedError, match="changed in place through a view"):
        BoundedModule(Of(function).eval(), torch.randn(3, 6))


class Returns(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(6, 4), function

    def forward(self, x):
        return self.function(self.layer(x))


NETWORK = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)]
UNUSABLE = {
    "batch norm in training mode": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), torch.float32,
        r"1 \(BatchNorm1d\): in training mode .*model.eval\(\)"),
    "half precision inputs": (
        lambda: nn.Sequential(*NETWORK), torch.float16, "input 0 is torch.float16.*x.float"),
    "bfloat16 inputs": (
        lambda: nn.Sequential(*NETWORK), torch.bfloat16, "input 0 is torch.bfloat16.*x.float"),
    "half precision statistics": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).half().eval(), torch.float32,
        "running statistics are torch.float16.*model.float"),
    "inputs in another type": (
        lambda: nn.Sequential(*NETWORK), torch.float64, "input 0 is torch.float64, parameter"),
    "whole numbers": (lambda: nn.Sequential(*NETWORK), torch.int64, "input 0 is torch.int64"),
    "a tuple": (lambda: Returns(lambda y: (y, y)), torch.float32, "returns a tuple"),
    "a dictionary": (lambda: Returns(lambda y: {"y": y}), torch.float32, "returns a dict"),
    "a constant": (
        lambda: Returns(lambda y: torch.ones(2, 2)), torch.float32, "does not depend on an input"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_is_no_model_of_these_inputs_is_refused_by_name(case):
    make, dtype, message = UNUSABLE[case]
    with pytest.raises((UserError, NotImplementedError), match=message):
        BoundedModule(make(), torch.randn(2, 6).to(dtype))


@pytest.mark.parametrize("shape", [(6,), (0, 6)])
def test_inputs_without_a_batch_are_refused_by_their_shape(shape):
    with pytest.raises((UserError, NotImplementedError), match=r"batch"):
        BoundedModule(nn.Sequential(*NETWORK), torch.zeros(shape))


SETS = {
    "a radius for each sample": ({"eps": torch.tensor([0.1, 0.2])}, "eps has shape .*dimensions"),
    "balls of several radii": (
        {"eps": torch.tensor([0.1, 0.2]), "norm": 2.0}, "eps has shape .*norm 2"),
    "a negative radius": ({"eps": -1.0}, "eps is -1.0"),
    "no radius": ({"eps": float("nan")}, "eps is nan"),
    "an empty box": ({"x_L": torch.ones(2, 6), "x_U": torch.zeros(2, 6)}, "box is empty"),
    "a box of one sample": ({"x_L": torch.zeros(6), "x_U": torch.ones(6)}, "x_L has shape"),
}


@pytest.mark.parametrize("case", SETS)
def test_sets_that_are_none_or_broadcast_are_refused(case):
    given, message = SETS[case]
    module = BoundedModule(nn.Sequential(*NETWORK), torch.zeros(2, 6))
    x = BoundedTensor(torch.zeros(2, 6), PerturbationLpNorm(**{"norm": float("inf"), **given}))
    with pytest.raises(ValueError, match=f"input 0: .*{message}"):
        module.compute_bounds((x,), method="CROWN")


def test_a_radius_for_each_sample_has_a_dimension_for_each_of_the_inputs():
    torch.manual_seed(0)
    model, x = nn.Sequential(*NETWORK), torch.randn(2, 6)
    module = BoundedModule(model, x)
    both = module.compute_bounds((boxed(x, torch.tensor([[0.1], [0.3]])),), method="CROWN")
    for i, eps in enumerate((0.1, 0.3)):
        one = module.compute_bounds((boxed(x[i : i + 1], eps),), method="CROWN")
        torch.testing.assert_close([b[i : i + 1] for b in both], list(one), rtol=1e-5, atol=1e-5)


def test_a_parameter_that_the_model_does_not_hold_is_refused_by_name():
    outside = nn.Linear(4, 3)

    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return outside(x).relu()

    for trainable in (True, False):
        outside.requires_grad_(trainable)
        with pytest.raises(NotImplementedError, match="shape .3, 4. that the model does not hold"):
            BoundedModule(Model(), torch.zeros(1, 4))
