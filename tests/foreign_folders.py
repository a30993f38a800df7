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


_HYBRID = "megatron.bridge.models.hybrid.hybrid_provider."
HYBRID_PROVIDER = dict(
    _target_=f"{_HYBRID}HybridModelProvider", hybrid_attention_ratio=0.0, hybrid_mlp_ratio=0.0,
    hybrid_override_pattern=None, hybrid_layer_pattern="**--", mtp_num_layers=None,
    hybrid_stack_spec={"_target_": f"{_HYBRID}get_default_hybrid_stack_spec", "_call_": False},
    mtp_hybrid_override_pattern=None, keep_mtp_spec_in_bf16=False, mamba_chunk_size=128,
    num_layers=4,
)
_OF_GPT = (
    "rope_scaling", "rope_scaling_factor", "rotary_scaling_factor", "transformer_layer_spec",
    "use_transformer_engine_full_layer_spec", "scatter_embedding_sequence_parallel",
    "dense_grouped_gemm", "use_arbitrary_attention_mask", "mtp_enabled",
)


def hybrid_provider(**changes):
    """The section `model` for the checkpoint "hybrid" of `checkpoints.JOBS`."""
    fields = {name: value for name, value in provider("stacked").items() if name not in _OF_GPT}
    return {**fields, **HYBRID_PROVIDER, **changes}


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


def nemo(out, name, model=None, **settings):
    """A checkpoint of `checkpoints.JOBS` as NeMo 2.0 leaves it; its logits."""
    folder, expected = checkpoints.written()
    shutil.copytree(folder / name / DATA, out / "weights")
    without_arguments(out / "weights")
    checkpoints.rewrite_metadata(out / "weights", lambda m: prefix_keys(m, "module."))
    (out / "context").mkdir()
    kind = "base.GPT" if name == "stacked" else "llama.Llama"
    content = nemo_context(kind, provider(name), **settings) | (model or {})
    (out / "context" / "model.yaml").write_text(yaml.safe_dump(content))
    (out / "context" / "io.json").write_text("{")  # is not read
    return expected[name]


def nemo_context(kind, provider, **settings):
    """`context/model.yaml` for fields as Megatron-Bridge has them.

    Args:
        kind: of the model: "base.GPT", "llama.Llama".
        provider: the fields.
        **settings: replace some of the config's.
    """
    config = {key: value for key, value in provider.items() if "rope_scaling" not in key}
    config |= {
        "_target_": f"nemo.collections.llm.gpt.model.{kind}Config", "vocab_size": None,
        "forward_step_fn": {"_target_": "nemo.collections.llm.gpt.model.base.gpt_forward_step",
                            "_call_": False},
        "transformer_layer_spec": {
            "_target_": "nemo.collections.llm.gpt.model.base.default_layer_spec", "_call_": False},
    }
    return {
        "_target_": f"nemo.collections.llm.gpt.model.{kind}Model", "config": config | settings,
        "optim": {"_target_": "nemo.lightning.pytorch.optim.megatron.MegatronOptimizerModule"},
        "tokenizer": {"_target_": "nemo.collections.common.tokenizers.x.AutoTokenizer"},
        "model_transform": None,
    }


def prefix_keys(metadata, prefix):
    """Renames the tensors of the model in a `.metadata`."""
    entries, places = metadata.state_dict_metadata, metadata.storage_data
    own = [key for key in entries if key.startswith(("embedding", "decoder", "output_layer"))]
    for key in own:
        entries[prefix + key] = entries.pop(key)
    for index in [index for index in places if index.fqn in own]:
        places[dataclasses.replace(index, fqn=prefix + index.fqn)] = places.pop(index)


def fsdp(out, state, args, prefix="model.module.", keep=("args",)):
    """A model as Megatron-FSDP's `fsdp_dtensor` has it, written by torch's own writer.

    Args:
        out: the checkpoint's directory.
        state: parameters of the whole model by name.
        args: Megatron's Namespace.
        prefix: of the keys.
        keep: which of args, checkpoint_version and iteration are written.
    """
    import torch.distributed.checkpoint as dcp

    directory = out / DATA
    directory.mkdir(parents=True)
    (out / checkpoints.TRACKER).write_text(str(checkpoints.ITERATION))
    stored = {}
    for name, tensor in state.items():
        key = prefix + checkpoints.fused_name(name)
        if args.swiglu and "linear_fc1.weight" in key:
            stored[f"{key}_w"], stored[f"{key}_v"] = (half.clone() for half in tensor.chunk(2))
        else:
            stored[key] = tensor
    said = {"args": args, "checkpoint_version": 3.0, "iteration": checkpoints.ITERATION}
    stored |= {key: value for key, value in said.items() if key in keep}
    dcp.save(stored, checkpoint_id=directory, no_dist=True)


def hybrid(out, state, args):
    """A GPT model as HybridModel's checkpoint has it (torch_dist): two layers for one."""
    import json

    renamed = {hybrid_name(name): tensor for name, tensor in state.items()}
    args.num_layers *= 2
    args.is_hybrid_model = True
    fsdp(out, renamed, args, prefix="", keep=())
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (out / DATA / "metadata.json").write_text(json.dumps(backend))
    common = {"args": args, "checkpoint_version": 3.0, "iteration": checkpoints.ITERATION}
    torch.save(common, out / DATA / "common.pt")


def hybrid_name(name, fused=True):
    """HybridModel's name for a parameter of a GPTModel, of which a layer is two."""
    local = name.replace("final_layernorm", "final_norm")
    name = checkpoints.fused_name(local) if fused else local
    if ".layers." in name:
        block, rest = name.split(".layers.")
        index, rest = rest.split(".", 1)
        second = rest.startswith(("mlp.", "pre_mlp_layernorm."))
        name = f"{block}.layers.{2 * int(index) + second}.{rest}"
    return name
