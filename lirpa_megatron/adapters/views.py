"""Which function of a transformer is bounded: from which layer on, at which position, which head.

`BoundedModule(at_position(from_layer(model, 2), -1), hidden)` bounds the next-token logits of a
GPTModel as a function of the hidden states that enter layer 2.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import nn

from lirpa_megatron.adapters import hooks
from lirpa_megatron.adapters.refusals import joined
from lirpa_megatron.adapters.registry import Copy, register
from lirpa_megatron.compat.megatron_hybrid import HybridModel, HybridStack
from lirpa_megatron.errors import UserError

DECODERS = (GPTModel, HybridModel)
LANGUAGE_MODELS = (*DECODERS, BertModel)
BLOCKS = (TransformerBlock, HybridStack)


class View(nn.Module):
    """Part of a model's function, as a module: hidden [B, S, h], mask -> the part's output.

    Args:
        model: a GPTModel, HybridModel or BertModel, the block of one, or a wrapper (`hooks`); its
            parameters are `model.…` here.
        start_layer: the layer (from 0) that the hidden states enter; for layer 0 they are the
            embedding's output.
        position: where in the sequence the output is wanted (negative counts from the end); None
            wants it everywhere.
        head: of a BertModel, 'lm' or 'binary'; None takes 'binary' if there is one.

    Raises:
        UserError: a model of another kind, or a choice that it does not offer.
    """

    def __init__(
        self, model: nn.Module, start_layer: int = 0, position: int | None = None,
        head: str | None = None,
    ) -> None:
        super().__init__()
        model = hooks.unwrapped(model)
        if not isinstance(model, (*LANGUAGE_MODELS, *BLOCKS)):
            raise UserError(
                f"{type(model).__name__}: from_layer, at_position and bert_head take a GPTModel, "
                "a HybridModel, a BertModel or the block of one"
            )
        if head not in (None, "lm", "binary"):
            raise UserError(f"there is no head {head!r}: choose 'lm' or 'binary'")
        if head is not None and not isinstance(model, BertModel):
            raise UserError(f"bert_head: a {type(model).__name__} has no choice of heads")
        self.model = model
        self.start_layer, self.position, self.head = start_layer, position, head
        self.train(model.training)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        from lirpa_megatron.adapters.traceable import traceable

        return traceable(self)(hidden, mask)


def from_layer(model: nn.Module, layer: int) -> View:
    """The model as a function of the hidden states [B, S, h] that enter a layer (from 0)."""
    return _view(model, start_layer=layer)


def at_position(model: nn.Module, position: int) -> View:
    """The model's output at one position of the sequence: [B, V or V/p], or [B, h] for a block."""
    return _view(model, position=position)


def bert_head(model: nn.Module, head: str) -> View:
    """One head of a BertModel: 'lm' or 'binary'."""
    return _view(model, head=head)


def _view(model: nn.Module, **choice: Any) -> View:
    model = hooks.unwrapped(model)
    if not isinstance(model, View):
        return View(model, **choice)
    chosen = {name: getattr(model, name) for name in ("start_layer", "position", "head")}
    return View(model.model, **{**chosen, **choice})


class ViewFacade(nn.Module):
    """Holds the facade of the model, so that parameters keep their names."""

    def __init__(self, view: View, facade: nn.Module) -> None:
        super().__init__()
        self.model = facade
        self.train(view.training)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(*inputs)


def facade_of_part(view: View, name: str, copy: Copy) -> nn.Module:
    """The facade of the view's model, of the part that the view chooses."""
    enters = getattr(view.model, "pre_process", True)  # the first pipeline stage
    part = {"start_layer": view.start_layer if enters else 0, "position": view.position}
    if view.head is not None:
        part["head"] = view.head
    return copy(view.model, joined(name, "model"), **part)


register(View, lambda view, name, copy: ViewFacade(view, facade_of_part(view, name, copy)))
