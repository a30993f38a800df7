"""Folders as Megatron-Bridge and NeMo 2.0 write them, made of checkpoints of megatron-core."""

import dataclasses
import enum
import shutil

import checkpoints
import torch
import transformers
import yaml

DATA = f"iter_{checkpoints.ITERATION:07d}"

PROVIDER = dict(
    fp16_lm_cross_entropy=False, parallel_output=True, share_embeddings_and_output_weights=True,
    make_vocab_size_divisible_by=128, position_embedding_type="learned_absolute",
    rotary_base=10000, rotary_percent=1.0, rope_scaling=False, rope_scaling_factor=1.0,
    rotary_scaling_factor=None, seq_len_interpolation_factor=None, seq_length=transformers.LENGTH,
    yarn_rotary_scaling_factor=None, yarn_mscale=None, scatter_embedding_sequence_parallel=True,
    tp_comm_overlap_cfg=None, use_transformer_engine_full_layer_spec=False,
    dense_grouped_gemm=False, hf_model_id=None, hf_model_revision=None,
    vocab_size=transformers.VOCABULARY, should_pad_vocab=False, mtp_enabled=False,
    restore_modelopt_state=False, use_arbitrary_attention_mask=None, generation_config=None,
    transformer_layer_spec={
        "_target_": "megatron.bridge.models.gpt_provider.default_layer_spec", "_call_": False,
    },
)
"""What a provider of Megatron-Bridge 0.6 has beside megatron-core's TransformerConfig."""

LLAMA_CONFIG = dict(
    num_query_groups=2, add_bias_linear=False, activation_func=torch.nn.functional.silu,
    gated_linear_unit=True, normalization="RMSNorm", layernorm_epsilon=1e-5,
)
LLAMA = dict(
    share_embeddings_and_output_weights=False, position_embedding_type="rope", rotary_base=1e4,
)
MODELS = {"stacked": ({}, {}), "indexed": (LLAMA_CONFIG, LLAMA)}


def provider(name, **changes):
    """The section `model` for a checkpoint of `checkpoints.JOBS`: every field, as it is dumped."""
    settings, own = MODELS[name]
    config = transformers.config(torch.float64, **settings)
    fields = {
        field.name: _dumped(getattr(config, field.name, None))
        for field in dataclasses.fields(config) if not field.name.startswith("_")
    }
    target = {"_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider"}
    return {**target, **fields, **PROVIDER, **own, **changes}


def _dumped(value):
    """As the representers of megatron's yaml_utils write it."""
    if isinstance(value, enum.Enum):
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        return {"_target_": name, "_call_": True, "_args_": [value.value], "_name_": value.name}
    if isinstance(value, torch.dtype):
        return {"_target_": str(value), "_call_": False}
    if callable(value):
        name = getattr(value, "__qualname__", "partial")
        return {"_target_": f"{value.__module__}.{name}", "_call_": False}
    return value


def bridge(out, name, model=None, **sections):
    """A checkpoint of `checkpoints.JOBS` as Megatron-Bridge 0.6 leaves it; its logits."""
    folder, expected = checkpoints.written()
    shutil.copytree(folder / name, out)
    without_arguments(out / DATA)
    (out / checkpoints.TRACKER).unlink()
    state = {
        "step": torch.tensor(checkpoints.ITERATION, dtype=torch.int64),
        "consumed_train_samples": torch.tensor(0), "do_train": torch.tensor(True),
        "floating_point_operations_so_far": torch.tensor(0.0, dtype=torch.float32),
    }
    torch.save(state, out / DATA / "train_state.pt")
    shutil.copy(out / DATA / "train_state.pt", out / "latest_train_state.pt")
    content = {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "model": provider(name) if model is None else model,
        "checkpoint": {"_target_": "megatron.bridge.training.config.CheckpointConfig",
                       "ckpt_format": "torch_dist"},
        "tokenizer": {"_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
                      "tokenizer_type": "HuggingFaceTokenizer"},
        "train": {"train_iters": 10}, "peft": None, **sections,
    }
    (out / DATA / "run_config.yaml").write_text(yaml.safe_dump(content))
    return expected[name]


def without_arguments(directory):
    """Takes Megatron-LM's arguments out of a checkpoint, which other writers do not put there."""
    common = {"iteration": checkpoints.ITERATION, "content_metadata": {"a": 1}}
    torch.save(common, directory / "common.pt")
