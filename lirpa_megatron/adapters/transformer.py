"""Megatron's transformer modules, batch first, as modules that the host can trace.

Each facade holds the Parameters of its module under the same names and computes the same function
of hidden states [B, S, h] (Megatron's are [S, B, h]), replicated on every tensor-parallel rank.

Masks are [B or 1, 1, S, S], as numbers, nonzero where masked. A given mask is used as it is. None
masks what lies ahead where the attention is causal, and nothing elsewhere, as in Megatron. Rotary
tables are (cos, sin), each [S, r], or None.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import attention_mask_func
from torch import nn

from lirpa_megatron.adapters import refusals, traced_ops
from lirpa_megatron.adapters.activations import kind_of
from lirpa_megatron.adapters.linear_facades import (
    ColumnFacade,
    RowFacade,
    column_rows,
    gather_features,
    select_from_region,
)
from lirpa_megatron.adapters.norms import NormFacade
from lirpa_megatron.adapters.refusals import joined
from lirpa_megatron.adapters.registry import Copy, register
from lirpa_megatron.adapters.tracing import untraced
from lirpa_megatron.errors import UserError

Rotary = tuple[torch.Tensor, torch.Tensor]


@functools.lru_cache(maxsize=8)
def causal_mask(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[1, 1, S, S], 1 above the diagonal. One object for all layers: one constant of the graph."""
    with untraced():
        ones = torch.ones(length, length, dtype=dtype, device=device)
        return torch.triu(ones, diagonal=1)[None, None]


class MLPFacade(nn.Module):
    """MLP: hidden [B, S, h] -> [B, S, h], with the bias of fc2 (Megatron leaves it to the caller).

    Megatron's fused GELU (`bias_activation_fusion`) is the tanh approximation with its constant
    rounded to eight digits; the exact one stands here, which makes a difference of about 1e-10.
    """

    def __init__(self, mlp: MLP, name: str, copy: Copy) -> None:
        super().__init__()
        refusals.check_methods(mlp, name, MLP)
        refusals.check_config(mlp, name)
        config = mlp.config
        self.kind = _activation_of(mlp, name)
        self.gated = config.gated_linear_unit
        self.offset = getattr(config, "glu_linear_offset", 0.0)
        self.linear_fc1 = child(mlp, "linear_fc1", name, copy, ColumnFacade)
        self.linear_fc2 = child(mlp, "linear_fc2", name, copy, RowFacade)
        if self.gated:  # each rank's fc1 is [gate; up]
            self.gate_rows, self.up_rows = torch.arange(self.linear_fc1.weight.shape[0]).chunk(2)
        self.train(mlp.training)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x = self.linear_fc1.normalized(hidden)
        if self.gated:
            gate, up = self.linear_fc1.selections(x, self.gate_rows, self.up_rows)
            gate = traced_ops.activation(gate, self.kind)
            x = traced_ops.product(gate, up + self.offset if self.offset else up)
        else:
            x = traced_ops.activation(self.linear_fc1.rows(x), self.kind)
        return self.linear_fc2.whole(x)


def _activation_of(mlp: MLP, name: str) -> str:
    function = mlp.config.activation_func if mlp.config.gated_linear_unit else mlp.activation_func
    if mlp.config.bias_activation_fusion:
        if function is F.gelu:
            return "gelu_tanh"
        if function is not F.silu or not mlp.config.gated_linear_unit:
            raise refusals.refusal(
                mlp, name,
                "bias_activation_fusion=True with an activation that Megatron does not fuse",
            )
    kind = kind_of(function)
    if kind is None:
        named = getattr(function, "__name__", repr(function))
        raise refusals.refusal(mlp, name, f"the activation function {named} is not supported")
    return kind


class SelfAttentionFacade(nn.Module):
    """SelfAttention: hidden [B, S, h] -> [B, S, h], or [B, 1, h] for the query at one position,
    with the bias of linear_proj (Megatron leaves it to the caller).

    This rank has n query heads and g key/value groups of d features. The rows of linear_qkv are
    packed per group [q_0 ... q_(n/g-1), k, v]; q [B, S, n d], k and v [B, S, g d] are taken as
    three selections of rows. With fewer groups than ranks a group's rows lie on several ranks: all
    of them are gathered, and each rank selects its heads and their group.
    """

    def __init__(self, attention: SelfAttention, name: str, copy: Copy) -> None:
        super().__init__()
        refusals.check_methods(attention, name, SelfAttention)
        refusals.check_config(attention, name)
        config, core = attention.config, attention.core_attention
        self.tp = tp = copy.tp
        self.head_dim = attention.hidden_size_per_attention_head
        self.scale = _softmax_scale(core, joined(name, "core_attention"), config, self.head_dim)
        self.causal = attention.attn_mask_type == AttnMaskType.causal
        self.mask_ignored = self.causal and _ignores_masks(core)
        self.rotary_interleaved = config.rotary_interleaved
        skips = getattr(config, "no_rope_freq", None)
        self.no_rope = bool(skips[attention.layer_number - 1]) if skips else False
        self.linear_qkv = child(attention, "linear_qkv", name, copy, ColumnFacade)
        self.q_layernorm = _optional_norm(attention, "q_layernorm", name, copy)
        self.k_layernorm = _optional_norm(attention, "k_layernorm", name, copy)
        self.linear_proj = child(attention, "linear_proj", name, copy, RowFacade)

        self.gathered = config.num_query_groups < tp.size
        heads, groups = config.num_attention_heads, config.num_query_groups
        # [groups, n/g + 2, d]: the row of every feature of every group that is at hand.
        of_group = heads // groups
        at_hand = groups if self.gathered else groups // tp.size
        rows = torch.arange(at_hand * (of_group + 2) * self.head_dim)
        rows = rows.view(at_hand, of_group + 2, self.head_dim)
        first, last = 0, of_group
        if self.gathered:
            sharing = tp.size // groups  # ranks that have the same group
            rows = rows[tp.rank // sharing].unsqueeze(0)
            first = (tp.rank % sharing) * (of_group // sharing)
            last = first + of_group // sharing
        self.q_rows = rows[:, first:last].flatten()
        self.k_rows, self.v_rows = rows[:, of_group].flatten(), rows[:, of_group + 1].flatten()
        self.heads = self.q_rows.numel() // self.head_dim
        self.groups = self.k_rows.numel() // self.head_dim
        self.train(attention.training)

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None = None,
        rotary: Rotary | None = None, position: int | None = None,
    ) -> torch.Tensor:
        if mask is not None and self.mask_ignored:
            raise UserError(
                "the attention's kernel (fused softmax in half precision, or TransformerEngine's) "
                "is causal and ignores any other mask: give no attention_mask, or build "
                "the model without masked_softmax_fusion"
            )
        query = None if position is None else position % int(hidden.shape[1])
        q, k, v = self._query_key_value(hidden, query)
        if self.q_layernorm is not None:
            q = self.q_layernorm(q, self.heads)
        if self.k_layernorm is not None and not self._norms_gathered_keys():
            k = self.k_layernorm(k, self.groups)
        if rotary is not None and not self.no_rope:
            own = rotary if query is None else tuple(x[query : query + 1] for x in rotary)
            q = traced_ops.rotary(q, *own, self.heads, self.rotary_interleaved)
            k = traced_ops.rotary(k, *rotary, self.groups, self.rotary_interleaved)
        if mask is None and self.causal:
            mask = causal_mask(int(hidden.shape[1]), hidden.dtype, hidden.device)
        s = traced_ops.scores(q, k, self.head_dim, self.scale)
        return self.linear_proj.whole(traced_ops.attend(s, v, mask, self.head_dim, query=query))

    def _norms_gathered_keys(self) -> bool:
        """Whether keys are normalised before ranks select theirs: in the graph of bounds.

        Ranks that share a group would each relax the norm for their own heads' part of A, which is
        not the relaxation for the sum. Run as a module, each rank has Megatron's own gradient.
        """
        return self.k_layernorm is not None and self.gathered and torch.jit.is_tracing()

    def _query_key_value(self, hidden: torch.Tensor, query: int | None) -> list[torch.Tensor]:
        def at_query(x: torch.Tensor) -> torch.Tensor:
            return x if query is None else traced_ops.select_position(x, query, keep=True)

        qkv = self.linear_qkv
        x, selections = qkv.normalized(hidden), (self.q_rows, self.k_rows, self.v_rows)
        if not self.gathered:
            if query is None or not torch.jit.is_tracing():
                q, k, v = qkv.selections(x, *selections)
                return [at_query(q), k, v]
            return [qkv.rows(at_query(x), self.q_rows), *qkv.selections(x, *selections[1:])]
        x = gather_features(column_rows(x, qkv.weight, qkv.bias, None, self.tp), self.tp)
        keys = x
        if self._norms_gathered_keys():
            keys = self.k_layernorm(x, x.shape[-1] // self.head_dim)
        q, k, v = (
            select_from_region(values, features, self.tp)
            for values, features in zip((x, keys, x), selections, strict=True)
        )
        return [at_query(q), k, v]


def _softmax_scale(core: nn.Module, name: str, config: object, head_dim: int) -> float:
    """What the scores are multiplied with in all; refuses what else the core attention does."""
    local = isinstance(core, DotProductAttention)
    if local:
        refusals.check_methods(core, name, DotProductAttention)
        softmax, inside = core.scale_mask_softmax, joined(name, "scale_mask_softmax")
        refusals.check_methods(softmax, inside, FusedScaleMaskSoftmax)
        if softmax.mask_func is not attention_mask_func:
            raise refusals.refusal(softmax, inside, "its mask_func is not Megatron's own")
        dropout = joined(name, "attention_dropout")
        refusals.check_methods(core.attention_dropout, dropout, nn.Dropout)
        window = getattr(softmax, "window_size", None)
        if window is not None:
            raise refusals.refusal(softmax, inside, f"window_size={window} is not supported")
        if getattr(core, "softmax_offset", None) is not None:
            raise refusals.refusal(core, name, "softmax_offset is not supported")
    elif type(core).__name__ != "TEDotProductAttention" or refusals.package(core) != "megatron":
        raise refusals.refusal(core, name, f"{type(core).__name__} is not supported")
    p = core.attention_dropout.p if local else config.attention_dropout
    refusals.check_dropout(core, name, attention_dropout=p)
    if local:
        # With apply_query_key_layer_scaling the two factors hold the layer number and its inverse.
        inner = softmax.scale
        return core.softmax_scale * (1.0 if inner is None else inner)
    given = getattr(config, "softmax_scale", None)
    return 1.0 / math.sqrt(head_dim) if given is None else given


def _ignores_masks(core: nn.Module) -> bool:
    """Whether a causal core attention looks at no mask that it is given."""
    if not isinstance(core, DotProductAttention):
        return True
    softmax = core.scale_mask_softmax
    return softmax.scaled_masked_softmax_fusion and softmax.input_in_float16


class TransformerLayerFacade(nn.Module):
    """TransformerLayer: hidden [B, S, h] -> hidden [B, S, h] (Megatron returns a context too).

    With a position, what it returns of that position alone, [B, 1, h]: nothing else of the layer's
    queries and of its MLP is computed, and so nothing else bounded.

    A layer of a hybrid model has one of the two parts alone: in place of the other, of its norm
    and of its residual are identities.
    """

    def __init__(self, layer: TransformerLayer, name: str, copy: Copy) -> None:
        super().__init__()
        refusals.check_methods(layer, name, TransformerLayer)
        refusals.check_config(layer, name)
        refusals.check_dropout(layer, name, hidden_dropout=layer.hidden_dropout)
        for part in ("cross_attention", "pre_cross_attn_layernorm"):
            if type(getattr(layer, part)) is not IdentityOp:
                why = "cross attention is not supported"
                raise refusals.refusal(layer, joined(name, part), why)
        self.input_layernorm = self.self_attention = self.pre_mlp_layernorm = self.mlp = None
        if _has_part(layer, name, "self_attention", "input_layernorm", "self_attn_bda"):
            self.input_layernorm = _optional_norm(layer, "input_layernorm", name, copy)
            self.self_attention = child(layer, "self_attention", name, copy, SelfAttentionFacade)
        if _has_part(layer, name, "mlp", "pre_mlp_layernorm", "mlp_bda"):
            self.pre_mlp_layernorm = _optional_norm(layer, "pre_mlp_layernorm", name, copy)
            self.mlp = child(layer, "mlp", name, copy, MLPFacade)
        self.train(layer.training)

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None = None,
        rotary: Rotary | None = None, position: int | None = None,
    ) -> torch.Tensor:
        x = hidden if self.input_layernorm is None else self.input_layernorm(hidden)
        if position is not None:
            hidden = traced_ops.select_position(hidden, position, keep=True)
        if self.self_attention is not None:
            hidden = hidden + self.self_attention(x, mask, rotary, position)
        if self.mlp is None:
            return hidden
        x = hidden if self.pre_mlp_layernorm is None else self.pre_mlp_layernorm(hidden)
        return hidden + self.mlp(x)


def _has_part(layer: TransformerLayer, name: str, part: str, norm: str, residual: str) -> bool:
    """Whether a layer has its attention or MLP; refuses a part of which half is there."""
    if type(getattr(layer, part)) is not IdentityOp:
        if getattr(layer, residual) is not get_bias_dropout_add:
            why = "only get_bias_dropout_add, a residual connection, is supported"
            raise refusals.refusal(layer, joined(name, residual), why)
        return True
    for other, kind in ((norm, IdentityOp), (residual, IdentityFuncOp)):
        if type(getattr(layer, other)) is not kind:
            why = f"the layer has no {part}, but it is not {kind.__name__}: not supported"
            raise refusals.refusal(layer, joined(name, other), why)
    return False


class TransformerBlockFacade(nn.Module):
    """TransformerBlock: hidden [B, S, h] -> [B, S, h], or [B, h] at one position.

    Args:
        block: all its layers stay, for the names' sake.
        name: of the block in its model.
        copy: gives facades of submodules.
        start_layer: the layer (from 0) that `hidden` enters.
        position: of the sequence, taken where the last layer with attention has read all of them;
            None keeps all.
    """

    block_class: type = TransformerBlock
    last_norm = "final_layernorm"

    def __init__(
        self, block: nn.Module, name: str, copy: Copy, start_layer: int = 0,
        position: int | None = None,
    ) -> None:
        super().__init__()
        refusals.check_methods(block, name, self.block_class)
        refusals.check_config(block, name)
        if not len(block.layers):
            raise refusals.refusal(
                block, name, "a pipeline stage without layers is not supported: give each stage one"
            )
        self.layers = nn.ModuleList(
            child(block.layers, str(i), joined(name, "layers"), copy, TransformerLayerFacade)
            for i in range(len(block.layers))
        )
        if not 0 <= start_layer < len(self.layers):
            raise UserError(f"there is no layer {start_layer}: the model has {len(self.layers)}")
        norm = None
        if self.has_last_norm(block):
            norm = _optional_norm(block, self.last_norm, name, copy)
        setattr(self, self.last_norm, norm)
        self.start_layer, self.position = start_layer, position
        self.train(block.training)

    @staticmethod
    def has_last_norm(block: nn.Module) -> bool:
        """Whether the norm at the end, if there is one, is applied."""
        return True

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor | None = None, rotary: Rotary | None = None
    ) -> torch.Tensor:
        layers, position = self.layers[self.start_layer :], self.position
        # Layers after the last attention look at each position for itself.
        reads = [index for index, layer in enumerate(layers) if layer.self_attention is not None]
        last = reads[-1] if reads else 0
        for index, layer in enumerate(layers):
            hidden = layer(hidden, mask, rotary, position if index == last else None)
        if position is not None:
            hidden = traced_ops.select_position(hidden, 0)
        norm = getattr(self, self.last_norm)
        return hidden if norm is None else norm(hidden)


def child(parent: nn.Module, attribute: str, name: str, copy: Copy, facade: type) -> nn.Module:
    """The facade of a submodule, which must be of the kind that the parent's forward counts on."""
    module = getattr(parent, attribute)
    full = joined(name, attribute)
    copied = copy(module, full)
    if not isinstance(copied, facade):
        raise refusals.refusal(module, full, f"{type(module).__name__} is not supported")
    return copied


def _optional_norm(parent: nn.Module, attribute: str, name: str, copy: Copy) -> nn.Module | None:
    """The facade of a norm; None where there is none (None or IdentityOp)."""
    module = getattr(parent, attribute, None)
    if module is None or type(module) in (IdentityOp, nn.Identity):
        return None
    return child(parent, attribute, name, copy, NormFacade)


register(TransformerBlock, TransformerBlockFacade)
register(TransformerLayer, TransformerLayerFacade)
register(SelfAttention, SelfAttentionFacade)
register(MLP, MLPFacade)
