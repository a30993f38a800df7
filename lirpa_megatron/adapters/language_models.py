"""GPTModel and BertModel from their first hidden states on, batch first.

Token ids are not something to perturb: the input is the output of the embedding (`embeddings`), and
everything after it is here. Masks are as in `transformer`.
"""

from __future__ import annotations

import torch
from megatron.core.models.bert.bert_lm_head import BertLMHead
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.bert.pooler import Pooler
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import nn

from lirpa_megatron.adapters import refusals, traced_ops
from lirpa_megatron.adapters.activations import kind_of
from lirpa_megatron.adapters.linear_facades import ColumnFacade
from lirpa_megatron.adapters.refusals import joined
from lirpa_megatron.adapters.registry import Copy, register
from lirpa_megatron.adapters.tracing import untraced
from lirpa_megatron.adapters.transformer import Rotary, child
from lirpa_megatron.errors import UserError


class _LanguageModelFacade(nn.Module):
    """What GPTModel and BertModel have in common: the output layer and the rotary tables."""

    def __init__(self, model: nn.Module, name: str, copy: Copy) -> None:
        super().__init__()
        refusals.check_config(model, name)
        self.is_last = model.post_process
        # The last of several stages has a copy of the embedding's weight as its own.
        self.tied = model.share_embeddings_and_output_weights and model.pre_process
        if model.pre_process:
            self.embedding = copy(model.embedding, joined(name, "embedding"))
        if self.is_last:
            self.output_layer = child(model, "output_layer", name, copy, ColumnFacade)
        self.rotary_pos_emb = None
        if model.position_embedding_type == "rope":
            self.rotary_pos_emb = _checked_rotary(model, name, copy)
        elif model.position_embedding_type not in ("learned_absolute", "none"):
            raise refusals.refusal(
                model, name, f"position_embedding_type={model.position_embedding_type} is not "
                "supported"
            )

    def rotary(self, hidden: torch.Tensor) -> Rotary | None:
        """cos and sin, each [S, r], computed and cast as Megatron does it."""
        if self.rotary_pos_emb is None:
            return None
        length = int(hidden.shape[1])
        with untraced():
            angles = self.rotary_pos_emb(length)[:, 0, 0].to(hidden.device)
            return torch.cos(angles).to(hidden.dtype), torch.sin(angles).to(hidden.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., h] -> [..., V/p] (sharded), or [..., V] if the output layer gathers."""
        weight = self.embedding.word_embeddings.weight if self.tied else None
        return self.output_layer(hidden, weight=weight)[0]

    def output_weight_and_bias(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What makes the logits of `before_output`: this rank's [V/p, h], and [V/p] or None."""
        layer = self.output_layer
        weight = self.embedding.word_embeddings.weight if self.tied else layer.weight
        return weight, None if layer.skip_bias_add else layer.bias


def _checked_rotary(model: nn.Module, name: str, copy: Copy) -> nn.Module:
    rotary, name = model.rotary_pos_emb, joined(name, "rotary_pos_emb")
    refusals.check_methods(rotary, name, RotaryEmbedding)
    if getattr(model.config, "yarn_rotary_scaling_factor", None) is not None:
        raise refusals.refusal(rotary, name, "yarn scaling of rotary embeddings is not supported")
    return copy(rotary, name)


class GPTFacade(_LanguageModelFacade):
    """GPTModel: hidden [B, S, h] -> logits [B, S, V], [B, S, V/p] sharded with parallel_output.

    A pipeline stage before the last one: hidden [B, S, h] -> hidden [B, S, h].

    Args:
        model: its embedding and all layers stay, for the names' sake.
        name: of the model, "" if it is the whole.
        copy: gives facades of submodules.
        start_layer: the layer (from 0) that `hidden` enters; 0 takes the embedding's output.
        position: of the sequence where logits are wanted ([B, V] or [B, V/p]); None: everywhere.
    """

    model_class: type = GPTModel

    def __init__(
        self, model: nn.Module, name: str, copy: Copy, start_layer: int = 0,
        position: int | None = None,
    ) -> None:
        super().__init__(model, name, copy)
        refusals.check_methods(model, name, self.model_class)
        if getattr(model, "mtp_process", False):
            raise refusals.refusal(model, name, "multi-token prediction is not supported")
        mup = getattr(model.config, "use_mup", False)
        self.logits_factor = model.config.mup_output_mult if mup else 1.0
        if self.is_last and self.logits_factor != 1 and self.output_layer.bias is not None:
            raise refusals.refusal(
                self.output_layer, joined(name, "output_layer"), "muP with a bias of the logits is "
                "not supported"
            )
        self.window = getattr(model, "attention_window", None)
        self.decoder = copy(
            model.decoder, joined(name, "decoder"), start_layer=start_layer,
            position=position if self.is_last else None,
        )
        self.train(model.training)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.before_output(hidden, mask)
        return self.logits(hidden) if self.is_last else hidden

    def before_output(
        self, hidden: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What enters the output layer: [B, S, h], or [B, h] at one position.

        muP's factor of the logits is here, where it commutes with the output layer's product.

        Raises:
            UserError: an input longer than the window of a checkpoint whose model was built without
                it, which computes the same up to there.
        """
        if self.window is not None and int(hidden.shape[1]) > self.window:
            raise UserError(
                f"the input has {int(hidden.shape[1])} tokens, and the model's attention a window "
                f"of {self.window}: longer inputs are not supported"
            )
        hidden = self.decoder(hidden, mask, self.rotary(hidden))
        scaled = self.is_last and self.logits_factor != 1
        return hidden * self.logits_factor if scaled else hidden


class BertFacade(_LanguageModelFacade):
    """BertModel: hidden [B, S, h] -> what one of its heads returns.

    =========  ==========================================  ==========================
    head       output                                      sharded
    =========  ==========================================  ==========================
    'binary'   [B, 2], from the first token                no
    'lm'       [B, S, V] ([B, V] at one position)          [..., V/p], parallel_output
    =========  ==========================================  ==========================

    Args:
        model, name, copy, start_layer: as for `GPTFacade`.
        position: of the sequence, for the 'lm' head.
        head: by default 'binary' if the model has one, else 'lm'.
    """

    def __init__(
        self, model: BertModel, name: str, copy: Copy, start_layer: int = 0,
        position: int | None = None, head: str | None = None,
    ) -> None:
        super().__init__(model, name, copy)
        refusals.check_methods(model, name, BertModel)
        if model.return_embeddings:
            raise refusals.refusal(model, name, "return_embeddings=True is not supported")
        binary = self.is_last and model.binary_head is not None
        self.head = head or ("binary" if binary else "lm")
        if not self.is_last:
            position = None
        elif self.head == "binary":
            if not binary:
                raise UserError("the model has no binary head (add_binary_head=False)")
            if position is not None:
                raise UserError("the binary head looks at the first token: at_position needs 'lm'")
            position = 0
        self.encoder = copy(
            model.encoder, joined(name, "encoder"), start_layer=start_layer, position=position
        )
        if self.is_last:
            self.lm_head = BertLMHeadFacade(model.lm_head, joined(name, "lm_head"), copy)
        if binary:
            self.pooler = PoolerFacade(model.pooler, joined(name, "pooler"), copy)
            self.binary_head = copy(model.binary_head, joined(name, "binary_head"))
        self.train(model.training)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if not self.is_last:
            return self.encoder(hidden, mask, self.rotary(hidden))
        if self.head == "binary":
            hidden = self.encoder(hidden, mask, self.rotary(hidden))
            return self.binary_head(self.pooler(hidden))
        return self.logits(self.before_output(hidden, mask))

    def before_output(
        self, hidden: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What enters the output layer of the 'lm' head: [B, S, h], or [B, h] at one position."""
        hidden = self.encoder(hidden, mask, self.rotary(hidden))
        return self.lm_head(hidden) if self.is_last else hidden


class BertLMHeadFacade(nn.Module):
    """BertLMHead: hidden [..., h] -> [..., h]."""

    def __init__(self, head: BertLMHead, name: str, copy: Copy) -> None:
        super().__init__()
        refusals.check_methods(head, name, BertLMHead)
        self.kind = kind_of(head.gelu)
        if self.kind is None:
            raise refusals.refusal(head, name, "its activation function is not supported")
        self.dense = copy(head.dense, joined(name, "dense"))
        self.layer_norm = copy(head.layer_norm, joined(name, "layer_norm"))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer_norm(traced_ops.activation(self.dense(hidden), self.kind))


class PoolerFacade(nn.Module):
    """Pooler: the hidden state [B, h] of the first token -> [B, h]."""

    def __init__(self, pooler: Pooler, name: str, copy: Copy) -> None:
        super().__init__()
        refusals.check_methods(pooler, name, Pooler)
        self.dense = copy(pooler.dense, joined(name, "dense"))

    def forward(self, first: torch.Tensor) -> torch.Tensor:
        return traced_ops.activation(self.dense(first), "tanh")


register(GPTModel, GPTFacade)
register(BertModel, BertFacade)
