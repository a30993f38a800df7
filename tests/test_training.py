"""Certified training: gradients as on one device, with Megatron's DDP and reductions."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from ranks import pool
from torch import nn

from lirpa_megatron import BoundedTensor, PerturbationLpNorm, UserError, parallelize
from lirpa_megatron.adapters.views import bert_head
from lirpa_megatron.parallel import runtime
from lirpa_megatron.problem.token_perturbations import perturb_tokens
from lirpa_megatron.training import (
    CertifiedLoss,
    Ramp,
    bound_regularizer,
    ibp_initialization,
    margin_cross_entropy,
)

BATCH = 2
EPS = 1e-2  # narrower intervals have slopes that are differences of nearly equal numbers
_SLOW = pytest.mark.slow


def tokens():
    """ids [4, 8] and labels: next tokens and classes."""
    generator = torch.Generator().manual_seed(3)
    shape = BATCH, transformers.LENGTH
    ids = torch.randint(0, transformers.VOCABULARY, shape, generator=generator)
    targets = torch.randint(0, transformers.VOCABULARY, (BATCH,), generator=generator)
    return ids, targets, targets % 2


CASES = {
    "gpt": (transformers.gpt, {}),
    "gpt, sequence parallel": (
        transformers.gpt, {"sequence_parallel": True, "num_layers": 1},
    ),
    "llama, sequence parallel, norms of queries and keys": (
        transformers.llama,
        {"sequence_parallel": True, "qk_layernorm": True, "spec": {"qk_layernorm": True},
         "num_layers": 1},
    ),
    "gpt, recomputed": (
        transformers.gpt,
        {"recompute_granularity": "full", "recompute_method": "uniform",
         "recompute_num_layers": 1},
    ),
    "bert": (transformers.bert, {}),
}


@contextlib.contextmanager
def norms_for_sequence_parallel():
    """Torch's norms, marked as apex's and TransformerEngine's are; Megatron has none of its own."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__

    def new(cls, config, *arguments, **named):
        whole = copy.copy(config)
        whole.sequence_parallel = False
        norm = original(cls, whole, *arguments, **named)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = new
    try:
        yield
    finally:
        WrappedTorchNorm.__new__ = original


def build(name):
    """The model, its certified loss, and functions (ids, labels) -> natural loss, inputs."""
    make, flags = CASES[name]
    tp = runtime.tp_size()
    if tp == 1:
        flags = {k: v for k, v in flags.items() if k != "sequence_parallel"}
    with norms_for_sequence_parallel():
        model = make(**flags).train()
    ids, targets, classes = tokens()
    positions = torch.arange(transformers.LENGTH).expand(BATCH, -1)

    if make is transformers.bert:
        types, padding = torch.zeros_like(ids[:1]), torch.ones_like(ids[:1])

        def inputs(ids):
            return perturb_tokens(
                model, ids, eps=EPS, attention_mask=padding[: len(ids)],
                tokentype_ids=types[: len(ids)],
            )

        def natural(module, ids, labels):
            return F.cross_entropy(
                module(ids, padding[: len(ids)], types[: len(ids)])[1], labels, reduction="none"
            )

        loss = CertifiedLoss(
            bert_head(model, "binary"), inputs(ids[:1]), num_classes=2, method="CROWN"
        )
        return model, loss, natural, inputs, (ids, classes)

    def inputs(ids):
        return perturb_tokens(model, ids, eps=EPS)

    def natural(module, ids, labels):
        # Whole logits: Megatron's vocabulary-parallel cross-entropy rounds to float32.
        logits = module(ids, positions[: len(ids)], None)[:, -1]
        return F.cross_entropy(logits, labels, reduction="none")

    return (
        model, CertifiedLoss(model, inputs(ids[:1]), method="CROWN"), natural, inputs,
        (ids, targets),
    )


def gradients(name, with_natural=True):
    """Gradients after a step of Megatron's loop, whole; and loss and margins of the batch."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    model, robust, natural, inputs, (ids, labels) = build(name)
    names = set(model.state_dict())
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(overlap_grad_reduce=False), model
    )
    replicas = parallel_state.get_data_parallel_world_size()
    replica = parallel_state.get_data_parallel_rank()
    ids, labels = ids.chunk(replicas)[replica], labels.chunk(replicas)[replica]
    ddp.zero_grad_buffer()
    losses = []
    micro = list(zip(ids.split(1), labels.split(1), strict=True))
    for index, (some, own) in enumerate(micro):
        last = index == len(micro) - 1
        with ddp.no_sync() if not last else warnings.catch_warnings():
            batch = robust(inputs(some), own, iteration=index)
            loss = batch.loss
            if with_natural:
                loss = loss + natural(ddp, some, own)
            losses.append(torch.stack([batch.loss, batch.margin]).detach())
            (loss.mean() / len(micro)).backward()
    finalize_model_grads([ddp])
    assert set(model.state_dict()) == names
    tp, whole = robust.bounded.context.collectives, {}
    for parameter, value in model.named_parameters():
        whole[parameter] = transformers.whole_gradient(
            parameter, value, value.main_grad, model, tp
        )
    return replica, whole, torch.cat(losses, 1)


def same(one, many):
    """Every rank has the gradients of one device."""
    ((_, expected, losses),) = one
    assert len(expected) > 8 and losses.isfinite().all()
    for replica, found, own in many:
        assert found.keys() == expected.keys()
        part = losses.chunk(BATCH // own.shape[1], dim=1)[replica]
        assert torch.allclose(part, own, rtol=1e-10, atol=1e-12)
        for name, gradient in expected.items():
            size = gradient.abs().max()
            assert size.isfinite()
            # One unit in the last place of eps moves them by 2e-10 of their size on one device.
            assert (found[name] - gradient).abs().max() <= 1e-9 * size + 1e-13, name


@pytest.mark.parametrize(
    "name",
    ["llama, sequence parallel, norms of queries and keys",
     pytest.param("gpt, sequence parallel", marks=_SLOW), pytest.param("bert", marks=_SLOW),
     pytest.param("gpt", marks=_SLOW),
     pytest.param("gpt, recomputed", marks=_SLOW)],
)
def test_gradients_of_sharded_models_are_those_of_one_device(name):
    # Megatron's recomputation reads the random state of a GPU, also where there is none.
    both = (name, name != "gpt, recomputed")
    same(pool(1).run(gradients, *both), pool(2).run(gradients, *both))


@_SLOW
def test_gradients_of_replicas_are_those_of_one_device():
    same(pool(1).run(gradients, "bert"), pool(2, 1).run(gradients, "bert"))


@pytest.mark.slow
def test_gradients_of_sharded_replicas_are_those_of_one_device():
    same(pool(1).run(gradients, "gpt, sequence parallel"),
         pool(4, 2).run(gradients, "gpt, sequence parallel"))


# ---------------------------------------------------------------------------------- the loss


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


def network(scale=1.0):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def box(x, eps):
    return BoundedTensor(x, PerturbationLpNorm(norm=math.inf, eps=eps))


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
    (dict(method="CROWN-Optimized"), "CROWN-Optimized cannot be trained with"),
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


# ----------------------------------------------------------- schedules and regularisers


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
