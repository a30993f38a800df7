"""A small network and properties that are decided by branch and bound alone."""

import numpy as np
from exact_minima import minimum
from onnx import numpy_helper
from small_networks import property_text, save, stack

LOW, HIGH = [-0.9, -0.8], [0.8, 0.9]


def write_complete(folder):
    """A network of two inputs, and properties whose thresholds lie close to the true minimum of its
    first output, or of the larger one of two."""
    proto = stack([2, 8, 6, 3], seed=3, dtype="float64")
    save(proto, folder / "net.onnx")
    values = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    layers = [(values[f"w{i}"], values[f"b{i}"]) for i in range(3)]
    (least,) = minimum(layers, np.array(LOW), np.array(HIGH), np.eye(3)[:1])
    formulas = {
        "holds": f"(<= Y_0 {least - 0.01:.9f})",
        "fails": f"(<= Y_0 {least + 0.01:.9f})",
        "both": f"(and (<= Y_0 {least - 0.01:.9f}) (<= Y_1 100.0))",
    }
    for name, formula in formulas.items():
        (folder / f"{name}.vnnlib").write_text(property_text(LOW, HIGH, 3, formula))
    (folder / "instances.csv").write_text("".join(f"net.onnx,{n}.vnnlib,60\n" for n in formulas))
    save(stack([2, 8, 3], activation="Tanh"), folder / "tanh.onnx")
    return folder
