"""The caller's own modules, called as their facades are: what the model itself computes.

Facades take hidden states batch first and return the part that a view asks for. Megatron's modules
take [S, B, h] (a rank's own positions with sequence_parallel) and return tuples. Here the live
modules are run as they are, hooks, config and all, and their outputs put in the facades' form.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from lirpa_megatron.adapters import hooks
from lirpa_megatron.adapters.margins import TokenMargins
from lirpa_megatron.adapters.registry import adapter_of
from lirpa_megatron.adapters.views import BLOCKS, DECODERS, LANGUAGE_MODELS, View
from lirpa_megatron.errors import UserError
from lirpa_megatron.parallel.collectives import Collectives

_MEGATRON = (*LANGUAGE_MODELS, *BLOCKS, TransformerLayer, SelfAttention, MLP)


def live(model: nn.Module, tp: Collectives) -> nn.Module:
    """A module with the facade's inputs and outputs that runs the live modules.

    A model without Megatron's transformer modules is returned as it is, without its wrappers; in
    others these are called through `_Live`, and what is around them is a shallow copy.

    Args:
        model: what is bounded.
        tp: its collectives.
    """
    model = hooks.unwrapped(model)
    if not any(_has_own_form(module) for module in model.modules()):
        return model
    return _around(model, tp, {})


def _has_own_form(module: nn.Module) -> bool:
    """Whether the module takes or returns something else than its facade."""
    adapter = adapter_of(module)
    own = adapter is not None and adapter.live is not None
    return own or isinstance(module, (View, *_MEGATRON))


def _around(module: nn.Module, tp: Collectives, done: dict[int, nn.Module]) -> nn.Module:
    if id(module) not in done:
        if _has_own_form(module):
            done[id(module)] = _Live(module, tp)
        else:
            copied = done[id(module)] = copy.copy(module)
            copied._modules = {
                name: None if child is None else _around(child, tp, done)
                for name, child in module._modules.items()
            }
    return done[id(module)]


class _Live(nn.Module):
    """One of Megatron's or a registered module, or a view: inputs and output as its facade's."""

    def __init__(self, module: nn.Module, tp: Collectives) -> None:
        super().__init__()
        self.run, self.tp = [module], tp  # in a list: not a submodule

    def forward(self, hidden: torch.Tensor, *inputs: Any) -> torch.Tensor:
        module = self.run[0]
        adapter = adapter_of(module)
        if adapter is not None and adapter.live is not None:
            return adapter.live(module, self.tp, hidden, *inputs)
        if isinstance(module, TokenMargins):
            return _margins(module, hidden, inputs, self.tp)
        if isinstance(module, View):
            return _view(module, hidden, *inputs, tp=self.tp)
        if isinstance(module, LANGUAGE_MODELS):
            return language_model(module, hidden, *inputs, tp=self.tp)
        return _part(module, hidden, *inputs, tp=self.tp)


# ----------------------------------------------------------------------- the models


def language_model(
    model: nn.Module, hidden: torch.Tensor, mask: torch.Tensor | None = None, *,
    tp: Collectives, start_layer: int = 0, head: str | None = None,
) -> torch.Tensor:
    """What the model's own forward makes of hidden states that enter a layer.

    A GPTModel or HybridModel takes them as `decoder_input`; a BertModel embeds token 0, and a hook
    on its encoder (for a later layer: on that) puts the hidden states there. The hook is gone
    afterwards.

    Args:
        model: live.
        hidden: [B, S, h], replicated.
        mask: [B or 1, 1, S, S], nonzero where masked, or None.
        tp: the model's collectives.
        start_layer: the layer (from 0) that `hidden` enters.
        head: of a BertModel.

    Returns:
        [B, S, V] or [B, S, V/p], or [B, 2] of the binary head, as the model returns it; of a
        pipeline stage before the last, its hidden states [B, S, h].
    """
    first = _entering(hidden, model.config, tp)
    mask = None if mask is None else mask != 0
    if not (model.pre_process and model.post_process):
        return _stage(model, first, mask, tp, start_layer, head)
    if isinstance(model, DECODERS):
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with _replaced(model.decoder, start_layer, first):
            return model(
                input_ids=ids, position_ids=ids, attention_mask=mask, decoder_input=first
            )
    length = model.max_sequence_length
    if hidden.shape[1] > length and model.position_embedding_type == "learned_absolute":
        raise UserError(f"the sequence has {hidden.shape[1]} tokens, the model {length} positions")
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    has_types = model.embedding.tokentype_embeddings is not None
    with _replaced(model.encoder, start_layer, first, {"attention_mask": mask}):
        logits, binary = model(
            ids, torch.ones_like(ids), tokentype_ids=ids if has_types else None
        )
    head = head or ("lm" if model.binary_head is None else "binary")
    return binary if head == "binary" else logits


def _stage(
    model: nn.Module, first: torch.Tensor, mask: torch.Tensor | None, tp: Collectives,
    start_layer: int, head: str | None,
) -> torch.Tensor:
    """`language_model` of a pipeline stage; `first` and `mask` as Megatron's forward takes them."""
    is_gpt = isinstance(model, DECODERS)
    block = model.decoder if is_gpt else model.encoder
    batch, length = first.shape[1], first.shape[0]
    if is_sequence_parallel(model.config, tp):
        length *= tp.size
    ids = torch.zeros(batch, length, dtype=torch.long, device=first.device)
    further = None if is_gpt else {"attention_mask": mask}
    before = block.input_tensor
    with _replaced(block, start_layer if model.pre_process else 0, first, further):
        try:
            if not model.pre_process:
                model.set_input_tensor(first)
            if is_gpt:
                given = first if model.pre_process else None
                y = model(
                    input_ids=ids, position_ids=ids, attention_mask=mask, decoder_input=given
                )
            else:
                types = getattr(getattr(model, "embedding", None), "tokentype_embeddings", None)
                y = model(ids, torch.ones_like(ids), tokentype_ids=None if types is None else ids)
        finally:
            block.set_input_tensor(before)
    if not model.post_process:
        y = tp.gather_results(y.contiguous()) if is_sequence_parallel(model.config, tp) else y
        return y.transpose(0, 1)
    if is_gpt:
        return y
    logits, binary = y
    head = head or ("lm" if model.binary_head is None else "binary")
    return binary if head == "binary" else logits


def _ends(model: nn.Module) -> bool:
    """Whether the model's output is made here: not on a pipeline stage before the last."""
    return getattr(model, "post_process", True)


def entering_layer(
    model: nn.Module, hidden: torch.Tensor, mask: torch.Tensor | None, layer: int,
    tp: Collectives,
) -> torch.Tensor:
    """What enters a layer of the live model, [S, B, h] or the rank's positions of it.

    Args:
        model, hidden, mask, tp: as for `language_model`.
        layer: from 1 on.
    """
    block = model.encoder if isinstance(model, BertModel) else model.decoder

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Reached(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    handle = block.layers[layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        language_model(model, hidden, mask, tp=tp)
    except _Reached as reached:
        return reached.args[0]
    finally:
        handle.remove()
    raise UserError(f"the model's forward never reaches layer {layer}")


class _Reached(BaseException):
    """Ends a forward at a layer."""


def _view(
    view: View, hidden: torch.Tensor, mask: torch.Tensor | None = None, *, tp: Collectives
) -> torch.Tensor:
    model = view.model
    if isinstance(model, BLOCKS):
        with _replaced(model, view.start_layer, _entering(hidden, model.config, tp)):
            y = _part(model, hidden, mask, tp=tp, whole=True)
    else:
        y = language_model(
            model, hidden, mask, tp=tp, start_layer=view.start_layer, head=view.head
        )
    return y if view.position is None or not _ends(model) else y[:, view.position]


def _margins(
    view: TokenMargins, hidden: torch.Tensor, inputs: tuple[torch.Tensor, ...], tp: Collectives
) -> torch.Tensor:
    """As `TokenMarginsFacade`, from the model's own logits."""
    targets = view.targets
    if targets is None:
        *inputs, targets = inputs
    logits = _view(view, hidden, *inputs, tp=tp)
    if not _ends(view.model):
        return logits
    if logits.shape[-1] < view.model.vocab_size:
        logits = tp.gather_features(logits)
    targets = targets.to(logits.device)
    if view.targets is None:
        own = logits.gather(1, targets.unsqueeze(1))
        rivals = logits
    else:
        own, rivals = logits[:, targets].unsqueeze(-1), logits.unsqueeze(1)
    if view.against is not None:
        rivals = rivals[..., view.against.to(logits.device)]
    y = own - rivals
    if view.against is None and not view.gather_output:
        y = y.chunk(tp.size, -1)[tp.rank]
    return y


def _part(
    module: Any, hidden: torch.Tensor, mask: torch.Tensor | None = None, rotary: Any = None,
    position: int | None = None, *, tp: Collectives, whole: bool = False,
) -> torch.Tensor:
    """A block, layer, attention or MLP on its own, with the bias that it leaves to its caller.

    With sequence_parallel the ranks' positions are put together.
    """
    x = _entering(hidden, module.config, tp)
    if isinstance(module, MLP):
        y = module(x)
    else:
        further = {}
        if rotary is not None:  # the angles, up to whole turns
            cos, sin = rotary
            further["rotary_pos_emb"] = torch.atan2(sin, cos)[:, None, None, :]
        if isinstance(module, SelfAttention):
            y = module(x, None if mask is None else mask != 0, **further)
        else:
            mask = None if mask is None else mask != 0
            y = module(hidden_states=x, attention_mask=mask, **further)
    y = y if isinstance(module, BLOCKS) else _without_tuple(y, module)
    if is_sequence_parallel(module.config, tp):
        y = tp.gather_results(y.contiguous())
    y = y.transpose(0, 1)
    return y if position is None or whole else y[:, [position]]


def _without_tuple(y: Any, module: nn.Module) -> torch.Tensor:
    if not isinstance(y, tuple):
        return y
    if isinstance(module, TransformerLayer) or y[1] is None:
        return y[0]
    return y[0] + y[1]


# ------------------------------------------------------------------------- the inputs


def is_sequence_parallel(config: Any, tp: Collectives) -> bool:
    """Whether each rank has its own positions of a sequence."""
    return tp.size > 1 and config.sequence_parallel


def _entering(hidden: torch.Tensor, config: Any, tp: Collectives) -> torch.Tensor:
    """[B, S, h] -> [S, B, h], or the rank's positions of it with sequence_parallel."""
    x = hidden.transpose(0, 1).contiguous()
    if not is_sequence_parallel(config, tp):
        return x
    if len(x) % tp.size:
        raise UserError(
            f"sequence_parallel: {tp.size} ranks cannot share a sequence of {len(x)}, so the model "
            "itself cannot run on it: pad it, or switch sequence_parallel off"
        )
    return x.chunk(tp.size)[tp.rank].contiguous()


@contextlib.contextmanager
def _replaced(
    block: Any, start_layer: int, hidden: torch.Tensor,
    further: dict[str, Any] | None = None,
) -> Iterator[None]:
    """While it runs, `hidden` enters a layer of the block, and `further` arguments the block."""

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def enter_block(module: nn.Module, args: Any, kwargs: Any) -> Any:
        args, kwargs = enter(module, args, kwargs)
        return args, {**kwargs, **further}

    handles = []
    if further is not None:
        handles.append(block.register_forward_pre_hook(enter_block, with_kwargs=True))
    if start_layer > 0:
        layer = block.layers[start_layer]
        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
