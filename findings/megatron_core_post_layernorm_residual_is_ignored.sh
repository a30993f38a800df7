#!/usr/bin/env bash
# megatron-core 0.16.1 (PyPI) with torch 2.13.0, one process, gloo, CPU:
# `TransformerConfig.apply_residual_connection_post_layernorm` is accepted and changes nothing.
#
# By its documentation the field takes the residual behind the layer norm, as the first BERT did. A
# GPTModel that is built with True gives, with the same weights, bitwise the logits of one that is
# built with False. Whoever rebuilds such a checkpoint by setting the flag gets another function,
# without a warning. (Other fields do count: with another layernorm_epsilon the logits move.)
#
# Seen:
#   largest difference between the logits: 0.0
#   with layernorm_epsilon 0.1: 0.173
#
# Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy packaging megatron-core==0.16.1
cat >"$folder/models.py" <<'PYTHON'
import contextlib
import sys
import types

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import random
from megatron.core.transformer.transformer_config import TransformerConfig

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel(1)
# megatron-core asks for CUDA's device and random state also where every tensor is on the CPU
torch.cuda.current_device = lambda: torch.device("cpu")
random._CUDA_RNG_STATE_TRACKER = types.SimpleNamespace(fork=contextlib.nullcontext)
random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


def logits(state=None, **flags):
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True,
        hidden_dropout=0.0, attention_dropout=0.0, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, bias_dropout_fusion=False, persist_layer_norm=False,
        **flags,
    )
    model = GPTModel(
        config=config, transformer_layer_spec=get_gpt_layer_local_spec(), vocab_size=32,
        max_sequence_length=8, position_embedding_type="learned_absolute", parallel_output=False,
    ).eval()
    if state is not None:
        model.load_state_dict(state)
    ids = torch.arange(8).unsqueeze(0)
    hidden = torch.ones(1, 1, 8, 8).triu(1).bool()
    with torch.no_grad():
        return model(ids, ids, hidden), model.state_dict()


plain, state = logits()
post, _ = logits(state, apply_residual_connection_post_layernorm=True)
other, _ = logits(state, layernorm_epsilon=0.1)
difference = (plain - post).abs().max().item()
print(f"largest difference between the logits: {difference}")
print(f"with layernorm_epsilon 0.1: {(plain - other).abs().max().item():.3g}")
ignored = difference == 0 and not torch.equal(plain, other)
sys.exit(0 if ignored else "changed: the residual connection depends on the flag")
PYTHON
"$folder/venv/bin/python" "$folder/models.py" 2>"$folder/errors" || {
    tail -n 5 "$folder/errors"
    exit 1
}
