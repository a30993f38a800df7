"""Certified training: gradients as on one device, with Megatron's DDP and reductions."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from ranks import pool
from training_networks import BATCH, tokens

from lirpa_megatron.adapters.views import bert_head
from lirpa_megatron.parallel import runtime
from lirpa_megatron.problem.token_perturbations import perturb_tokens
from lirpa_megatron.training import CertifiedLoss

EPS = 1e-2  # narrower intervals have slopes that are differences of nearly equal numbers
_SLOW = pytest.mark.slow


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
