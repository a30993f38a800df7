#!/usr/bin/env bash
# megatron-core 0.16.1 (PyPI) with torch 2.13.0, CPU: `bias_activation_fusion` is not only a matter
# of speed. With `activation_func=torch.nn.functional.gelu` (the exact, erf GELU) an MLP computes
# the tanh approximation as soon as the flag is on, and the same weights give other outputs.
#
# Whoever rebuilds a checkpoint's model must take the flag over with the weights: Megatron-LM writes
# `bias_gelu_fusion=True` by default, and the configuration still names the exact GELU.
#
# Seen (weights of deviation 1, inputs from -3 to 3):
#   fused against exact GELU 2.9e-03, fused against tanh GELU 1.9e-06
#
# Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy packaging megatron-core==0.16.1
cat >"$folder/gelu.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel(1)


def mlp(fused):
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, activation_func=F.gelu,
        bias_activation_fusion=fused, add_bias_linear=True, use_cpu_initialization=True,
        init_method_std=1.0,
    )
    return MLP(config, get_gpt_layer_local_spec().submodules.mlp.submodules)


x = torch.linspace(-3, 3, 80).view(10, 1, 8)
with torch.no_grad():
    plain, fused = mlp(False), mlp(True)
    same_weights = all(map(torch.equal, plain.parameters(), fused.parameters()))
    hidden = plain.linear_fc1(x)[0] + plain.linear_fc1.bias
    outputs = [model(x)[0] for model in (plain, fused)]
    tanh = plain.linear_fc2(F.gelu(hidden, approximate="tanh"))[0]
from_exact = (outputs[1] - outputs[0]).abs().max().item()
from_tanh = (outputs[1] - tanh).abs().max().item()
print(f"fused against exact GELU {from_exact:.1e}, fused against tanh GELU {from_tanh:.1e}")
seen = same_weights and from_exact > 1e-3 and from_tanh < 1e-5
sys.exit(0 if seen else "changed: the flag no longer chooses the function")
PYTHON
"$folder/venv/bin/python" "$folder/gelu.py" 2>"$folder/errors" || {
    tail -n 5 "$folder/errors"
    exit 1
}
