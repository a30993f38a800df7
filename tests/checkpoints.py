"""Checkpoints of small Megatron models, as Megatron-LM writes them, for tests.

Functions that all ranks run say so. The models are those of `transformers`.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import pickle
import shutil
import signal
import tempfile
from pathlib import Path

import forks
import torch
import transformers
from releases import WRITES_COMMON_ITEM

TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = 10


def arguments(**changes):
    """Megatron's Namespace for `transformers.gpt` (erf GELU), with values its parser writes."""
    from megatron.core.transformer.enums import AttnBackend

    values = dict(
        num_layers=transformers.LAYERS, hidden_size=transformers.HIDDEN,
        ffn_hidden_size=transformers.FFN, num_attention_heads=transformers.HEADS,
        group_query_attention=False, num_query_groups=1, kv_channels=4,
        max_position_embeddings=transformers.LENGTH, seq_length=transformers.LENGTH,
        position_embedding_type="learned_absolute", add_position_embedding=True,
        use_rotary_position_embeddings=False, rotary_percent=1.0, rotary_base=10000,
        rotary_interleaved=False, use_rope_scaling=False, rope_scaling_factor=8.0,
        normalization="LayerNorm", layernorm_epsilon=1e-5, layernorm_zero_centered_gamma=False,
        add_bias_linear=True, add_qkv_bias=True, qk_layernorm=False, swiglu=False,
        quick_geglu=False, squared_relu=False, bias_gelu_fusion=False, bias_swiglu_fusion=True,
        openai_gelu=False, onnx_safe=None, untie_embeddings_and_output_weights=False,
        vocab_size=transformers.VOCABULARY, padded_vocab_size=transformers.VOCABULARY,
        num_experts=None, multi_latent_attention=False, fp8=None, spec=None, bf16=False,
        params_dtype=torch.float32, attention_backend=AttnBackend.auto,
        exit_signal=signal.SIGTERM, transformer_impl="transformer_engine",
        tensor_model_parallel_size=2, pipeline_model_parallel_size=1, bert_binary_head=True,
        mtp_num_layers=None, is_hybrid_model=False, cp_comm_type=["p2p"],
    )
    return argparse.Namespace(**{**values, **changes})


LLAMA = dict(
    group_query_attention=True, num_query_groups=2, add_bias_linear=False, add_qkv_bias=False,
    swiglu=True, normalization="RMSNorm", layernorm_epsilon=1e-5, position_embedding_type="rope",
    untie_embeddings_and_output_weights=True,
)
MODELS = {
    "gpt": transformers.gpt, "llama": transformers.llama, "bert": transformers.bert,
    "hybrid": transformers.hybrid, "hybrid llama": transformers.hybrid_llama,
}


# name: (model, its settings as keyword arguments, the arguments that say the same)
CASES = {
    "gpt": ("gpt", {}, {}),
    "llama": ("llama", {}, LLAMA),
    "bert": ("bert", {}, {}),
    "bert without binary head": (
        "bert", dict(model=dict(num_tokentypes=0, add_binary_head=False)),
        dict(bert_binary_head=False),
    ),
    "tanh GELU": ("gpt", dict(bias_activation_fusion=True), dict(bias_gelu_fusion=True)),
    "one query group": ("llama", dict(num_query_groups=1), {**LLAMA, "num_query_groups": 1}),
    "qk norms": (
        "llama", dict(spec=dict(qk_layernorm=True), qk_layernorm=True),
        {**LLAMA, "qk_layernorm": True},
    ),
    "biases of QKV, interleaved half rotary": (
        "llama",
        dict(add_qkv_bias=True, rotary_interleaved=True,
             model=dict(rotary_percent=0.5, rotary_base=500)),
        {**LLAMA, "add_qkv_bias": True, "rotary_interleaved": True, "rotary_percent": 0.5,
         "rotary_base": 500},
    ),
    "wide heads, squared ReLU": (
        "gpt", dict(kv_channels=8, activation_func="squared_relu", layernorm_epsilon=1e-3),
        dict(kv_channels=8, squared_relu=True, layernorm_epsilon=1e-3),
    ),
    "untied, no positions": (
        "gpt",
        dict(model=dict(position_embedding_type="none",
                        share_embeddings_and_output_weights=False)),
        dict(position_embedding_type="none", untie_embeddings_and_output_weights=True),
    ),
    "vocabulary of 34": (
        "gpt", dict(model=dict(vocab_size=34)), dict(padded_vocab_size=34, vocab_size=32),
    ),
    "hybrid": (
        "hybrid", dict(pattern="**--"),
        dict(num_layers=4, hybrid_layer_pattern="**--", is_hybrid_model=True,
             hybrid_attention_ratio=0.0,
             spec=["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]),
    ),
    "hybrid llama": (
        "hybrid llama", dict(pattern="-*--**", spec=dict(qk_layernorm=True), qk_layernorm=True,
                             model=dict(rotary_base=500)),
        {**LLAMA, "num_layers": 6, "hybrid_override_pattern": "-*-|-**", "is_hybrid_model": True,
         "qk_layernorm": True, "rotary_base": 500,
         "spec": ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]},
    ),
    "scaled rotary": (
        "llama", dict(model=dict(rope_scaling=True)), {**LLAMA, "use_rope_scaling": True},
    ),
}


def model(case, dtype=torch.float64):
    """A case's model at this rank's tensor-parallel size (runs on a rank)."""
    from megatron.core.activations import squared_relu

    name, settings, _ = CASES[case]
    if settings.get("activation_func") == "squared_relu":
        settings = {**settings, "activation_func": squared_relu}
    return MODELS[name](dtype, **settings)


def logits(built):
    """All outputs of a model, as one flat tensor."""
    from megatron.core.models.bert.bert_model import BertModel

    ids, positions, padding, types = transformers.tokens()
    with torch.no_grad():
        if isinstance(built, BertModel):
            types = types if built.embedding.num_tokentypes else None
            words, binary = built(ids, padding, tokentype_ids=types)
            outputs = [words] + ([] if binary is None else [binary])
        else:
            outputs = [built(ids, positions, None)]
    return torch.cat([out.double().flatten() for out in outputs])


# ------------------------------------------------------------------------------- torch_dist


def save_case(case, out, dtype=torch.float64, metadata=None, common_item=False, **changes):
    """Writes a case's model with Megatron's dist_checkpointing (runs on every rank).

    Args:
        case: a key of CASES.
        out: the checkpoint's directory.
        dtype: of the weights.
        metadata: for `sharded_state_dict`, besides the group.
        common_item: without `common.pt`, as releases from 0.19 on write; otherwise with it, as
            older ones do.
        **changes: of the arguments.

    Returns:
        the logits that the stored numbers make in float64.
    """
    built = model(case, dtype)
    args = arguments(**{**CASES[case][2], **changes})
    save_model(built, out, args, metadata=metadata, common_item=common_item)
    return logits(built.double())


def save_model(built, out, args, iteration=ITERATION, metadata=None, common_item=False):
    """As Megatron-LM's save_checkpoint, without an optimizer (runs on every rank)."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    directory = Path(out) / f"iter_{iteration:07d}"
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
        (Path(out) / TRACKER).write_text(str(iteration))
    dist.barrier()
    common = {"args": args, "checkpoint_version": 3.0, "iteration": iteration}
    state = {
        **common,
        "model": built.sharded_state_dict(metadata={"dp_cp_group": group, **(metadata or {})}),
        "rng_state": ShardedObject("rng_state", [{"seed": 1}], (1, 1), (0, 0),
                                   replica_id=dist.get_rank()),
    }
    if common_item and not WRITES_COMMON_ITEM:
        state["common_state"] = ShardedObject("common_state", common, (1,), (0,),
                                              replica_id=dist.get_rank())
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(state, str(directory), strategy)
    dist.barrier()
    if dist.get_rank() == 0 and common_item != WRITES_COMMON_ITEM:
        if common_item:
            (directory / "common.pt").unlink()
        else:
            torch.save(common, directory / "common.pt")


def load_logits(checkpoint, dtype=None, rows=None, **options):
    """(logits of the loaded model, cut to `rows` of the vocabulary; its description) on a rank."""
    from lirpa_megatron.checkpoint.language_model import load_language_model
    from lirpa_megatron.parallel import runtime

    description, built = load_language_model(checkpoint, runtime.tp_group(), dtype, **options)
    assert not built.training and not any(p.requires_grad for p in built.parameters())
    assert not any(p.is_meta for p in [*built.parameters(), *built.buffers()])
    if rows is None:
        return logits(built), description
    ids, positions, _, _ = transformers.tokens()
    with torch.no_grad():
        found = built(ids, positions, None)
    return found[..., :rows].double().flatten(), description


def bounds(checkpoint):
    """CROWN bounds of the loaded model's last position (runs on a rank)."""
    from lirpa_megatron import BoundedModule, next_token_margins, perturb_tokens
    from lirpa_megatron.checkpoint.language_model import load_language_model
    from lirpa_megatron.parallel import runtime

    _, built = load_language_model(checkpoint, runtime.tp_group())
    ids = transformers.tokens(1)[0]
    inputs = (*perturb_tokens(built, ids, eps=1e-3), torch.tensor([3]))
    return BoundedModule(next_token_margins(built), inputs).compute_bounds(inputs)[0]


def refused(checkpoint, message, **options):
    """Asserts that a description and a model are refused, with one line that says so."""
    import pytest

    from lirpa_megatron.checkpoint.language_model import (
        load_language_model,
        read_model_description,
    )
    from lirpa_megatron.errors import UserError

    for function in (read_model_description, lambda c, **o: load_language_model(c, None, **o)):
        with pytest.raises(UserError, match=message) as caught:
            function(checkpoint, **options)
        assert "\n" not in str(caught.value)


def rewrite_metadata(directory, change):
    """Changes `.metadata` in place."""
    path = Path(directory) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


# ----------------------------------------------------------------------------------- legacy


def whole_state(case, dtype=torch.float64):
    """(parameters of the unsharded model, its logits); at tensor-parallel size 1."""
    built = model(case, dtype)
    return {name: p.detach().clone() for name, p in built.named_parameters()}, logits(built)


_COLUMN = ("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight", "linear_fc1.bias",
           "word_embeddings.weight", "output_layer.weight", "output_layer.bias")
_ROW = ("linear_proj.weight", "linear_fc2.weight")


def shard(name, tensor, rank, tp, gated):
    """What Megatron's rank holds of a whole tensor."""
    if name.endswith(_ROW):
        return tensor.chunk(tp, 1)[rank].clone()
    if not name.endswith(_COLUMN):
        return tensor.clone()
    halves = tensor.chunk(2) if gated and "linear_fc1" in name else (tensor,)
    return torch.cat([half.chunk(tp)[rank] for half in halves])


def fused_name(name):
    """TransformerEngine's name of a parameter of the local spec."""
    name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
    return name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")


def stage_of(name, stages, layers):
    """Pipeline stage, and name there, of a parameter."""
    if ".layers." in name:
        block, rest = name.split(".layers.")
        index, rest = rest.split(".", 1)
        each = layers // stages
        return int(index) // each, f"{block}.layers.{int(index) % each}.{rest}"
    return (0 if name.startswith("embedding.") else stages - 1), name


def save_legacy(state, out, args, tp=1, pp=1, fused=False, tied=True, change=None):
    """mp_rank_* files of a whole model, with the optimizer and random states beside it.

    Args:
        state: from `whole_state`.
        out: the checkpoint's directory.
        args: Megatron's Namespace.
        tp, pp: sizes to write for.
        fused: under TransformerEngine's names, with `_extra_state`.
        tied: with pp > 1, the last stage gets a copy of the word embeddings.
        change: (content of a file, tensor-parallel rank, stage) -> None, changes it.
    """
    import random

    import numpy as np

    directory = Path(out) / f"iter_{ITERATION:07d}"
    directory.mkdir(parents=True)
    (Path(out) / TRACKER).write_text(str(ITERATION))
    for stage in range(pp):
        for rank in range(tp):
            part = {}
            for name, tensor in state.items():
                where, local = stage_of(name, pp, args.num_layers)
                if where == stage:
                    local = fused_name(local) if fused else local
                    part[local] = shard(name, tensor, rank, tp, args.swiglu)
                if fused and where == stage and name.endswith("linear_fc1.weight"):
                    part[local.replace("weight", "_extra_state")] = None
            if pp > 1 and tied and stage == pp - 1:
                words = "embedding.word_embeddings.weight"
                part["output_layer.weight"] = shard(words, state[words], rank, tp, False)
            content = {
                "args": args, "checkpoint_version": 3.0, "iteration": ITERATION, "model": part,
                "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
                "opt_param_scheduler": {"max_lr": 1.0},
                "rng_state": [{
                    "random_rng_state": random.getstate(),
                    "np_rng_state": np.random.get_state(),
                    "torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {},
                }],
            }
            if change:
                change(content, rank, stage)
            folder = directory / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            folder.mkdir()
            torch.save(content, folder / "model_optim_rng.pt")


# name: (case, keyword arguments of `save_case`)
JOBS = {
    "stacked": ("gpt", dict(common_item=True)),
    "indexed": ("llama", dict(metadata={"singleton_local_shards": True})),
    "bert": ("bert", {}),
    "bfloat16": ("llama", dict(dtype=torch.bfloat16)),
    "hybrid": ("hybrid", {}),
    "hybrid llama": ("hybrid llama", {}),
}


@functools.cache
def written():
    """(folder of the checkpoints of JOBS, written at TP=2; name -> logits of the saved model)."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder, write_all(folder, JOBS, 2)


def write_all(out, jobs, size):
    """Writes cases with `size` processes; name in `out` -> expected logits.

    Processes of their own: Megatron's writer forks, which is not safe in those of a rank pool.

    Args:
        out: folder of the checkpoints.
        jobs: name -> (case, keyword arguments of `save_case`).
        size: tensor-parallel size.
    """
    done = forks.launch(size, _write_jobs, Path(out), jobs, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(Path(out) / f"expected{size}.pt", weights_only=True)


def _write_jobs(out, jobs):
    from lirpa_megatron.parallel import runtime

    with runtime.session():
        expected = {
            name: save_case(case, out / name, **options)
            for name, (case, options) in jobs.items()
        }
        if runtime.is_rank0():
            torch.save(expected, out / f"expected{runtime.tp_size()}.pt")
