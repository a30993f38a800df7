#!/usr/bin/env bash
# onnx 1.23.2 with onnxruntime 1.32.0 (PyPI), Python 3.11, CPU: onnx's own ReferenceEvaluator computes
# other values than the standard's text for three operators; onnxruntime follows the text.
#
# - Softmax (LogSoftmax and Hardmax, too) of operator sets below 13: the standard makes the input a
#   matrix at the axis (1 by default) and normalises its rows. The evaluator normalises along the one
#   axis, as of set 13.
# - BatchNormalization of sets 9 to 13, one output: the standard's inference, with the mean and the
#   variance that are given. The evaluator mixes a tenth of its input's own (1 - momentum) into them.
# - LpNormalization with p = 1: the evaluator divides by the sum of x, not of |x|.
#
# No warning is printed. Who folds constants with the evaluator, or takes it for the truth in a
# test, gets another network.
#
# Seen: first number of the result by the evaluator and by onnxruntime
#   Softmax, set 12                  0.5000 0.1667
#   Softmax, set 13                  0.3333 0.3333
#   BatchNormalization, set 13       0.8393 0.8944
#   BatchNormalization, set 14       0.8944 0.8944
#   LpNormalization, p = 1           -1.0000 0.3333
#   LpNormalization, p = 2           0.4472 0.4472
#
# Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator


def both(op, opset, *arrays, **attributes):
    names = [f"i{n}" for n in range(len(arrays))]
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], **attributes)], "one",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape)
         for n, a in zip(names, arrays)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, arrays[0].shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    feeds = dict(zip(names, arrays))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [float(np.ravel(run(None, feeds)[0])[0])
            for run in (ReferenceEvaluator(model).run, session.run)]


zeros = np.zeros((1, 2, 3), np.float32)
four, none = np.float32([4]), np.float32([0])
two = np.float32([[2]])
one = np.float32([1])
for name, pair in [
    ("Softmax, set 12", both("Softmax", 12, zeros, axis=1)),
    ("Softmax, set 13", both("Softmax", 13, zeros, axis=2)),
    ("BatchNormalization, set 13",
     both("BatchNormalization", 13, two, one, none, none, four, epsilon=1.0)),
    ("BatchNormalization, set 14",
     both("BatchNormalization", 14, two, one, none, none, four, epsilon=1.0)),
    ("LpNormalization, p = 1",
     both("LpNormalization", 13, np.float32([[1, -2]]), p=1, axis=1)),
    ("LpNormalization, p = 2",
     both("LpNormalization", 13, np.float32([[1, -2]]), p=2, axis=1)),
]:
    print(f"  {name:<33}{pair[0]:.4f} {pair[1]:.4f}")
PYTHON
cat "$folder/seen"
diff <(sed -n 's/^#   \(\(Softmax\|Batch\|Lp\).*\)$/  \1/p' "$0") "$folder/seen"
