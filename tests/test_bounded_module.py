"""What a caller of BoundedModule may rely on, beside the bounds themselves."""

from __future__ import annotations

import pytest
import torch
from ranks import pool
from torch import nn

from lirpa_megatron import BoundedModule, BoundedTensor, PerturbationLpNorm
from lirpa_megatron.compat import auto_lirpa
from lirpa_megatron.operators.tuning import Tuning


def _input():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 6, generator=generator, dtype=torch.float64)


def _ball(x, eps=0.2):
    return BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), eps=eps))


def test_a_plain_process_without_launcher_needs_no_process_group():
    import torch.distributed as dist

    assert not dist.is_initialized()
    x = _input().float()
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    lower, upper = BoundedModule(net, x).compute_bounds(x=(_ball(x),), method="CROWN")
    assert torch.all(lower <= net(x)) and torch.all(net(x) <= upper)


def test_both_hosts_names_for_renamed_arguments_are_accepted():
    x = _input().float()
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    bounded = BoundedModule(net, x)
    lower, _ = bounded.compute_bounds(x=(_ball(x),), method="CROWN")
    nodes = bounded._modules.values()
    node = next(n for n in nodes if isinstance(n, auto_lirpa.BoundRelu)).inputs[0]
    given = {node.name: (node.lower.detach(), node.upper.detach())}
    for name in ("interm_bounds", "intermediate_layer_bounds"):
        again, _ = bounded.compute_bounds(x=(_ball(x),), method="CROWN", **{name: given})
        assert torch.allclose(again, lower)


@pytest.mark.parametrize("name", [
    "interm_bounds", "intermediate_layer_bounds", "reference_bounds",
])
def test_given_bounds_of_a_node_that_does_not_exist_are_refused_by_its_name(name):
    x = _input().float()
    bounded = BoundedModule(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), x)
    pair = (torch.zeros(3, 5), torch.ones(3, 5))
    said = name.replace("intermediate_layer_bounds", "interm_bounds")
    with pytest.raises(ValueError, match=f"{said} has bounds of '/no_node', but the graph has no"):
        bounded.compute_bounds(x=(_ball(x),), method="CROWN", **{name: {"/no_node": pair}})
    with pytest.raises(ValueError, match="give a dictionary, node name"):
        bounded.compute_bounds(x=(_ball(x),), method="CROWN", **{name: [pair]})


def test_float64_needs_no_default_dtype_of_the_callers():
    assert torch.get_default_dtype() == torch.float32
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    x, net = _input(), net.double()
    C = torch.tensor([[[1.0, -1.0]]]).double().expand(3, 1, 2)
    for method in ("IBP", "CROWN-IBP", "CROWN", "CROWN-Optimized"):
        lower, upper = BoundedModule(net, x).compute_bounds(x=(_ball(x),), C=C, method=method)
        assert lower.dtype == torch.float64 and torch.all(lower <= upper)
    assert torch.get_default_dtype() == torch.float32


class ReadsSizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return self.down(torch.relu(self.up(x))) * (self.up.out_features / self.down.in_features)


def _reads_sizes():
    from lirpa_megatron import parallelize

    torch.manual_seed(0)
    net, x = ReadsSizes(), _input().float()
    return (BoundedModule(parallelize(net), x)(x) - net(x)).abs().max().item()


def test_a_forward_may_read_the_sizes_of_its_layers():
    assert max(pool(2).run(_reads_sizes)) < 1e-5  # float32 sums of 8


@pytest.mark.parametrize("given, error, words", [
    ({"method": "CROWM"}, ValueError, "unknown method 'CROWM'; the methods are IBP, CROWN-IBP"),
    ({"cutter": object()}, NotImplementedError, "compute_bounds(cutter=...)"),
    ({"C": torch.ones(3, 1, 5)}, ValueError, "C has 5 output features, the output node has 2"),
])
def test_what_cannot_be_computed_is_refused_in_one_line(given, error, words):
    x = _input().float()
    bounded = BoundedModule(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), x)
    with pytest.raises(error) as caught:
        bounded.compute_bounds(x=(_ball(x),), **given)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("options, words", [
    ({"sparse_features_alpha": True}, "sparse_features_alpha"),
    ({"conv_mode": "patches"}, "conv_mode='patches'"),
    ({"crown_batch_size": 10}, "use max_spec_rows"),
    ({"optimize_bound_args": {"enable_beta_crown": True}}, "enable_beta_crown"),
])
def test_options_that_are_not_rank_safe_are_refused_by_name(options, words):
    with pytest.raises(NotImplementedError, match=words):
        BoundedModule(nn.Linear(6, 2), _input().float(), options)


@pytest.mark.parametrize("options, words", [
    ({"moves": "B"}, "moves is 'B': choose auto, A or weights"),
    ({"final_rows": "all"}, "final_rows is 'all'"),
    ({"max_spec_rows": 0}, "max_spec_rows is 0"),
    ({"pass_memory": -1}, "pass_memory is -1"),
    ({"sparse_intermediate_bounds": "no"}, "sparse_intermediate_bounds is 'no'"),
])
def test_an_option_that_does_not_exist_is_named_with_what_does(options, words):
    with pytest.raises(ValueError, match=words):
        BoundedModule(nn.Linear(6, 2), _input().float(), options)


@pytest.mark.parametrize("ptb, words", [
    ({"eps": -0.1}, "eps is -0.1, it must be at least 0"),
    ({"x_L": torch.ones(3, 6), "x_U": torch.zeros(3, 6)}, "the box is empty or NaN"),
    ({"x_L": torch.full((3, 6), torch.nan), "x_U": torch.zeros(3, 6)}, "the box is empty or NaN"),
])
def test_a_perturbation_that_is_no_set_is_refused(ptb, words):
    x = _input().float()
    bounded = BoundedModule(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), x)
    ball = BoundedTensor(x, PerturbationLpNorm(norm=float("inf"), **ptb))
    with pytest.raises(ValueError, match=words):
        bounded.compute_bounds(x=(ball,), method="CROWN")


def test_reduced_precision_that_the_caller_switched_on_does_not_reach_the_bounds():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    x = torch.rand(3, 6)
    bounded = BoundedModule(net.eval(), x)

    def bounds():
        return bounded.compute_bounds(x=(_ball(x),), method="CROWN")

    want = bounds()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = bounds()
            assert net(x).dtype is torch.bfloat16  # it was switched on, and is again
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_sizes_by_which_work_is_cut_are_set_when_a_module_is_built():
    module = BoundedModule(nn.Linear(6, 2), _input().float(), {"tuning": Tuning(few=0)})
    assert module.context.tuning.few == 0
    with pytest.raises(ValueError, match="tuning is .*few=0.*build another one"):
        module.set_bound_opts({"tuning": Tuning()})
    module.set_bound_opts({"tuning": Tuning(few=0), "max_spec_rows": 3})
