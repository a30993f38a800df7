"""Margins of target tokens at one position of a language model, as one operator of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.bert.bert_model import BertModel
from torch import nn

from lirpa_megatron.adapters import hooks
from lirpa_megatron.adapters.linear_facades import gather_features
from lirpa_megatron.adapters.registry import Copy, register
from lirpa_megatron.adapters.views import LANGUAGE_MODELS, View, facade_of_part
from lirpa_megatron.errors import UserError
from lirpa_megatron.operators.functional import margins
from lirpa_megatron.parallel.collectives import Collectives


class TokenMargins(View):
    """logit[t] - logit[j] at one position, as a module: hidden [B, S, h], mask, targets -> margins.

    Args:
        model: a GPTModel, HybridModel or BertModel.
        targets: t, the same for all samples; None: they are the last input [B], one for each.
        against: j; None: the whole vocabulary.
        start_layer, position, head: as for `View`; the position is the last one by default, and
            the head of a BertModel 'lm'.
        gather_output: whether the margins over the vocabulary are put together on every rank.

    Raises:
        UserError: a model without a vocabulary at its end, or token ids out of it.
    """

    def __init__(
        self, model: nn.Module, targets: Sequence[int] | None = None,
        against: Sequence[int] | None = None, start_layer: int = 0, position: int | None = None,
        head: str | None = None, gather_output: bool = True,
    ) -> None:
        model = hooks.unwrapped(model)
        if not isinstance(model, LANGUAGE_MODELS) or head == "binary":
            kind = "the binary head" if head == "binary" else type(model).__name__
            raise UserError(
                "margins need a GPTModel, a HybridModel or the 'lm' head of a BertModel, not "
                f"{kind}"
            )
        head = "lm" if isinstance(model, BertModel) else None
        super().__init__(model, start_layer, -1 if position is None else position, head)
        self.targets = None if targets is None else _ids(model, targets, "the labels")
        self.against = None if against is None else _ids(model, against, "against")
        self.gather_output = gather_output
        if against is not None and not gather_output:
            raise UserError("with `against`, margins are gathered: leave gather_output at True")

    def forward(self, hidden: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        from lirpa_megatron.adapters.traceable import traceable

        return traceable(self)(hidden, *inputs)


def _ids(model: nn.Module, ids: Sequence[int], name: str) -> torch.Tensor:
    """The ids as a tensor, checked."""
    found, size = torch.as_tensor(ids), model.vocab_size
    if found.ndim != 1 or not len(found) or found.is_floating_point():
        raise UserError(f"{name}: give a list of one or more token ids")
    if not (0 <= int(found.min()) and int(found.max()) < size):
        raise UserError(
            f"{name}: token ids from {int(found.min())} to {int(found.max())}, but the vocabulary "
            f"has {size} entries"
        )
    return found.long()


class TokenMarginsFacade(nn.Module):
    """Holds the facade of the model, so that parameters keep their names.

    Output [B, V] (replicated; the rank's own [B, V/p] without gather_output), [B, m] against m
    tokens; [B, T, V] and [B, T, m] for T targets that are the same for all samples.
    """

    def __init__(self, view: TokenMargins, facade: Any, tp: Collectives) -> None:
        super().__init__()
        self.model, self.tp = facade, tp
        self.targets, self.against = view.targets, view.against
        self.gather_output = view.gather_output
        self.train(view.training)

    def forward(self, hidden: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        mask, targets = inputs, self.targets
        if targets is None:
            if not inputs or inputs[-1].ndim != 1 or len(inputs[-1]) != len(hidden):
                given = tuple(inputs[-1].shape) if inputs else "nothing"
                raise UserError(
                    "the last input must be the targets, "
                    f"one id for each of {len(hidden)} samples, but it is {given}"
                )
            *mask, targets = inputs
        x = self.model.before_output(hidden, *mask)
        if not self.model.is_last:
            return x
        weight, bias = self.model.output_weight_and_bias()
        shared = self.targets is not None
        return token_margins(
            x, weight, bias, targets, self.against, shared, self.tp, self.gather_output
        )


def token_margins(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
    against: torch.Tensor | None, shared: bool, tp: Collectives, gather_output: bool = True,
) -> torch.Tensor:
    """Margins of targets, from the rank's part of the output layer; see
    `operators.linear.vocabulary_margins`.

    Args:
        x: [B, h], replicated.
        weight: [V/p, h].
        bias: [V/p] or None.
        targets: [B], or [T] if `shared` by all samples.
        against: [m] or None.
        shared: whether targets are the same for all samples.
        tp: the output layer's collectives.
        gather_output: whether margins over the vocabulary are put together.

    Returns:
        [B, V or m], or [B, T, V or m], replicated; without gather_output over the vocabulary the
        rank's own [B, V/p] or [B, T, V/p].
    """
    tables = (weight,) if bias is None else (weight, bias)
    if torch.jit.is_tracing():
        ids = (targets,) if against is None else (targets, against)
        name = "VocabularyMargins" if against is None else "TokenMargins"
        y = _MarginsSymbol.apply(name, int(shared), len(tables) - 1, x, *tables, *ids)
        return gather_features(y, tp) if against is None and gather_output else y
    found = [tp.look_up(table, targets) for table in tables]
    if against is None:
        x, found = tp.copy_to(x), [tp.copy_to(rows) for rows in found]
    else:
        tables = [tp.look_up(table, against) for table in tables]
    y = margins(x, *(*found, None)[:2], F.linear(x, *tables), shared)
    return gather_features(y, tp) if against is None and gather_output else y


class _MarginsSymbol(torch.autograd.Function):
    """Inputs x, weight, the bias if there is one, targets, and `against` if there are such."""

    @staticmethod
    def symbolic(g: Any, name: str, shared: int, has_bias: int, x: Any, *inputs: Any) -> Any:
        out = g.op(
            f"lirpa_megatron::{name}", x, *inputs, shared_i=shared, has_bias_i=has_bias
        )
        if x.type().kind() != "TensorType" or x.type().sizes() is None:
            return out
        last = inputs[0 if name == "VocabularyMargins" else -1].type().sizes()[0]
        middle = [inputs[1 + has_bias].type().sizes()[0]] if shared else []
        return out.setType(x.type().with_sizes([x.type().sizes()[0], *middle, last]))

    @staticmethod
    def forward(
        ctx: Any, name: str, shared: int, has_bias: int, x: torch.Tensor, *inputs: torch.Tensor
    ) -> torch.Tensor:
        # Only the shape counts: the ranks' rows are not at hand while tracing.
        count = len(inputs[0 if name == "VocabularyMargins" else -1])
        y = x.sum(-1, keepdim=True).expand(-1, count)
        return (y.unsqueeze(1).expand(-1, len(inputs[1 + has_bias]), -1) if shared else y).clone()


def _facade(view: TokenMargins, name: str, copy: Copy) -> TokenMarginsFacade:
    return TokenMarginsFacade(view, facade_of_part(view, name, copy), copy.tp)


register(TokenMargins, _facade)
