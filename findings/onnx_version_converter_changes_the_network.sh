#!/usr/bin/env bash
# onnx 1.23.2 with onnxruntime 1.32.0 (PyPI), Python 3.11, CPU: `onnx.version_converter` to a newer
# operator set keeps most operators' meaning (Softmax below set 13 among them) but not that of
# these; no error, no warning.
#
# - Hardmax below set 13 makes its input a matrix at the axis, as Softmax did then. Softmax gets the
#   nodes that do so; Hardmax is copied, and then chooses along one dimension.
# - Resize of set 10 places samples as set 11's "asymmetric" does, whose default is "half_pixel". The
#   attribute is not written, so that linear resizing reads between other samples.
# - GroupNormalization of sets 18 to 20 has a scale for each group, that of set 21 for each channel.
#   The numbers are repeated in a wrong shape: onnxruntime refuses the file.
#
# Who brings an old network to a newer set before verifying it verifies another one.
#
# Seen: set before and after, and the largest difference of outputs in onnxruntime
#   Softmax             12 -> 13   same
#   Hardmax             12 -> 13   differs by 1.0
#   Resize, nearest     10 -> 13   same
#   Resize, linear      10 -> 13   differs by 1.0
#   GroupNormalization  18 -> 21   converted, and refused by onnxruntime
#
# Exit status 0 while this holds, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    numpy==2.4.6 onnx==1.23.2 onnxruntime==1.32.0
"$folder/venv/bin/python" - 2>/dev/null > "$folder/seen" <<'PYTHON'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper, version_converter

onnxruntime.set_default_logger_severity(4)


def change(op, before, after, x, *constants, **attributes):
    names = [f"c{i}" for i in range(len(constants))]
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *names], ["y"], **attributes)], "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(c, n) for c, n in zip(constants, names)],
    )
    old = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", before)], ir_version=8)
    new = version_converter.convert_version(old, after)

    def run(model):
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {"x": x})[0]

    expected = run(old)
    try:
        found = run(new)
    except Exception:
        return "converted, and refused by onnxruntime"
    apart = float(np.abs(expected - found).max())
    return f"differs by {apart:.1f}" if apart > 1e-5 else "same"


x = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
image = np.float32([[[[0, 4], [0, 4]]]])
twice = np.float32([1, 1, 2, 2])
channels = np.arange(8, dtype=np.float32).reshape(1, 4, 2)
for name, before, after, found in [
    ("Softmax", 12, 13, change("Softmax", 12, 13, x, axis=1)),
    ("Hardmax", 12, 13, change("Hardmax", 12, 13, x, axis=1)),
    ("Resize, nearest", 10, 13, change("Resize", 10, 13, image, twice, mode="nearest")),
    ("Resize, linear", 10, 13, change("Resize", 10, 13, image, twice, mode="linear")),
    ("GroupNormalization", 18, 21,
     change("GroupNormalization", 18, 21, channels, np.float32([1, 2]), np.float32([0, 0]),
            num_groups=2)),
]:
    print(f"  {name:<20}{before} -> {after}   {found}")
PYTHON
cat "$folder/seen"
diff <(sed -n 's/^#   \(.* -> .*\)$/  \1/p' "$0") "$folder/seen"
