"""What a model makes of token ids before its first layer: the values that get perturbed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lirpa_megatron.adapters.traceable import collectives_of
from lirpa_megatron.errors import UserError


def embed(
    model: nn.Module,
    ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    tokentype_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The hidden states that enter the first layer, on every rank.

    Dropout is left out, and the sequence is whole also with sequence_parallel. Gradients flow to
    the embeddings' parameters.

    Args:
        model: a GPTModel or BertModel.
        ids: token ids [B, S].
        position_ids: [B, S]; by default 0, 1, ... in each sequence.
        tokentype_ids: [B, S], for a model with token types.

    Returns:
        [B, S, h].

    Raises:
        UserError: token ids outside of the vocabulary, or token types given to a model without
            them, or missing.
    """
    embedding: Any = model.embedding
    if (tokentype_ids is None) != (embedding.tokentype_embeddings is None):
        needs = "needs" if tokentype_ids is None else "has no embeddings for"
        raise UserError(f"the model {needs} tokentype_ids")
    hidden = collectives_of(model).look_up(embedding.word_embeddings.weight, ids)
    if embedding.add_position_embedding:
        if position_ids is None:
            position_ids = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        hidden = hidden + embedding.position_embeddings(position_ids)
    if tokentype_ids is not None:
        hidden = hidden + embedding.tokentype_embeddings(tokentype_ids)
    return hidden.float() if embedding.config.fp32_residual_connection else hidden
