"""What a model makes of token ids before its first layer: the values that get perturbed."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import nn

from lirpa_megatron.adapters import hooks, refusals
from lirpa_megatron.adapters.live.modules import is_sequence_parallel
from lirpa_megatron.adapters.live.submodules import difference, values
from lirpa_megatron.adapters.live.undisturbed import undisturbed
from lirpa_megatron.adapters.stages import pipeline_of
from lirpa_megatron.adapters.traceable import collectives_of
from lirpa_megatron.arithmetic.floating import TINY, UNIT
from lirpa_megatron.errors import LiveModelError, SPMDError, UserError
from lirpa_megatron.operators.parameters import HALF, widened
from lirpa_megatron.parallel import spmd
from lirpa_megatron.parallel.collectives import Collectives
from lirpa_megatron.parallel.foreign import agreed_collectives
from lirpa_megatron.parallel.pipeline import guard
from lirpa_megatron.parallel.stage_forward import from_first_stage

ROUNDING = 64
"""Units in the last place of the largest number by which both may differ: they add the same."""


def embed(
    model: nn.Module,
    ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    tokentype_ids: torch.Tensor | None = None,
    *,
    check_live: bool = True,
) -> torch.Tensor:
    """The hidden states that enter the first layer, on every rank.

    Of a pipeline's stages the first one has the embedding; every rank of all stages calls it.
    Dropout is omitted, and the sequence is complete even with sequence_parallel. Gradients flow to
    the embedding's parameters.

    Args:
        model: a GPTModel, HybridModel or BertModel.
        ids: token ids [B, S].
        position_ids: [B, S]; by default 0, 1, ... in each sequence.
        tokentype_ids: [B, S], for a model with token types.
        check_live: whether to run the model's own embedding too, and compare.

    Returns:
        [B, S, h].

    Raises:
        UserError: token ids outside the vocabulary, token types that are missing, or that the
            model does not have.
        NotImplementedError: an embedding that differs from Megatron's, by name.
        LiveModelError: the model's own embedding gives a different result; on every rank.
    """
    model = hooks.unwrapped(model)
    tp, pipeline = collectives_of(model), pipeline_of(model)
    with guard(pipeline, tp.group, "embed"):
        hidden = None
        if pipeline is None or pipeline.is_first:
            hidden = _embedded(model, ids, position_ids, tokentype_ids, tp, check_live)
        return from_first_stage(pipeline, "what the tokens are embedded as", hidden)


def _embedded(
    model: nn.Module, ids: torch.Tensor, position_ids: torch.Tensor | None,
    tokentype_ids: torch.Tensor | None, tp: Collectives, check_live: bool,
) -> torch.Tensor:
    """`embed` where the embedding is."""
    embedding: Any = model.embedding
    _check(embedding, tp)
    if (tokentype_ids is None) != (embedding.tokentype_embeddings is None):
        needs = "needs" if tokentype_ids is None else "has no embeddings for"
        raise UserError(f"the model {needs} tokentype_ids")
    if position_ids is None:
        position_ids = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    hidden = _hidden(embedding, ids, position_ids, tokentype_ids, tp)
    if check_live and ids.numel():
        _compare(embedding, ids, position_ids, tokentype_ids, hidden, tp)
    return hidden


def _hidden(
    embedding: Any, ids: torch.Tensor, position_ids: torch.Tensor,
    tokentype_ids: torch.Tensor | None, tp: Collectives,
) -> torch.Tensor:
    """As LanguageModelEmbedding.forward; muP's factor comes last."""
    hidden = tp.look_up(embedding.word_embeddings.weight, ids)
    if embedding.add_position_embedding:
        hidden = hidden + embedding.position_embeddings(position_ids)
    if tokentype_ids is not None:
        hidden = hidden + embedding.tokentype_embeddings(tokentype_ids)
    config = embedding.config
    if getattr(config, "use_mup", False) and config.mup_embedding_mult != 1.0:
        hidden = hidden * config.mup_embedding_mult
    return hidden.float() if config.fp32_residual_connection else hidden


def off_sums(
    model: nn.Module, ids: torch.Tensor, position_ids: torch.Tensor | None = None,
    tokentype_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Most that `embed` is off the sums of the tables' numbers in real arithmetic: [B, S, h].

    In float64, sums of numbers that were stored as float32 or less are exact as a rule. What one
    rounded sum s = fl(a + b) is off is a number itself, found without an error (Knuth's TwoSum);
    muP's factor is one product: u of it. Every rank of all stages of a pipeline calls it.
    """
    model = hooks.unwrapped(model)
    tp, pipeline = collectives_of(model), pipeline_of(model)
    with guard(pipeline, tp.group, "what sums of embeddings are off"):
        off = None
        if pipeline is None or pipeline.is_first:
            off = _off(model.embedding, ids, position_ids, tokentype_ids, tp)
        return from_first_stage(pipeline, "what sums of embeddings are off", off)


def _off(
    embedding: Any, ids: torch.Tensor, position_ids: torch.Tensor | None,
    tokentype_ids: torch.Tensor | None, tp: Collectives,
) -> torch.Tensor:
    """`off_sums` where the embedding is."""
    if position_ids is None:
        position_ids = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    total = tp.look_up(embedding.word_embeddings.weight, ids)
    off, parts = torch.zeros_like(total), []
    if embedding.add_position_embedding:
        parts.append(embedding.position_embeddings(position_ids))
    if tokentype_ids is not None:
        parts.append(embedding.tokentype_embeddings(tokentype_ids))
    for part in parts:
        s = total + part
        b = s - total
        off = off + ((total - (s - b)) + (part - b)).abs()
        total = s
    config = embedding.config
    if getattr(config, "use_mup", False) and config.mup_embedding_mult != 1.0:
        factor = abs(config.mup_embedding_mult)
        off = off * factor + UNIT * (total * factor).abs() + TINY
    return (off * (1 + 2.0**-40)).detach()


def _check(embedding: nn.Module, tp: Collectives) -> None:
    """Refuses what is not Megatron's own embedding, as it is."""
    hooks.check_all(embedding, "embedding")
    refusals.check_methods(embedding, "embedding", LanguageModelEmbedding)
    refusals.check_config(embedding, "embedding")
    words = embedding.word_embeddings
    refusals.check_methods(words, "embedding.word_embeddings", VocabParallelEmbedding)
    tables = {"tokentype_embeddings": embedding.tokentype_embeddings}
    if embedding.add_position_embedding:
        tables["position_embeddings"] = embedding.position_embeddings
    for name, table in tables.items():
        if table is not None:
            refusals.check_table(table, f"embedding.{name}")
    scattered = getattr(embedding, "scatter_to_sequence_parallel", True)
    if is_sequence_parallel(embedding.config, tp) and not scattered:
        raise refusals.refusal(
            embedding, "embedding", "scatter_embedding_sequence_parallel=False is not supported "
            "with sequence_parallel: every rank's layers take the whole sequence for their part"
        )


def _compare(
    embedding: nn.Module, ids: torch.Tensor, position_ids: torch.Tensor,
    tokentype_ids: torch.Tensor | None, hidden: torch.Tensor, tp: Collectives,
) -> None:
    """Raises on every rank if the model's own embedding gives something else.

    Tables of half precision are compared as float32, so that rounding hides nothing.
    """
    scattered = is_sequence_parallel(embedding.config, tp)
    if scattered and ids.shape[1] % tp.size:
        raise UserError(
            f"sequence_parallel: {tp.size} ranks cannot share a sequence of {ids.shape[1]}, so the "
            "model itself cannot run on it: pad it, or switch sequence_parallel off"
        )
    modes = dict.fromkeys(embedding.modules(), False)
    half = any(p.dtype in HALF for p in embedding.parameters())
    with widened(embedding), torch.no_grad():
        if half:
            hidden = _hidden(embedding, ids, position_ids, tokentype_ids, tp)
        with undisturbed(embedding, modes), agreed_collectives(tp.group):
            try:
                live = embedding(ids, position_ids, tokentype_ids)
            except (SPMDError, UserError):
                raise
            except Exception as error:
                raise LiveModelError(
                    f"the model's own embedding raises {type(error).__name__}: {error}"
                ) from error
        ours = hidden.detach()
        if scattered:
            ours = ours.chunk(tp.size, 1)[tp.rank]
        live = live.transpose(0, 1)
        share = max(spmd.gather_objects(difference(live, ours), tp.group))
        if share > ROUNDING * torch.finfo(ours.dtype).eps:
            raise LiveModelError(
                f"embedding: the model itself computes {values(live, ours, 'its tables')}: see "
                "what changes its output (hooks, replaced methods, a patched class)"
            )
