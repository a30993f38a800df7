"""Bounds that exclude what the model itself computes are an error on every rank, never a result."""

from __future__ import annotations

import json

import pytest
import torch
from ranks import pool
from small_networks import property_text, save, stack
from torch import nn

from lirpa_megatron import (
    BoundedModule,
    BoundedTensor,
    PerturbationLpNorm,
    parallelize,
)
from lirpa_megatron.cli.commands import main
from lirpa_megatron.compat import (
    auto_lirpa,
)
from lirpa_megatron.crown.clean_output_check import check_contains, clean_is_inside
from lirpa_megatron.crown.row_schedule import RowSchedule
from lirpa_megatron.errors import BoundsError
from lirpa_megatron.problem.perturbations import PerturbationHull, PerturbationPositions

INF = float("inf")
Y = torch.tensor([[1.0, -2.0, 0.0], [3.0, 4.0, 500.0]])


def _check(lower, upper, y=Y, C=None):
    check_contains(y, C, lower, upper, lambda part: part)


def test_bounds_around_the_output_pass_and_so_does_rounding():
    rounding = 20 * torch.finfo(torch.float32).eps * (1 + Y.abs())
    _check(Y + rounding, Y - rounding)
    _check(Y - 1, None)
    _check(None, Y + 1)
    _check(torch.full_like(Y, -INF), torch.full_like(Y, INF))


@pytest.mark.parametrize("side", ["lower", "upper"])
def test_a_bound_that_excludes_the_output_is_named(side):
    bounds = {"lower": Y - 1, "upper": Y + 1}
    bounds[side] = bounds[side].clone()
    bounds[side][1, 2] = 500.5 if side == "lower" else 499.5
    with pytest.raises(BoundsError, match=rf"the {side} bound {bounds[side][1, 2]:g} of output 2 "
                                          r"of sample 1 excludes the model's own output 500 "):
        _check(**bounds)


def test_an_infinite_bound_on_the_wrong_side_is_found():
    with pytest.raises(BoundsError, match="the lower bound inf of output 0"):
        _check(torch.tensor([[INF, -3.0, -3.0]]), None, Y[:1])


def test_outputs_that_are_no_numbers_have_no_finite_bounds():
    """Of exact arithmetic there may be some; the model that runs overflows."""
    y = torch.tensor([[float("nan"), -INF, INF]])
    _check(torch.tensor([[-INF, -INF, 0.0]]), torch.tensor([[INF, 2.0, INF]]), y)
    for side, output, value in (("lower", 0, "nan"), ("lower", 1, "-inf"), ("upper", 2, "inf")):
        bounds = {"lower": torch.full((1, 3), -INF), "upper": torch.full((1, 3), INF)}
        bounds[side][0, output] = 1e30
        with pytest.raises(BoundsError, match=f"of output {output} .* own output {value} .*overf"):
            _check(**bounds, y=y)
    C = torch.tensor([[[0.0, 1.0, 1.0], [0.0, -1.0, 1.0], [1.0, 0.0, 0.0]]])  # nan, inf, nan
    _check(torch.tensor([[-INF, 5.0, -INF]]), torch.full((1, 3), INF), y, C)
    with pytest.raises(BoundsError, match="upper bound 5 of output 1"):
        _check(None, torch.tensor([[INF, 5.0, INF]]), y, C)


def test_a_model_that_overflows_has_no_certificate():
    from torch import nn

    from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm

    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).eval()
    for layer, value in zip(model, (3e38, 1e-38), strict=True):
        nn.init.constant_(layer.weight, value)
    x = torch.full((1, 2), 2.0)
    bounded = BoundedModule(model, x)
    ball = BoundedTensor(x, PerturbationLpNorm(norm=INF, eps=0.1))
    with pytest.raises(BoundsError, match="overflows in its number type"):
        bounded.compute_bounds((ball,), method="CROWN")  # 24, but for rounding
    lower, _ = bounded.compute_bounds((ball,), method="forward")
    assert not lower.isfinite().any()


def test_differences_are_compared_with_what_they_are_differences_of():
    C = torch.tensor([[[1.0, -1.0, 0.0]], [[1.0, 1.0, -1.0]]])
    margins = torch.tensor([[3.0], [-493.0]])
    _check(margins - 1, margins + 1, C=C)
    _check(margins + 1e-3 * torch.tensor([[0.0], [1.0]]), None, C=C)  # rounding of 500
    with pytest.raises(BoundsError, match="output 0 of sample 1"):
        _check(margins + torch.tensor([[0.0], [1.0]]), None, C=C)


def test_a_specification_may_have_the_outputs_shape():
    y, C = Y.reshape(1, 2, 3), torch.ones(1, 1, 2, 3)
    _check(torch.tensor([[505.0]]), torch.tensor([[507.0]]), y, C)
    with pytest.raises(BoundsError, match="own output 506 "):
        _check(torch.tensor([[506.5]]), None, y, C)


def _kinds():
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    own = torch.stack([x, x + 1], 2)
    corners = {"x_L": x - 1, "x_U": x}
    beside = {"x_L": x + 0.5, "x_U": x + 1}
    return x, {
        "ball": (PerturbationLpNorm(norm=2, eps=0.1), True),
        "box by its radius": (PerturbationLpNorm(norm=INF, eps=0.1), True),
        "corners": (PerturbationLpNorm(norm=INF, **corners), True),
        "corners beside it": (PerturbationLpNorm(norm=INF, **beside), False),
        "hull of its own and another": (PerturbationHull(own), True),
        "hull of others": (PerturbationHull(own + 0.5), False),
        "balls": (PerturbationPositions(x, torch.tensor([[0.1, 0.0]]), 2, True), True),
    }


@pytest.mark.parametrize("kind", _kinds()[1])
def test_the_check_is_left_out_where_the_clean_input_may_be_outside(kind):
    x, kinds = _kinds()
    perturbation, inside = kinds[kind]
    bounded = BoundedModule(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), x)
    bounded.compute_bounds(x=(BoundedTensor(x, perturbation),), method="CROWN")
    assert clean_is_inside(auto_lirpa.perturbed_inputs(bounded)) == inside


def _ball():
    x = torch.linspace(-1, 1, 8).reshape(2, 4)
    return BoundedTensor(x, PerturbationLpNorm(norm=INF, eps=0.01))


class Hidden(nn.Module):
    """A Column-Row pair; then the output layer, each rank's features its own if it is sharded."""

    def __init__(self, sharded):
        from megatron.core import ModelParallelConfig
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear

        super().__init__()
        torch.manual_seed(0)
        self.pair = parallelize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
        config = ModelParallelConfig(
            tensor_model_parallel_size=torch.distributed.get_world_size(),
            use_cpu_initialization=True, gradient_accumulation_fusion=False,
        )
        self.out = ColumnParallelLinear(
            4, 4, config=config, init_method=nn.init.xavier_normal_, bias=True,
            gather_output=not sharded,
        )

    def forward(self, x):
        return self.out(self.pair(x))[0]


def _with_a_fault(sharded, with_C, rank):
    """Bounds of a model whose passes end with lower bounds that are 1 too high on one rank."""
    bounded, run = BoundedModule(Hidden(sharded), _ball()), RowSchedule.run
    C = torch.eye(2 if sharded else 4).expand(2, -1, -1) if with_C else None

    def faulty(self, node, *args, **kwargs):
        bounds = run(self, node, *args, **kwargs)
        if node.name == bounded.final_name and torch.distributed.get_rank() == rank:
            bounds.lower = bounds.lower + 1
        return bounds

    RowSchedule.run = faulty
    try:
        bounded.compute_bounds(x=(_ball(),), C=C, method="CROWN", bound_upper=False)
    finally:
        RowSchedule.run = run


@pytest.mark.parametrize(
    "sharded, with_C, rank, first",
    [(False, False, 0, 0), (False, True, 0, 0), (True, True, 0, 0), (True, False, 1, 1)],
)
def test_a_fault_in_the_bounds_is_an_error_on_every_rank(sharded, with_C, rank, first):
    for outcome in pool(2).outcomes(_with_a_fault, sharded, with_C, None):
        assert outcome.error is None, outcome.trace
    outcomes = pool(2).outcomes(_with_a_fault, sharded, with_C, rank)
    for number, outcome in enumerate(outcomes):
        # Where only one rank sees it the other ends with that rank's error.
        alone = sharded and not with_C and number != first
        assert outcome.error == ("RemoteRankError" if alone else "BoundsError"), outcome.trace
        assert "excludes the model's own output" in outcome.message


def test_bounds_of_a_part_of_the_ball_may_leave_the_clean_input_out():
    """As branch and bound has them: a neuron's bounds are those of one side of its split."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    bounded = BoundedModule(net, _ball())
    bounded.compute_bounds(x=(_ball(),), method="CROWN")
    node = next(n for n in bounded.named_nodes().values() if isinstance(n, auto_lirpa.BoundRelu))
    hidden = net[0](_ball().detach())
    beside = {node.inputs[0].name: (hidden + 3, hidden + 4)}
    lower, upper = bounded.compute_bounds(x=(_ball(),), method="CROWN", interm_bounds=beside)
    y = net(_ball().detach())
    assert ((y < lower) | (y > upper)).any()


def test_the_command_line_calls_it_an_error_and_proves_nothing(tmp_path, monkeypatch):
    save(stack([4, 8, 8, 3]), tmp_path / "net.onnx")
    box = [-0.1] * 4, [0.1] * 4
    # Whatever the property is: a bound of +1e6 would prove it.
    text = property_text(*box, 3, "(<= Y_0 Y_1)")
    (tmp_path / "one.vnnlib").write_text(text)
    run = RowSchedule.run

    def faulty(self, *args, **kwargs):
        bounds = run(self, *args, **kwargs)
        bounds.lower = None if bounds.lower is None else bounds.lower + 1e6
        return bounds

    monkeypatch.setattr(RowSchedule, "run", faulty)
    files = ("--onnx", "net.onnx"), ("--vnnlib", "one.vnnlib"), ("--output", "r.jsonl")
    status = main(["verify", *(w for o, name in files for w in (o, str(tmp_path / name)))])
    assert status == 1
    result = json.loads((tmp_path / "r.jsonl").read_text())
    assert result["result"] == "error" and "excludes the model's own output" in result["error"]
