"""Megatron's own model of a description, on the meta device: no weights yet.

The layers are those of Megatron's local spec, which need neither TransformerEngine nor apex; fused
kernels are off, except where fusion changes the function (the tanh approximation of GELU).
"""

from __future__ import annotations

import dataclasses
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from lirpa_megatron.checkpoint.description import HYBRID, ModelDescription
from lirpa_megatron.checkpoint.stage import Stage
from lirpa_megatron.compat.megatron_hybrid import (
    PATTERN,
    STACK_SPEC,
    HybridModel,
    HybridStack,
    HybridStackSubmodules,
)
from lirpa_megatron.errors import UserError

_ACTIVATIONS = {
    "gelu": F.gelu, "gelu_tanh": F.gelu, "silu": F.silu,
    "squared_relu": squared_relu, "quick_gelu": quick_gelu,
}


def build(
    description: ModelDescription, group: dist.ProcessGroup | None, dtype: torch.dtype,
    stage: Stage | None = None,
) -> GPTModel | HybridModel | BertModel:
    """This rank's part of the model, its parameters on the meta device.

    Args:
        description: what to build.
        group: the tensor-parallel group, Megatron's own (None: one rank).
        dtype: of the parameters.
        stage: the pipeline stage that this rank has; None: the whole model.

    Raises:
        UserError: the model cannot be split over the group, or Megatron refuses it.
    """
    size = 1 if group is None else group.size()
    _check_group(size)
    description.check_tensor_parallel(size)
    stage = stage or Stage(0, description.num_layers)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = _config(description, size, dtype, stage.layers)
            make = {"GPT": _gpt, "BERT": _bert, HYBRID: _hybrid}[description.kind]
            return make(description, config, size, stage).to(dtype).eval()
    except (ValueError, AssertionError, TypeError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"megatron-core does not build the checkpoint's model: {reason}") from None


def _check_group(size: int) -> None:
    if not parallel_state.model_parallel_is_initialized():
        raise UserError(
            "the process groups are not set up: call lirpa_megatron.parallel.runtime.initialize() "
            "before loading a model"
        )
    ours = parallel_state.get_tensor_model_parallel_world_size()
    if ours != size:
        raise UserError(
            f"the group given has {size} ranks, Megatron's tensor-parallel group has {ours}"
        )


def _config(
    d: ModelDescription, size: int, dtype: torch.dtype, layers: int
) -> TransformerConfig:
    """A stage's config is that of a model of its own layers: nothing in it depends on others."""
    settings = dict(
        num_layers=layers, hidden_size=d.hidden_size, ffn_hidden_size=d.ffn_hidden_size,
        num_attention_heads=d.num_attention_heads, num_query_groups=d.num_query_groups,
        kv_channels=d.kv_channels, normalization=d.normalization,
        layernorm_epsilon=d.layernorm_epsilon,
        layernorm_zero_centered_gamma=False,  # 1 is added to the weights instead
        add_bias_linear=d.add_bias_linear, add_qkv_bias=d.add_qkv_bias,
        activation_func=_ACTIVATIONS[d.activation], gated_linear_unit=d.gated,
        glu_linear_offset=d.glu_linear_offset, bias_activation_fusion=d.activation == "gelu_tanh",
        qk_layernorm=d.qk_layernorm, softmax_scale=d.softmax_scale,
        rotary_interleaved=d.rotary_interleaved,
        tensor_model_parallel_size=size, params_dtype=dtype, pipeline_dtype=dtype,
        # Which also sets the attributes of sharded parameters; on the meta device it costs nothing.
        use_cpu_initialization=True, perform_initialization=True,
        hidden_dropout=0.0, attention_dropout=0.0, attention_softmax_in_fp32=True,
        apply_query_key_layer_scaling=False, gradient_accumulation_fusion=False,
        masked_softmax_fusion=False, bias_dropout_fusion=False, apply_rope_fusion=False,
        persist_layer_norm=False, sequence_parallel=False,
    )
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    unknown = {name for name in settings if name not in known}
    needed = {"softmax_scale": d.softmax_scale is not None, "glu_linear_offset":
              d.glu_linear_offset != 0.0}
    for name in unknown:
        if needed.get(name, True):
            raise UserError(
                f"this release of megatron-core does not know {name}, which the checkpoint's model "
                "needs: install a newer one"
            )
    return TransformerConfig(**{k: v for k, v in settings.items() if k in known})


def _gpt(
    d: ModelDescription, config: TransformerConfig, size: int, stage: Stage
) -> GPTModel:
    spec = get_gpt_layer_local_spec(qk_layernorm=d.qk_layernorm, normalization=d.normalization)
    return GPTModel(
        config=config, transformer_layer_spec=spec, vocab_size=d.vocabulary_rows(size),
        max_sequence_length=d.max_position_embeddings, parallel_output=False,
        share_embeddings_and_output_weights=d.tied,
        position_embedding_type=d.position_embedding_type, rotary_percent=d.rotary_percent,
        rotary_base=d.rotary_base, rope_scaling=d.rope_scaling,
        rope_scaling_factor=d.rope_scaling_factor,
        seq_len_interpolation_factor=d.seq_len_interpolation_factor,
        pre_process=stage.is_first, post_process=stage.is_last,
    )


def _hybrid(
    d: ModelDescription, config: TransformerConfig, size: int, stage: Stage
) -> HybridModel:
    """The stack's last norm is made here: Megatron's stack asks for TransformerEngine's."""
    spec = get_gpt_layer_local_spec(qk_layernorm=d.qk_layernorm, normalization=d.normalization)
    parts = spec.submodules
    attention = ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(
        input_layernorm=parts.input_layernorm, self_attention=parts.self_attention,
        self_attn_bda=parts.self_attn_bda,
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    ))
    mlp = ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(
        pre_mlp_layernorm=parts.pre_mlp_layernorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    ))
    stack = ModuleSpec(
        module=HybridStack, params={"post_layer_norm": False},
        submodules=HybridStackSubmodules(attention_layer=attention, mlp_layer=mlp),
    )
    model = HybridModel(
        config=config, vocab_size=d.vocabulary_rows(size),
        max_sequence_length=d.max_position_embeddings, parallel_output=False,
        share_embeddings_and_output_weights=d.tied,
        position_embedding_type=d.position_embedding_type, rotary_percent=d.rotary_percent,
        rotary_base=d.rotary_base, seq_len_interpolation_factor=d.seq_len_interpolation_factor,
        pre_process=stage.is_first, post_process=stage.is_last,
        **{STACK_SPEC: stack, PATTERN: d.layers[stage.first : stage.end]},
    )
    if not stage.is_last:
        return model
    model.decoder.post_layer_norm = True
    model.decoder.final_norm = WrappedTorchNorm(
        config, config.hidden_size, eps=config.layernorm_epsilon
    )
    return model


def _bert(
    d: ModelDescription, config: TransformerConfig, size: int, stage: Stage
) -> BertModel:
    return BertModel(
        config=config, num_tokentypes=d.num_tokentypes,
        transformer_layer_spec=bert_layer_local_spec, vocab_size=d.vocabulary_rows(size),
        max_sequence_length=d.max_position_embeddings, parallel_output=False,
        share_embeddings_and_output_weights=d.tied, add_binary_head=d.binary_head,
        pre_process=stage.is_first, post_process=stage.is_last,
    )
