"""What a checkpoint's model is, as plain data: architecture, full shapes, and how it was stored."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lirpa_megatron.errors import UserError

HYBRID = "Hybrid"
"""The kind of megatron-core's HybridModel."""


@dataclass(frozen=True)
class ParameterDescription:
    """A parameter of the whole (unsharded) model."""

    # full shape
    shape: tuple[int, ...]
    # the dimension that Megatron splits over the tensor-parallel ranks; None: replicated
    partition_dim: int | None = None
    # whether dimension 0 is [gate; up], of which every rank holds a part each
    gated: bool = False
    # whether dimension 0 is the vocabulary, which may be padded
    vocabulary: bool = False
    # whether it scales a norm (stored as weight - 1 when the gamma is zero-centred)
    norm_weight: bool = False


@dataclass(frozen=True)
class StoredForm:
    """How the checkpoint stores the weights."""

    # "torch_dist", "fsdp_dtensor", "torch" (mp_rank_* files) or "Hugging Face"
    format: str
    # "release", the iteration, or "none" (folders of Hugging Face and NeMo have none)
    iteration: str
    # torch's name without "torch.", for instance "bfloat16"
    dtype: str
    # sizes that it was written with; None: it does not say
    tensor_parallel: int | None
    pipeline_parallel: int | None
    # rows of the word embeddings, padding included
    vocabulary_rows: int
    # what says which model it is: "Megatron-LM's arguments", a model config, or the file's name
    described_by: str = "Megatron-LM's arguments"


@dataclass(frozen=True)
class ModelDescription:
    """A GPT, LLaMA-like or BERT model."""

    # "GPT", "BERT" or "Hybrid"
    kind: str
    # letters of a Hybrid's layers, `*` attention and `-` MLP; None: each layer of a GPT or BERT has
    # both
    layers: str | None
    num_layers: int
    hidden_size: int
    # of one of the two halves, if gated
    ffn_hidden_size: int
    num_attention_heads: int
    # groups of queries that share a key and a value (the number of heads without grouping)
    num_query_groups: int
    # size of a head
    kv_channels: int
    # tokens that are not padding; None: the checkpoint does not say
    vocab_size: int | None
    # rows of the word embeddings that are used, padding included, before `vocabulary_rows` of a TP
    padded_vocab_size: int
    max_position_embeddings: int
    # learned_absolute, rope or none
    position_embedding_type: str
    rotary_percent: float
    rotary_base: float
    rotary_interleaved: bool
    # LLaMA 3's scaling of low frequencies, and its factor
    rope_scaling: bool
    rope_scaling_factor: float
    # positions are divided by it; None: they are not
    seq_len_interpolation_factor: float | None
    # LayerNorm or RMSNorm
    normalization: str
    layernorm_epsilon: float
    # norms scale by 1 + weight; 1 is added to the weights when they are read
    zero_centered_gamma: bool
    # gelu, gelu_tanh (what Megatron's bias_gelu_fusion computes), silu, squared_relu, quick_gelu
    activation: str
    # activation(gate) * (up + glu_linear_offset)
    gated: bool
    glu_linear_offset: float
    # biases of all linear layers, of linear_qkv
    add_bias_linear: bool
    add_qkv_bias: bool
    # norms of queries and keys
    qk_layernorm: bool
    # factor of the attention scores; None: 1 / sqrt(kv_channels)
    softmax_scale: float | None
    # the output layer uses the word embeddings
    tied: bool
    # BERT only
    num_tokentypes: int
    binary_head: bool
    # positions that a query sees, its own too; inputs may be no longer. None: all before it
    attention_window: int | None
    # length of the training sequences; None: unknown
    seq_length: int | None
    stored: StoredForm

    @property
    def longest_input(self) -> int | None:
        """Most tokens of an input; None: any number."""
        limits = [self.attention_window]
        if self.position_embedding_type == "learned_absolute":
            limits.append(self.max_position_embeddings)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def block(self) -> str:
        """The name of the stack of layers in Megatron's model."""
        return "encoder" if self.kind == "BERT" else "decoder"

    @property
    def qkv_size(self) -> int:
        """Rows of linear_qkv: [q ... q, k, v] for each group."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def fc1_size(self) -> int:
        """Rows of linear_fc1: [gate; up] if gated."""
        return (2 if self.gated else 1) * self.ffn_hidden_size

    def vocabulary_rows(self, tensor_parallel: int) -> int:
        """Rows of the word embeddings at a TP size: `padded_vocab_size`, and zeros to divide it."""
        return math.ceil(self.padded_vocab_size / tensor_parallel) * tensor_parallel

    def misfit(self, tensor_parallel: int) -> str | None:
        """Why the model cannot be split over so many ranks; None if it can."""
        heads, groups = self.num_attention_heads, self.num_query_groups
        for what, number in (("num_attention_heads", heads), ("ffn_hidden_size",
                                                              self.ffn_hidden_size)):
            if number % tensor_parallel:
                return f"{what} {number} is not divisible by tensor-parallel size {tensor_parallel}"
        if groups % tensor_parallel and tensor_parallel % groups:
            return (
                f"num_query_groups {groups} and tensor-parallel size {tensor_parallel} do not "
                "divide each other"
            )
        return None

    def check_tensor_parallel(self, size: int) -> None:
        """Raises UserError if the model cannot be split over so many ranks."""
        why = self.misfit(size)
        if why:
            raise UserError(f"{why}: choose another number of processes")

    def parameters(self) -> dict[str, ParameterDescription]:
        """Every parameter of the whole model, under Megatron's names for the local layer spec."""
        h, words = self.hidden_size, self.padded_vocab_size
        described = {
            "embedding.word_embeddings.weight": ParameterDescription(
                (words, h), 0, vocabulary=True
            )
        }
        if self.position_embedding_type == "learned_absolute":
            described["embedding.position_embeddings.weight"] = ParameterDescription(
                (self.max_position_embeddings, h)
            )
        if self.num_tokentypes:
            described["embedding.tokentype_embeddings.weight"] = ParameterDescription(
                (self.num_tokentypes, h)
            )
        for i in range(self.num_layers):
            described |= self.layer_parameters(i)
        last = "final_norm" if self.kind == HYBRID else "final_layernorm"
        described |= self._norm(f"{self.block}.{last}", h)
        if self.kind == "BERT":
            described |= self._linear("lm_head.dense", h, h)
            described |= self._norm("lm_head.layer_norm", h)
            described["output_layer.bias"] = ParameterDescription((words,), 0, vocabulary=True)
        if not self.tied:
            described["output_layer.weight"] = ParameterDescription((words, h), 0, vocabulary=True)
        if self.binary_head:
            described |= self._linear("pooler.dense", h, h) | self._linear("binary_head", 2, h)
        return described

    def has_attention(self, layer: int) -> bool:
        """Whether a layer has attention."""
        return self.layers is None or self.layers[layer] == "*"

    def has_mlp(self, layer: int) -> bool:
        """Whether a layer has an MLP."""
        return self.layers is None or self.layers[layer] == "-"

    def layer_parameters(self, layer: int) -> dict[str, ParameterDescription]:
        """Those of `parameters` that are a layer's."""
        described: dict[str, ParameterDescription] = {}
        if self.has_attention(layer):
            described |= self._attention_parameters()
        if self.has_mlp(layer):
            described |= self._mlp_parameters()
        return {f"{self.block}.layers.{layer}.{name}": p for name, p in described.items()}

    def _attention_parameters(self) -> dict[str, ParameterDescription]:
        h, attention = self.hidden_size, self.num_attention_heads * self.kv_channels
        described = {
            "self_attention.linear_proj.weight": ParameterDescription((h, attention), 1),
            "self_attention.linear_qkv.weight": ParameterDescription((self.qkv_size, h), 0),
        }
        described |= self._norm("input_layernorm", h)
        if self.qk_layernorm:
            for name in ("q_layernorm", "k_layernorm"):
                described |= self._norm(f"self_attention.{name}", self.kv_channels)
        if self.add_bias_linear or self.add_qkv_bias:
            described["self_attention.linear_qkv.bias"] = ParameterDescription((self.qkv_size,), 0)
        if self.add_bias_linear:
            described["self_attention.linear_proj.bias"] = ParameterDescription((h,))
        return described

    def _mlp_parameters(self) -> dict[str, ParameterDescription]:
        h, ffn = self.hidden_size, self.ffn_hidden_size
        described = {
            "mlp.linear_fc1.weight": ParameterDescription((self.fc1_size, h), 0, self.gated),
            "mlp.linear_fc2.weight": ParameterDescription((h, ffn), 1),
        }
        described |= self._norm("pre_mlp_layernorm", h)
        if self.add_bias_linear:
            described["mlp.linear_fc1.bias"] = ParameterDescription((self.fc1_size,), 0, self.gated)
            described["mlp.linear_fc2.bias"] = ParameterDescription((h,))
        return described

    def _norm(self, name: str, size: int) -> dict[str, ParameterDescription]:
        described = {f"{name}.weight": ParameterDescription((size,), norm_weight=True)}
        if self.normalization == "LayerNorm":
            described[f"{name}.bias"] = ParameterDescription((size,))
        return described

    @staticmethod
    def _linear(name: str, rows: int, columns: int) -> dict[str, ParameterDescription]:
        """A layer that is replicated."""
        return {
            f"{name}.weight": ParameterDescription((rows, columns)),
            f"{name}.bias": ParameterDescription((rows,)),
        }
