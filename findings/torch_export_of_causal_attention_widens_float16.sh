#!/usr/bin/env bash
# torch 2.13.0 with onnx 1.23.2 and onnxruntime 1.32.0 (PyPI), Python 3.11, CPU:
# `torch.onnx.export(..., dynamo=False)` of a float16 model writes `scaled_dot_product_attention`
# with is_causal=True as float32 arithmetic.
#
# The causal mask becomes a float32 constant, scores and values are cast to float32 for it, and
# nothing casts back: the file's output is float32 where the model's is float16. With a LayerNorm
# behind the attention, whose weights stay float16, the file is not valid, and onnxruntime refuses to
# load it. Without is_causal both files are float16 and agree with the model.
#
# Seen:
#   plain,  attention alone:    float16
#   plain,  then a LayerNorm:   float16
#   causal, attention alone:    float32
#   causal, then a LayerNorm:   refused, (LayerNormalization) bound to different types
#
# Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" - 2>"$folder/errors" <<'PYTHON' || { tail -n 5 "$folder/errors"; exit 1; }
import io
import sys

import onnxruntime
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, causal, after):
        super().__init__()
        self.causal, self.after = causal, after

    def forward(self, x):
        y = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=self.causal)
        return self.after(y)


def outcome(causal, after):
    model, x = Model(causal, after).half().eval(), torch.ones(1, 2, 3, 4).half()
    assert model(x).dtype == torch.float16
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, input_names=["x"], opset_version=17, dynamo=False)
    try:
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    except Exception as error:
        known = "(LayerNormalization) bound to different types"
        return f"refused, {known}" if known in str(error) else str(error)
    return str(session.run(None, {"x": x.numpy()})[0].dtype)


seen = []
for causal in (False, True):
    for name, after in (("attention alone", nn.Identity()), ("then a LayerNorm", nn.LayerNorm(4))):
        seen.append(outcome(causal, after))
        print(f"{'causal' if causal else 'plain'},".ljust(8) + f"{name}:".ljust(20) + seen[-1])
expected = [
    "float16", "float16", "float32", "refused, (LayerNormalization) bound to different types"
]
sys.exit(0 if seen == expected else "changed: causal attention is exported in another type")
PYTHON
