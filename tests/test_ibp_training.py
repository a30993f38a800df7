"""What keeps training with intervals going: ramps, the regularizer, the initialization."""

from __future__ import annotations

import pytest
import torch
import transformers
from ranks import pool
from torch import nn
from training_networks import box, network

from lirpa_megatron import UserError, parallelize
from lirpa_megatron.parallel import runtime
from lirpa_megatron.training import CertifiedLoss, Ramp, bound_regularizer, ibp_initialization


@pytest.mark.parametrize("start, length, mid, beta", [(1, 4, 0.25, 4.0), (3, 5, 0.4, 2.0)])
def test_a_ramp_is_auto_lirpas_smoothed_schedule(start, length, mid, beta):
    from auto_LiRPA.eps_scheduler import SmoothedScheduler

    batches = 10
    theirs = SmoothedScheduler(0.3, f"start={start},length={length},mid={mid},beta={beta}")
    theirs.set_epoch_length(batches)
    ours = Ramp(batches * (start - 1), batches * length, 0.0, 0.3, mid, beta)
    for iteration in range(batches * (start + length + 1)):
        theirs.step_batch()
        assert ours(iteration) == pytest.approx(theirs.get_eps(), abs=1e-12), iteration


def test_a_ramp_has_its_ends_and_goes_one_way():
    down = Ramp(10, 100, 1.0, 0.25, mid=0)
    values = [down(i) for i in range(130)]
    assert values[:11] == [1.0] * 11 and values[110:] == [0.25] * 20
    assert all(a >= b for a, b in zip(values, values[1:], strict=False))
    assert down(60) == pytest.approx(0.625)
    assert Ramp(5, 0, 0.0, 1.0)(4) == 0.0 and Ramp(5, 0, 0.0, 1.0)(5) == 1.0
    for wrong in (dict(length=-1), dict(mid=2.0), dict(beta=1.0)):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Ramp(**{**dict(start=0, length=5, first=0.0, last=1.0), **wrong})


def regularized(seed):
    torch.set_default_dtype(torch.float64)
    model = parallelize(network().double())
    if seed is not None:
        ibp_initialization(model, seed)
    torch.manual_seed(2)
    x = torch.rand(8, 5)
    loss = CertifiedLoss(model, (x,), num_classes=3, method="IBP")
    loss((box(x, 0.1),), torch.zeros(8, dtype=torch.long))
    value = bound_regularizer(loss.bounded)
    found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    tp, whole = loss.bounded.context.collectives, []
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        if getattr(parameter, "tensor_model_parallel", False):
            dim = parameter.partition_dim
            gradient = tp.gather_results(gradient.movedim(dim, 0).contiguous()).movedim(0, dim)
        whole.append(gradient.clone())
    return value.detach(), whole


@pytest.mark.parametrize("seed", [None, 3])
def test_the_regularizer_and_its_gradients_are_the_same_on_two_ranks(seed):
    ((value, expected),) = pool(1).run(regularized, seed)
    assert value > 0 and any(g.abs().max() > 0 for g in expected)
    for other, found in pool(2).run(regularized, seed):
        torch.testing.assert_close(other, value)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_ibp_initialization_passes_over_an_output_layer_without_a_weight_of_its_own():
    with runtime.session():
        model = transformers.gpt(num_layers=1)
        words = model.embedding.word_embeddings.weight.detach().clone()
        ibp_initialization(model)
    assert torch.equal(words, model.embedding.word_embeddings.weight)
    assert not model.decoder.layers[0].mlp.linear_fc1.bias.any()


def test_ibp_initialization_keeps_the_width_of_intervals():
    torch.manual_seed(0)
    sizes = [64, 256, 256, 256, 10]
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    model = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])
    x, widths = torch.rand(4, 64), {}
    for name in ("usual", "ibp"):
        if name == "ibp":
            ibp_initialization(model)
        loss = CertifiedLoss(model, (x,), num_classes=10, method="IBP")
        lower, upper = loss.bounded.compute_bounds((box(x, 0.1),), method="IBP")
        widths[name] = float((upper - lower).mean() / 0.2)
    assert 0.3 < widths["ibp"] < 3 and widths["usual"] > 100
    assert all(not layer.bias.any() for layer in layers)
