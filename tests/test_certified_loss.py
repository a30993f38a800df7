"""The certified loss: above the cross-entropy, of the model as it is now, in float32 at least."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from ranks import pool
from torch import nn
from training_networks import BATCH, box, network, tokens

from lirpa_megatron import UserError, parallelize
from lirpa_megatron.parallel import runtime
from lirpa_megatron.problem.token_perturbations import perturb_tokens
from lirpa_megatron.training import CertifiedLoss, margin_cross_entropy


def vocabulary_losses(lower, targets, size):
    """Of margins over the whole vocabulary cut into the ranks' parts; and Megatron's own loss."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from lirpa_megatron.parallel.collectives import Collectives

    tp = Collectives(runtime.tp_group())
    part = lower.chunk(tp.size, 1)[tp.rank].clone().requires_grad_()
    entries = torch.arange(lower.shape[1]).chunk(tp.size)[tp.rank]
    own = (entries != targets.unsqueeze(1)) & (entries < size)
    loss = margin_cross_entropy(part, own, tp)
    (gradient,) = torch.autograd.grad(loss.sum(), part)
    logits = torch.where(own, -part.detach(), -1e30)
    logits = torch.where(entries == targets.unsqueeze(1), 0.0, logits)
    theirs = vocab_parallel_cross_entropy(logits.unsqueeze(0).contiguous(), targets.unsqueeze(0))
    return loss.detach(), gradient, theirs[0]


def test_the_loss_of_a_vocabulary_in_parts_is_that_of_the_whole_and_megatrons():
    torch.manual_seed(0)
    targets, size = torch.tensor([3, 17, 0]), 20
    lower = 5 * torch.randn(3, 24)
    lower[torch.arange(3), targets] = 0
    whole = lower.clone().requires_grad_()
    rivals = torch.ones_like(lower, dtype=torch.bool)
    rivals[torch.arange(3), targets] = False
    rivals[:, size:] = False
    kept = [torch.logsumexp(torch.cat([-whole[i][rivals[i]], torch.zeros(1)]), 0) for i in range(3)]
    expected = torch.stack(kept)
    (gradient,) = torch.autograd.grad(expected.sum(), whole)
    for ranks in (1, 2):
        results = pool(ranks).run(vocabulary_losses, lower, targets, size)
        for rank, (loss, part, theirs) in enumerate(results):
            torch.testing.assert_close(loss, expected.detach())
            torch.testing.assert_close(theirs, loss)
            torch.testing.assert_close(part, gradient.chunk(ranks, 1)[rank])


def test_the_loss_is_no_less_than_the_cross_entropy_anywhere_in_the_set():
    model, x, labels = network(), torch.rand(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    eps = 0.1
    for method in ("IBP", "CROWN-IBP", "CROWN"):
        loss = CertifiedLoss(model, (x,), num_classes=3, method=method)
        batch = loss((box(x, eps),), labels, crown_share=0.5)
        worst = torch.stack([
            F.cross_entropy(model(x + eps * (2 * torch.rand_like(x) - 1)), labels, reduction="none")
            for _ in range(50)
        ]).amax(0)
        assert (batch.loss >= worst).all() and batch.loss.requires_grad
        assert (batch.certified == (batch.margin > 0)).all() and not batch.margin.requires_grad


def test_a_tighter_bound_is_a_smaller_loss_and_the_mix_lies_between():
    model, x, labels = network(), torch.rand(6, 5), torch.zeros(6, dtype=torch.long)
    loss = CertifiedLoss(model, (x,), num_classes=3, method="CROWN")
    at = [loss((box(x, 0.2),), labels, crown_share=share).loss.sum() for share in (0.0, 0.5, 1.0)]
    assert at[0] > at[1] > at[2] > 0


def test_the_bounds_follow_the_model_after_a_step():
    model, x = network(), torch.rand(4, 5)
    labels = torch.tensor([0, 1, 2, 0])
    loss = CertifiedLoss(model, (x,), num_classes=3, method="CROWN")
    names = set(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    values = []
    for _ in range(5):
        batch = loss((box(x, 0.02),), labels)
        optimizer.zero_grad()
        batch.loss.mean().backward()
        optimizer.step()
        values.append(float(batch.loss.mean()))
    assert values[-1] < values[0] and set(model.state_dict()) == names
    again = CertifiedLoss(model, (x,), num_classes=3, method="CROWN")
    torch.testing.assert_close(
        loss((box(x, 0.02),), labels).margin, again((box(x, 0.02),), labels).margin
    )


def test_dropout_is_left_out_of_the_bounds_and_stays_in_the_model():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    x, labels = torch.rand(4, 5), torch.tensor([0, 1, 2, 0])
    loss = CertifiedLoss(model, (x,), num_classes=3, method="IBP")
    first, second = (loss((box(x, 0.1),), labels).loss for _ in range(2))
    assert torch.equal(first, second) and all(m.training for m in model.modules())


class AlwaysActive(nn.Dropout):
    def forward(self, x):
        return F.dropout(x, self.p, training=True)


def test_dropout_that_stays_active_in_eval_mode_is_not_taken_for_the_identity():
    from lirpa_megatron.adapters.traceable import traceable

    model = nn.Sequential(nn.Dropout(0.5), AlwaysActive(0.5)).eval()
    kinds = [type(module) for module in traceable(model)]
    assert kinds == [nn.Identity, AlwaysActive]


def test_bfloat16_parameters_have_float32_bounds():
    model, x, labels = network().bfloat16(), torch.rand(4, 5), torch.tensor([0, 1, 2, 0])
    pointers = [p.data_ptr() for p in model.parameters()]
    batch = CertifiedLoss(model, (x,), num_classes=3, method="CROWN")((box(x, 0.02),), labels)
    assert batch.loss.dtype == torch.float32
    assert pointers == [p.data_ptr() for p in model.parameters()]
    batch.loss.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.bfloat16 for p in model.parameters())
    whole = copy.deepcopy(model).float()
    same = CertifiedLoss(whole, (x,), num_classes=3, method="CROWN")((box(x, 0.02),), labels)
    torch.testing.assert_close(batch.loss, same.loss)
    same.loss.sum().backward()
    for half, full in zip(model.parameters(), whole.parameters(), strict=True):
        # A gradient in bfloat16 has eight bits.
        torch.testing.assert_close(half.grad.float(), full.grad, rtol=2e-2, atol=1e-3)


def test_a_language_model_in_bfloat16_has_float32_bounds():
    with runtime.session():
        check_bfloat16_language_model()


def check_bfloat16_language_model():
    model = transformers.gpt(torch.bfloat16).train()
    ids, targets, _ = tokens()
    ids = ids[:, :4]
    inputs = perturb_tokens(model, ids, eps=1e-4)
    batch = CertifiedLoss(model, inputs, method="CROWN")(inputs, targets)
    assert batch.loss.dtype == torch.float32 and batch.loss.isfinite().all()
    whole = transformers.gpt(torch.float32).train()
    with torch.no_grad():
        for full, half in zip(whole.parameters(), model.parameters(), strict=True):
            full.copy_(half)
    inputs = perturb_tokens(whole, ids, eps=1e-4)
    # The embeddings were added in bfloat16: eight bits.
    other = CertifiedLoss(whole, inputs, method="CROWN")(inputs, targets)
    torch.testing.assert_close(batch.margin, other.margin, rtol=0.05, atol=0.05)


def bad_on_one_rank():
    model = parallelize(network())
    if runtime.tp_rank() == 1:
        with torch.no_grad():
            model[2].weight.fill_(math.nan)
    x = torch.rand(4, 5)
    loss = CertifiedLoss(model, (x,), num_classes=3, method="IBP")
    loss((box(x, 0.1),), torch.tensor([0, 1, 2, 0]), iteration=7)


def test_a_bound_that_is_not_finite_ends_all_ranks_with_the_layer_and_the_iteration():
    for outcome in pool(2).outcomes(bad_on_one_rank):
        assert outcome.error == "FloatingPointError", outcome
        assert "layer 2" in outcome.message and "iteration 7" in outcome.message


@pytest.mark.parametrize("change, message", [
    (dict(method="CROWN-Optimized"), "CROWN-Optimized cannot be used for training"),
    (dict(num_classes=None), "margins need a GPTModel"),
    (dict(num_classes=1), "num_classes is 1"),
    (dict(crown_share=1.5), "crown_share is 1.5"),
    (dict(labels=torch.tensor([0, 1, 2, 3])), "labels from 0 to 3, but there are 3 classes"),
], ids=str)
def test_bad_input_is_one_clear_line(change, message):
    x, call = torch.rand(4, 5), {"labels": torch.tensor([0, 1, 2, 0]), "crown_share": 1.0}
    made = {"num_classes": 3, "method": "IBP"}
    for name, value in change.items():
        (call if name in call else made)[name] = value
    with pytest.raises(UserError, match=message):
        CertifiedLoss(network(), (x,), **made)((box(x, 0.1),), **call)


@pytest.mark.parametrize("build", [transformers.gpt, transformers.llama])
def test_at_radius_zero_the_loss_is_the_cross_entropy_and_so_are_its_gradients(build):
    torch.set_default_dtype(torch.float64)
    try:
        with runtime.session():
            check_radius_zero(build(num_layers=1).train())
    finally:
        torch.set_default_dtype(torch.float32)


def check_radius_zero(model):
    ids, targets, _ = tokens()
    ids, positions = ids[:, :4], torch.arange(4).expand(BATCH, -1)
    inputs = perturb_tokens(model, ids, eps=0.0)
    loss_of = CertifiedLoss(model, inputs, method="CROWN")
    found = []
    for radius in (0.0, None):
        model.zero_grad()
        if radius is None:
            loss = F.cross_entropy(model(ids, positions, None)[:, -1], targets, reduction="none")
        else:
            loss = loss_of(perturb_tokens(model, ids, eps=radius), targets).loss
        loss.sum().backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
